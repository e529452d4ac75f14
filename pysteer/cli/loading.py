"""Checks before a command loads its model, and the loading."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysteer.distribution import install_command
from pysteer.errors import SteeringError

if TYPE_CHECKING:
    from pysteer.pack.pack import SteeringPack
    from pysteer.pack.policy import Policy
    from pysteer.runtime.steered import SteeredLlama


def load_steered(model: str, pack: SteeringPack | Path | None, **arguments: Any) -> SteeredLlama:
    """Return a quiet `SteeredLlama` that reads prompts with `n_threads`, too.

    Raises:
        SteeringError: the file is not a GGUF model.
    """
    from pysteer.runtime.steered import SteeredLlama

    arguments.setdefault("n_threads_batch", arguments.get("n_threads"))
    return SteeredLlama(model, pack=pack, verbose=False, **arguments)


def load_policy(path: Path, pack: SteeringPack | None) -> Policy:
    """Return a policy that fits a pack.

    Raises:
        SteeringError: there is no pack, or the policy does not fit.
    """
    from pysteer.pack.policy import Policy

    if pack is None:
        raise SteeringError("--policy needs --pack: a pack for this model")
    policy = Policy.load(path)
    pack.check_policy(policy)
    return policy


def require(module: str, extra: str) -> None:
    """Raise SteeringError with the extra to install if a module is missing."""
    if find_spec(module) is None:
        raise SteeringError(f"this needs {module}; run: {install_command(extra)}")
