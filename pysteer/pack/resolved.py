"""`ResolvedPolicy`: a pack under a policy, with every default in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from numbers import Real
from types import MappingProxyType
from typing import Final, TypeAlias

from pysteer.errors import SteeringError, quoted
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import CategorySettings, GateKind, Policy
from pysteer.pack.vector import finite

Steering: TypeAlias = "Mapping[str, float | str] | str | None"
"""Category to strength (forced) or "auto" (gated); "auto": all categories gated; None: off."""

AUTO: Final = "auto"


@dataclass(frozen=True)
class ResolvedPolicy:
    """A pack under a policy. Immutable.

    The *gate* of a category is open where the category's score has reached its threshold. A gated
    category acts where its *rule* holds: an expression over gates, by default its own gate alone.

    Args:
        pack: the pack.
        over: the operator's policy, laid over the pack's own (see `Policy.merged`); None: the
            pack's own alone.

    Attributes:
        pack: the pack.
        policy: the merged policy.

    Raises:
        SteeringError: the merged policy does not fit the pack; see `Policy.check`.

    Examples:
        >>> import numpy as np
        >>> from pysteer import Policy, SteeringPack, SteeringVector
        >>> from pysteer.pack.resolved import ResolvedPolicy
        >>> vector = SteeringVector({1: np.ones(8)})
        >>> pack = SteeringPack({"malware": vector, "hate": vector})
        >>> policy = Policy(categories={"hate": {"mode": "always", "strength": 0.5}})
        >>> resolved = ResolvedPolicy(pack, policy)
        >>> resolved.settings("malware").mode  # no router, so no category can be gated
        'off'
        >>> dict(resolved.default_steering)
        {'hate': 0.5}
        >>> resolved.requested({"hate": 0, "malware": 2})
        {'malware': 2.0}
    """

    pack: SteeringPack
    over: InitVar[Policy | None] = None
    policy: Policy = field(init=False)

    def __post_init__(self, over: Policy | None) -> None:
        own = self.pack.policy or Policy()
        self._put(own if over is None else self._laid_over(own, over))

    def _put(self, policy: Policy) -> None:
        object.__setattr__(self, "policy", policy)

    def _laid_over(self, policy: Policy, over: Policy) -> Policy:
        """Return a policy with another laid over it, checked against the pack."""
        router = self.pack.router
        merged = policy.merged(over, () if router is None else list(router.gates))
        self.pack.check_policy(merged)
        return merged

    def __reduce__(self) -> tuple[Callable[..., ResolvedPolicy], tuple[SteeringPack, Policy]]:
        return _resolved, (self.pack, self.policy)  # the read-only views cannot be pickled

    def merged(self, over: Policy | None) -> ResolvedPolicy:
        """Return the pack under this policy with another laid over it, as of one request.

        Raises:
            SteeringError: the merged policy contradicts itself or does not fit the pack.
        """
        if over is None:
            return self
        return _resolved(self.pack, self._laid_over(self.policy, over))

    def settings(self, category: str) -> CategorySettings:
        """Return the settings of a category with all defaults in place.

        The mode is decided: a category without one is "auto" if it can be gated, else "off".

        Raises:
            UnknownCategoryError: the pack has no such category.
        """
        _ = self.pack[category]
        return self._settings[category]

    @cached_property
    def _settings(self) -> Mapping[str, CategorySettings]:
        router = self.pack.router
        known = () if router is None else router.categories
        return {name: self.policy.settings(name, known) for name in self.pack.categories}

    @cached_property
    def gate(self) -> GateKind | None:
        """The kind of gate in force; None for a pack without a router."""
        router = self.pack.router
        return None if router is None else self.policy.gate_kind(list(router.gates))

    @cached_property
    def thresholds(self) -> Mapping[str, float]:
        """The threshold in force of each category that the router knows, in the router's order.

        In float64 and the unit of the gate's score; empty for a pack without a router.
        """
        router = self.pack.router
        if router is None or self.gate is None:
            return MappingProxyType({})
        stored = router.gates[self.gate].thresholds.tolist()
        given = (self._settings[name].threshold for name in router.categories)
        return MappingProxyType(
            {
                name: fitted if own is None else own
                for name, own, fitted in zip(router.categories, given, stored, strict=True)
            }
        )

    @cached_property
    def opens_above(self) -> Mapping[str, bool]:
        """The side on which each category's gate opens, in the router's order.

        True: at scores of at least the threshold. False: at scores of at most the threshold.
        """
        router = self.pack.router
        if router is None or self.gate is None:
            return MappingProxyType({})
        above = router.gates[self.gate].above.tolist()
        return MappingProxyType(dict(zip(router.categories, above, strict=True)))

    @cached_property
    def gateable(self) -> tuple[str, ...]:
        """The categories that can be gated, in the pack's order.

        These are the categories whose rules name only categories that the router knows; empty for a
        pack without a router.
        """
        return tuple(
            name
            for name, settings in self._settings.items()
            if set(settings.rule.names) <= set(self.thresholds)
        )

    def opens(self, category: str, scores: Mapping[str, float]) -> bool:
        """Return True if `{category: "auto"}` fires for the router's scores of a prompt.

        A gated category steers nothing before the router has decided, so neither its scores nor
        its rule depend on other categories that are switched on.

        Args:
            category: one of `gateable`.
            scores: score of each category that the category's rule names.

        Raises:
            SteeringError: the category cannot be gated.
        """
        rule = self.settings(category).rule
        self._check_gateable(category)
        gates = {}
        for name in rule.names:
            score, threshold = scores[name], self.thresholds[name]
            gates[name] = score >= threshold if self.opens_above[name] else score <= threshold
        return rule.evaluate(gates)

    @cached_property
    def default_steering(self) -> Mapping[str, float | str]:
        """The steering of a request without `steering`, by the modes of the categories.

        Category to the policy's strength ("always") or to "auto"; without categories that are off.
        """
        return MappingProxyType(
            {
                name: AUTO if settings.mode == AUTO else settings.strength
                for name, settings in self._settings.items()
                if settings.mode != "off"
            }
        )

    def requested(self, steering: Steering) -> dict[str, float | str]:
        """Return the categories that a request's own steering switches on, in the pack's order.

        Args:
            steering: see `Steering`. None and an empty mapping switch nothing on, strength 0 leaves
                a category out, and "auto" alone switches on all of `gateable`.

        Returns:
            Category to strength (forced: finite, not 0) or to "auto" (gated).

        Raises:
            UnknownCategoryError: a category that the pack does not hold.
            SteeringError: `steering` is of another type, a strength is not a finite number, or a
                gated category is not one of `gateable`.
        """
        if steering is None:
            return {}
        if isinstance(steering, str):
            if steering != AUTO:
                raise SteeringError(
                    f"steering={steering!r}: give 'auto', a mapping of category to strength, or "
                    "None"
                )
            if not self.gateable:
                raise SteeringError(
                    "steering='auto' gates every category, and this pack has no router; "
                    "give a mapping of category to strength"
                )
            return dict.fromkeys(self.gateable, AUTO)
        if not isinstance(steering, Mapping):
            raise SteeringError(
                f"steering={steering!r}: give a mapping of category to strength, 'auto', or None"
            )
        found: dict[str, float | str] = {}
        for category, strength in steering.items():
            _ = self.pack[category]
            value = _strength(category, strength)
            if value != 0:
                found[category] = value
        for category, value in found.items():
            if value == AUTO:
                self._check_gateable(category)
        if len(found) > 1:
            found = {name: found[name] for name in self.pack.categories if name in found}
        return found

    def _check_gateable(self, category: str) -> None:
        if category not in self.gateable:
            raise SteeringError(
                f"cannot gate category {quoted(category)}: no router for this category; "
                "give a number as its strength"
            )


def _resolved(pack: SteeringPack, policy: Policy) -> ResolvedPolicy:
    """Return a pack under a policy that already includes the pack's own."""
    found = ResolvedPolicy(pack)
    found._put(policy)
    return found


def _strength(category: str, strength: object) -> float | str:
    """Return a strength as a float, or "auto"."""
    if type(strength) is float and math.isfinite(strength):  # nearly always; the rest is slow
        return strength
    if isinstance(strength, str) and strength == AUTO:
        return AUTO
    name = quoted(category)
    if not isinstance(strength, Real) or isinstance(strength, bool):
        raise SteeringError(f"the strength of {name} is {quoted(strength)}, not a number or 'auto'")
    return finite(strength, f"the strength of {name} must be")
