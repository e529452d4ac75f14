"""Arms: the ways in which the same prompts are answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pysteer.evaluate.answers import Asked
from pysteer.evaluate.report import STEERED, UNSTEERED
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import CategoryPolicy, Policy
from pysteer.pack.resolved import AUTO, ResolvedPolicy, Steering
from pysteer.prompts import Prompt
from pysteer.runtime.steered import IN_FORCE, InForce


class Own:
    """Stands for: each prompt is steered by its own category, forced."""

    def __repr__(self) -> str:
        return "own"


OWN: Final = Own()


@dataclass(frozen=True)
class Arm:
    """One way of answering.

    Attributes:
        name: in the report.
        steering: as a request takes it; `IN_FORCE` leaves it to the policy; `OWN` forces each
            prompt's own category.
        factor: on every strength.
    """

    name: str
    steering: Steering | InForce | Own
    factor: float = 1.0

    @property
    def described(self) -> str:
        """How it is steered, in words."""
        if self.steering is None:
            return "not steered"
        if isinstance(self.steering, InForce):
            how = "the policy decides"
        elif isinstance(self.steering, Own):
            how = "each prompt's own category, forced"
        elif isinstance(self.steering, Mapping):
            how = ", ".join(f"{name}={value}" for name, value in self.steering.items())
        else:
            how = "all categories, gated"
        return how if self.factor == 1 else f"{how}; strengths times {self.factor:g}"


@dataclass(frozen=True)
class Steered:
    """A pack and what holds for it, from which arms become requests.

    Attributes:
        pack: the pack.
        policy: the pack's own policy under the caller's, merged.
    """

    pack: SteeringPack
    policy: Policy

    @classmethod
    def of(cls, pack: SteeringPack, policy: Policy | None) -> Steered:
        """A pack, and a policy that goes before its own."""
        base = pack.policy or Policy()
        return cls(pack, base if policy is None else base.merged(policy))

    @property
    def gated(self) -> list[str]:
        """The categories that the router can decide, by the policy's rules."""
        return list(ResolvedPolicy(self.pack, self.policy).gateable)

    def strength(self, category: str) -> float:
        """What the policy multiplies a category's directions by."""
        return self.policy.settings(category).strength

    def default(self) -> InForce | Own:
        """How prompts are steered where nobody says: by the policy, if that does anything."""
        modes = (self.policy.settings(name, self.gated).mode for name in self.pack.categories)
        return IN_FORCE if any(mode != "off" for mode in modes) else OWN

    def routes_all(self, steering: Steering | InForce | Own) -> bool:
        """Whether a request steered so asks the router for all categories that it can decide."""
        if isinstance(steering, InForce):
            return all(self.policy.settings(name).mode == AUTO for name in self.gated)
        return steering == AUTO

    def check(self, steering: Steering | InForce | Own) -> None:
        """Raise SteeringError if a request cannot be steered so."""
        if isinstance(steering, (InForce, Own)):
            return
        ResolvedPolicy(self.pack, self.policy).requested(steering)

    def asked(self, arm: Arm, prompts: Sequence[Prompt], start: int = 0) -> list[Asked]:
        """The requests of an arm.

        Args:
            arm: the arm.
            prompts: what to ask.
            start: the number of the first among all prompts of its kind. Under `OWN`, prompts of
                no category of the pack's take turns with all its categories.
        """
        return [self._one(arm, prompt, start + i) for i, prompt in enumerate(prompts)]

    def _one(self, arm: Arm, prompt: Prompt, number: int) -> Asked:
        steering = arm.steering
        if steering is None:
            return Asked(prompt.prompt)
        if isinstance(steering, Own):
            names = list(self.pack.categories)
            own = prompt.category if prompt.category in names else names[number % len(names)]
            steering = {own: self.strength(own)}
        if isinstance(steering, Mapping):
            steering = {
                name: value if isinstance(value, str) else value * arm.factor
                for name, value in steering.items()
            }
        return Asked(prompt.prompt, steering, self._factored(arm))

    def _factored(self, arm: Arm) -> Policy | None:
        """For what the policy sets the strength of."""
        steering = arm.steering
        forced = isinstance(steering, Own) or (
            isinstance(steering, Mapping) and AUTO not in steering.values()
        )
        if arm.factor == 1 or forced:
            return None
        return Policy(
            categories={
                name: CategoryPolicy(strength=self.strength(name) * arm.factor)
                for name in self.pack.categories
            }
        )


def main_arms(steering: Steering | InForce | Own, strengths: Sequence[float]) -> list[Arm]:
    """Unsteered, steered, and steered at other strengths, ascending."""
    others = sorted(set(strengths) - {0.0, 1.0})
    return [
        Arm(UNSTEERED, None),
        Arm(STEERED, steering),
        *(Arm(f"{STEERED} x{factor:g}", steering, factor) for factor in others),
    ]
