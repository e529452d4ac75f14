"""From what a request asks for to what happens at each site, layer and token of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

from pysteer import _native
from pysteer.errors import HookError, SteeringError, quoted
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import CategorySettings, GateKind, Policy
from pysteer.pack.router import Router
from pysteer.pack.rules import Rule
from pysteer.pack.scope import Scope
from pysteer.pack.vector import SteeringVector, finite
from pysteer.runtime.native import SITES, native_gate, native_operator, native_scope

Mode: TypeAlias = Literal["auto", "resident", "hooked"]
MODES: tuple[Mode, ...] = ("auto", "resident", "hooked")

Steering: TypeAlias = "Mapping[str, float | str] | str | None"
"""Category to strength (forced) or "auto" (gated); "auto", all categories gated; None, off."""

AUTO = "auto"

_WAYS = dict(
    zip(MODES, (_native.Way.automatic, _native.Way.resident, _native.Way.hooked), strict=True)
)
_SEVERAL = dict(_native.Several.__members__)
_CERTAINLY_FINITE = 1e38  # sums that stay below it in float64 do not overflow float32


@dataclass(frozen=True)
class Wanted:
    """One category that a request asks for.

    Attributes:
        category: its name.
        strength: finite and not 0.
        gated: whether the router decides.
    """

    category: str
    strength: float
    gated: bool


@dataclass(frozen=True)
class PlannedTerm:
    """One category of a compiled plan, for reports."""

    category: str
    strength: float
    gated: bool
    threshold: float | None
    site: str
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CompiledPlan:
    """Exactly what happens to a sequence, as far as that can be said before its prompt is read.

    Immutable; any number of sequences share one.

    Attributes:
        native: for the hook; None does nothing.
        terms: the categories in the order in which they act.
        gate: kind of gate; None where nothing is gated.
        router: what the gates look at.
        markers: pairs of markers between which some category does not act.
        rechecks: whether the router decides anew during the response.
    """

    native: _native.Plan | None
    terms: tuple[PlannedTerm, ...] = ()
    gate: str | None = None
    router: Router | None = None
    markers: tuple[tuple[str, str], ...] = ()
    rechecks: bool = False

    @property
    def mode(self) -> str:
        """ "off", "forced", "auto" or "mixed"; see `SteeringReport`."""
        kinds = {term.gated for term in self.terms}
        return (
            "off"
            if not kinds
            else "mixed"
            if len(kinds) == 2
            else "auto"
            if True in kinds
            else "forced"
        )

    @property
    def gated(self) -> bool:
        """Whether the router decides about any category."""
        return self.gate is not None

    @property
    def pools(self) -> bool:
        """Whether the router averages over several tokens anywhere."""
        return self.router is not None and any(read.pooling != "last" for read in self.router.reads)

    def start(
        self, n_prompt: int, spans: Sequence[tuple[int, int]], n_positions: int
    ) -> _native.Sequence | None:
        """The state of one sequence under this plan; None if nothing is to be done.

        Args:
            n_prompt: number of prompt tokens.
            spans: for each of the router's reads the token range [start, stop) of the prompt that
                it averages over.
            n_positions: the most tokens that the sequence can have.

        Raises:
            SteeringError: the router has no token to look at.
        """
        if self.native is None:
            return None
        try:
            return _native.Sequence(self.native, n_prompt, spans, n_positions)
        except ValueError as error:
            raise SteeringError(str(error)) from None


UNSTEERED = CompiledPlan(None)


def check_steering(pack: SteeringPack, steering: Steering) -> list[Wanted]:
    """What a request's own `steering` asks for, by the pack's order of categories.

    Args:
        pack: its categories are the ones there are.
        steering: None and an empty mapping ask for nothing; strength 0 leaves a category out.

    Raises:
        UnknownCategoryError: a category that the pack lacks.
        SteeringError: it is no steering, or a strength is not a finite number.
    """
    if steering is None:
        return []
    if isinstance(steering, str):
        if steering != AUTO:
            raise SteeringError(
                f"steering={steering!r}: give 'auto', a mapping of category to strength, or None"
            )
        return [Wanted(name, 1.0, True) for name in pack.categories]
    if not isinstance(steering, Mapping):
        raise SteeringError(
            f"steering={steering!r}: give a mapping of category to strength, 'auto', or None"
        )
    wanted = []
    for category, strength in steering.items():
        _ = pack[category]
        if type(strength) is float and math.isfinite(strength):  # nearly always; the rest is slow
            if strength != 0:
                wanted.append(Wanted(category, strength, False))
            continue
        if isinstance(strength, str) and strength == AUTO:
            wanted.append(Wanted(category, 1.0, True))
            continue
        name = quoted(category)
        if not isinstance(strength, Real) or isinstance(strength, bool):
            raise SteeringError(
                f"the strength of {name} is {quoted(strength)}, not a number or 'auto'"
            )
        number = finite(strength, f"the strength of {name} must be")
        if number != 0:
            wanted.append(Wanted(category, number, False))
    if len(wanted) > 1:
        order = list(pack.categories)
        wanted.sort(key=lambda one: order.index(one.category))
    return wanted


class PlanCompiler:
    """Compiles requests for one pack and one model, and remembers the latest.

    Args:
        pack: a pack that fits the model; None: nothing can be steered.
        policy: what holds where a request does not say otherwise; goes before the pack's own.
        n_layer: the model's number of blocks.
        n_embd: the model's width.
        sites: site to the layers at which the model's graph has it; None: all of them.
        mode: how the directions get in: "auto", or "resident" or "hooked" to insist.

    Raises:
        SteeringError: a policy that does not fit the pack, or the router.
        HookError: the policy asks for a site that the model lacks.
    """

    _KEPT = 16  # so that requests that alternate do not compile each time

    def __init__(
        self,
        pack: SteeringPack | None,
        policy: Policy | None,
        *,
        n_layer: int,
        n_embd: int,
        sites: Mapping[str, tuple[int, ...]] | None = None,
        mode: Mode = "auto",
    ) -> None:
        if mode not in MODES:
            raise SteeringError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
        self.pack = pack
        self.n_layer = n_layer
        self.n_embd = n_embd
        self.mode = mode
        self._sites = None if sites is None else {name: set(sites[name]) for name in sites}
        self._gates: dict[str, _native.Gate] = {}
        self._plans: dict[tuple[object, ...], CompiledPlan] = {}
        self._policies: dict[Policy | None, Policy] = {}
        self._base = (pack.policy if pack is not None else None) or Policy()
        if policy is not None:
            self._base = self._merged(policy)
        if pack is not None:
            for name, settings in self._base.categories.items():
                if settings.mode != "off":
                    self._require_sites(name, pack[name])
            self.by_policy()  # so that what cannot be is said now, not at the first request

    def compile(self, steering: Steering, policy: Policy | None = None) -> CompiledPlan:
        """What a request asks for.

        Args:
            steering: the request's own; see `Steering`.
            policy: the request's own; what it sets goes before what holds otherwise.

        Raises:
            UnknownCategoryError: a category that the pack lacks.
            SteeringError: something else that cannot be done.
            HookError: mode "resident" for what llama.cpp's control vector cannot express.
        """
        # The types belong to the key because True == 1 == 1.0, and True is no strength.
        key: tuple[object, ...]
        if type(steering) is dict:
            key = (policy, *[(name, type(value), value) for name, value in steering.items()])
        else:
            key = (policy, repr(steering))
        try:
            plan = self._plans.get(key)
        except TypeError:  # not hashable, hence no number: the check below says which
            plan = None
        if plan is None:
            if steering is None or (isinstance(steering, Mapping) and not steering):
                return UNSTEERED
            if self.pack is None:
                raise SteeringError("there is nothing to steer with; pass pack=")
            plan = self._compile(check_steering(self.pack, steering), steering == AUTO, policy)
            self._keep(key, plan)
        return plan

    def by_policy(self, policy: Policy | None = None) -> CompiledPlan:
        """What happens to a request that says nothing: each category by its mode in the policy."""
        key = ("by policy", policy)
        plan = self._plans.get(key)
        if plan is None:
            plan = UNSTEERED
            if self.pack is not None:
                merged = self._merged(policy)
                wanted = []
                for name in self.pack.categories:
                    settings = merged.of(name)
                    if settings.mode == "always":
                        wanted.append(Wanted(name, settings.strength, False))
                    elif settings.mode == AUTO and self._rule(settings) is not None:
                        wanted.append(Wanted(name, 1.0, True))
                plan = self._compile(wanted, False, policy)
            elif policy is not None:
                self._merged(policy)  # which has nothing to apply to
            self._keep(key, plan)
        return plan

    def _keep(self, key: tuple[object, ...], plan: CompiledPlan) -> None:
        if len(self._plans) >= self._KEPT:
            self._plans.pop(next(iter(self._plans)))
        self._plans[key] = plan

    def _merged(self, policy: Policy | None) -> Policy:
        if policy is None:
            return self._base
        if self.pack is None:
            raise SteeringError("a policy needs a pack to apply to; pass pack=")
        if policy not in self._policies:
            merged = self._base.merged(policy)
            self.pack.check_policy(merged)
            if len(self._policies) >= self._KEPT:
                self._policies.pop(next(iter(self._policies)))
            self._policies[policy] = merged
        return self._policies[policy]

    def _rule(self, settings: CategorySettings) -> Rule | None:
        """When a gated category fires; None where the router cannot tell."""
        assert self.pack is not None
        router = self.pack.router
        known = router is not None and set(settings.rule.names) <= set(router.categories)
        return settings.rule if known else None

    def _compile(
        self, wanted: list[Wanted], all_of_them: bool, policy: Policy | None
    ) -> CompiledPlan:
        if not wanted:
            return UNSTEERED
        assert self.pack is not None
        merged = self._merged(policy)
        router = self.pack.router
        native = _native.Plan(self.n_layer, self.n_embd, _WAYS[self.mode])
        terms: list[PlannedTerm] = []
        markers: list[tuple[str, str]] = []
        bound = 0.0
        gates = {name: i for i, name in enumerate(router.categories)} if router is not None else {}
        thresholds: list[float] = []
        above: list[int] = []
        kind: GateKind | None = None
        if router is not None and any(one.gated for one in wanted):
            kind = merged.gate_of(list(router.gates))
            thresholds, above = _thresholds(merged, router, kind)
        for one in wanted:
            settings = merged.of(one.category)
            rule = self._rule(settings) if one.gated else None
            if one.gated and rule is None:
                if all_of_them and router is not None:
                    continue
                raise SteeringError(
                    f"category {quoted(one.category)} is to be gated, and this pack has no router "
                    "that knows it; give it a number as strength"
                )
            strength = settings.strength if one.gated else one.strength
            if strength == 0:
                continue
            vector = self.pack[one.category]
            exclude = settings.scope.exclude
            if exclude is not None and exclude not in markers:
                markers.append(exclude)
            own = gates.get(one.category, -1)
            try:
                self._add(native, vector, strength, settings.scope, markers, rule, gates, own)
            except ValueError as error:
                raise SteeringError(f"category {quoted(one.category)}: {error}") from None
            bound += abs(strength) * max(vector.peak, 1.0) * _largest(settings.scope)
            terms.append(
                PlannedTerm(
                    one.category,
                    strength,
                    one.gated,
                    thresholds[own] if one.gated and own >= 0 else None,
                    vector.site,
                    vector.layers,
                )
            )
        for term in terms:
            self._require_sites(term.category, self.pack[term.category])
        if not terms:
            if all_of_them:
                raise SteeringError(
                    "steering='auto' gates every category, and this pack has no router; "
                    "give a mapping of category to strength"
                )
            return UNSTEERED
        if self.mode == "resident" and not native.fits_resident:
            raise HookError(
                "mode 'resident' adds to the residual of layers >= 1, to all tokens alike, and "
                "nothing else; use 'auto' or 'hooked'"
            )
        if bound > _CERTAINLY_FINITE:  # a look at every sum, which a change between tokens spares
            try:
                native.check_finite()
            except ValueError as error:
                names = ", ".join(quoted(term.category) for term in terms)
                raise SteeringError(f"category {names}: {error}") from None
        if not any(term.gated for term in terms):
            return CompiledPlan(native, tuple(terms), markers=tuple(markers))
        assert router is not None
        assert kind is not None
        self._require_router(router)
        native.set_gate(
            self._gate(router, kind),
            thresholds,
            above,
            _SEVERAL[merged.several],
            merged.recheck or 0,
        )
        return CompiledPlan(
            native, tuple(terms), kind, router, tuple(markers), merged.recheck is not None
        )

    def _add(
        self,
        native: _native.Plan,
        vector: SteeringVector,
        strength: float,
        scope: Scope,
        markers: list[tuple[str, str]],
        rule: Rule | None,
        gates: Mapping[str, int],
        own: int,
    ) -> None:
        native.add(
            SITES[vector.site],
            vector.layer_indices,
            vector.prepared,
            native_operator(vector.operator),
            strength,
            native_scope(scope),
            int(vector.digest[:16], 16),
            -1 if scope.exclude is None else markers.index(scope.exclude),
            [] if rule is None else rule.postfix(gates),
            own,
        )

    def _require_sites(self, category: str, vector: SteeringVector) -> None:
        if self._sites is None:
            return
        missing = sorted(set(vector.layers) - self._sites[vector.site])
        if missing:
            raise HookError(
                f"category {quoted(category)} acts at site {vector.site} of layers {missing}, "
                "which this model's graph does not have"
            )

    def _require_router(self, router: Router) -> None:
        if self._sites is None:
            return
        for read in router.reads:
            place = f"site {router.site} of layer {read.layer}"
            if read.layer not in self._sites[router.site]:
                raise HookError(
                    f"the router looks at {place}, which this model's graph does not have; "
                    "force categories instead of gating them"
                )
            last = read.layer == self.n_layer - 1 and router.site != "attention"
            if last and read.pooling != "last":
                raise HookError(
                    f"the router averages over tokens at {place}, where llama.cpp computes only "
                    "the last one; fit it at another layer, or force categories"
                )

    def _gate(self, router: Router, kind: str) -> _native.Gate:
        if kind not in self._gates:
            self._gates[kind] = native_gate(router, kind)
        return self._gates[kind]


def _thresholds(policy: Policy, router: Router, kind: str) -> tuple[list[float], list[int]]:
    """Where each of the router's gates opens, and whether at scores above that."""
    gate = router.gates[kind]
    own = [policy.of(name).threshold for name in router.categories]
    thresholds = [
        float(stored) if given is None else given
        for given, stored in zip(own, gate.thresholds, strict=True)
    ]
    return thresholds, [int(flag) for flag in gate.above]


def _largest(scope: Scope) -> float:
    """The largest factor that a scope gives."""
    return max([1.0, *map(abs, scope.values)])
