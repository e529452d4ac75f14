"""Settings of an extraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pysteer.errors import SteeringError
from pysteer.extract.capture import Pooling
from pysteer.extract.methods import METHODS
from pysteer.extract.routers.settings import RouterSettings
from pysteer.pack.router import GATES, POOLINGS
from pysteer.pack.vector import SITES
from pysteer.settings import check, one_of, setting

DEFAULT_STRENGTH = 0.4
"""Share of the residual stream's typical norm, over all steered layers together."""

MASSIVE_RATIO = 10.0

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction: directions, their scale, and the router.

    Attributes:
        method: a name in `pysteer.extract.methods.METHODS`.
        options: options of the method, by name; see `Method.options`.
        site: where in a block.
        layers: block indices; None is three around the middle.
        pooling: which tokens' activations are averaged; see `Pooling`. Methods that read answers
            average tokens of the answers instead.
        matched: True: each category is held against safe prompts of the same category. None: True
            if every category has safe prompts.
        mask_massive: dimensions whose typical activation is above this many times the median are
            set to 0; None leaves them, and so does a method that keeps its scale. This step and
            those below are done in this order.
        top_k: number of dimensions of each direction that are kept; None keeps all.
        orthogonalise: "categories" removes what categories share, "benign" the mean of the safe
            activations; "" removes nothing.
        unit_norm: directions of norm 1; the norms before go into the provenance.
        scale: fraction of the residual stream's typical norm that strength 1 adds at each layer;
            None is 0.4 / sqrt(number of layers), or no scaling for a method that keeps its scale; 0
            keeps the directions as the method found them.
        router: fit a router.
        gates: kinds of gate of the router.
        false_positive_rate: largest share of benign prompts that the router's thresholds let
            through; None is each kind's own rule, see `pysteer.extract.routers.fit.fit_router`.
        held_out: share of the prompts kept for the reported figures.
        seed: of every choice.

    Raises:
        SteeringError: a value out of range, or settings that exclude each other.

    Examples:
        >>> ExtractSettings(method="pca", options={"variant": "centred"}).needs_pairs
        False
        >>> ExtractSettings(method="median")
        Traceback (most recent call last):
        pysteer.errors.SteeringError: unknown method 'median'; use one of mean, pruned, guided, ...
    """

    method: str = setting("mean", "How directions are found.", choices=tuple(METHODS))
    options: Mapping[str, Any] = setting({}, "Options of the method.")
    site: str = setting("residual", "Where in a block.", choices=SITES)
    layers: tuple[int, ...] | None = setting(
        None, "Layers; without, three around the middle.", minimum=0
    )
    pooling: Pooling = setting("user", "Tokens whose activations are averaged.")
    matched: bool | None = setting(
        None, "Hold each category against safe prompts of the same category."
    )
    mask_massive: float | None = setting(
        MASSIVE_RATIO, "Leave out dimensions above so many times the median.", above=1
    )
    top_k: int | None = setting(None, "Keep only so many dimensions.", minimum=1)
    orthogonalise: str = setting(
        "",
        "Remove what categories share, or the benign mean.",
        choices=("", "categories", "benign"),
    )
    unit_norm: bool = setting(False, "Directions of norm 1.")
    scale: float | None = setting(
        None,
        "Fraction of the residual's norm that strength 1 adds; 0 leaves directions as found.",
        minimum=0,
    )
    router: bool = setting(True, "Fit a router.")
    gates: tuple[str, ...] = setting(("margin",), "Kinds of gate of the router.", choices=GATES)
    false_positive_rate: float | None = setting(
        None, "Largest share of benign prompts that may open a gate.", minimum=0, below=1
    )
    held_out: float = setting(
        0.2, "Share of prompts kept for the reported figures.", minimum=0, below=1
    )
    seed: int = setting(0, "The same seed gives the same pack.", minimum=0, maximum=MAX_SEED)

    def __post_init__(self) -> None:
        if isinstance(self.pooling, tuple):
            if not 0 <= self.pooling[0] < self.pooling[1]:
                raise SteeringError(f"the token range {self.pooling} is empty; write (start, stop)")
        else:
            one_of("pooling", self.pooling, (*POOLINGS, "response"))
        check(self)
        if self.layers is not None and not self.layers:
            raise SteeringError("no layers are named; name one or more, or pass None")
        name, reads_answers = self.method, METHODS[self.method].reads_answers
        if self.needs_pairs and self.matched is False:
            raise SteeringError(
                f"{name} takes pairs, and pairs are matched; use another method for generic data"
            )
        if reads_answers and self.pooling != "user":
            raise SteeringError(f"{name} reads answers and has no pooling of prompts")
        if reads_answers and self.matched is not None:
            raise SteeringError(f"{name} reads answers and does not match prompts")
        if self.unit_norm and self.scale:
            raise SteeringError("directions cannot have both norm 1 and a scale; choose one")
        self.router_settings  # noqa: B018 - checks the gates

    @property
    def method_options(self) -> Any:
        """The method's options, as an instance of `Method.options`."""
        return METHODS[self.method].configured(self.options)

    @property
    def needs_pairs(self) -> bool:
        """True if row i of the unsafe prompts must belong to row i of the safe ones."""
        return METHODS[self.method].needs_pairs(self.method_options)

    @property
    def router_settings(self) -> RouterSettings:
        """Settings of the router."""
        return RouterSettings(
            gates=self.gates, false_positive_rate=self.false_positive_rate, seed=self.seed
        )
