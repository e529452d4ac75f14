"""The whole of an evaluation: which arms are run over which prompts, and what becomes of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import llama_cpp

from pysteer.engine import Engine
from pysteer.errors import SteeringError
from pysteer.evaluate.answering import Answers, answer_everything
from pysteer.evaluate.answers import Answer, Answerer, KeptAnswers, Sampling
from pysteer.evaluate.arms import Arm, Own, Steered, main_arms
from pysteer.evaluate.figures import (
    arm_figures,
    benign_by_category,
    benign_figures,
    category_figures,
    curve,
)
from pysteer.evaluate.intervals import share
from pysteer.evaluate.isolation import Mode, matrix
from pysteer.evaluate.judges import Item, Judge, RefusalJudge, Reward, Verdict
from pysteer.evaluate.likelihood import Likelihood
from pysteer.evaluate.metrics import is_degenerate
from pysteer.evaluate.refusal import is_refusal
from pysteer.evaluate.report import (
    BENIGN,
    STEERED,
    UNSTEERED,
    AnswerRecord,
    BenignFigures,
    NoiseFloor,
    PromptRecord,
    Report,
    RouterFigures,
)
from pysteer.evaluate.router_figures import Routed, router_figures
from pysteer.evaluate.verdicts import scores, verdicts
from pysteer.extract.capture import file_identity
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import Steering
from pysteer.prompts import Prompt
from pysteer.runtime.steered import InForce

ANSWERS = "answers.jsonl"
VERDICTS = "verdicts.jsonl"
UNNAMED = "unsafe"
"""The category of prompts that name none."""


class Progress(Protocol):
    """Told what is being done."""

    def start(self, what: str, total: int) -> Callable[[int], None]:
        """A stage begins; what is returned is called with the number of units just done."""
        ...


class Silent:
    """Tells nobody."""

    def start(self, what: str, total: int) -> Callable[[int], None]:
        """See `Progress`."""
        return lambda n: None


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured, and how.

    Attributes:
        sampling: how answers are drawn.
        steering: of the steered arm; None: by the policy if that does anything, else each prompt's
            own category, forced.
        strengths: further strengths for the trade-off curves: factors on the steered arm's.
        isolation: which matrices: "gated", "forced"; None: gated, where the pack has a router.
        fluency: whether to measure log-likelihoods under the unsteered model.
        limit: at most so many prompts of each category, and benign ones; None: all.
        parallel: how many prompts are answered at once. Part of what determines an answer.
        context: tokens that these share.
    """

    sampling: Sampling = field(default_factory=Sampling)
    steering: Steering | InForce | Own = None
    strengths: Sequence[float] = ()
    isolation: Sequence[Mode] | None = None
    fluency: bool = True
    limit: int | None = None
    parallel: int = 8
    context: int = 4096


def evaluate(
    model: str | os.PathLike[str],
    pack: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
    folder: str | os.PathLike[str],
    *,
    settings: EvaluateSettings | None = None,
    policy: Policy | None = None,
    judge: Judge | None = None,
    reward: Reward | None = None,
    progress: Progress | None = None,
    **llama_arguments: Any,
) -> Report:
    """Answer prompts with and without steering, judge the answers, and count.

    Args:
        model: a GGUF model.
        pack: a pack file, or a plain llama.cpp control vector.
        prompts: harmful ones, each with its category, which need not be one of the pack's. Those
            without are the category "unsafe".
        benign: harmless ones; may be none.
        folder: where answers are kept, in `answers.jsonl`, from which the same call goes on after
            it was interrupted; created.
        settings: what is measured, and how.
        policy: goes before the pack's own.
        judge: what says whether an answer is safe; left out, `RefusalJudge`.
        reward: what says how good an answer is, or nothing.
        progress: told what is being done.
        **llama_arguments: what else `llama_cpp.Llama` takes, such as n_threads.

    Raises:
        SteeringError: files, prompts or settings that cannot be.
    """
    settings = settings or EvaluateSettings()
    judge = judge or _default_judge()
    progress = progress or Silent()
    folder = Path(folder)
    steered = Steered.of(SteeringPack.load(pack), policy)
    settings = _settled(settings, steered)
    harmful, harmless = _rows(prompts, benign, settings.limit)
    make_folder(folder)
    arguments = quiet_arguments(llama_arguments)
    arms = main_arms(settings.steering, settings.strengths)
    identity = _identity(Path(model), Path(pack), steered, settings, arguments)
    engine = open_engine(
        model,
        pack=steered.pack,
        policy=policy,
        max_sequences=settings.parallel,
        max_queue=max(256, settings.parallel),
        n_ctx=settings.context,
        **arguments,
    )
    with engine:
        about = {"file": Path(model).name, **vars(engine.base_model)}
        answerer = Answerer(engine, settings.sampling, KeptAnswers(folder / ANSWERS), identity)
        found = answer_everything(
            answerer,
            steered,
            arms,
            harmful,
            harmless,
            isolation=settings.isolation or (),
            group_size=settings.parallel,
            progress=progress,
        )
    records = _judged(found, judge, reward, folder / VERDICTS, progress)
    if settings.fluency:
        arguments["n_ctx"] = settings.context
        with Likelihood(model, **arguments) as likelihood:
            records = _with_fluency(records, arms, likelihood, progress)
    return _report(found, records, steered, arms, settings, judge, reward, about, Path(pack))


def make_folder(folder: Path) -> None:
    """Make a folder that answers are kept in.

    Raises:
        SteeringError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteeringError(f"{folder}: {error.strerror}; name another folder") from None


def quiet_arguments(llama_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `llama_cpp.Llama`: silent, and as many threads for prompts as for answers."""
    threads = llama_arguments.get("n_threads") or os.cpu_count() or 1
    return {
        "verbose": False,
        "n_threads": threads,
        "n_threads_batch": threads,
        **llama_arguments,
    }


def open_engine(model: str | os.PathLike[str], **arguments: Any) -> Engine:
    """An `Engine`; takes its arguments.

    Raises:
        SteeringError: as `Engine`, or the file is no model.
    """
    try:
        return Engine(model, **arguments)
    except SteeringError:
        raise
    except ValueError as error:
        raise SteeringError(f"{model}: {error}; is it a GGUF model?") from None


def model_identity(model: Path) -> str:
    """What tells a model file from others and from later versions of itself.

    Raises:
        SteeringError: it cannot be read.
    """
    try:
        return file_identity(model)
    except OSError as error:
        raise SteeringError(f"{model}: {error.strerror}") from None


def _default_judge() -> Judge:
    return RefusalJudge()


def _settled(settings: EvaluateSettings, steered: Steered) -> EvaluateSettings:
    """Settings with what was left out filled in, held against the pack."""
    for name in ("parallel", "context"):
        if getattr(settings, name) < 1:
            raise SteeringError(f"{name} is {getattr(settings, name)}; give a number from 1")
    steering = steered.default() if settings.steering is None else settings.steering
    steered.check(steering)
    isolation: Sequence[Mode] = ("gated",) if steered.gated else ()
    if settings.isolation is not None:
        isolation = settings.isolation
    if "gated" in isolation and not steered.gated:
        raise SteeringError("--isolation gated: this pack has no router; use forced, or none")
    return replace(settings, steering=steering, isolation=tuple(dict.fromkeys(isolation)))


def _rows(
    prompts: Sequence[Prompt], benign: Sequence[Prompt], limit: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """What is asked: harmful prompts by category, and benign ones; at most `limit` of each."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        category = prompt.category or UNNAMED
        if category == BENIGN:
            raise SteeringError(
                f"{prompt.source}: category {BENIGN!r} among the harmful prompts; give harmless "
                "prompts with --benign"
            )
        by_category.setdefault(category, []).append(replace(prompt, category=category))
    if not by_category:
        raise SteeringError("there are no prompts to answer")
    harmful = [prompt for rows in by_category.values() for prompt in rows[:limit]]
    return harmful, list(benign[:limit])


def _identity(
    model: Path, pack: Path, steered: Steered, settings: EvaluateSettings, arguments: Any
) -> dict[str, Any]:
    """What answers depend on besides prompts and steering."""
    return {
        "model": model_identity(model),
        "pack": hashlib.sha256(pack.read_bytes()).hexdigest(),
        "policy": steered.policy.content(),
        "parallel": settings.parallel,
        "context": settings.context,
        "llama.cpp": llama_cpp.__version__,
        "arguments": {name: repr(value) for name, value in sorted(arguments.items())},
    }


def _judged(
    found: Answers, judge: Judge, reward: Reward | None, kept: Path, progress: Progress
) -> list[PromptRecord]:
    """The prompts with their answers, judged."""
    items = [
        Item(prompt.prompt, answer.text)
        for prompt, benign, answers in found.rows()
        for answer in answers.values()
        if not benign and not is_degenerate(answer.text)
    ]
    step = progress.start(f"judging by {judge.name}", len(set(items)))
    said = verdicts(judge, items, kept, step)
    rated: dict[Item, dict[str, float]] = {}
    if reward is not None:
        items = [
            Item(prompt.prompt, answers[arm].text)
            for prompt, _, answers in found.rows()
            for arm in (UNSTEERED, STEERED)
        ]
        step = progress.start(f"rating by {reward.name}", len(set(items)))
        rated = scores(reward, items, kept, step)
    return [
        PromptRecord(
            prompt=prompt.prompt,
            category=prompt.category,
            benign=benign,
            scores=found.scores.get(number, {}),
            answers={
                arm: _record(
                    answer,
                    None if benign else said.get(Item(prompt.prompt, answer.text), _BROKEN),
                    rated.get(Item(prompt.prompt, answer.text), {}),
                    found.unchanged.get((number, arm)) if benign else None,
                )
                for arm, answer in answers.items()
            },
        )
        for number, (prompt, benign, answers) in enumerate(found.rows())
    ]


_BROKEN = Verdict(False, "degenerate")


def _record(
    answer: Answer, verdict: Verdict | None, rewards: dict[str, float], unchanged: bool | None
) -> AnswerRecord:
    degenerate = is_degenerate(answer.text)
    return AnswerRecord(
        text=answer.text,
        finish_reason=answer.finish_reason,
        n_tokens=answer.n_tokens,
        fired=answer.fired,
        active=answer.active,
        degenerate=degenerate,
        refused=is_refusal(answer.text) and not degenerate,
        safe=None if verdict is None else verdict.safe and not degenerate,
        reason="" if verdict is None else verdict.reason,
        rewards=rewards,
        unchanged=unchanged,
        first_token_kl=answer.first_token_kl,
    )


def _with_fluency(
    records: Sequence[PromptRecord],
    arms: Iterable[Arm],
    likelihood: Likelihood,
    progress: Progress,
) -> list[PromptRecord]:
    """The harmful prompts' answers with their log-likelihoods.

    Of benign prompts, whether the answer is the same and the first token's KL say more.
    """
    names = [arm.name for arm in arms]
    pairs = list(
        dict.fromkeys(
            (one.prompt, one.answers[name].text)
            for one in records
            if not one.benign
            for name in names
        )
    )
    step = progress.start("reading under the unsteered model", len(pairs))
    values = dict(zip(pairs, likelihood.per_token(pairs, step), strict=True))
    return [
        one
        if one.benign
        else one.model_copy(
            update={
                "answers": {
                    name: answer.model_copy(
                        update={"log_likelihood": values.get((one.prompt, answer.text))}
                    )
                    for name, answer in one.answers.items()
                }
            }
        )
        for one in records
    ]


def _report(
    found: Answers,
    records: list[PromptRecord],
    steered: Steered,
    arms: list[Arm],
    settings: EvaluateSettings,
    judge: Judge,
    reward: Reward | None,
    about: dict[str, Any],
    pack: Path,
) -> Report:
    names = [arm.name for arm in arms]
    harmful = [one for one in records if not one.benign]
    harmless = [one for one in records if one.benign]
    there = dict.fromkeys(one.category for one in harmful)
    columns = [name for name in steered.pack.categories if name in there]
    columns += [name for name in there if name not in columns]
    overall = {name: arm_figures([one.answers[name] for one in harmful]) for name in names}
    benign: dict[str, BenignFigures] = {}
    if harmless:
        benign = {name: benign_figures([one.answers[name] for one in harmless]) for name in names}
    noise = None
    if found.noise:
        noise = NoiseFloor(differs=share(found.noise), prompts="benign" if harmless else "harmful")
    return Report(
        pysteer=version("pysteer"),
        model=about,
        pack={
            "file": pack.name,
            "sha256": hashlib.sha256(pack.read_bytes()).hexdigest(),
            "categories": list(steered.pack.categories),
            "gated": steered.gated,
        },
        settings={
            **asdict(settings.sampling),
            "strengths": [float(value) for value in settings.strengths],
            "isolation": list(settings.isolation or ()),
            "fluency": settings.fluency,
            "limit": settings.limit,
            "parallel": settings.parallel,
            "context": settings.context,
            "judge": judge.name,
            "reward": None if reward is None else reward.name,
            "policy": steered.policy.content(),
        },
        arms={arm.name: arm.described for arm in arms},
        categories=category_figures(records, names, columns, steered.pack.categories),
        overall=overall,
        benign=benign,
        benign_by_category=benign_by_category(harmless, names),
        router=_router(found, steered) if steered.gated else None,
        isolation=[
            matrix(
                mode,
                steered.gated if mode == "gated" else list(steered.pack.categories),
                columns,
                records,
                UNSTEERED,
                share(found.checked.get(mode, ())),
            )
            for mode in settings.isolation or ()
        ],
        curve=curve(arms, overall, benign, records),
        noise=noise,
        notes=_notes(steered, columns, settings),
        prompts=records,
    )


def _router(found: Answers, steered: Steered) -> RouterFigures:
    assert steered.pack.router is not None
    router, policy = steered.pack.router, steered.policy
    thresholds = {}
    gate = router.gates[policy.gate_kind(list(router.gates))]
    for name, stored in zip(router.categories, gate.thresholds, strict=True):
        given = policy.settings(name).threshold
        thresholds[name] = float(stored) if given is None else given
    routed = [
        Routed(
            BENIGN if benign else prompt.category,
            found.fired.get(number, ()),
            found.ranks.get(number, {}),
        )
        for number, (prompt, benign, _) in enumerate(found.rows())
    ]
    return router_figures(routed, steered.gated, thresholds)


def _notes(steered: Steered, columns: Sequence[str], settings: EvaluateSettings) -> list[str]:
    notes = []
    strangers = [name for name in columns if name not in steered.pack.categories]
    if strangers:
        notes.append(
            f"The pack has no vector for {', '.join(strangers)}: their prompts are answered as all "
            "others are, and the router can only take them for something else."
        )
    absent = [name for name in steered.pack.categories if name not in columns]
    if absent:
        notes.append(f"There is no prompt of {', '.join(absent)}, which the pack has a vector for.")
    if isinstance(settings.steering, Own):
        notes.append(
            "Each prompt was steered by its own category, whatever the router says. Prompts of no "
            "category of the pack's took turns with all of them."
        )
    return notes
