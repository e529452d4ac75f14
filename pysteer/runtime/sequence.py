"""The steering of one sequence of tokens, from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from pysteer.chat.conversation import Conversation
from pysteer.chat.spans import pooled_span
from pysteer.runtime.ledger import Keys, matching
from pysteer.runtime.markers import MarkerTracker
from pysteer.runtime.plan import CompiledPlan
from pysteer.runtime.report import SteeringReport, report

IMAGE: Final = -1
"""In a prompt, in place of a token: a position of an image."""

OPEN: Final = 2**30
"""Number of prompt tokens of a prompt whose end is not known yet."""

_END = 2**31  # beyond every position


class SequenceSteering:
    """A plan at work on one sequence: its gates' decisions, and the steering of every token.

    Args:
        plan: the plan of the request.
        prompt: the prompt's tokens, and `IMAGE` for each position of an image. None: a prompt that
            a chat handler evaluates part by part; no gate reads it, and all of it is prompt.
        conversation: finds the user's message in the prompt, for routers that read the message or
            its suffix. None: not a chat, so the whole prompt stands for the message.
        n_positions: largest number of tokens in the sequence.
        piece: returns the text of a token as bytes; called only for plans that need it, and for no
            image.

    Attributes:
        native: the native state of the sequence; None if nothing is steered.
        n_prompt: number of prompt tokens.
        images: positions [start, stop) of the prompt's images, ascending; images side by side are
            one range.
        begun: a token of the sequence was decoded.

    Raises:
        SteeringError: the router has no token to read, or the form of the chat is a guess.
    """

    def __init__(
        self,
        plan: CompiledPlan,
        prompt: Sequence[int] | None,
        *,
        conversation: Conversation | None,
        n_positions: int,
        piece: Callable[[int], bytes],
    ) -> None:
        self.plan = plan
        self.n_prompt = OPEN if prompt is None else len(prompt)
        self.begun = False
        prompt = [] if prompt is None else prompt
        text = [at for at, token in enumerate(prompt) if token != IMAGE]
        spans = self._spans(prompt, text, conversation)
        self._first_read = min([start for start, _ in spans], default=0)
        self.native = plan.start(self.n_prompt, spans, n_positions)
        self.images = _gaps(text, len(prompt))
        if self.native is not None:
            for start, stop in self.images:
                self.native.leave_out(start, stop)
        self._piece = piece
        self._tokens: list[int] = []
        self._tracker = MarkerTracker(plan.markers) if plan.markers else None
        self.follow(0, prompt)

    def _spans(
        self, prompt: Sequence[int], text: list[int], conversation: Conversation | None
    ) -> list[tuple[int, int]]:
        """Return for each read of the router the range of the prompt to average over.

        Args:
            prompt: the prompt.
            text: positions of the prompt's tokens, without images.
            conversation: as for the class.
        """
        if self.plan.router is None:
            return []
        poolings = [read.pooling for read in self.plan.router.reads]
        if self.n_prompt == OPEN:
            return [(OPEN - 1, OPEN)] * len(poolings)
        message = (0, len(prompt))
        if conversation is not None:
            conversation.require_form()
        if conversation is not None and text and not {"user", "suffix"}.isdisjoint(poolings):
            start, stop = conversation.message_span([prompt[at] for at in text])
            message = (text[start], text[stop - 1] + 1)
        return [pooled_span(pooling, message, len(prompt)) for pooling in poolings]

    def follow(self, start: int, tokens: Sequence[int]) -> None:
        """Take note of tokens, at positions from `start` on, before they are decoded.

        Only exclusion by markers depends on the tokens themselves. Known tokens are skipped.
        """
        if self._tracker is None or self.native is None:
            return
        tokens = list(tokens)
        if self._tokens[start : start + len(tokens)] == tokens:
            return
        if start < len(self._tokens):  # the sequence was rewound and goes on otherwise
            tokens = [*self._tokens[:start], *tokens]
            start = 0
            self._tokens.clear()
            self._tracker = MarkerTracker(self.plan.markers)
        self._tokens += tokens
        self.native.set_excluded(start, self._tracker.feed(map(self._text, tokens)))

    def _text(self, token: int) -> bytes:
        return b"" if token == IMAGE else self._piece(token)

    def keys(self, start: int, stop: int) -> Keys:
        """Return fingerprints of the steering of the tokens at positions [start, stop), uint64.

        Fingerprints cover the steering that the KV cache depends on, so not the last block. For
        tokens yet to be computed they follow from the decisions so far.
        """
        if self.native is None:
            return np.zeros(max(stop - start, 0), np.uint64)
        keys: Keys = self.native.keys(start, stop)
        return keys

    def logits_key(self, position: int) -> int:
        """Return a fingerprint of the whole steering of one token."""
        return 0 if self.native is None else int(self.native.logits_key(position))

    @property
    def images_end(self) -> int:
        """The position after the last image of the prompt; 0 without images."""
        return self.images[-1][1] if self.images else 0

    @property
    def first_to_decode(self) -> int:
        """Position from which tokens have to be decoded, even if they are in the cache.

        A router has to read the last prompt token and all tokens of its averages.
        """
        if self.native is None or not self.plan.gated:
            return _END
        decided = self.native.decided_at
        if not decided:
            return self._first_read
        return decided[-1] + 1 if self.plan.rechecks and self.plan.pools else _END

    def free_after(self, position: int) -> int:
        """Return the number of tokens after a position that no later decision reads."""
        if self.native is None or not self.plan.rechecks:
            return _END
        return 0 if self.plan.pools else max(self.native.next_decision - position - 1, 0)

    def reprocess_from(self, n_tokens: int) -> int:
        """Return the position from which tokens have to be decoded again.

        A category that fires may steer prompt tokens that were computed without it. The decision
        then holds from the first token on.

        Args:
            n_tokens: number of tokens decoded.

        Returns:
            `n_tokens` if no token has to be decoded again.
        """
        if self.native is None or not self.native.wants_reprocess:
            return n_tokens
        before, last = self.keys(0, n_tokens), self.logits_key(n_tokens - 1)
        self.native.hold()
        changed = matching(before, self.keys(0, n_tokens))
        if changed < n_tokens or last == self.logits_key(n_tokens - 1):
            return changed
        return n_tokens - 1

    def restart(self) -> None:
        """Forget the router's reads since its last decision: decoding restarts."""
        if self.native is not None:
            self.native.restart()

    @property
    def n_decisions(self) -> int:
        """Number of decisions of the router so far."""
        return 0 if self.native is None else self.native.n_decisions

    def undo(self, n_decisions: int) -> None:
        """Take back the last decision, of a failed decode, if there are more than `n_decisions`."""
        if self.n_decisions > n_decisions:
            assert self.native is not None
            self.native.undo_decision()
        self.restart()

    def report(self, n_tokens: int) -> SteeringReport:
        """Return the effect on the first `n_tokens` tokens."""
        return report(self.plan, self.native, n_tokens)


def _gaps(kept: Sequence[int], stop: int) -> list[tuple[int, int]]:
    """Return the ranges of [0, stop) between ascending positions."""
    ends = zip([-1, *kept], [*kept, stop], strict=True)
    return [(before + 1, after) for before, after in ends if before + 1 < after]
