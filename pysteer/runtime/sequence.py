"""The steering of one sequence of tokens, from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pysteer.chat.spans import pooled_span, span_of
from pysteer.runtime.ledger import Keys
from pysteer.runtime.markers import MarkerTracker
from pysteer.runtime.plan import CompiledPlan
from pysteer.runtime.report import SteeringReport, report

_END = 2**31  # beyond every position


class SequenceSteering:
    """A plan at work on one sequence: what its gates found, and what follows for every token.

    Args:
        plan: what the request asks for.
        prompt: its tokens.
        user: what the user said last, if that is known; a router that pools over it looks at the
            whole prompt otherwise, and one that pools over what follows it at the last token.
        n_positions: the most tokens that the sequence can have.
        piece: the text of a token, as bytes; called only for plans that need it.

    Raises:
        SteeringError: the router has no token to look at.
    """

    def __init__(
        self,
        plan: CompiledPlan,
        prompt: Sequence[int],
        *,
        user: str | None,
        n_positions: int,
        piece: Callable[[int], bytes],
    ) -> None:
        self.plan = plan
        self.n_prompt = len(prompt)
        self.begun = False  # whether any of its tokens was decoded
        spans: list[tuple[int, int]] = []
        if plan.router is not None:
            poolings = [read.pooling for read in plan.router.reads]
            said = (0, len(prompt))
            if user and not {"user", "suffix"}.isdisjoint(poolings):
                said = span_of(user, list(map(piece, prompt)))
            spans = [pooled_span(pooling, said, len(prompt)) for pooling in poolings]
        self._first_read = min([start for start, _ in spans], default=0)
        self.native = plan.start(len(prompt), spans, n_positions)
        self._piece = piece
        self._tokens: list[int] = []
        self._tracker = MarkerTracker(plan.markers) if plan.markers else None
        self.follow(0, prompt)

    def follow(self, start: int, tokens: Sequence[int]) -> None:
        """Take note of tokens, at positions from `start` on, before they are decoded.

        Only exclusion by markers depends on what the tokens are; tokens known already are skipped.
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
        self.native.set_excluded(start, self._tracker.feed(map(self._piece, tokens)))

    def keys(self, start: int, stop: int) -> Keys:
        """Fingerprints of the steering of the tokens at positions [start, stop), uint64.

        As far as the KV cache depends on it; what acts in the last block alone is not part of it.

        Of tokens yet to be computed: what they would be computed under, given the decisions so far.
        """
        if self.native is None:
            return np.zeros(max(stop - start, 0), np.uint64)
        keys: Keys = self.native.keys(start, stop)
        return keys

    def logits_key(self, position: int) -> int:
        """A fingerprint of all of the steering of one token."""
        return 0 if self.native is None else int(self.native.logits_key(position))

    @property
    def first_to_decode(self) -> int:
        """The position from which on no cached token can stand in for computing it.

        A router has to see the last prompt token, and all tokens that it averages over.
        """
        if self.native is None or not self.plan.gated:
            return _END
        decided = self.native.decided_at
        if not decided:
            return self._first_read
        return decided[-1] + 1 if self.plan.rechecks and self.plan.pools else _END

    @property
    def wants_reprocess(self) -> bool:
        """Whether a category fired that steers prompt tokens which were computed without it."""
        return self.native is not None and self.native.wants_reprocess

    def hold(self, n_tokens: int) -> int:
        """Make the decision hold from the first token on.

        Returns:
            The position from which on the first `n_tokens` tokens have to be decoded again.
        """
        before, last = self.keys(0, n_tokens), self.logits_key(n_tokens - 1)
        if self.native is not None:
            self.native.hold()
        changed = np.flatnonzero(before != self.keys(0, n_tokens))
        if len(changed):
            return int(changed[0])
        return n_tokens if last == self.logits_key(n_tokens - 1) else n_tokens - 1

    def restart(self) -> None:
        """Evaluation starts again: forget what the router has seen since its last decision."""
        if self.native is not None:
            self.native.restart()

    def report(self, n_tokens: int) -> SteeringReport:
        """What was done to the first `n_tokens` tokens."""
        return report(self.plan, self.native, n_tokens)
