"""Compile a request's steering into the operations at each site, layer and token of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from pysteer import _native
from pysteer.errors import HookError, SteeringError, quoted
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import AUTO, ResolvedPolicy, Steering
from pysteer.pack.router import Router
from pysteer.pack.vector import SteeringVector
from pysteer.runtime.limits import StrengthLimits
from pysteer.runtime.native import SITES, native_gate, native_operator, native_scope

Injection: TypeAlias = Literal["auto", "resident", "hooked"]
INJECTIONS: tuple[Injection, ...] = get_args(Injection)
"""Routes of directions into a model's graph.

"resident": through llama.cpp's control vector. "hooked": by cutting the graph. "auto": resident
where all rows of a decode are steered alike, else by a table of the rows' directions inside the
whole graph where a layer's additions allow it, else hooked.
"""

_NATIVE_INJECTIONS = {
    "auto": _native.Injection.automatic,
    "resident": _native.Injection.resident,
    "hooked": _native.Injection.hooked,
}
_KEPT = 16  # compiled plans and resolved policies, so that requests that alternate find theirs

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class PlannedTerm:
    """One category of a compiled plan.

    Attributes:
        category: its name.
        strength: factor of its directions, before the scope's; finite and not 0.
        gated: True if the router decides, False if the category is forced.
        threshold: threshold of the category's own gate; None if forced or without an own gate.
        site: steered site.
        layers: steered layers, ascending.
    """

    category: str
    strength: float
    gated: bool
    threshold: float | None
    site: str
    layers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CompiledPlan:
    """Steering of a sequence, as far as known before the prompt is read.

    Immutable; any number of sequences share one.

    Attributes:
        native: the plan for the hook; None if nothing is steered.
        terms: the categories in the order in which they act.
        gate: kind of gate; None if no category is gated.
        router: the router whose gates decide; None if no category is gated.
        markers: pairs of markers between which some category does not act.
        rechecks: True if the router decides anew during the response.
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
        if not kinds:
            return "off"
        if len(kinds) == 2:
            return "mixed"
        return "auto" if True in kinds else "forced"

    @property
    def gated(self) -> bool:
        """True if the router decides about any category."""
        return self.gate is not None

    @property
    def pools(self) -> bool:
        """True if the router averages over more than one token anywhere."""
        return self.router is not None and any(read.pooling != "last" for read in self.router.reads)

    def start(
        self, n_prompt: int, spans: Sequence[tuple[int, int]], n_positions: int
    ) -> _native.Sequence | None:
        """Return the state of a new sequence under this plan; None for a plan that does nothing.

        Args:
            n_prompt: number of prompt tokens.
            spans: for each of the router's reads the token range [start, stop) of the prompt to
                average over.
            n_positions: the largest number of tokens that the sequence can have.

        Raises:
            SteeringError: a span is empty, so that the router has no token to read.
        """
        if self.native is None:
            return None
        try:
            return _native.Sequence(self.native, n_prompt, spans, n_positions)
        except ValueError as error:
            raise SteeringError(str(error)) from None


UNSTEERED = CompiledPlan(None)


class PlanCompiler:
    """Compiles requests for one pack and one model, and keeps the latest plans.

    Args:
        pack: a pack that fits the model; None: nothing can be steered.
        policy: default policy of requests; laid over the pack's policy.
        n_layer: the model's number of blocks.
        n_embd: the model's width.
        sites: site to the layers at which the model's graph has the site; None: all layers.
        injection: route of directions into the graph; see `INJECTIONS`.
        limits: the largest strengths; None: any strength that leaves finite sums.

    Raises:
        SteeringError: the policy does not fit the pack or the router, or there is no pack for it,
            or the policy's strengths are beyond the limits.
        HookError: the policy needs a site that the model lacks.
    """

    def __init__(
        self,
        pack: SteeringPack | None,
        policy: Policy | None,
        *,
        n_layer: int,
        n_embd: int,
        sites: Mapping[str, tuple[int, ...]] | None = None,
        injection: Injection = "auto",
        limits: StrengthLimits | None = None,
    ) -> None:
        if injection not in INJECTIONS:
            raise SteeringError(
                f"unknown injection {injection!r}; use one of {', '.join(INJECTIONS)}"
            )
        self.pack = pack
        self.n_layer = n_layer
        self.n_embd = n_embd
        self.injection = injection
        self._limits = limits
        self._sites = None if sites is None else {name: set(sites[name]) for name in sites}
        self._gates: dict[str, _native.Gate] = {}
        self._plans: dict[tuple[object, ...], CompiledPlan] = {}
        self._resolved: dict[Policy, ResolvedPolicy] = {}
        self._base = None if pack is None else ResolvedPolicy(pack, policy)
        if self._base is None:
            self._check_no_policy(policy)
            return
        for name, settings in self._base.policy.categories.items():
            if settings.mode != "off":
                self._require_sites(name, self._base.pack[name])
        self.by_policy()  # so that its errors come here and not with the first request

    def compile(self, steering: Steering, policy: Policy | None = None) -> CompiledPlan:
        """Return the plan of a request that brings its own steering.

        Args:
            steering: see `Steering`.
            policy: the request's own policy, laid over that of the compiler.

        Raises:
            UnknownCategoryError: a category that the pack does not hold.
            SteeringError: steering or policy is invalid, does not fit the pack, or asks for more
                than the limits.
            HookError: the model lacks a site, or injection "resident" cannot express the plan.
        """
        if isinstance(steering, Mapping):
            steering = dict(steering.items())  # read once: key and plan are of the same strengths
        key = _key(steering, policy)
        try:
            plan = self._plans.get(key)
        except TypeError:  # a strength that cannot be hashed is not a number; `requested` raises
            plan = None
        if plan is not None:
            return plan
        if steering is None or (isinstance(steering, Mapping) and not steering):
            return UNSTEERED
        if self._base is None:
            raise SteeringError("steering needs a pack; pass pack=")
        resolved = self._under(self._base, policy)
        plan = self._compile(resolved, resolved.requested(steering))
        _keep(self._plans, key, plan)
        return plan

    def by_policy(self, policy: Policy | None = None) -> CompiledPlan:
        """Return the plan of a request that brings no steering: each category by its mode.

        Args:
            policy: the request's own policy, laid over that of the compiler.

        Raises:
            SteeringError: the policy does not fit the pack, or there is no pack for it.
            HookError: as for `compile`.
        """
        if self._base is None:
            self._check_no_policy(policy)
            return UNSTEERED
        key = ("by policy", policy)
        plan = self._plans.get(key)
        if plan is None:
            resolved = self._under(self._base, policy)
            plan = self._compile(resolved, resolved.default_steering)
            _keep(self._plans, key, plan)
        return plan

    def _check_no_policy(self, policy: Policy | None) -> None:
        if policy is not None:
            raise SteeringError("a policy needs a pack; pass pack=")

    def _under(self, base: ResolvedPolicy, policy: Policy | None) -> ResolvedPolicy:
        """Return the pack under the policy of one request."""
        if policy is None:
            return base
        resolved = self._resolved.get(policy)
        if resolved is None:
            resolved = base.merged(policy)
            _keep(self._resolved, policy, resolved)
        return resolved

    def _compile(
        self, resolved: ResolvedPolicy, steering: Mapping[str, float | str]
    ) -> CompiledPlan:
        """Return the plan for category to strength or "auto"."""
        terms = tuple(
            term
            for name, value in steering.items()
            if (term := _term(resolved, name, value)).strength != 0
        )
        if not terms:
            return UNSTEERED
        markers = _markers(resolved, terms)
        native = _native.Plan(self.n_layer, self.n_embd, _NATIVE_INJECTIONS[self.injection])
        for term in terms:
            self._add(native, resolved, term, markers)
        for term in terms:
            self._require_sites(term.category, resolved.pack[term.category])
        self._check(native, terms)
        if not any(term.gated for term in terms):
            return CompiledPlan(native, terms, markers=markers)
        router, kind, recheck = resolved.pack.router, resolved.gate, resolved.policy.recheck
        assert router is not None  # or no category could be gated
        assert kind is not None
        self._require_router(router)
        native.set_gate(
            self._gate(router, kind),
            list(resolved.thresholds.values()),
            list(map(int, resolved.opens_above.values())),
            _native.ConflictRule.__members__[resolved.policy.conflict],
            recheck or 0,
        )
        return CompiledPlan(native, terms, kind, router, markers, recheck is not None)

    def _add(
        self,
        native: _native.Plan,
        resolved: ResolvedPolicy,
        term: PlannedTerm,
        markers: Sequence[tuple[str, str]],
    ) -> None:
        """Add a category to the native plan.

        Raises:
            SteeringError: the category's vector does not fit the model, or its strength is beyond
                the limits.
        """
        vector = resolved.pack[term.category]
        settings = resolved.settings(term.category)
        if self._limits is not None:
            factors = settings.scope.values or (1.0,)
            self._limits.check(term.category, vector, term.strength, factors)
        exclude = settings.scope.exclude
        gates = {name: i for i, name in enumerate(resolved.thresholds)}
        try:
            native.add(
                SITES[vector.site],
                vector.layer_indices,
                vector.prepared,
                _native.Term(
                    operator=native_operator(vector.operator),
                    strength=term.strength,
                    scope=native_scope(settings.scope),
                    digest=int(vector.digest[:16], 16),
                    exclude_bit=-1 if exclude is None else markers.index(exclude),
                    rule=settings.rule.postfix(gates) if term.gated else [],
                    own_gate=gates.get(term.category, -1),
                ),
            )
        except ValueError as error:
            raise SteeringError(f"category {quoted(term.category)}: {error}") from None

    def _check(self, native: _native.Plan, terms: Sequence[PlannedTerm]) -> None:
        """Check the whole of a native plan: its injection, and that its sums are finite."""
        if self.injection == "resident" and not native.fits_resident:
            raise HookError(
                "injection 'resident' can only add to the residual of layers >= 1, equally for "
                "all tokens; use 'auto' or 'hooked'"
            )
        try:
            native.check_finite()
        except ValueError as error:
            names = ", ".join(quoted(term.category) for term in terms)
            raise SteeringError(f"category {names}: {error}") from None

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
                    f"the router reads {place}, which this model's graph does not have; "
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


def _term(resolved: ResolvedPolicy, category: str, value: float | str) -> PlannedTerm:
    """Return a category with its strength: `value`, or the policy's where the router decides."""
    vector = resolved.pack[category]
    gated = value == AUTO
    return PlannedTerm(
        category,
        resolved.settings(category).strength if gated else float(value),
        gated,
        resolved.thresholds.get(category) if gated else None,
        vector.site,
        vector.layers,
    )


def _markers(resolved: ResolvedPolicy, terms: Sequence[PlannedTerm]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of markers that the scopes exclude, each once."""
    excluded = (resolved.settings(term.category).scope.exclude for term in terms)
    return tuple(dict.fromkeys(pair for pair in excluded if pair is not None))


def _key(steering: object, policy: Policy | None) -> tuple[object, ...]:
    """Return a key that two requests share only if they get the same plan.

    The types belong to it because True == 1 == 1.0, and True is not a strength.
    """
    if isinstance(steering, Mapping):
        return (policy, *[(name, type(value), value) for name, value in steering.items()])
    return (policy, type(steering), steering)


def _keep(kept: dict[Any, _Value], key: object, value: _Value) -> None:
    """Keep a value under a key, in the place of the oldest if there are enough."""
    if len(kept) >= _KEPT:
        kept.pop(next(iter(kept)))
    kept[key] = value
