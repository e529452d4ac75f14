"""The prompt of a chat whose handler evaluates it part by part, images included."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from pysteer.errors import SteeringError
from pysteer.runtime.sequence import OPEN, SequenceSteering


def new_images() -> int:
    """Return a number for the images of one evaluation, never that of others."""
    return secrets.randbits(63) + 1


class AgainError(BaseException):
    """Ends a chat handler, which is then called once more.

    Not an `Exception`, so that no handler takes it for a failure of its own.
    """


def _another_prompt() -> SteeringError:
    return SteeringError(
        "the chat handler made another prompt of the same messages when it was called again, so "
        "that its images cannot be steered; give images that do not change, or pass steering=None"
    )


@dataclass(eq=False)
class HandlerPrompt:
    """The prompt that the chat handler of a request evaluates by itself.

    Multimodal handlers evaluate texts with `eval`, decode images straight on the context, and then
    complete the prompt. The first evaluation tells the prompt's length and its images; if its rows
    are not those of the steering, the handler is called again.

    Attributes:
        sequence: the steering of the prompt; in the first evaluation, of a prompt without end. None
            once a generation has it.
        images: number of the images of this evaluation.
        ranges: positions [start, stop) of each image in this evaluation.
        starts: where calls of `eval` began.
        open: True while the handler evaluates.
        tokens: the whole prompt as the handler gave it, with any token where an image stands; None
            in the first evaluation.
        marked: the whole prompt, with `IMAGE` where an image stands.
        first_ranges: the images of the first evaluation.
        again: True while the handler has to be called once more.
    """

    sequence: SequenceSteering | None
    images: int = field(default_factory=new_images)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    open: bool = True
    tokens: list[int] | None = None
    marked: list[int] = field(default_factory=list)
    first_ranges: list[tuple[int, int]] = field(default_factory=list)
    again: bool = False

    def restart(self) -> None:
        """Begin another evaluation, after the first."""
        self.images = new_images()
        self.ranges, self.starts = [], []
        self.open, self.again = True, False

    def text_starts(self, stop: int) -> list[int]:
        """Return where the calls of `eval` after the last image began, ascending, before `stop`."""
        end = self.ranges[-1][1] if self.ranges else 0
        return sorted({start for start in self.starts if end <= start < stop})

    def n_positions(self, start: int) -> int:
        """Return the number of positions of an image that may begin at `start`."""
        return dict(self.first_ranges).get(start, OPEN) - start

    def add_text(self, start: int, tokens: list[int]) -> None:
        """Note tokens that are evaluated from `start` on.

        Raises:
            SteeringError: they are not those of the first evaluation.
        """
        if self.tokens is not None and self.marked[start : start + len(tokens)] != tokens:
            raise _another_prompt()
        self.starts.append(start)

    def add_image(self, start: int, stop: int) -> None:
        """Note an image at the positions [start, stop).

        Raises:
            SteeringError: the first evaluation had no such image.
        """
        if self.tokens is not None and (start, stop) not in self.first_ranges:
            raise _another_prompt()
        self.ranges = [part for part in self.ranges if part[1] <= start]
        self.ranges.append((start, stop))

    def settle(self, tokens: list[int], marked: list[int]) -> bool:
        """Take the whole prompt, which must be that of the first evaluation.

        Returns:
            True if this is the first evaluation.

        Raises:
            SteeringError: the handler made another prompt than before.
        """
        found = self.ranges
        if self.tokens is None:
            self.tokens, self.marked, self.first_ranges = tokens, marked, found
            return True
        if self.marked != marked or self.first_ranges != found:
            raise _another_prompt()
        return False

    def take(self, prompt: list[int]) -> SequenceSteering | None:
        """Return the steering for the first generation of this prompt."""
        if self.tokens != prompt:
            return None
        sequence, self.sequence = self.sequence, None
        return sequence

    def mark(self, prompt: list[int]) -> list[int]:
        """Return a prompt with `IMAGE` at the images, if it begins with this prompt."""
        n = 0 if self.tokens is None else len(self.tokens)
        return [*self.marked, *prompt[n:]] if n and prompt[:n] == self.tokens else prompt
