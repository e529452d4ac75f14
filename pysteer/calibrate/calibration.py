"""`calibrate`: a whole calibration, from prompts to a validated pack."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pysteer.calibrate.budget import (
    LEARNING_SHARE,
    ROUTER_SHARE,
    VALIDATION_MARGIN,
    Size,
    affordable,
    fitting_size,
)
from pysteer.calibrate.candidates import CandidateVectors, find_candidates
from pysteer.calibrate.provenance import provenance, warn_beyond_limits
from pysteer.calibrate.search import Deadline, OnRound, SearchResult, search
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import PromptSet, Split, split
from pysteer.calibrate.trials import Scorer
from pysteer.chat.form import form_content, form_of
from pysteer.engine import Engine
from pysteer.errors import SteeringError
from pysteer.evaluate.answers import Answerer, Query
from pysteer.evaluate.evaluation import UNNAMED, evaluate
from pysteer.evaluate.judges.refusal import RefusalJudge
from pysteer.evaluate.preparation import answer_identity, make_folder
from pysteer.evaluate.report import Report
from pysteer.evaluate.settings import EvaluateSettings, Sampling
from pysteer.extract.capture import Capture
from pysteer.extract.data import Data, distinct
from pysteer.extract.extraction import fit_pack_routers
from pysteer.extract.routers.settings import RouterSettings
from pysteer.journal import Journal
from pysteer.judge import Judge
from pysteer.llama.hooked import quiet_arguments
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import CategoryPolicy, Policy
from pysteer.pack.resolved import AUTO
from pysteer.pack.router import Router
from pysteer.pack.scope import Scope
from pysteer.progress import SILENT, Progress
from pysteer.prompts import Prompt, grouped

_log = logging.getLogger(__name__)

VALIDATED_BENIGN = 24
"""Most benign prompts answered to validate the pack."""

_SECONDS = "seconds per answer"


@dataclass(frozen=True)
class CalibrationResult:
    """The result of a calibration.

    Attributes:
        pack: strength 1.0 of each category is the best trial; scopes and gate are in the policy,
            figures in the provenance under "calibration".
        search: all trials.
        validation: report on the pack's vectors, with a router that was fitted without the
            validation prompts; None if the validation was interrupted, or had no time.
        test: prompts that the calibration has not seen.
    """

    pack: SteeringPack
    search: SearchResult
    validation: Report | None
    test: PromptSet


def calibrate(
    capture: Capture,
    model: str | os.PathLike[str],
    prompts: PromptSet,
    folder: str | os.PathLike[str],
    *,
    answers: Sequence[Prompt] = (),
    settings: CalibrateSettings | None = None,
    judge: Judge | None = None,
    progress: Progress = SILENT,
    on_round: OnRound = lambda result: None,
    **llama_arguments: Any,
) -> CalibrationResult:
    """Search a pack for a GGUF model, and validate the pack.

    Vector and strength of a category are chosen by their effect, forced, on validation prompts; the
    gate by its effect on prompts that its weights were fitted without. On one machine the same
    arguments give the same pack, unless time or a user ended the search (`SearchResult.stopped`).

    Args:
        capture: the model for extraction.
        model: the same model for generation: a GGUF file.
        prompts: the prompts. Unsafe prompts without a category are "unsafe".
        folder: for activations, answers and packs, from which the same call resumes; created.
        answers: safe answers for `contrast` and `learned`.
        settings: search space and limits.
        judge: decides whether an answer is safe; by default `RefusalJudge`.
        progress: receives the progress.
        on_round: called after each round of the search, with the best so far.
        **llama_arguments: other arguments of `llama_cpp.Llama`, such as n_threads.

    Raises:
        SteeringError: invalid data or settings.
    """
    started = time.monotonic()
    settings = settings or CalibrateSettings()
    judge = judge or RefusalJudge()
    folder = Path(folder)
    seconds = 60 * settings.minutes
    parts = affordable(_split(prompts, settings), capture, ROUTER_SHARE * seconds)
    make_folder(folder)
    cache = folder / "activations"
    router, blind = _routers(capture, parts, settings, cache, progress)
    candidates = find_candidates(
        capture,
        parts.train,
        answers,
        settings,
        cache=cache,
        progress=progress,
        deadline=started + LEARNING_SHARE * seconds,
    )
    base = SteeringPack(
        next(iter(candidates.vectors.values())),
        base_model=capture.base_model,
        residual_norm=candidates.residual_norm,
    )
    measurement = _Measurement(
        Path(model),
        folder,
        settings,
        judge,
        progress,
        quiet_arguments(**llama_arguments),
        parts,
        started + seconds,
    )
    result = measurement.search(base, candidates, on_round)
    pack = _assembled(base, candidates, result, router)
    pack.save(folder / "pack.gguf")
    validated = replace(pack, router=blind)
    validation = measurement.validate(validated)
    record = provenance(result, candidates, validation, validated, settings, judge, parts)
    warn_beyond_limits(result, validation, settings)
    return CalibrationResult(
        replace(pack, provenance=_provenance(capture, record)),
        result,
        validation,
        parts.test,
    )


def _split(prompts: PromptSet, settings: CalibrateSettings) -> Split:
    for rows, kind in ((prompts.unsafe, "unsafe"), (prompts.benign, "benign")):
        if not rows:
            raise SteeringError(f"no {kind} prompts; a calibration needs unsafe and benign prompts")
    named = [p if p.category else replace(p, category=UNNAMED) for p in prompts.unsafe]
    unique = PromptSet(
        distinct(named, "unsafe"),
        distinct(prompts.safe, "safe"),
        distinct(prompts.benign, "benign"),
    )
    return split(unique, settings)


def _provenance(capture: Capture, record: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of the pack: the form of the router's prompts, and the calibration."""
    form = form_content(form_of(capture.prompt_tokens))
    return {"method": "calibrated", "form": form, "calibration": record}


def _routers(
    capture: Capture,
    parts: Split,
    settings: CalibrateSettings,
    cache: Path,
    progress: Progress,
) -> tuple[Router, Router]:
    """Return the pack's router, and a router fitted without the validation prompts.

    The pack's router knows the validation prompts, so validation needs the other.
    """
    router, blind = fit_pack_routers(
        capture,
        [
            Data(part.unsafe, part.safe, part.benign)
            for part in (parts.train + parts.validation, parts.train)
        ],
        cache=cache,
        settings=RouterSettings(
            false_positive_rate=settings.max_benign_change,
            max_leak=settings.max_leak,
            look_alike_rate=settings.max_look_alike,
            seed=settings.seed,
        ),
        progress=progress,
    )
    return router, blind


@dataclass
class _Measurement:
    """Trials and validation on one model and its validation prompts, cut to the time left.

    Attributes:
        deadline: end of the calibration, in seconds of `time.monotonic()`.
        size: numbers of answered prompts.
        seconds: measured time of an answer.
    """

    model: Path
    folder: Path
    settings: CalibrateSettings
    judge: Judge
    progress: Progress
    arguments: dict[str, Any]
    parts: Split
    deadline: float
    seconds: float = 0.0

    def __post_init__(self) -> None:
        benign = min(len(self.parts.validation.benign), VALIDATED_BENIGN)
        self.size = Size(self.settings.limit, self.settings.others, benign)

    @property
    def counts(self) -> dict[str, int]:
        """Category to its number of validation prompts."""
        by_category = grouped(self.parts.validation.unsafe)
        return {name: len(rows) for name, rows in by_category.items()}

    @property
    def unsafe(self) -> dict[str, list[Prompt]]:
        by_category = grouped(self.parts.validation.unsafe)
        return {name: rows[: self.size.unsafe] for name, rows in by_category.items()}

    @property
    def benign(self) -> list[Prompt]:
        return list(self.parts.validation.benign[: self.size.benign])

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.settings.max_tokens, seed=self.settings.seed)

    def search(
        self, base: SteeringPack, candidates: CandidateVectors, on_round: OnRound
    ) -> SearchResult:
        """Search the best vector, strength and scope of each category, by forced trials."""
        settings = self.settings
        pack = candidates.pack(base)
        identity = {
            **answer_identity(self.model, settings.parallel, settings.context, self.arguments),
            "vectors": {name: vector.digest for name, vector in pack.categories.items()},
        }
        with Engine(
            self.model,
            pack=pack,
            max_sequences=settings.parallel,
            n_ctx=settings.context,
            **self.arguments,
        ) as engine:
            journal = Journal(self.folder / "trials.jsonl")
            answerer = Answerer(engine, self.sampling, journal, identity)
            self._fit_trials(answerer)
            n_validated = self.size.validation_answers(self.counts)
            return search(
                Scorer(
                    answerer,
                    self.judge,
                    self.unsafe,
                    candidates,
                    replace(settings, others=self.size.others),
                ),
                list(base.categories),
                candidates.starts,
                settings,
                deadline=Deadline(
                    self.deadline, lambda seconds: seconds * n_validated * VALIDATION_MARGIN
                ),
                progress=self.progress,
                on_round=on_round,
            )

    def _fit_trials(self, answerer: Answerer) -> None:
        """Measure the time of an answer, and cut the prompts to the time left.

        Answers that an earlier run has kept take no time: then the time measured there counts.
        """
        speed = Journal(self.folder / "speed.jsonl")
        rows = [p for group in zip_longest(*self.unsafe.values()) for p in group if p is not None]
        group = [Query(prompt.prompt) for prompt in rows[: self.settings.parallel]]
        started = time.monotonic()
        answerer.ask(group)
        seconds = (time.monotonic() - started) / len(group)
        kept = speed.get(_SECONDS)
        if not isinstance(kept, float) or seconds > kept / 10:  # not from the journal
            speed.put(_SECONDS, seconds)
        self.seconds = float(speed.get(_SECONDS))
        left = self.deadline - time.monotonic()
        size = fitting_size(self.size, self.counts, self.seconds, left, trial=True)
        self._cut("trials and validation", size or self.size.scaled(0.0))

    def _cut(self, stage: str, size: Size) -> None:
        if size != self.size:
            _log.warning(
                "the time left suffices for %d unsafe prompts of each category and %d benign "
                "prompts in %s; the figures are rougher, and more --minutes make them finer",
                size.unsafe,
                size.benign,
                stage,
            )
        self.size = size

    def validate(self, pack: SteeringPack) -> Report | None:
        """Evaluate a pack with its router deciding; None if interrupted, or without time."""
        left = self.deadline - time.monotonic()
        size = fitting_size(self.size, self.counts, self.seconds, left, trial=False)
        if size is None:
            _log.warning(
                "no time is left to validate the pack: its provenance has no validation; raise "
                "--minutes, or measure the pack with pysteer evaluate"
            )
            return None
        self._cut("the validation", size)
        path = self.folder / "validated.gguf"
        pack.save(path)
        try:
            return evaluate(
                self.model,
                path,
                [prompt for rows in self.unsafe.values() for prompt in rows],
                self.benign,
                self.folder / "validation",
                settings=EvaluateSettings(
                    sampling=self.sampling,
                    steering=AUTO,
                    isolation=(),
                    fluency=False,
                    parallel=self.settings.parallel,
                    context=self.settings.context,
                ),
                judge=self.judge,
                progress=self.progress,
                **self.arguments,
            )
        except KeyboardInterrupt:  # the search took longer, and its pack is complete
            _log.warning(
                "interrupted before the pack was validated: its provenance has no validation"
            )
            return None


def _assembled(
    base: SteeringPack, candidates: CandidateVectors, result: SearchResult, router: Router
) -> SteeringPack:
    """Return a pack whose strength 1.0 is the chosen trial of each category."""
    chosen = {name: result.chosen[name].trial for name in base.categories}
    return replace(
        base,
        categories={
            name: candidates.vectors[trial.candidate][name] * trial.strength
            for name, trial in chosen.items()
        },
        router=router,
        policy=Policy(
            conflict="strongest",
            categories={
                name: CategoryPolicy(scope=Scope.parse(trial.scope))
                for name, trial in chosen.items()
            },
        ),
    )
