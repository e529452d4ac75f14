"""Records of the report from answers: verdicts, rewards and likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pysteer.evaluate.answering import AnswerSet
from pysteer.evaluate.answers import Answer
from pysteer.evaluate.judges.refusal import is_refusal
from pysteer.evaluate.likelihood import Likelihood
from pysteer.evaluate.report import STEERED, UNSTEERED, AnswerRecord, PromptRecord
from pysteer.evaluate.verdicts import scores, verdicts
from pysteer.judge import NO_ANSWER, Item, Judge, Reward, Verdict
from pysteer.progress import Progress

_DEGENERATE = Verdict(False, "degenerate")


def judged_records(
    answers: AnswerSet, judge: Judge, reward: Reward | None, journal: Path, progress: Progress
) -> list[PromptRecord]:
    """Return every prompt with its answers, judged.

    Degenerate answers are unsafe, and no judge reads them. Where a thought does not end there is
    no answer, which is neither safe nor refused. Answers to benign prompts have no verdict.

    Args:
        answers: all answers.
        judge: decides whether an answer is safe.
        reward: scores the answers of the unsteered and the steered arm, or None.
        journal: file for verdicts and scores.
        progress: receives the progress.

    Raises:
        SteeringError: the judge or the reward failed.
    """
    items = [
        Item(prompt.prompt, answer.text)
        for prompt, benign, by_arm in answers.rows()
        for answer in by_arm.values()
        if not benign and not answer.degenerate and not answer.unfinished
    ]
    advance = progress.start(f"judging by {judge.name}", len(set(items)), "answers")
    safety = verdicts(judge, items, journal, advance)
    rewards: dict[Item, dict[str, float]] = {}
    if reward is not None:
        items = [
            Item(prompt.prompt, by_arm[arm].text)
            for prompt, _, by_arm in answers.rows()
            for arm in (UNSTEERED, STEERED)
            if not by_arm[arm].unfinished
        ]
        advance = progress.start(f"rating by {reward.name}", len(set(items)), "answers")
        rewards = scores(reward, items, journal, advance)
    return [
        PromptRecord(
            prompt=prompt.prompt,
            category=prompt.category,
            benign=benign,
            scores=answers.scores.get(number, {}),
            answers={
                arm: _record(
                    answer,
                    None if benign else _verdict(prompt.prompt, answer, safety),
                    rewards.get(Item(prompt.prompt, answer.text), {}),
                    answers.unchanged.get((number, arm)) if benign else None,
                )
                for arm, answer in by_arm.items()
            },
        )
        for number, (prompt, benign, by_arm) in enumerate(answers.rows())
    ]


def _verdict(prompt: str, answer: Answer, safety: dict[Item, Verdict]) -> Verdict:
    if answer.degenerate:
        return _DEGENERATE
    return NO_ANSWER if answer.unfinished else safety[Item(prompt, answer.text)]


def _record(
    answer: Answer, verdict: Verdict | None, rewards: dict[str, float], unchanged: bool | None
) -> AnswerRecord:
    return AnswerRecord(
        text=answer.text,
        finish_reason=answer.finish_reason,
        n_tokens=answer.n_tokens,
        fired=answer.fired,
        active=answer.active,
        degenerate=answer.degenerate,
        refused=is_refusal(answer.text) and not answer.degenerate,
        safe=None if verdict is None else verdict.safe and not answer.degenerate,
        reason="" if verdict is None else verdict.reason,
        rewards=rewards,
        unchanged=unchanged,
        thoughts=answer.thoughts,
        unfinished=answer.unfinished,
        first_token_kl=answer.first_token_kl,
    )


def with_likelihoods(
    records: Sequence[PromptRecord],
    arms: Sequence[str],
    likelihood: Likelihood,
    progress: Progress,
) -> list[PromptRecord]:
    """Return the records with log-likelihoods of the answers to harmful prompts.

    For benign prompts, `unchanged` and the first token's KL say more.

    Args:
        records: judged records.
        arms: names of the arms whose answers are read.
        likelihood: the unsteered model.
        progress: receives the progress.

    Raises:
        SteeringError: a prompt and its answers do not fit the context.
    """
    pairs = [
        (record.prompt, record.answers[arm].whole)
        for record in records
        if not record.benign
        for arm in arms
    ]
    pairs = list(dict.fromkeys(pairs))
    advance = progress.start("reading under the unsteered model", len(pairs), "answers")
    values = dict(zip(pairs, likelihood.per_token(pairs, advance), strict=True))
    return [record if record.benign else _with_likelihood(record, values) for record in records]


def _with_likelihood(
    record: PromptRecord, values: dict[tuple[str, str], float | None]
) -> PromptRecord:
    answers = {
        arm: answer.model_copy(update={"log_likelihood": values.get((record.prompt, answer.whole))})
        for arm, answer in record.answers.items()
    }
    return record.model_copy(update={"answers": answers})
