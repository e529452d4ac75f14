"""Candidates: for every category, the vectors that the search chooses among."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import Part
from pysteer.extract.capture import Capture
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.methods import METHODS
from pysteer.extract.postprocess import norms, scale_to
from pysteer.extract.settings import ExtractSettings
from pysteer.pack.pack import SteeringPack
from pysteer.pack.vector import SteeringVector
from pysteer.progress import Progress
from pysteer.prompts import Prompt


class Trial(NamedTuple):
    """One way to steer a category.

    Attributes:
        candidate: which vector; see `Candidates`.
        strength: factor on it.
        scope: which tokens are steered, as a policy writes it.
    """

    candidate: str
    strength: float
    scope: str


@dataclass(frozen=True)
class Candidates:
    """What the search chooses among.

    Attributes:
        vectors: name of the candidate (method and layers) to category to vector; strength 1.0 is
            what the method recommends.
        scopes: name of the candidate to the scope that it is tried with first.
        residual_norm: layer to the typical norm of the residual stream.
        provenance: method to what its extraction says of itself.
    """

    vectors: Mapping[str, Mapping[str, SteeringVector]]
    scopes: Mapping[str, str]
    residual_norm: Mapping[int, float]
    provenance: Mapping[str, Any]

    @property
    def starts(self) -> list[Trial]:
        """What is tried of any category, in this order, before the search proposes anything."""
        return [Trial(name, 1.0, self.scopes[name]) for name in self.vectors]

    def category_of(self, candidate: str, category: str) -> str:
        """What a candidate for a category is called in `pack`."""
        return f"{category}: {candidate}"

    def pack(self, base: SteeringPack) -> SteeringPack:
        """All candidates of all categories as one pack, so that one model tries any of them.

        Args:
            base: whose base model it is for.
        """
        return SteeringPack(
            {
                self.category_of(name, category): vector
                for name, vectors in self.vectors.items()
                for category, vector in vectors.items()
            },
            base_model=base.base_model,
        )


def find_candidates(
    capture: Capture,
    part: Part,
    answers: Sequence[Prompt],
    settings: CalibrateSettings,
    *,
    cache: Path,
    progress: Progress,
) -> Candidates:
    """Extract with every method, and take its layers one by one and together.

    `learned` learns at the lowest of the layers only, since each set of layers takes it minutes,
    and holds the model still on the benign prompts, not on the safe ones. Of the other methods
    the mean over all categories comes first: what each category's direction adds to it is as much
    about the category's subject as about what the model should do.

    Args:
        capture: the model; `learned` needs torch.
        part: what to learn from; the benign prompts count as safe ones, too.
        answers: safe answers for `contrast` and `learned`.
        settings: methods, layers and seed.
        cache: a folder for what was computed, from which an interrupted call goes on.
        progress: receives progress reports.

    Raises:
        SteeringError: names what is wrong with the data.
    """
    layers = settings.layers or _middle(capture)
    vectors: dict[str, dict[str, SteeringVector]] = {}
    scopes: dict[str, str] = {}
    provenance: dict[str, Any] = {}
    residual_norm: dict[int, float] = {}
    for method in settings.methods:
        how = METHODS[method]
        trains = how.needs.gradients  # which takes minutes for each set of layers
        chosen = ExtractSettings(
            method=method,
            options={"category_steps": settings.category_steps} if trains else {},
            layers=layers[:1] if trains else layers,
            router=False,
            held_out=0.0,
            seed=settings.seed,
        )
        # Twins share topic and wording with the unsafe prompts: a vector that has to leave them as
        # they are learns to do little at all. What keeps them apart is the gate.
        safe = part.benign if how.needs.everyday_prompts else [*part.safe, *part.benign]
        data = Data(part.unsafe, safe, (), answers if how.needs.safe_answers else ())
        pack = extract(capture, data, chosen, cache=cache, progress=progress)
        residual_norm.update(pack.residual_norm)
        provenance[method] = {
            name: pack.provenance[name] for name in ("settings", "counts", "engine", "weights")
        }
        ways = {method: pack.categories}
        if not trains and len(pack.categories) > 1:
            shared = _mean(list(pack.categories.values()))
            ways = {f"{method} of all": dict.fromkeys(pack.categories, shared)} | ways
        for way, whole in ways.items():
            for part_of in _subsets(chosen.layers or ()):
                name = f"{way} at {'+'.join(map(str, part_of))}"
                vectors[name] = {c: _only(vector, part_of) for c, vector in whole.items()}
                scopes[name] = how.scope if how.scope in settings.scopes else settings.scopes[0]
    return Candidates(vectors, scopes, residual_norm, provenance)


def _middle(capture: Capture) -> tuple[int, ...]:
    """Where directions do most: from two to three fifths of the depth."""
    there = capture.sites["residual"]
    n_layer = capture.base_model.n_layer
    return tuple(sorted({min(round(d * n_layer), there[-1]) for d in (0.4, 0.5, 0.6)}))


def _subsets(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Each layer alone, from the middle one outwards, then all."""
    middle = (len(layers) - 1) / 2
    alone = sorted(layers, key=lambda layer: abs(layers.index(layer) - middle))
    return [(layer,) for layer in alone] + ([tuple(layers)] if len(layers) > 1 else [])


def _mean(vectors: Sequence[SteeringVector]) -> SteeringVector:
    """Where all of them point, as long as each is: an extraction makes them equally long."""
    first, *others = vectors
    return scale_to(sum(others, start=first), norms(first), fraction=1.0)


def _only(vector: SteeringVector, layers: Sequence[int]) -> SteeringVector:
    """The directions of some layers, which together do as much as those of all.

    Directions of L layers have 1/sqrt(L) of the length that one alone is given.
    """
    factor = math.sqrt(len(vector.layers) / len(layers))
    return SteeringVector(
        {layer: vector.direction(layer) * factor for layer in layers},
        site=vector.site,
        operator=vector.operator,
    )
