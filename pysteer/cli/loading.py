"""Checks before a command loads its model, and the loading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysteer.cli import console, options
from pysteer.distribution import install_command
from pysteer.errors import SteeringError
from pysteer.shipped import default_pack_path

if TYPE_CHECKING:
    from pysteer.pack.pack import SteeringPack
    from pysteer.pack.policy import Policy
    from pysteer.pack.resolved import ResolvedPolicy
    from pysteer.runtime.steered import SteeredLlama


@dataclass(frozen=True)
class Setup:
    """The model, the pack and the policy of a command, before the model is loaded.

    Attributes:
        model: path of the model.
        files: pack files; none without a pack.
        pack: the categories of all files, or None.
        policy: the policy of --policy, or None.
        resolved: the pack under the policy, or None.
    """

    model: str
    files: Sequence[Path]
    pack: SteeringPack | None
    policy: Policy | None
    resolved: ResolvedPolicy | None

    @property
    def decided(self) -> bool:
        """True if a policy or a router decides about requests without `steering`."""
        resolved = self.resolved
        if self.pack is None or resolved is None:
            return False
        stated = self.policy is not None or self.pack.policy is not None
        return stated or bool(resolved.default_steering)

    def headline(self, steering: str) -> str:
        """Return the line that a command begins with.

        Args:
            steering: the mode, such as "policy (auto)".
        """
        model = Path(self.model).stem
        if self.pack is None:
            return f"{model}, no pack: unsteered"
        names = " + ".join(file.stem for file in self.files)
        n = len(self.pack.categories)
        categories = f"{n} {'category' if n == 1 else 'categories'}"
        return f"{model}, pack {names} ({categories}), steering: {steering}"

    @property
    def policy_words(self) -> str:
        """The modes of the policy's categories, such as "policy (2 auto, 1 off)"."""
        if self.resolved is None:
            return "off"
        modes = Counter(self.resolved.settings(name).mode for name in self.resolved.pack.categories)
        if len(modes) == 1:
            return f"policy ({next(iter(modes))})"
        return f"policy ({', '.join(f'{n} {mode}' for mode, n in modes.items())})"

    def steering(self, steer: Sequence[str] | None) -> dict[str, Any]:
        """Return the `steering` of requests by --steer; without --steer the policy decides.

        Raises:
            SteeringError: --steer without a pack, or with a category of another pack.
        """
        if not steer:
            return {}
        asked = options.parse_steering(steer)
        if self.resolved is not None:
            self.resolved.requested(asked)
        elif asked is not None:
            raise SteeringError("--steer needs --pack: a pack for this model")
        return {"steering": asked}


def read_setup(
    model: Path | None, packs: Sequence[Path] | None, policy: Path | None = None
) -> Setup:
    """Return the setup of a command; without a model and a pack, the default model and its pack.

    Raises:
        SteeringError: a file is missing or of another kind, or --policy does not fit the packs.
    """
    from pysteer.pack.merge import read_packs
    from pysteer.pack.resolved import ResolvedPolicy

    files = packs or ([default_pack_path()] if model is None else [])
    pack = read_packs(files) if files else None
    read_policy = None if policy is None else load_policy(policy, pack)
    resolved = None if pack is None else ResolvedPolicy(pack, read_policy)
    return Setup(options.model_path(model), files, pack, read_policy, resolved)


def load_setup(setup: Setup, **arguments: Any) -> SteeredLlama:
    """Return a quiet `SteeredLlama` that reads prompts with `n_threads`, too.

    Raises:
        SteeringError: the file is not a GGUF model, or the pack is for another model.
    """
    from pysteer.runtime.steered import SteeredLlama

    arguments.setdefault("n_threads_batch", arguments.get("n_threads"))
    try:
        with console.waiting("loading the model"):
            return SteeredLlama(
                setup.model, pack=setup.pack, policy=setup.policy, verbose=False, **arguments
            )
    except SteeringError as error:
        if "llama_context" not in str(error):
            raise
        raise SteeringError(f"{error}; a smaller --context takes less memory") from None


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
