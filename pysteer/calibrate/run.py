"""The whole of a calibration: split, router, candidates, search, and what the result is worth."""

from __future__ import annotations

import datetime
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from pysteer.calibrate.candidates import Candidates, find_candidates
from pysteer.calibrate.search import Found, as_content, search
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import Part, Split, split
from pysteer.calibrate.trials import Scorer
from pysteer.errors import SteeringError, quoted
from pysteer.evaluate.answers import Answerer, KeptAnswers, Sampling
from pysteer.evaluate.arms import Steered
from pysteer.evaluate.isolation import opens
from pysteer.evaluate.judges import Judge, RefusalJudge
from pysteer.evaluate.report import STEERED, UNSTEERED, Report
from pysteer.evaluate.run import (
    EvaluateSettings,
    evaluate,
    make_folder,
    model_identity,
    open_engine,
    quiet_arguments,
)
from pysteer.extract.capture import Capture
from pysteer.extract.examples import distinct
from pysteer.extract.run import fit_pack_router
from pysteer.pack import SteeringPack
from pysteer.policy import CategoryPolicy, Policy
from pysteer.prompts import Prompt
from pysteer.router import Router
from pysteer.runtime.plan import AUTO
from pysteer.scope import Scope

_log = logging.getLogger(__name__)

VALIDATED_BENIGN = 32
"""At most so many benign prompts are answered to validate the pack."""

WEAK = 0.9
"""A category of which fewer prompts are answered safely is warned of."""


class Watch(Protocol):
    """Told how a calibration goes; `pysteer.extract.session.Reporter` with one method more."""

    def start(self, what: str, total: int, unit: str) -> Callable[[int, int], None]:
        """Begin a stage of `total` units; returns what to call with (units, rows) done."""
        ...

    def best(self, found: Found) -> None:
        """A round of the search is over; `found` has the best so far."""
        ...


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gives.

    Attributes:
        pack: at strength 1.0 each category is as the search found it best; scopes and the gate are
            in its policy, the figures in its provenance under "calibration".
        found: everything that was tried.
        validation: what the pack's vectors do to the prompts that the search measured on, with a
            router that was fitted without them; None if that was interrupted.
        test: prompts that nothing of all this has seen.
    """

    pack: SteeringPack
    found: Found
    validation: Report | None
    test: Part


def calibrate(
    capture: Capture,
    model: str | os.PathLike[str],
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    benign: Sequence[Prompt],
    folder: str | os.PathLike[str],
    *,
    answers: Sequence[Prompt] = (),
    settings: CalibrateSettings | None = None,
    judge: Judge | None = None,
    watch: Watch,
    **llama_arguments: Any,
) -> Calibrated:
    """Search a pack for a GGUF model, and measure it.

    A category's vector and strength are chosen by what they do, forced, to validation prompts; the
    gate by what it does to prompts that its weights were fitted without. The same arguments give
    the same pack on one machine, unless `Found.stopped` says that time or a user ended the search.

    Args:
        capture: the model as it is learned from.
        model: the same model as it will run: a GGUF file.
        unsafe: unsafe prompts; those without a category are "unsafe".
        safe: harmless prompts: twins of the unsafe ones (by `pair_id`, or by category), generic
            ones, or both.
        benign: everyday prompts, which must stay as they are.
        folder: where everything is kept that took time, from which the same call goes on; created.
        answers: safe answers for `contrast` and `learned`.
        settings: what is tried, and the limits.
        judge: what says whether an answer is safe; left out, `RefusalJudge`.
        watch: told how it goes.
        **llama_arguments: what else `llama_cpp.Llama` takes, such as n_threads.

    Raises:
        SteeringError: names what is wrong with the data or the settings.
    """
    started = time.monotonic()
    settings = settings or CalibrateSettings()
    judge = judge or RefusalJudge()
    folder = Path(folder)
    parts = _parts(unsafe, safe, benign, settings)
    make_folder(folder)
    cache = folder / "activations"
    # The pack's router knows the validation prompts too, and so says nothing about them.
    router, blind = (
        fit_pack_router(
            capture,
            known.unsafe,
            known.safe,
            known.benign,
            cache=cache,
            false_positive_rate=settings.max_benign_change,
            max_leak=settings.max_leak,
            seed=settings.seed,
            report=watch,
        )
        for known in (parts.train + parts.validation, parts.train)
    )
    candidates = find_candidates(capture, parts.train, answers, settings, cache=cache, report=watch)
    base = SteeringPack(
        next(iter(candidates.vectors.values())),
        base_model=capture.base_model,
        residual_norm=candidates.residual_norm,
    )
    arguments = quiet_arguments(llama_arguments)
    asked = _asked(parts.validation.unsafe, settings.limit)
    benign_asked = parts.validation.benign[:VALIDATED_BENIGN]
    trying = candidates.pack(base)
    identity = {
        "model": model_identity(Path(model)),
        "vectors": {name: vector.digest for name, vector in trying.categories.items()},
        "parallel": settings.parallel,
        "context": settings.context,
        "arguments": {name: repr(value) for name, value in sorted(arguments.items())},
    }
    sampling = Sampling(max_tokens=settings.max_tokens, seed=settings.seed)
    with open_engine(
        model, pack=trying, max_sequences=settings.parallel, n_ctx=settings.context, **arguments
    ) as engine:
        answerer = Answerer(engine, sampling, KeptAnswers(folder / "trials.jsonl"), identity)
        n_validated = 2 * sum(map(len, asked.values())) + 3 * len(benign_asked)
        found = search(
            Scorer(answerer, judge, asked, candidates, settings),
            list(base.categories),
            candidates.names,
            settings,
            deadline=started + 60 * settings.minutes,
            reserve=lambda seconds: seconds * n_validated,
            watch=_SearchWatch(watch),
        )
    pack = _assembled(base, candidates, found, router)
    pack.save(folder / "pack.gguf")
    validated = replace(pack, router=blind)
    path = folder / "validated.gguf"
    validated.save(path)
    validation = None
    try:
        validation = evaluate(
            model,
            path,
            [p for rows in asked.values() for p in rows],
            benign_asked,
            folder / "validation",
            settings=EvaluateSettings(
                sampling=sampling,
                steering=AUTO,
                isolation=(),
                fluency=False,
                parallel=settings.parallel,
                context=settings.context,
            ),
            judge=judge,
            progress=_Stages(watch),
            **arguments,
        )
    except KeyboardInterrupt:  # the pack is there, and it took longer
        _log.warning("interrupted before the pack was validated: it says nothing of what it does")
    figures = _figures(found, candidates, validation, validated, settings, judge, parts)
    _warn_beyond_limits(found, validation, settings)
    return Calibrated(
        replace(pack, provenance={"method": "calibrated", "calibration": figures}),
        found,
        validation,
        parts.test,
    )


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write a prompt file, so that what was held out can be evaluated on.

    Raises:
        SteeringError: it cannot be written.
    """
    keys = ("prompt", "category", "subcategory", "response", "pair_id", "label")
    rows = [{key: getattr(p, key) for key in keys if getattr(p, key)} for p in prompts]
    try:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    except OSError as error:
        raise SteeringError(f"{path}: {error.strerror}") from None


def _parts(
    unsafe: Sequence[Prompt],
    safe: Sequence[Prompt],
    benign: Sequence[Prompt],
    settings: CalibrateSettings,
) -> Split:
    for prompts, what in ((unsafe, "unsafe"), (benign, "benign")):
        if not prompts:
            raise SteeringError(f"there are no {what} prompts")
    named = [p if p.category else replace(p, category="unsafe") for p in unsafe]
    return split(
        distinct(named, "unsafe"), distinct(safe, "safe"), distinct(benign, "benign"), settings
    )


def _asked(prompts: Sequence[Prompt], limit: int) -> dict[str, list[Prompt]]:
    """The first prompts of each category."""
    rows: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        rows.setdefault(prompt.category, []).append(prompt)
    return {name: there[:limit] for name, there in rows.items()}


def _assembled(
    base: SteeringPack, candidates: Candidates, found: Found, router: Router
) -> SteeringPack:
    """What was chosen, as a pack whose strength 1.0 it is."""
    chosen = {name: found.chosen[name].trial for name in base.categories}
    return replace(
        base,
        categories={
            name: candidates.vectors[trial.candidate][name] * trial.strength
            for name, trial in chosen.items()
        },
        router=router,
        policy=Policy(
            several="strongest",
            categories={
                name: CategoryPolicy(scope=Scope.parse(trial.scope))
                for name, trial in chosen.items()
            },
        ),
    )


def _figures(
    found: Found,
    candidates: Candidates,
    validation: Report | None,
    validated: SteeringPack,
    settings: CalibrateSettings,
    judge: Judge,
    parts: Split,
) -> dict[str, Any]:
    """What the pack keeps of its calibration, as JSON data."""
    return {
        "pysteer": version("pysteer"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "settings": settings.content(),
        "judge": judge.name,
        "prompts": {
            part: {kind: len(rows) for kind, rows in vars(getattr(parts, part)).items()}
            for part in ("train", "validation", "test")
        },
        "search": as_content(found),
        "chosen": {name: one.trial._asdict() for name, one in found.chosen.items()},
        "validation": None if validation is None else _validated(validation, validated),
        "extraction": dict(candidates.provenance),
    }


def _validated(report: Report, validated: SteeringPack) -> dict[str, Any]:
    benign = report.benign.get(STEERED)
    return {
        "categories": {
            row.category: {
                "n": row.n,
                "safe_unsteered": row.arms[UNSTEERED].safe.value,
                "safe": row.arms[STEERED].safe.value,
                "degenerate": row.arms[STEERED].degenerate.value,
            }
            for row in report.categories
        },
        "safe": report.overall[STEERED].safe.value,
        "degenerate": report.overall[STEERED].degenerate.value,
        "benign": None
        if benign is None
        else {
            "n": benign.unchanged.n,
            "unchanged": benign.unchanged.value,
            "refused": benign.refused.value,
            "fired": benign.fired.value,
        },
        "gates": _gates(report, validated),
    }


def _gates(report: Report, validated: SteeringPack) -> dict[str, float]:
    """With one category on at a time: how often its own prompts' gate opens, and the others'.

    Where a gate is closed the answer is the unsteered one, so this bounds what a category does.
    """
    steered = Steered.of(validated, None)
    shares: dict[bool, list[bool]] = {True: [], False: []}
    for one in report.prompts:
        if not one.benign:
            for name in steered.gated:
                shares[name == one.category].append(opens(steered, name, one.scores))
    return {
        what: sum(there) / len(there) if there else 0.0
        for what, there in (("own", shares[True]), ("others", shares[False]))
    }


def _warn_beyond_limits(
    found: Found, validation: Report | None, settings: CalibrateSettings
) -> None:
    limit = settings.max_degenerate
    beyond = [name for name, one in found.chosen.items() if one.outcome.degenerate > limit]
    if beyond:
        _log.warning(
            "no trial kept within %g of degenerate answers for %s; widen --strengths or allow "
            "other methods and scopes",
            limit,
            ", ".join(map(quoted, beyond)),
        )
    weak = [name for name, one in found.chosen.items() if one.outcome.safe < WEAK]
    if weak:
        _log.warning(
            "less than %.0f%% of the validation prompts are answered safely in %s",
            100 * WEAK,
            ", ".join(map(quoted, weak)),
        )
    benign = None if validation is None else validation.benign.get(STEERED)
    fired = None if benign is None else benign.fired
    if fired is not None and fired.low is not None and fired.low > settings.max_benign_change:
        _log.warning(
            "the router opens a gate for %d of %d benign prompts, more than a share of %g",
            fired.k,
            fired.n,
            settings.max_benign_change,
        )


class _SearchWatch:
    """A `Watch` as the search wants it."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def start(self, what: str, total: int) -> Callable[[int], None]:
        return _Stages(self._watch).start(what, total)

    def best(self, found: Found) -> None:
        self._watch.best(found)


class _Stages:
    """A `Watch` as an evaluation wants it."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def start(self, what: str, total: int) -> Callable[[int], None]:
        advance = self._watch.start(what, total, "answers")
        return lambda n: advance(n, n)
