"""What an extraction is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pysteer.errors import SteeringError, quoted
from pysteer.extract.capture import POOLINGS, Pooling
from pysteer.extract.directions import METHODS, PCA_VARIANTS
from pysteer.vector import SITES

ALL_METHODS = (*METHODS, "learned")

DEFAULT_STRENGTH = 0.4
"""Of the residual stream's typical norm, over all steered layers together."""

MASSIVE_RATIO = 10.0


@dataclass(frozen=True)
class ExtractSettings:
    """How directions and the router are found.

    Attributes:
        method: one of `ALL_METHODS`; see `pysteer.extract.directions` and `.learned`.
        options: keyword arguments of the method: `paired` (pruned), `variant` (pca), `C`
            (logistic).
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
        router_pooling: which tokens the router looks at: "last", "prompt" or "user".
        false_positive_rate: the router's thresholds keep that share of benign prompts; None is
            Youden's J.
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
    router_pooling: str = "user"
    false_positive_rate: float | None = None
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, ALL_METHODS)
        _one_of("site", self.site, SITES)
        _one_of("router_pooling", self.router_pooling, ("last", "prompt", "user"))
        _one_of("orthogonalise", self.orthogonalise, ("", "categories", "benign"))
        if not isinstance(self.pooling, tuple):
            _one_of("pooling", self.pooling, POOLINGS)
        allowed = METHODS[self.method].options if self.method in METHODS else ()
        for option in self.options:
            if option not in allowed or option.startswith("really_"):
                raise SteeringError(f"the method {self.method} has no option {quoted(option)}")
        if "variant" in self.options:
            _one_of("variant", self.options["variant"], PCA_VARIANTS)
        self._check_numbers()
        if self.paired and self.matched is False:
            raise SteeringError("pairs are matched; leave generic safe data to other methods")
        if self.method in ("contrast", "learned") and self.pooling != "user":
            raise SteeringError(f"{self.method} looks at answers; it has no pooling of prompts")
        if self.unit_norm and self.scale:
            raise SteeringError("directions cannot have both norm 1 and a scale")
        if self.method == "contrast" and self.matched is not None:
            raise SteeringError("contrast holds answers against each other, not prompts")

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
    def paired(self) -> bool:
        """Whether the method needs pairs of an unsafe and a safe prompt."""
        if self.method == "learned" or self.method == "contrast":
            return False
        return METHODS[self.method].needs_pairs(**self.options)

    def content(self) -> dict[str, Any]:
        """As plain data, for the provenance."""
        content = asdict(self)
        content["options"] = dict(self.options)
        for name in ("layers", "pooling"):
            if isinstance(content[name], tuple):
                content[name] = list(content[name])
        return content


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        known = ", ".join(name for name in allowed if name)
        raise SteeringError(f"unknown {what} {quoted(value)}; use one of {known}")
