"""What an extraction is asked to do, and what the method `learned` is made with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pysteer.errors import SteeringError, quoted
from pysteer.extract.capture import Pooling
from pysteer.extract.directions import METHODS, PCA_VARIANTS
from pysteer.pack.router import CLASSIFIERS, GATES, POOLINGS
from pysteer.pack.vector import SITES

ALL_METHODS = (*METHODS, "learned")

DEFAULT_STRENGTH = 0.4
"""Of the residual stream's typical norm, over all steered layers together."""

MASSIVE_RATIO = 10.0


@dataclass(frozen=True)
class LearnedSettings:
    """What the method `learned` is made with; see `pysteer.extract.learned`.

    Attributes:
        learning_rate: of Adam, as a share of the typical size of one component of the residual
            stream at each layer (`SteeredForward.typical_sizes`), so that it suits any model. It
            falls evenly to a tenth over a run's steps.
        batch_size: unsafe prompts per step.
        benign_batch_size: benign prompts per step.
        shared_steps: at most so many for the vector shared by all categories; 0 for none.
        category_steps: at most so many for each category, from the shared vector.
        category_rate: what a category's steps from the shared vector begin at, as a share of
            learning_rate: full steps would leave where the shared one has arrived.
        kl_weight: of the term that holds the model still on benign prompts; 0 leaves it out.
        kl_tokens: how many tokens of the answers to benign prompts are held.
        first_token_weight: how often the first token of an answer counts.
        max_benign: at most so many benign prompts are used, drawn by the seed.
        max_tokens: longer examples and benign prompts are left out.
        validation_share: of a category's prompts, and of the benign ones, kept aside to choose the
            best state by; 0 for none.
        validation_prompts: at most so many unsafe, and as many benign, prompts are looked at.
        min_prompts: categories with fewer different prompts are trained on all of them.
        check_every: steps between two looks at the loss on the validation prompts.
        patience: a run stops early after so many looks without a lower loss.
        seed: of the split, the order of the prompts and the choice of benign ones.

    Raises:
        SteeringError: a value is out of its range.
    """

    learning_rate: float = 0.5
    batch_size: int = 8
    benign_batch_size: int = 4
    shared_steps: int = 60
    category_steps: int = 10
    category_rate: float = 0.1
    kl_weight: float = 1.0
    kl_tokens: int = 8
    first_token_weight: float = 4.0
    max_benign: int = 128
    max_tokens: int = 1024
    validation_share: float = 0.2
    validation_prompts: int = 8
    min_prompts: int = 10
    check_every: int = 5
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        at_least = {"shared_steps": 0, "category_steps": 0, "kl_weight": 0, "seed": 0}
        for each in fields(self):
            value, least = getattr(self, each.name), at_least.get(each.name, 1)
            if each.name == "validation_share":
                good = 0 <= value < 1
            elif each.name in ("learning_rate", "category_rate"):
                good = value > 0
            else:
                good = value >= least
            whole = isinstance(value, int) or not isinstance(each.default, int)
            if not (good and whole and math.isfinite(value)):
                raise SteeringError(f"{each.name} cannot be {quoted(value)} in LearnedSettings")
        if not self.shared_steps and not self.category_steps:
            raise SteeringError("nothing is learned in 0 steps; raise shared_steps")


@dataclass(frozen=True)
class ExtractSettings:
    """How directions and the router are found.

    Attributes:
        method: one of `ALL_METHODS`; see `pysteer.extract.directions` and `.learned`.
        options: keyword arguments of the method: `paired` (pruned), `variant` (pca), `C`
            (logistic), all of `LearnedSettings` but the seed (learned).
        site: where in a block.
        layers: block indices; None is three around the middle.
        pooling: which tokens' activations are averaged; see `Pooling`. `contrast` averages the
            first `response_tokens` of the response instead.
        matched: whether each category is held against safe prompts of the same category; None is
            where every category has some.
        response_tokens: `contrast`: how many tokens of the answers are averaged.
        mask_massive: dimensions whose typical activation is above this many times the median are
            set to 0; None leaves them, as `learned` always does. This and what follows is done in
            this order.
        top_k: only so many dimensions of each direction are kept; None keeps all.
        orthogonalise: "categories" takes out what categories share, "benign" the mean of the safe
            activations; "" neither.
        unit_norm: directions of norm 1; the norms they had go into the provenance.
        scale: fraction of the residual stream's typical norm that strength 1 adds at each layer;
            None is 0.4 / sqrt(number of layers); 0 keeps the directions as the method found them.
            For `learned` None leaves directions as they were learned.
        router: whether to fit a router.
        gates: the kinds of gate that it is to have, of `pysteer.pack.router.GATES`.
        false_positive_rate: the router's thresholds let through at most that share of benign
            prompts; None is each kind's own rule, see `pysteer.extract.router.fit_router`.
        held_out: share of the prompts kept for the figures that are reported.
        seed: of every choice.

    Raises:
        SteeringError: settings that exclude each other or do not exist.
    """

    method: str = "mean"
    options: Mapping[str, Any] = field(default_factory=dict)
    site: str = "residual"
    layers: tuple[int, ...] | None = None
    pooling: Pooling = "user"
    matched: bool | None = None
    response_tokens: int = 8
    mask_massive: float | None = MASSIVE_RATIO
    top_k: int | None = None
    orthogonalise: str = ""
    unit_norm: bool = False
    scale: float | None = None
    router: bool = True
    gates: tuple[str, ...] = ("margin",)
    false_positive_rate: float | None = None
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, ALL_METHODS)
        _one_of("site", self.site, SITES)
        for kind in self.gates:
            _one_of("gate", kind, GATES)
        if not set(self.gates) & set(CLASSIFIERS):
            raise SteeringError(f"a router needs a gate that is one of {', '.join(CLASSIFIERS)}")
        _one_of("orthogonalise", self.orthogonalise, ("", "categories", "benign"))
        if not isinstance(self.pooling, tuple):
            _one_of("pooling", self.pooling, (*POOLINGS, "response"))
        allowed: tuple[str, ...] = tuple(
            f.name for f in fields(LearnedSettings) if f.name != "seed"
        )
        if self.method in METHODS:
            allowed = METHODS[self.method].options
        for option in self.options:
            if option not in allowed or option.startswith("really_"):
                raise SteeringError(f"the method {self.method} has no option {quoted(option)}")
        if "variant" in self.options:
            _one_of("variant", self.options["variant"], PCA_VARIANTS)
        self._check_numbers()
        if self.method == "learned":
            LearnedSettings(seed=self.seed, **self.options)
        if self.paired and self.matched is False:
            raise SteeringError("pairs are matched; leave generic safe data to other methods")
        if self.on_answers and self.pooling != "user":
            raise SteeringError(f"{self.method} looks at answers; it has no pooling of prompts")
        if self.unit_norm and self.scale:
            raise SteeringError("directions cannot have both norm 1 and a scale")
        if self.on_answers and self.matched is not None:
            raise SteeringError(f"{self.method} looks at answers; it does not match prompts")

    def _check_numbers(self) -> None:
        # Here rather than where they are used, which may be hours later.
        ranges: tuple[tuple[str, Any, float, float], ...] = (
            ("response_tokens", self.response_tokens, 1, math.inf),
            ("top_k", self.top_k, 1, math.inf),
            ("mask_massive", self.mask_massive, math.nextafter(1, 2), math.inf),
            ("scale", self.scale, 0, math.inf),
            ("false_positive_rate", self.false_positive_rate, 0, math.nextafter(1, 0)),
            ("held_out", self.held_out, 0, math.nextafter(1, 0)),
            ("seed", self.seed, 0, 2**32 - 1),
        )
        for name, value, least, most in ranges:
            if value is not None and not (least <= value <= most and math.isfinite(value)):
                raise SteeringError(f"{name} cannot be {quoted(value)}")
        if isinstance(self.pooling, tuple) and not 0 <= self.pooling[0] < self.pooling[1]:
            raise SteeringError(f"the token range {self.pooling} is empty")
        if self.layers is not None and not self.layers:
            raise SteeringError("no layers are named")

    @property
    def on_answers(self) -> bool:
        """Whether the method is about answers to unsafe prompts, and not about prompts."""
        return self.method in ("contrast", "learned")

    @property
    def paired(self) -> bool:
        """Whether the method needs pairs of an unsafe and a safe prompt."""
        if self.on_answers:
            return False
        return METHODS[self.method].needs_pairs(**self.options)

    def content(self) -> dict[str, Any]:
        """As plain data, for the provenance."""
        content = asdict(self)
        content["options"] = dict(self.options)
        for name in ("layers", "pooling", "gates"):
            if isinstance(content[name], tuple):
                content[name] = list(content[name])
        return content


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        known = ", ".join(name for name in allowed if name)
        raise SteeringError(f"unknown {what} {quoted(value)}; use one of {known}")
