"""Arms: steerings under which the same prompts are answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pysteer.errors import SteeringError
from pysteer.evaluate.answers import Query
from pysteer.evaluate.report import STEERED, UNSTEERED
from pysteer.evaluate.steering import OWN_CATEGORY, ArmSteering, OwnCategory
from pysteer.pack.policy import CategoryPolicy, Policy
from pysteer.pack.resolved import AUTO, ResolvedPolicy
from pysteer.prompts import Prompt
from pysteer.runtime.arguments import INHERIT, Inherit


@dataclass(frozen=True)
class Arm:
    """A steering with a name and a factor.

    Attributes:
        name: in the report.
        steering: see `ArmSteering`.
        factor: multiplies every strength.
    """

    name: str
    steering: ArmSteering
    factor: float = 1.0

    @property
    def described(self) -> str:
        """The steering in words."""
        if self.steering is None:
            return "not steered"
        if isinstance(self.steering, Inherit):
            how = "the policy decides"
        elif isinstance(self.steering, OwnCategory):
            how = "each prompt's own category, forced"
        elif isinstance(self.steering, Mapping):
            how = ", ".join(f"{name}={value}" for name, value in self.steering.items())
        else:
            how = "all categories, gated"
        return how if self.factor == 1 else f"{how}; strengths times {self.factor:g}"


def main_arms(steering: ArmSteering, strengths: Sequence[float]) -> list[Arm]:
    """Return the unsteered and the steered arm, and other strengths in ascending order."""
    others = sorted(set(strengths) - {0.0, 1.0})
    return [
        Arm(UNSTEERED, None),
        Arm(STEERED, steering),
        *(Arm(f"{STEERED} x{factor:g}", steering, factor) for factor in others),
    ]


def default_steering(resolved: ResolvedPolicy) -> Inherit | OwnCategory:
    """Return the steering of the policy if it switches anything on, else `OWN_CATEGORY`."""
    return INHERIT if resolved.default_steering else OWN_CATEGORY


def asks_router(resolved: ResolvedPolicy, steering: ArmSteering) -> bool:
    """Return True if a steering asks the router for every category that can be gated."""
    if isinstance(steering, Inherit):
        return all(resolved.settings(name).mode == AUTO for name in resolved.gateable)
    return steering == AUTO


def check_steering(resolved: ResolvedPolicy, steering: ArmSteering) -> None:
    """Check a steering against a pack.

    Raises:
        SteeringError: the pack has no such category, or no router that knows a gated category.
    """
    if isinstance(steering, (Inherit, OwnCategory)):
        return
    if steering == AUTO and not resolved.gateable:
        raise SteeringError("--steer auto: this pack has no router; use own, or CATEGORY=STRENGTH")
    resolved.requested(steering)


def query(resolved: ResolvedPolicy, arm: Arm, prompt: Prompt, number: int) -> Query:
    """Return the request of an arm for a prompt.

    Args:
        resolved: pack and policy.
        arm: the arm.
        prompt: the prompt.
        number: among all prompts. Under `OWN_CATEGORY`, prompts of a category that the pack lacks
            take turns with all categories of the pack.
    """
    steering = arm.steering
    if steering is None:
        return Query(prompt.prompt)
    if isinstance(steering, OwnCategory):
        names = list(resolved.pack.categories)
        own = prompt.category if prompt.category in names else names[number % len(names)]
        steering = {own: resolved.settings(own).strength}
    if isinstance(steering, Mapping):
        steering = {
            name: value if isinstance(value, str) else value * arm.factor
            for name, value in steering.items()
        }
    return Query(prompt.prompt, steering, _scaled_policy(resolved, arm))


def _scaled_policy(resolved: ResolvedPolicy, arm: Arm) -> Policy | None:
    """Return a policy that multiplies every strength of the policy by the arm's factor."""
    steering = arm.steering
    forced = isinstance(steering, OwnCategory) or (
        isinstance(steering, Mapping) and AUTO not in steering.values()
    )
    if arm.factor == 1 or forced:
        return None
    return Policy(
        categories={
            name: CategoryPolicy(strength=resolved.settings(name).strength * arm.factor)
            for name in resolved.pack.categories
        }
    )
