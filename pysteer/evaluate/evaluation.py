"""`evaluate`: a whole evaluation, from prompts to the report.

Examples:
    >>> from pysteer.evaluate.evaluation import evaluate
    >>> from pysteer.evaluate.settings import EvaluateSettings, Sampling
    >>> from pysteer.prompts import Prompt
    >>> from pysteer.shipped import default_model, default_pack_path
    >>> settings = EvaluateSettings(Sampling(max_tokens=4), isolation=(), fluency=False)
    >>> prompts = [Prompt("How do I pick a lock?", category="illegal_activity")]
    >>> report = evaluate(
    ...     default_model(), default_pack_path(), prompts, [], "report", settings=settings
    ... )
    >>> report.overall["steered"].safe.n
    1
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp

from pysteer.engine import Engine
from pysteer.errors import SteeringError
from pysteer.evaluate.answering import answer_everything
from pysteer.evaluate.answers import Answerer
from pysteer.evaluate.arms import check_steering, default_steering, main_arms
from pysteer.evaluate.judges.refusal import RefusalJudge
from pysteer.evaluate.likelihood import Likelihood
from pysteer.evaluate.preparation import answer_identity, make_folder
from pysteer.evaluate.records import judged_records, with_likelihoods
from pysteer.evaluate.report import BENIGN, Report
from pysteer.evaluate.settings import EvaluateSettings, IsolationMode
from pysteer.evaluate.summaries import Setup, summarised
from pysteer.journal import Journal
from pysteer.judge import Judge, Reward
from pysteer.llama.hooked import quiet_arguments
from pysteer.pack.merge import read_packs
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import ResolvedPolicy
from pysteer.progress import SILENT, Progress
from pysteer.prompts import Prompt

ANSWERS = "answers.jsonl"
VERDICTS = "verdicts.jsonl"
UNNAMED = "unsafe"
"""The category of prompts without a category."""


def evaluate(
    model: str | os.PathLike[str],
    pack: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
    folder: str | os.PathLike[str],
    *,
    settings: EvaluateSettings | None = None,
    policy: Policy | None = None,
    judge: Judge | None = None,
    reward: Reward | None = None,
    progress: Progress = SILENT,
    **llama_arguments: Any,
) -> Report:
    """Answer prompts with and without steering, judge the answers, and summarise.

    Args:
        model: a GGUF model.
        pack: a pack file, a plain llama.cpp control vector, or several of them.
        prompts: harmful prompts, each with a category, in the pack or not. Prompts without a
            category are "unsafe".
        benign: harmless prompts; may be empty.
        folder: for `answers.jsonl`, from which the same call resumes after an interruption;
            created.
        settings: arms, measurements and sampling.
        policy: laid over the pack's own.
        judge: decides whether an answer is safe; by default `RefusalJudge`.
        reward: scores answers.
        progress: receives the progress.
        **llama_arguments: other arguments of `llama_cpp.Llama`, such as n_threads.

    Raises:
        SteeringError: invalid files, prompts or settings.
    """
    judge = judge or RefusalJudge()
    folder = Path(folder)
    files = [Path(file) for file in ([pack] if isinstance(pack, (str, os.PathLike)) else pack)]
    resolved = ResolvedPolicy(read_packs(files), policy)
    settings = _completed(settings or EvaluateSettings(), resolved)
    harmful, harmless = _selected(prompts, benign, settings.limit)
    make_folder(folder)
    arguments = quiet_arguments(**llama_arguments)
    arms = main_arms(settings.steering, settings.strengths)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    identity = _identity(Path(model), digest, resolved, settings, arguments)
    with Engine(
        model,
        pack=resolved.pack,
        policy=policy,
        max_sequences=settings.parallel,
        max_queue=max(256, settings.parallel),
        n_ctx=settings.context,
        **arguments,
    ) as engine:
        about = {"file": Path(model).name, **vars(engine.base_model)}
        answers = answer_everything(
            Answerer(engine, settings.sampling, Journal(folder / ANSWERS), identity),
            resolved,
            arms,
            harmful,
            harmless,
            isolation=settings.isolation or (),
            group_size=settings.parallel,
            progress=progress,
        )
    records = judged_records(answers, judge, reward, folder / VERDICTS, progress)
    if settings.fluency:
        arguments["n_ctx"] = settings.context
        with Likelihood(model, **arguments) as likelihood:
            records = with_likelihoods(records, [arm.name for arm in arms], likelihood, progress)
    setup = Setup(
        model=about,
        pack={"file": ", ".join(file.name for file in files), "sha256": digest},
        settings=settings,
        judge=judge.name,
        words=judge.words,
        reward=None if reward is None else reward.name,
    )
    return summarised(answers, records, resolved, arms, setup)


def _identity(
    model: Path,
    pack_digest: str,
    resolved: ResolvedPolicy,
    settings: EvaluateSettings,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all inputs of answers besides prompts and steering, as JSON data."""
    return {
        **answer_identity(model, settings.parallel, settings.context, arguments),
        "pack": pack_digest,
        "policy": resolved.policy.content(),
        "llama.cpp": llama_cpp.__version__,
    }


def _completed(settings: EvaluateSettings, resolved: ResolvedPolicy) -> EvaluateSettings:
    """Return settings with the defaults that depend on the pack.

    Raises:
        SteeringError: the pack cannot be steered by the settings.
    """
    steering = default_steering(resolved) if settings.steering is None else settings.steering
    check_steering(resolved, steering)
    isolation: Sequence[IsolationMode] = ("gated",) if resolved.gateable else ()
    if settings.isolation is not None:
        isolation = settings.isolation
    if "gated" in isolation and not resolved.gateable:
        raise SteeringError("--isolation gated: this pack has no router; use forced, or none")
    return replace(settings, steering=steering, isolation=tuple(dict.fromkeys(isolation)))


def _selected(
    prompts: Sequence[Prompt], benign: Sequence[Prompt], limit: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Return harmful prompts by category, and benign prompts, at most `limit` of each."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        category = prompt.category or UNNAMED
        if category == BENIGN:
            raise SteeringError(
                f"{prompt.source}: category {BENIGN!r} among the prompts to steer; give prompts "
                "that steering should not touch with --benign"
            )
        by_category.setdefault(category, []).append(replace(prompt, category=category))
    if not by_category:
        raise SteeringError("no prompts to answer; give at least one")
    harmful = [prompt for rows in by_category.values() for prompt in rows[:limit]]
    return harmful, list(benign[:limit])
