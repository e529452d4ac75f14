"""Loading a model for a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pysteer.errors import SteeringError
from pysteer.pack import SteeringPack
from pysteer.runtime.steered import SteeredLlama


def load_steered(model: str, pack: SteeringPack | Path | None, **arguments: Any) -> SteeredLlama:
    """A `SteeredLlama`, quiet, with llama.cpp's own load failures as a SteeringError."""
    try:
        return SteeredLlama(model, pack=pack, verbose=False, **arguments)
    except SteeringError:
        raise
    except ValueError as error:
        raise SteeringError(f"{model}: {error}; is it a GGUF model?") from None
