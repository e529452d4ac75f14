"""Ties to a version of llama-cpp-python: the tested versions, and the private names in use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import llama_cpp

from pysteer import _native
from pysteer.errors import HookError
from pysteer.llama import log

TESTED_LLAMA_CPP = ("0.3.36",)
"""Versions of llama-cpp-python that the test suite has passed with."""

UNTESTED_OVERRIDE = "PYSTEER_UNTESTED_LLAMA_CPP"
"""Environment variable: set to 1 to try another version."""

PRIVATE_NAMES: Final = {
    "_logger": "llama-cpp-python's log callback, the only one that is replaced",
    "_lib": "the loaded llama.cpp library, whose functions the native part looks up",
    "_grammar": "text of a LlamaGrammar, for llama_sampler_init_grammar",
    "_root": "root rule of a LlamaGrammar, for llama_sampler_init_grammar",
    "_chat_handlers": "chat handlers that Llama made of the model's own templates",
    "_sampler": "sampler of the generation under way, which another generation replaces",
    "_requires_eval": "set where the logits in the context are another generation's",
}
"""Every private name of llama_cpp that pysteer uses, with the reason.

pysteer also relies on two behaviours of `llama_cpp.Llama` that no test of names can check:

- `Llama.__init__` assigns the context parameters to `self.context_params` before it creates the
  context; `HookedLlama` installs the hook there.
- `Llama.generate` reuses the first `n_tokens` of `input_ids`, and evaluates through `self.eval`;
  `SteeredLlama` cuts `n_tokens` back to the tokens that may be reused.
"""


def load_native() -> None:
    """Tie the native part to the llama.cpp that `llama_cpp` has loaded, and take over its log.

    Free after the first call.

    Raises:
        HookError: the version is untested, a function is missing, or the layout of a structure is
            unexpected.
    """
    version = llama_cpp.__version__
    works = f"pysteer works with llama-cpp-python {', '.join(TESTED_LLAMA_CPP)}"
    if version not in TESTED_LLAMA_CPP and os.environ.get(UNTESTED_OVERRIDE) != "1":
        raise HookError(
            f"llama-cpp-python {version} is untested: {works}; "
            f"install that, or set {UNTESTED_OVERRIDE}=1 to try this one"
        )
    library = llama_cpp.llama_cpp._lib
    try:
        _native.load_abi(library._handle, str(Path(library._name).parent))
    except RuntimeError as error:
        raise HookError(f"llama-cpp-python {version}: {error}; {works}") from None
    log.take_over()
