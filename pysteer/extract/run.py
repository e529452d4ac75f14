"""From prompts and a model to a pack: the whole of an extraction."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted
from pysteer.extract import postprocess
from pysteer.extract.answers import Judge
from pysteer.extract.capture import Capture
from pysteer.extract.examples import Sides, distinct, split_sides, warn_of_both
from pysteer.extract.figures import provenance, separation
from pysteer.extract.find import check, find_directions
from pysteer.extract.session import Data, Reporter, Run, Silent
from pysteer.extract.settings import DEFAULT_STRENGTH, ExtractSettings
from pysteer.extract.typical import Typical, measure
from pysteer.pack.pack import SteeringPack
from pysteer.pack.router import Read, Router
from pysteer.pack.vector import SteeringVector
from pysteer.prompts import Prompt

_log = logging.getLogger(__name__)


def extract(
    capture: Capture,
    data: Data,
    settings: ExtractSettings | None = None,
    *,
    cache: Path,
    judge: Judge | None = None,
    report: Reporter | None = None,
) -> SteeringPack:
    """Find each category's directions, fit the router, and say where it all came from.

    Args:
        capture: the model.
        data: the prompts.
        settings: what to do.
        cache: a folder for activations, so that an interrupted extraction can be repeated and goes
            on where it stopped. May be deleted afterwards.
        judge: for the method `guided`; None takes the labels in the data.
        report: told about progress.

    Returns:
        A pack with the held-out figures in its provenance: `separation`, by category and layer the
        AUC of held-out prompts' projections on the direction (0.5 is chance), and the router's own.

    Raises:
        SteeringError: names what is wrong with the data or the settings.
    """
    data = replace(
        data,
        unsafe=distinct(data.unsafe, "unsafe"),
        safe=distinct(data.safe, "safe"),
        benign=distinct(data.benign, "benign"),
    )
    run = Run(capture, data, settings or ExtractSettings(), judge, cache, report or Silent())
    settings = run.settings
    run.layers = _layers(capture, settings)
    run.sides = split_sides(
        data.unsafe,
        data.safe,
        matched=False if settings.on_answers else settings.matched,
        paired=settings.paired,
        held_out=settings.held_out,
        seed=settings.seed,
    )
    _log_imbalance(run.sides)
    warn_of_both(data.unsafe, data.safe)
    check(run)
    fit = _router_can_be_fitted(run)
    if fit:
        run.rows(data.benign, "user")
    rows = run.rows([*data.unsafe, *data.safe], "user")
    typical, residual = (
        measure(run.activations, rows, site=site, layers=run.layers, seed=settings.seed)
        for site in (settings.site, "residual")
    )
    router = _router(run) if fit else None
    found = find_directions(run)
    vectors = {
        name: SteeringVector(directions, site=settings.site) for name, directions in found.items()
    }
    vectors = _postprocess(run, vectors, typical, residual)
    run.figures["separation"] = separation(run, vectors)
    return SteeringPack(
        vectors,
        base_model=capture.base_model,
        residual_norm=residual.norm,
        provenance=provenance(run),
        router=router,
    )


def fit_pack_routers(
    capture: Capture,
    data: Sequence[Data],
    *,
    cache: Path,
    gates: Sequence[str] = ("margin",),
    false_positive_rate: float | None = None,
    max_leak: float | None = None,
    look_alike_rate: float | None = None,
    seed: int = 0,
    report: Reporter | None = None,
) -> list[Router]:
    """Fit routers alone, without directions: what `extract` does where it fits one.

    Twins, which share a `pair_id`, are learned from or tested with together. Safe prompts of a
    category of the unsafe ones count as look-alikes; see `pysteer.extract.router.fit_router`.

    Args:
        capture: the model.
        data: what each router is fitted to; without a category unsafe prompts are of the category
            "unsafe". A prompt that the one before it was fitted to, too, is not run again.
        cache: a folder for activations, as for `extract`.
        gates: kinds of gate to fit, of `pysteer.pack.router.GATES`; "margin" or "multinomial" among
            them.
        false_positive_rate: largest share of harmless prompts that may open a gate; None is each
            kind's default.
        max_leak: largest share of the other categories' prompts that may open a category's margin
            gate; None is its default.
        look_alike_rate: largest share of the look-alikes that may open a margin gate; None is its
            default.
        seed: of every choice; the same seed gives the same routers.
        report: told about progress.

    Returns:
        The routers. They look at the layers and tokens that `pysteer.extract.router.default_reads`
        names.

    Raises:
        SteeringError: names what is wrong with the prompts, or that there are too few of them.
    """
    settings = ExtractSettings(
        gates=tuple(gates), false_positive_rate=false_positive_rate, seed=seed
    )
    routers = []
    run = Run(capture, Data((), ()), settings, None, cache, report or Silent())
    for one in data:
        run.data = Data(
            distinct(one.unsafe, "unsafe"),
            distinct(one.safe, "safe"),
            distinct(one.benign, "benign"),
        )
        routers.append(_router(run, max_leak, look_alike_rate))
    return routers


def _layers(capture: Capture, settings: ExtractSettings) -> tuple[int, ...]:
    available = capture.sites.get(settings.site, ())
    if not available:
        raise SteeringError(f"this model has no site {settings.site}")
    n_layer = capture.base_model.n_layer
    chosen = settings.layers
    if chosen is None:
        chosen = tuple(sorted({round(share * n_layer) for share in (0.4, 0.5, 0.6)}))
        chosen = tuple(layer for layer in chosen if layer in available) or available[:1]
    missing = sorted(set(chosen) - set(available))
    if missing:
        raise SteeringError(
            f"this model has no site {settings.site} at layers {quoted(missing)}; "
            f"it has layers {available[0]} to {available[-1]}"
        )
    return tuple(sorted(set(chosen)))


def _log_imbalance(sides: Sides) -> None:
    sizes = {name: len(prompts) for name, prompts in sides.unsafe.items()}
    if max(sizes.values()) > 10 * min(sizes.values()):
        _log.warning("the categories differ widely in size: %s", sizes)


def _router_can_be_fitted(run: Run) -> bool:
    """Whether a router is asked for and there are prompts enough; logged, if not."""
    from pysteer.extract.router import MIN_PROMPTS  # scikit-learn takes a while to import

    if not run.settings.router:
        if run.data.benign:
            _log.warning("benign prompts are for the router alone, and none is asked for")
        return False
    counts = Counter(label for _, label in _router_prompts(run))
    benign = counts.pop("", 0)
    if benign < MIN_PROMPTS or max(counts.values()) < MIN_PROMPTS:
        _log.warning(
            "no router is fitted: that takes %d prompts of a category and %d harmless ones",
            MIN_PROMPTS,
            MIN_PROMPTS,
        )
        return False
    return True


def _router_prompts(run: Run) -> dict[tuple[str, str], Prompt]:
    """By text and label: each once, so that none is both held out and learned from."""
    benign = (*run.data.safe, *run.data.benign)
    return {
        **{(p.prompt, p.category or "unsafe"): p for p in run.data.unsafe},
        **{(p.prompt, ""): p for p in benign},
    }


def _router(
    run: Run, max_leak: float | None = None, look_alike_rate: float | None = None
) -> Router:
    """Fitted to the residual stream of all prompts."""
    # scikit-learn takes a while to import.
    from pysteer.extract.margin import LOOK_ALIKE_RATE, MAX_LEAK
    from pysteer.extract.router import MAX_PROMPTS, fit_router

    by_text = _router_prompts(run)
    prompts = list(by_text.values())
    labels = [label for _, label in by_text]
    if len(prompts) > MAX_PROMPTS:
        _log.warning("the router is fitted to %d of %d prompts", MAX_PROMPTS, len(prompts))
        chosen = np.random.default_rng(run.settings.seed).permutation(len(prompts))
        keep = sorted(chosen[:MAX_PROMPTS].tolist())
        prompts, labels = [prompts[i] for i in keep], [labels[i] for i in keep]
    reads, h = read_prompts(run, prompts)
    unsafe = set(labels)
    return fit_router(
        h,
        labels,
        reads=reads,
        site="residual",
        kinds=run.settings.gates,
        groups=[p.pair_id if p.pair_id is not None else i for i, p in enumerate(prompts)],
        look_alikes=[
            not label and p.category != "" and p.category in unsafe
            for label, p in zip(labels, prompts, strict=True)
        ],
        false_positive_rate=run.settings.false_positive_rate,
        max_leak=MAX_LEAK if max_leak is None else max_leak,
        look_alike_rate=LOOK_ALIKE_RATE if look_alike_rate is None else look_alike_rate,
        seed=run.settings.seed,
    )


def read_prompts(
    run: Run, prompts: Sequence[Prompt]
) -> tuple[tuple[Read, ...], npt.NDArray[np.float32]]:
    """Where a router looks in this model, and what it sees there of each prompt.

    Args:
        run: whose cache is used. Its layers are captured too, in the same pass, and remembered.
        prompts: n prompts.

    Returns:
        Those of `pysteer.extract.router.default_reads` that the model has, and their activations,
        float32 of shape (n, reads, n_embd).
    """
    from pysteer.extract.router import default_reads  # scikit-learn takes a while to import

    there = set(run.capture.sites["residual"])
    reads = default_reads(run.capture.base_model.n_layer)
    reads = tuple(read for read in reads if read.layer in there)
    # Those of the directions too, which are then remembered.
    layers = sorted({read.layer for read in reads} | (set(run.layers) & there))
    poolings: list[Any] = list(dict.fromkeys(read.pooling for read in reads))
    # All poolings at once, so that each prompt is run once.
    rows = [row for pooling in poolings for row in run.rows(prompts, pooling)]
    activations = run.activations(rows, "residual", layers)
    run.remember(rows, layers, activations)
    n = len(prompts)
    h = np.stack(
        [
            activations[poolings.index(read.pooling) * n :][:n, layers.index(read.layer)]
            for read in reads
        ],
        axis=1,
    )
    return reads, h


def _postprocess(
    run: Run, vectors: dict[str, SteeringVector], typical: Typical, residual: Typical
) -> dict[str, SteeringVector]:
    """What the settings ask for, in this order: mask, top-k, orthogonalise, length."""
    settings = run.settings
    learned = settings.method == "learned"  # as it is, it has the strength it was trained for
    if settings.mask_massive is not None and not learned:
        found = postprocess.massive_dimensions(typical.magnitude, ratio=settings.mask_massive)
        run.figures["massive_dimensions"] = {
            str(layer): dimensions.tolist() for layer, dimensions in found.items()
        }
        vectors = {
            name: postprocess.mask_massive(vector, typical.magnitude, ratio=settings.mask_massive)
            for name, vector in vectors.items()
        }
    if settings.top_k is not None:
        vectors = {n: postprocess.top_k(v, settings.top_k) for n, v in vectors.items()}
    if settings.orthogonalise == "categories":
        vectors = postprocess.orthogonalise(vectors)
    elif settings.orthogonalise == "benign":
        benign = _benign_mean(run)
        vectors = {n: postprocess.project_out(v, benign) for n, v in vectors.items()}
    run.figures["norms"] = {
        name: {str(layer): norm for layer, norm in postprocess.norms(vector).items()}
        for name, vector in vectors.items()
    }
    if settings.unit_norm:
        return {name: postprocess.unit_norm(vector)[0] for name, vector in vectors.items()}
    if settings.scale == 0 or (learned and settings.scale is None):
        return vectors
    fraction = settings.scale or DEFAULT_STRENGTH / math.sqrt(len(run.layers))
    run.figures["fraction_of_residual_norm"] = fraction
    return {
        name: postprocess.scale_to(vector, residual.norm, fraction=fraction)
        for name, vector in vectors.items()
    }


def _benign_mean(run: Run) -> dict[int, npt.NDArray[np.float32]]:
    prompts = [p for group in run.sides.safe.values() for p in group]
    rows = run.rows(prompts, "user")
    mean = run.means(rows, [0] * len(rows), 1)[0]
    return {layer: row.astype(np.float32) for layer, row in zip(run.layers, mean, strict=True)}
