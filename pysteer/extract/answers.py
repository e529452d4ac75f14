"""Answers that extraction continues prompts with: safe ones, and the model's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pysteer.errors import SteeringError
from pysteer.extract.cache import Progress, no_progress
from pysteer.extract.capture import Capture, Tokens
from pysteer.prompts import Prompt

Judge = Callable[[str, str], bool]
"""From a prompt and the answer to it to whether the answer is unsafe."""

JUDGED_TOKENS = 64
"""How long the model's own answers are that a judge is shown."""

SAFE_ANSWERS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request. I'd be glad to help with something safe instead.",
    "I won't help with that, because it could harm someone.",
    "Sorry, I can't assist with that. Is there something else I can do for you?",
    "I can't do that. If you like, I can suggest a safe and legal alternative.",
    "I'm not able to help with that, since it could cause harm.",
)
"""What a model should answer to unsafe prompts where the data does not say."""


def safe_answers(prompts: Sequence[Prompt], answers: Sequence[Prompt]) -> list[str]:
    """A safe answer for each prompt.

    The first that exists: one given for this very prompt, those given for its category, those given
    for any (`prompt` and `category` empty), `SAFE_ANSWERS`. Where several fit, they take turns.

    Args:
        prompts: unsafe prompts.
        answers: rows of an answer file, whose `response` is the answer.

    Raises:
        SteeringError: names file and line of a row without a response.
    """
    for row in answers:
        if not (row.response or "").strip():
            raise SteeringError(f"{row.source or 'an answer'}: needs a 'response'")
    chosen = []
    for number, prompt in enumerate(prompts):
        fitting = (
            [a for a in answers if a.prompt == prompt.prompt]
            or [a for a in answers if not a.prompt and a.category == prompt.category]
            or [a for a in answers if not a.prompt and not a.category]
        )
        texts = [a.response or "" for a in fitting] or SAFE_ANSWERS
        chosen.append(texts[number % len(texts)])
    return chosen


def own_answers(
    capture: Capture,
    prompts: Sequence[Tokens],
    n_tokens: int,
    *,
    kept: Path | None = None,
    progress: Progress = no_progress,
) -> list[Tokens]:
    """The model's own greedy answers.

    Args:
        capture: the model.
        prompts: tokens of the prompts, in the chat template.
        n_tokens: at most so many each.
        kept: a JSONL file of answers by prompt, read first and added to as answers come.
        progress: called for every answer.
    """
    known: dict[Tokens, Tokens] = {}
    if kept is not None and kept.exists():
        for line in kept.read_text().splitlines():
            try:
                prompt, answer = json.loads(line)
                known[tuple(prompt)] = tuple(answer)
            except (ValueError, TypeError):  # the last line of an interrupted run
                continue
    missing = list(dict.fromkeys(p for p in prompts if p not in known))
    lines = kept.open("a") if kept is not None else None
    try:
        if lines is not None and lines.tell():
            lines.write("\n")  # the line that was cut short must not swallow the next
        for index, tokens in capture.answers(missing, n_tokens):
            known[missing[index]] = tokens
            if lines is not None:
                lines.write(json.dumps([missing[index], tokens]) + "\n")
            progress(len(missing[index]) + len(tokens), 1)
    finally:
        if lines is not None:
            lines.close()
    return [known[p] for p in prompts]


def require_labels(prompts: Sequence[Prompt]) -> None:
    """Raise SteeringError that names a prompt without a label."""
    for prompt in prompts:
        if prompt.label is None:
            raise SteeringError(
                f"{prompt.source or 'a prompt'}: has no label; guided needs a judge, "
                "or a 'label' of 'safe' or 'unsafe' in each row"
            )


def judge_answers(
    capture: Capture,
    prompts: Sequence[Prompt],
    judge: Judge | None,
    *,
    n_tokens: int = JUDGED_TOKENS,
    kept: Path | None = None,
    progress: Progress = no_progress,
) -> list[bool]:
    """Whether each prompt's answer is unsafe, by the labels in the data or by a judge.

    Args:
        capture: the model, whose own answer is judged where the data brings no `response`.
        prompts: prompts.
        judge: see `Judge`; None takes the labels.
        n_tokens: length of the model's own answers.
        kept: see `own_answers`.
        progress: called for every answer that the model gives.

    Raises:
        SteeringError: there is no judge, and a prompt has no label.
    """
    if judge is None:
        require_labels(prompts)
        return [prompt.label == "unsafe" for prompt in prompts]
    silent = [i for i, prompt in enumerate(prompts) if prompt.response is None]
    given = own_answers(
        capture,
        [capture.prompt_tokens(prompts[i].prompt) for i in silent],
        n_tokens,
        kept=kept,
        progress=progress,
    )
    texts = {i: capture.text(answer) for i, answer in zip(silent, given, strict=True)}
    return [
        judge(prompt.prompt, texts[i] if prompt.response is None else prompt.response)
        for i, prompt in enumerate(prompts)
    ]
