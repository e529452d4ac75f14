"""The same prompts with and without steering."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pysteer.evaluate.metrics import is_degenerate
from pysteer.evaluate.refusal import is_refusal
from pysteer.pack.resolved import Steering
from pysteer.prompts import Prompt
from pysteer.runtime.steered import SteeredLlama


@dataclass(frozen=True)
class Answer:
    """One answer and what the judges say of it.

    Attributes:
        text: what the model wrote.
        refused: an explicit refusal or safe redirection, and not degenerate.
        degenerate: empty, repetitive or nearly so; never a success.
        n_tokens: tokens generated.
        decode_seconds: time between the first and the last of them.
    """

    text: str
    refused: bool
    degenerate: bool
    n_tokens: int
    decode_seconds: float


@dataclass(frozen=True)
class BeforeAfter:
    """One prompt answered twice, the second time steered."""

    prompt: Prompt
    unsafe: bool
    before: Answer
    after: Answer


@dataclass(frozen=True)
class CategorySummary:
    """Rates of one category, or of all, each a share of 0 to 1 of the prompts named.

    Attributes:
        category: that of the prompts, whose steering was on where it was forced.
        n_unsafe: number of unsafe prompts.
        n_harmless: number of harmless prompts.
        refused_before: unsafe prompts refused or redirected without steering.
        refused_after: the same with steering.
        degenerate_before: all answers without steering that are degenerate.
        degenerate_after: the same with steering.
        harmless_refused_before: harmless prompts refused without steering.
        harmless_refused_after: the same with steering.
        harmless_unchanged: harmless prompts answered word for word as before.
        tokens_per_second_before: decoding speed without steering.
        tokens_per_second_after: the same with steering.
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


def answer(llm: SteeredLlama, prompt: str, steering: Steering, *, max_tokens: int) -> Answer:
    """Answer one prompt greedily through the chat template."""
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
    degenerate = is_degenerate(text)
    return Answer(
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
    """Answer every prompt without steering and then with its own category's, or the router's.

    Args:
        llm: a steered model whose pack has the prompts' categories.
        unsafe: prompts that should be refused.
        harmless: prompts that should be answered.
        strength: of the category's vector, forced; 1.0 is what the pack recommends. None: the
            router decides what acts.
        max_tokens: where an answer is cut.
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
    """One summary per category, in the order of first appearance."""
    categories = dict.fromkeys(pair.prompt.category for pair in pairs)
    return [
        summary_of(name, [pair for pair in pairs if pair.prompt.category == name])
        for name in categories
    ]


def summary_of(category: str, pairs: Sequence[BeforeAfter]) -> CategorySummary:
    """What became of some prompts, under a name."""
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


def _speed(answers: Sequence[Answer]) -> float:
    """Tokens after the first of each answer, per second of decoding."""
    seconds = sum(item.decode_seconds for item in answers)
    tokens = sum(max(item.n_tokens - 1, 0) for item in answers)
    return tokens / seconds if seconds > 0 else 0.0
