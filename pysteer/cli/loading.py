"""Loading a model for a command."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pysteer.errors import SteeringError
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy
from pysteer.runtime.steered import SteeredLlama


def load_steered(model: str, pack: SteeringPack | Path | None, **arguments: Any) -> SteeredLlama:
    """A `SteeredLlama`, quiet, with llama.cpp's own load failures as a SteeringError.

    `n_threads` holds for prompts, too, for which llama-cpp-python takes all cores otherwise.
    """
    arguments.setdefault("n_threads_batch", arguments.get("n_threads"))
    try:
        return SteeredLlama(model, pack=pack, verbose=False, **arguments)
    except SteeringError:
        raise
    except ValueError as error:
        raise SteeringError(f"{model}: {error}; is it a GGUF model?") from None


def load_policy(path: Path, pack: SteeringPack | None) -> Policy:
    """The policy, held against the pack before the model is loaded, which may take long.

    Raises:
        SteeringError: there is no pack for it, or it does not fit.
    """
    if pack is None:
        raise SteeringError("--policy needs --pack: a pack for this model")
    policy = Policy.load(path)
    pack.check_policy(policy)
    return policy


def require(module: str, extra: str) -> None:
    """Raise SteeringError that names the extra to install if a module is missing."""
    if find_spec(module) is None:
        raise SteeringError(f"this needs {module}; run: pip install 'pysteer[{extra}]'")
