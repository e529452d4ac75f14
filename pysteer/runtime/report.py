"""Report of the steering of a request: categories, scores, sites, and numbers of tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pysteer import _native
from pysteer.runtime.plan import CompiledPlan


@dataclass(frozen=True)
class CategoryReport:
    """One category of a request.

    Attributes:
        strength: factor of the directions, before the scope's factor.
        gated: the router decided; else the category was forced.
        active: at least one token was steered by the category.
        fired: the gate opened at the last prompt token or at a check since; None if forced or not
            decided yet.
        score: score of the category's own gate at the last decision; None without a gate.
        threshold: the score at which the category's own gate opens.
        site: steered site.
        layers: steered layers.
        tokens_steered: number of steered tokens of prompt and response.
    """

    strength: float
    gated: bool
    active: bool
    fired: bool | None
    score: float | None
    threshold: float | None
    site: str
    layers: list[int]
    tokens_steered: int


@dataclass(frozen=True)
class SteeringReport:
    """The `steering` field of a result.

    Attributes:
        mode: "off" (no category), "forced", "auto" (all gated) or "mixed".
        categories: the requested categories, with open or closed gates.
        scores: score of each category that the router knows; empty if nothing was gated.
        ranks: the order among several categories that fired: the scores, but for margin gates the
            lead of each over the others; see `pysteer.pack.router.Router.ranks`.
        gate: the kind of gate, or None.
        prompt_reprocessed: the prompt was computed once more because a category fired.
        checks: number of the router's decisions.
        tokens_steered: number of tokens of prompt and response that any category acted on.
    """

    mode: str
    categories: dict[str, CategoryReport]
    scores: dict[str, float]
    ranks: dict[str, float]
    gate: str | None
    prompt_reprocessed: bool
    checks: int
    tokens_steered: int

    @property
    def fired(self) -> list[str]:
        """The gated categories that fired."""
        return [name for name, category in self.categories.items() if category.fired]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return asdict(self)


def report(plan: CompiledPlan, sequence: _native.Sequence | None, n_tokens: int) -> SteeringReport:
    """Return the effect of `plan` on the first `n_tokens` tokens of a sequence."""
    decisions = sequence.decided_at if sequence is not None else []
    scores: dict[str, float] = {}
    ranks: dict[str, float] = {}
    if plan.router is not None and sequence is not None and decisions:
        scores = dict(zip(plan.router.categories, sequence.scores, strict=True))
        ranks = dict(zip(plan.router.categories, sequence.ranks, strict=True))
    categories = {}
    for index, term in enumerate(plan.terms):
        steered = sequence.tokens_steered(index, n_tokens) if sequence is not None else 0
        fired = None
        if term.gated and sequence is not None and decisions:
            fired = any(sequence.fired(k, index) for k in range(len(decisions)))
        categories[term.category] = CategoryReport(
            strength=term.strength,
            gated=term.gated,
            active=steered > 0,
            fired=fired,
            score=scores.get(term.category) if term.gated else None,
            threshold=term.threshold,
            site=term.site,
            layers=list(term.layers),
            tokens_steered=steered,
        )
    return SteeringReport(
        mode=plan.mode,
        categories=categories,
        scores=scores,
        ranks=ranks,
        gate=plan.gate,
        prompt_reprocessed=sequence is not None and sequence.held,
        checks=len(decisions),
        tokens_steered=sequence.tokens_steered(n_tokens) if sequence is not None else 0,
    )
