"""The same prompts with and without steering."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pysteer.evaluate.degeneration import is_degenerate
from pysteer.evaluate.judges.refusal import is_refusal
from pysteer.pack.resolved import Steering
from pysteer.prompts import Prompt
from pysteer.runtime.steered import SteeredLlama
from pysteer.thoughts import answered


@dataclass(frozen=True)
class TimedAnswer:
    """An answer with its verdicts and its decoding time.

    Attributes:
        text: the answer.
        refused: the answer is a refusal or safe redirection, and not degenerate.
        degenerate: see `is_degenerate`; never a success.
        n_tokens: tokens generated.
        decode_seconds: time from the first token to the last.
    """

    text: str
    refused: bool
    degenerate: bool
    n_tokens: int
    decode_seconds: float


@dataclass(frozen=True)
class BeforeAfter:
    """A prompt with an unsteered and a steered answer."""

    prompt: Prompt
    unsafe: bool
    before: TimedAnswer
    after: TimedAnswer


@dataclass(frozen=True)
class CategorySummary:
    """Rates of one category, or of all categories.

    "Before" is without steering, "after" with. Rates are shares from 0 to 1.

    Attributes:
        category: the prompts' category.
        n_unsafe: number of unsafe prompts.
        n_harmless: number of harmless prompts.
        refused_before: unsafe prompts refused or redirected.
        refused_after: likewise.
        degenerate_before: degenerate answers to any prompt.
        degenerate_after: likewise.
        harmless_refused_before: harmless prompts refused.
        harmless_refused_after: likewise.
        harmless_unchanged: harmless prompts with the same answer, word for word.
        tokens_per_second_before: decoding speed.
        tokens_per_second_after: likewise.
    """

    category: str
    n_unsafe: int
    n_harmless: int
    refused_before: float
    refused_after: float
    degenerate_before: float
    degenerate_after: float
    harmless_refused_before: float
    harmless_refused_after: float
    harmless_unchanged: float
    tokens_per_second_before: float
    tokens_per_second_after: float


def answer(llm: SteeredLlama, prompt: str, steering: Steering, *, max_tokens: int) -> TimedAnswer:
    """Answer a prompt greedily through the chat template."""
    stream: Any = llm.create_chat_completion(
        [{"role": "user", "content": prompt}],
        steering=steering,
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
    )
    parts: list[str] = []
    times: list[float] = []
    for chunk in stream:
        piece = chunk["choices"][0]["delta"].get("content")
        if piece:
            parts.append(piece)
            times.append(time.perf_counter())
    text = "".join(parts)
    read = answered(text)
    degenerate = is_degenerate(text if read.unfinished else read.answer)
    return TimedAnswer(
        text=text,
        refused=is_refusal(text) and not degenerate,
        degenerate=degenerate,
        n_tokens=len(parts),
        decode_seconds=times[-1] - times[0] if times else 0.0,
    )


def answer_twice(
    llm: SteeredLlama,
    unsafe: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    strength: float | None = 1.0,
    max_tokens: int = 48,
    on_answer: Callable[[BeforeAfter], None] = lambda _: None,
) -> list[BeforeAfter]:
    """Answer every prompt without steering, and steered by its own category or by the router.

    Args:
        llm: a steered model whose pack has the prompts' categories.
        unsafe: prompts that should be refused.
        harmless: prompts that should be answered.
        strength: forced strength of the prompt's category; 1.0 is the pack's recommendation. None:
            the router decides.
        max_tokens: longest answer.
        on_answer: called after each pair.
    """
    pairs = []
    for prompts, is_unsafe in ((unsafe, True), (harmless, False)):
        for prompt in prompts:
            before = answer(llm, prompt.prompt, None, max_tokens=max_tokens)
            steering: Steering = "auto" if strength is None else {prompt.category: strength}
            after = answer(llm, prompt.prompt, steering, max_tokens=max_tokens)
            pairs.append(BeforeAfter(prompt, is_unsafe, before, after))
            on_answer(pairs[-1])
    return pairs


def summarise(pairs: Sequence[BeforeAfter]) -> list[CategorySummary]:
    """Return one summary per category, in the order of first appearance."""
    categories = dict.fromkeys(pair.prompt.category for pair in pairs)
    return [
        summary_of(name, [pair for pair in pairs if pair.prompt.category == name])
        for name in categories
    ]


def summary_of(category: str, pairs: Sequence[BeforeAfter]) -> CategorySummary:
    """Return the summary of some pairs under a name."""
    unsafe = [pair for pair in pairs if pair.unsafe]
    harmless = [pair for pair in pairs if not pair.unsafe]
    return CategorySummary(
        category=category,
        n_unsafe=len(unsafe),
        n_harmless=len(harmless),
        refused_before=_share([pair.before.refused for pair in unsafe]),
        refused_after=_share([pair.after.refused for pair in unsafe]),
        degenerate_before=_share([pair.before.degenerate for pair in pairs]),
        degenerate_after=_share([pair.after.degenerate for pair in pairs]),
        harmless_refused_before=_share([pair.before.refused for pair in harmless]),
        harmless_refused_after=_share([pair.after.refused for pair in harmless]),
        harmless_unchanged=_share([pair.before.text == pair.after.text for pair in harmless]),
        tokens_per_second_before=_speed([pair.before for pair in pairs]),
        tokens_per_second_after=_speed([pair.after for pair in pairs]),
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def _speed(answers: Sequence[TimedAnswer]) -> float:
    """Return tokens per second of decoding; the first token of each answer is prompt processing."""
    seconds = sum(item.decode_seconds for item in answers)
    tokens = sum(max(item.n_tokens - 1, 0) for item in answers)
    return tokens / seconds if seconds > 0 else 0.0
