"""The prompts that a user gives to an extraction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pysteer.errors import quoted
from pysteer.prompts import Prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The prompts of an extraction.

    Attributes:
        unsafe: prompts to steer away from. Prompts without a category are of the category "unsafe".
        safe: harmless prompts: twins of the unsafe prompts, generic instructions, or both.
        benign: everyday prompts, for the router alone: prompts of the kind that the model will
            mostly see, which no gate should open for. `pysteer.shipped.everyday_prompts` has some.
        answers: safe answers, for methods that read answers; see
            `pysteer.extract.answers.safe_answers`.
    """

    unsafe: Sequence[Prompt]
    safe: Sequence[Prompt]
    benign: Sequence[Prompt] = ()
    answers: Sequence[Prompt] = ()

    def distinct(self) -> Data:
        """Return the data without repeated prompts; see `distinct`."""
        return replace(
            self,
            unsafe=distinct(self.unsafe, "unsafe"),
            safe=distinct(self.safe, "safe"),
            benign=distinct(self.benign, "benign"),
        )


def distinct(prompts: Sequence[Prompt], side: str) -> list[Prompt]:
    """Return the prompts without repeats, in order; repeats are logged as a warning.

    Args:
        prompts: prompts.
        side: name of the prompts in the warning.
    """
    kept: dict[Prompt, None] = {}
    repeats: list[Prompt] = []
    for prompt in prompts:
        if prompt in kept:
            repeats.append(prompt)
        kept[prompt] = None
    if repeats:
        _log.warning(
            "%d %s prompts repeat others and are left out, the first at %s",
            len(repeats),
            side,
            repeats[0].source or quoted(repeats[0].prompt),
        )
    return list(kept)


def warn_of_both(unsafe: Sequence[Prompt], safe: Sequence[Prompt]) -> None:
    """Log prompts that are on both sides with the same response, or without one."""
    known = {(p.prompt, p.response) for p in unsafe}
    both = [p for p in safe if (p.prompt, p.response) in known]
    if both:
        _log.warning(
            "%d prompts are both unsafe and safe, the first at %s",
            len(both),
            both[0].source or quoted(both[0].prompt),
        )


def where(prompt: Prompt) -> str:
    """Return the start of an error message about a prompt: its file and line, if known."""
    return f"{prompt.source}: " if prompt.source else ""
