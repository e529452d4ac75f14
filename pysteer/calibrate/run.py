"""The whole of a calibration: split, router, candidates, search, and what the result is worth."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pysteer.calibrate.candidates import Candidates, find_candidates
from pysteer.calibrate.figures import figures, warn_beyond_limits
from pysteer.calibrate.search import Found, search
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import Part, Split, split
from pysteer.calibrate.trials import Scorer
from pysteer.errors import SteeringError
from pysteer.evaluate.answers import Answerer, KeptAnswers, Sampling
from pysteer.evaluate.judges import Judge, RefusalJudge
from pysteer.evaluate.report import Report
from pysteer.evaluate.run import (
    EvaluateSettings,
    evaluate,
    make_folder,
    model_identity,
    open_engine,
    quiet_arguments,
)
from pysteer.extract.capture import Capture
from pysteer.extract.data import Data, distinct
from pysteer.extract.extraction import fit_pack_routers
from pysteer.extract.routers.settings import RouterSettings
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import CategoryPolicy, Policy
from pysteer.pack.resolved import AUTO
from pysteer.pack.router import Router
from pysteer.pack.scope import Scope
from pysteer.progress import Advance
from pysteer.prompts import Prompt, grouped

_log = logging.getLogger(__name__)

VALIDATED_BENIGN = 24
"""At most so many benign prompts are answered to validate the pack."""

VALIDATION_MARGIN = 1.3
"""How much longer an answer takes there than in trials: 1.2 on the default model, and to spare."""


class Watch(Protocol):
    """A `Progress` that is also told the outcome of each round of the search."""

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        """See `Progress`."""
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
    known = (parts.train + parts.validation, parts.train)
    router, blind = fit_pack_routers(
        capture,
        [Data(part.unsafe, part.safe, part.benign) for part in known],
        cache=cache,
        settings=RouterSettings(
            false_positive_rate=settings.max_benign_change,
            max_leak=settings.max_leak,
            look_alike_rate=settings.max_look_alike,
            seed=settings.seed,
        ),
        progress=watch,
    )
    candidates = find_candidates(
        capture, parts.train, answers, settings, cache=cache, progress=watch
    )
    base = SteeringPack(
        next(iter(candidates.vectors.values())),
        base_model=capture.base_model,
        residual_norm=candidates.residual_norm,
    )
    trying = _Trying(
        Path(model),
        folder,
        settings,
        judge,
        watch,
        quiet_arguments(llama_arguments),
        unsafe={
            name: rows[: settings.limit] for name, rows in grouped(parts.validation.unsafe).items()
        },
        benign=parts.validation.benign[:VALIDATED_BENIGN],
    )
    found = trying.search(base, candidates, started + 60 * settings.minutes)
    pack = _assembled(base, candidates, found, router)
    pack.save(folder / "pack.gguf")
    validated = replace(pack, router=blind)
    validation = trying.validate(validated)
    calibration = figures(found, candidates, validation, validated, settings, judge, parts)
    warn_beyond_limits(found, validation, settings)
    return Calibrated(
        replace(pack, provenance={"method": "calibrated", "calibration": calibration}),
        found,
        validation,
        parts.test,
    )


@dataclass(frozen=True)
class _Trying:
    """What trials and the validation of their outcome share: a model, and prompts to ask it."""

    model: Path
    folder: Path
    settings: CalibrateSettings
    judge: Judge
    watch: Watch
    arguments: dict[str, Any]
    unsafe: dict[str, list[Prompt]]
    benign: list[Prompt]

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.settings.max_tokens, seed=self.settings.seed)

    def search(self, base: SteeringPack, candidates: Candidates, deadline: float) -> Found:
        """The best vector, strength and scope of each category, by what they do when forced."""
        settings = self.settings
        pack = candidates.pack(base)
        identity = {
            "model": model_identity(self.model),
            "vectors": {name: vector.digest for name, vector in pack.categories.items()},
            "parallel": settings.parallel,
            "context": settings.context,
            "arguments": {name: repr(value) for name, value in sorted(self.arguments.items())},
        }
        # Each harmful prompt is answered twice then; benign ones are compared in a third way, too.
        n_validated = 2 * sum(map(len, self.unsafe.values())) + 3 * len(self.benign)
        with open_engine(
            self.model,
            pack=pack,
            max_sequences=settings.parallel,
            n_ctx=settings.context,
            **self.arguments,
        ) as engine:
            kept = KeptAnswers(self.folder / "trials.jsonl")
            answerer = Answerer(engine, self.sampling, kept, identity)
            return search(
                Scorer(answerer, self.judge, self.unsafe, candidates, settings),
                list(base.categories),
                candidates.starts,
                settings,
                deadline=deadline,
                reserve=lambda seconds: seconds * n_validated * VALIDATION_MARGIN,
                watch=_SearchWatch(self.watch),
            )

    def validate(self, pack: SteeringPack) -> Report | None:
        """What a pack does with its router deciding; None if that was interrupted."""
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
                progress=_Stages(self.watch),
                **self.arguments,
            )
        except KeyboardInterrupt:  # the pack is there, and it took longer
            _log.warning(
                "interrupted before the pack was validated: it says nothing of what it does"
            )
            return None


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
            conflict="strongest",
            categories={
                name: CategoryPolicy(scope=Scope.parse(trial.scope))
                for name, trial in chosen.items()
            },
        ),
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
        return self._watch.start(what, total, "answers")
