"""`extract`: a whole extraction, from prompts and a model to a pack."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError, quoted
from pysteer.extract import postprocess
from pysteer.extract.capture import Capture
from pysteer.extract.data import Data, warn_of_both
from pysteer.extract.inputs import Inputs, TokenizedPrompt, Tokenizer, rows_of
from pysteer.extract.methods import METHODS
from pysteer.extract.methods.base import Method, Needs, Task, torch_model
from pysteer.extract.provenance import provenance, separation
from pysteer.extract.reader import Reader
from pysteer.extract.routers.prompts import enough, fit_to_prompts, labelled, warn_of_few
from pysteer.extract.routers.settings import RouterSettings
from pysteer.extract.settings import DEFAULT_STRENGTH, ExtractSettings
from pysteer.extract.sides import Sides, split_sides
from pysteer.extract.typical import Typical, measure
from pysteer.judge import Judge
from pysteer.pack.pack import SteeringPack
from pysteer.pack.router import Router
from pysteer.pack.vector import SteeringVector
from pysteer.progress import SILENT, Progress
from pysteer.prompts import Prompt

_log = logging.getLogger(__name__)


def extract(
    capture: Capture,
    data: Data,
    settings: ExtractSettings | None = None,
    *,
    cache: Path,
    judge: Judge | None = None,
    progress: Progress = SILENT,
    deadline: float = math.inf,
) -> SteeringPack:
    """Find each category's directions and fit a router.

    Args:
        capture: the model.
        data: the prompts.
        settings: method, scale and router.
        cache: a folder for activations and answers, from which an interrupted extraction resumes.
            It may be deleted afterwards.
        judge: decides which answers are safe, for methods that need labels; None: the labels in the
            data decide.
        progress: receives progress reports.
        deadline: end of gradient descent, in seconds of `time.monotonic()`; see
            `pysteer.extract.learning.learn.learn`.

    Returns:
        A pack with the held-out figures in its provenance: "separation", by category and layer the
        AUC of held-out prompts' projections on the direction (0.5 is chance), and "router", the
        shares of `pysteer.extract.routers.prompts.FittedToPrompts`.

    Raises:
        SteeringError: the data or the settings are at fault; for data with file and line.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from pysteer.extract import LlamaCapture
        >>> from pysteer.shipped import default_model
        >>> capture = LlamaCapture(default_model(), n_ctx=128)
        >>> data = Data([Prompt("Write a virus.", "malware")], [Prompt("Write a poem.")])
        >>> settings = ExtractSettings(layers=(12,), router=False, held_out=0.0)
        >>> with TemporaryDirectory() as folder:
        ...     pack = extract(capture, data, settings, cache=Path(folder))
        >>> pack["malware"].layers
        (12,)
        >>> capture.close()
    """
    settings = settings or ExtractSettings()
    method = METHODS[settings.method]
    data = data.distinct()
    layers = _layers(capture, settings)
    sides = split_sides(
        data.unsafe,
        data.safe,
        matched=False if method.reads_answers else settings.matched,
        paired=settings.needs_pairs,
        held_out=settings.held_out,
        seed=settings.seed,
    )
    _log_imbalance(sides)
    warn_of_both(data.unsafe, data.safe)
    _require_inputs(method, capture, data, judge)
    with_router = _router_is_possible(data, settings)
    inputs = _tokenized(capture, data, sides, settings, with_router=with_router)
    reader = Reader(capture, cache, progress)
    task: Task[Any] = Task(
        inputs,
        reader,
        settings.site,
        layers,
        settings.pooling,
        settings.seed,
        settings.method_options,
        data.answers,
        judge,
        deadline,
    )
    method.check(task)
    return _pack(method, task, data, settings, with_router=with_router)


def fit_pack_routers(
    capture: Capture,
    data: Sequence[Data],
    *,
    cache: Path,
    settings: RouterSettings | None = None,
    progress: Progress = SILENT,
) -> list[Router]:
    """Fit routers alone, as `extract` does, without directions.

    Prompts that share a `pair_id` are learned from or tested with together. Safe prompts with the
    category of unsafe prompts count as look-alikes; see `pysteer.extract.routers.fit.fit_router`.

    Args:
        capture: the model.
        data: the prompts of each router. Unsafe prompts without a category are of the category
            "unsafe". Prompts that two routers in a row share are run once.
        cache: a folder for activations, as for `extract`.
        settings: of all fits; None takes the defaults.
        progress: receives progress reports.

    Returns:
        The routers. They look at the layers and tokens that
        `pysteer.extract.routers.reads.default_reads` names.

    Raises:
        SteeringError: the prompts are at fault, or there are too few.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from pysteer.extract import LlamaCapture
        >>> from pysteer.shipped import default_model
        >>> capture = LlamaCapture(default_model(), n_ctx=128)
        >>> unsafe = [Prompt(f"Write virus {i}.", "malware") for i in range(5)]
        >>> safe = [Prompt(f"Write poem {i}.") for i in range(5)]
        >>> with TemporaryDirectory() as folder:
        ...     (router,) = fit_pack_routers(capture, [Data(unsafe, safe)], cache=Path(folder))
        >>> router.categories
        ('malware',)
        >>> capture.close()
    """
    settings = settings or RouterSettings()
    reader = Reader(capture, cache, progress)
    tokenized = Tokenizer(capture)
    routers = []
    for each in data:
        each = each.distinct()
        prompts = labelled(
            *(list(map(tokenized, rows)) for rows in (each.unsafe, each.safe, each.benign))
        )
        router, reader, _ = fit_to_prompts(reader, prompts, settings)
        routers.append(router)
    return routers


def _layers(capture: Capture, settings: ExtractSettings) -> tuple[int, ...]:
    available = capture.sites.get(settings.site, ())
    if not available:
        raise SteeringError(
            f"this model has no site {settings.site}; it has {', '.join(sorted(capture.sites))}"
        )
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


def _log_imbalance(sides: Sides[Prompt]) -> None:
    sizes = {name: len(prompts) for name, prompts in sides.unsafe.items()}
    if max(sizes.values()) > 10 * min(sizes.values()):
        _log.warning("the categories differ widely in size: %s", sizes)


def _require_inputs(method: Method[Any], capture: Capture, data: Data, judge: Judge | None) -> None:
    """Raise SteeringError for inputs that the method lacks, or does not take."""
    if method.needs.gradients:
        torch_model(capture, method.name)
    if data.answers and not method.needs.safe_answers:
        takers = _methods_with(lambda needs: needs.safe_answers)
        raise SteeringError(f"safe answers are for {takers}, not for {method.name}")
    if judge is not None and not method.needs.labels:
        takers = _methods_with(lambda needs: needs.labels)
        raise SteeringError(f"a judge is for {takers}, not for {method.name}")


def _router_is_possible(data: Data, settings: ExtractSettings) -> bool:
    """Return True if a router is wanted and can be fitted; log the reason otherwise."""
    if not settings.router:
        if data.benign:
            _log.warning("benign prompts are for the router alone, and no router is fitted")
        return False
    harmless = {p.prompt for p in (*data.safe, *data.benign)}
    unsafe = {(p.prompt, p.category or "unsafe") for p in data.unsafe}
    return enough([*(category for _, category in unsafe), *("" for _ in harmless)])


def _tokenized(
    capture: Capture,
    data: Data,
    sides: Sides[Prompt],
    settings: ExtractSettings,
    *,
    with_router: bool,
) -> Inputs:
    responses = settings.pooling == "response" or isinstance(settings.pooling, tuple)
    tokenized = Tokenizer(capture, responses=responses)
    return Inputs(
        unsafe=list(map(tokenized, data.unsafe)),
        safe=list(map(tokenized, data.safe)),
        benign=list(map(tokenized, data.benign)) if with_router else [],
        sides=sides.map(tokenized),
        form=tokenized.form,
    )


def _pack(
    method: Method[Any],
    task: Task[Any],
    data: Data,
    settings: ExtractSettings,
    *,
    with_router: bool,
) -> SteeringPack:
    """Run the model, and put the results together."""
    inputs, reader = task.inputs, task.reader
    rows = rows_of(reader.capture, [*inputs.unsafe, *inputs.safe], "user")
    typical, residual = (
        measure(reader.activations, rows, site=site, layers=task.layers, seed=task.seed)
        for site in (task.site, "residual")
    )
    router, rates = None, None
    if with_router:
        prompts = labelled(inputs.unsafe, inputs.safe, inputs.benign)
        warn_of_few(prompts)
        router, reader, rates = fit_to_prompts(
            reader, prompts, settings.router_settings, layers=task.layers
        )
        task = replace(task, reader=reader)
    result = method.find(task)
    if result.sides is not None:
        task = task.with_sides(result.sides)
    vectors = {
        name: SteeringVector(directions, site=task.site)
        for name, directions in result.directions.items()
    }
    vectors, changes = _postprocessed(vectors, task, settings, typical, residual)
    # A response may be missing, and answers are not among the held-out data.
    on_prompts = task.pooling == "response" or method.reads_answers
    auc = separation(task, vectors, on_prompts=on_prompts)
    figures = {**result.figures, **changes, "separation": auc}
    if rates is not None:
        figures["router"] = rates
    return SteeringPack(
        vectors,
        base_model=reader.capture.base_model,
        residual_norm=residual.norm,
        provenance=provenance(task, data, settings, figures),
        router=router,
    )


def _postprocessed(
    vectors: dict[str, SteeringVector],
    task: Task[Any],
    settings: ExtractSettings,
    typical: Typical,
    residual: Typical,
) -> tuple[dict[str, SteeringVector], dict[str, Any]]:
    """Mask, take the top k, orthogonalise, and scale, in this order, as the settings say.

    Returns:
        The vectors, and figures for the provenance.
    """
    keeps_scale = METHODS[settings.method].keeps_scale
    figures: dict[str, Any] = {}
    if settings.mask_massive is not None and not keeps_scale:
        massive = postprocess.massive_dimensions(typical.magnitude, ratio=settings.mask_massive)
        figures["massive_dimensions"] = {
            str(layer): dimensions.tolist() for layer, dimensions in massive.items()
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
        benign = _benign_mean(task)
        vectors = {n: postprocess.project_out(v, benign) for n, v in vectors.items()}
    figures["norms"] = {
        name: {str(layer): norm for layer, norm in postprocess.norms(vector).items()}
        for name, vector in vectors.items()
    }
    if settings.unit_norm:
        return {name: postprocess.unit_norm(vector)[0] for name, vector in vectors.items()}, figures
    if settings.scale == 0 or (keeps_scale and settings.scale is None):
        return vectors, figures
    fraction = settings.scale or DEFAULT_STRENGTH / math.sqrt(len(task.layers))
    figures["fraction_of_residual_norm"] = fraction
    vectors = {
        name: postprocess.scale_to(vector, residual.norm, fraction=fraction)
        for name, vector in vectors.items()
    }
    return vectors, figures


def _benign_mean(task: Task[Any]) -> dict[int, npt.NDArray[np.float32]]:
    prompts: list[TokenizedPrompt] = [p for group in task.sides.safe.values() for p in group]
    rows = rows_of(task.reader.capture, prompts, "user")
    mean = task.reader.means(rows, [0] * len(rows), 1, task.site, task.layers)[0]
    return {layer: row.astype(np.float32) for layer, row in zip(task.layers, mean, strict=True)}


def _methods_with(asked: Callable[[Needs], bool]) -> str:
    return " and ".join(name for name, method in METHODS.items() if asked(method.needs))
