"""Candidate vectors of every category, for the search."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import PromptSet
from pysteer.extract.capture import Capture
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.learning.settings import OutOfTimeError
from pysteer.extract.methods import METHODS
from pysteer.extract.postprocess import norms, scale_to
from pysteer.extract.settings import ExtractSettings
from pysteer.pack.pack import SteeringPack
from pysteer.pack.vector import SteeringVector
from pysteer.progress import Progress
from pysteer.prompts import Prompt

_log = logging.getLogger(__name__)

FALLBACK = "mean"
"""Method for a calibration without time to learn."""


class Trial(NamedTuple):
    """Steering of one category in the search.

    Attributes:
        candidate: name of a vector; see `CandidateVectors`.
        strength: factor on the vector.
        scope: steered tokens, as a policy writes them.
    """

    candidate: str
    strength: float
    scope: str


@dataclass(frozen=True)
class CandidateVectors:
    """The vectors that the search chooses among.

    Attributes:
        vectors: name of the candidate (method and layers) to category to vector; strength 1.0 is
            the method's recommendation.
        scopes: name of the candidate to the scope of its first trial.
        residual_norm: layer to the typical norm of the residual stream.
        provenance: method to the provenance of its extraction.
    """

    vectors: Mapping[str, Mapping[str, SteeringVector]]
    scopes: Mapping[str, str]
    residual_norm: Mapping[int, float]
    provenance: Mapping[str, Any]

    @property
    def starts(self) -> list[Trial]:
        """First trials of every category, in order, before the search proposes any."""
        return [Trial(name, 1.0, self.scopes[name]) for name in self.vectors]

    def category_of(self, candidate: str, category: str) -> str:
        """Return the name in `pack` of a candidate for a category."""
        return f"{category}: {candidate}"

    def pack(self, base: SteeringPack) -> SteeringPack:
        """Return all candidates of all categories as one pack, so that one model tries them all.

        Args:
            base: a pack for the same base model.
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
    prompts: PromptSet,
    answers: Sequence[Prompt],
    settings: CalibrateSettings,
    *,
    cache: Path,
    progress: Progress,
    deadline: float = math.inf,
) -> CandidateVectors:
    """Extract with every method, at each layer alone and at all layers together.

    `learned` learns at the lowest layer only, since each set of layers takes minutes, and holds the
    model still on the benign prompts, not on the safe prompts. Of the other methods the mean over
    all categories comes first: each category's own difference from the mean is as much about the
    category's subject as about the behaviour.

    Args:
        capture: the model; `learned` needs torch.
        prompts: training prompts; the benign prompts count as safe too.
        answers: safe answers for `contrast` and `learned`.
        settings: methods, layers and seed.
        cache: folder for activations, from which an interrupted call resumes.
        progress: receives the progress.
        deadline: end of learning, in seconds of `time.monotonic()`. If `learned` has not taken a
            step by then, `mean` takes its place, which is logged.

    Raises:
        SteeringError: invalid data.
    """
    layers = settings.layers or _middle(capture)
    vectors: dict[str, dict[str, SteeringVector]] = {}
    scopes: dict[str, str] = {}
    provenance: dict[str, Any] = {}
    residual_norm: dict[int, float] = {}
    methods = list(settings.methods)
    for method in methods:
        how = METHODS[method]
        trains = how.needs.gradients  # minutes for each set of layers
        chosen = ExtractSettings(
            method=method,
            options={"category_steps": settings.category_steps} if trains else {},
            layers=layers[:1] if trains else layers,
            router=False,
            held_out=0.0,
            seed=settings.seed,
        )
        # Twins share topic and wording with the unsafe prompts: a vector that must spare twins
        # learns to do little at all. The gate keeps twins and unsafe prompts apart.
        safe = prompts.benign if how.needs.everyday_prompts else [*prompts.safe, *prompts.benign]
        data = Data(prompts.unsafe, safe, (), answers if how.needs.safe_answers else ())
        try:
            pack = extract(capture, data, chosen, cache=cache, progress=progress, deadline=deadline)
        except OutOfTimeError as error:
            _log.warning("%s: %s; raise --minutes", method, error)
            if methods[-1] == method and not vectors:
                _log.warning("the directions are found by %s instead, which steers worse", FALLBACK)
                methods.append(FALLBACK)
            continue
        residual_norm.update(pack.residual_norm)
        provenance[method] = {
            name: pack.provenance[name] for name in ("settings", "counts", "engine", "weights")
        }
        sources = {method: pack.categories}
        if not trains and len(pack.categories) > 1:
            shared = _mean(list(pack.categories.values()))
            sources = {f"{method} of all": dict.fromkeys(pack.categories, shared)} | sources
        for source, whole in sources.items():
            for subset in _subsets(chosen.layers or ()):
                name = f"{source} at {'+'.join(map(str, subset))}"
                vectors[name] = {c: _restricted(vector, subset) for c, vector in whole.items()}
                scopes[name] = how.scope if how.scope in settings.scopes else settings.scopes[0]
    return CandidateVectors(vectors, scopes, residual_norm, provenance)


def _middle(capture: Capture) -> tuple[int, ...]:
    """Return three layers at two to three fifths of the depth, where directions do most."""
    layers = capture.sites["residual"]
    n_layer = capture.base_model.n_layer
    return tuple(sorted({min(round(d * n_layer), layers[-1]) for d in (0.4, 0.5, 0.6)}))


def _subsets(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Return each layer alone, from the middle outwards, then all layers."""
    middle = (len(layers) - 1) / 2
    alone = sorted(layers, key=lambda layer: abs(layers.index(layer) - middle))
    return [(layer,) for layer in alone] + ([tuple(layers)] if len(layers) > 1 else [])


def _mean(vectors: Sequence[SteeringVector]) -> SteeringVector:
    """Return the mean direction at the length of the vectors, which extraction makes equal."""
    first, *others = vectors
    return scale_to(sum(others, start=first), norms(first), fraction=1.0)


def _restricted(vector: SteeringVector, layers: Sequence[int]) -> SteeringVector:
    """Return the directions of some layers, scaled to do as much as all layers together.

    Directions at L layers have 1/sqrt(L) of the length of a direction at a single layer.
    """
    factor = math.sqrt(len(vector.layers) / len(layers))
    return SteeringVector(
        {layer: vector.direction(layer) * factor for layer in layers},
        site=vector.site,
        operator=vector.operator,
    )
