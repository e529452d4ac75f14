"""Ties to a version of llama-cpp-python: the tested versions, and the private names in use."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Final

import llama_cpp

from pysteer import _native
from pysteer.errors import HookError
from pysteer.llama import log

_log = logging.getLogger(__name__)

TESTED_LLAMA_CPP = ("0.3.36",)
"""Versions of llama-cpp-python that the test suite has passed with."""

_TESTED = ", ".join(TESTED_LLAMA_CPP)

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

`_requires_eval` is absent in some versions, and `HookedLlama` then answers for it.

pysteer also relies on two behaviours of `llama_cpp.Llama` that no test of names can check:

- `Llama.__init__` assigns the context parameters to `self.context_params` before it creates the
  context; `HookedLlama` installs the hook there.
- `Llama.generate` reuses the first `n_tokens` of `input_ids`, and evaluates through `self.eval`;
  `SteeredLlama` cuts `n_tokens` back to the tokens that may be reused.
"""


def untested_note() -> str:
    """Return a line about an installed llama-cpp-python that was never tested, or ""."""
    version = llama_cpp.__version__
    if version in TESTED_LLAMA_CPP:
        return ""
    return f"llama-cpp-python {version} is untested with this pysteer (tested: {_TESTED})"


_warn_once = cache(_log.warning)


def load_native() -> None:
    """Tie the native part to the llama.cpp that `llama_cpp` has loaded, and take over its log.

    The functions and structures of the loaded llama.cpp decide whether pysteer works with it, never
    a version number: an untested version is one warning in the log. Free after the first call.

    Raises:
        HookError: a function is missing, or the layout of a structure is unexpected.
    """
    if note := untested_note():
        _warn_once("%s; `pysteer doctor` checks that steering works", note)
    library = llama_cpp.llama_cpp._lib
    try:
        _native.load_abi(library._handle, str(Path(library._name).parent))
    except RuntimeError as error:
        raise HookError(
            f"llama-cpp-python {llama_cpp.__version__}: {error}; pysteer is tested with {_TESTED}"
        ) from None
    log.take_over()
