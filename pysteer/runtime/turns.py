"""Turns that the generations of several requests take in one context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pysteer.errors import SteeringError
from pysteer.llama.hooked import HookedLlama
from pysteer.runtime.cache import SteeredCache
from pysteer.runtime.generation import Generation, Request, SavedContext
from pysteer.runtime.sequence import SequenceSteering

_REFUSED = (
    "another request has used the model since; read each stream to its end before the next "
    "request, or use Engine"
)


class Turns:
    """The owner of the context among generations, and copies of the others.

    An interrupted generation is copied to memory of the host, KV cache included, and put back for
    its next step, exact to the last bit. All calls need the context's lock.

    Args:
        llm: the model.
        cache: the steering of the tokens in its context.

    Attributes:
        current: the generation that the context belongs to; None if tokens were evaluated by hand.
        running: the generation in the middle of a step, or None.
    """

    def __init__(self, llm: HookedLlama, cache: SteeredCache) -> None:
        self._llm = llm
        self._cache = cache
        self.current: Generation | None = None
        self.running: Generation | None = None

    def take(self, generation: Generation | None) -> None:
        """Give the context to a generation, with its state put back; None: to evaluation by hand.

        Raises:
            SteeringError: the generation cannot be put back.
        """
        if self.current is not generation:
            self._interrupt()
            self.current = generation
            if generation is not None:
                self._put_back(generation)
        if generation is not None:
            self._rewrite(generation)

    def evaluate_prompt(self, request: Request, sequence: SequenceSteering) -> None:
        """Give the context to a request whose chat handler evaluates the prompt by itself."""
        latest = request.latest
        if latest is None or latest is not self.current or latest.n_drawn:
            self.take(None)
            latest = request.latest = self.current = Generation(request, sequence, 0, over=True)
        latest.sequence = sequence

    def _interrupt(self) -> None:
        left, self.current = self.current, None
        if left is None or not left.wanted:
            return
        llm, n = self._llm, len(left.tokens)
        try:
            memory = llm.context.memory.save(0)
            scores = llm.scores[:n].copy() if llm.keeps_logits else None
        except (RuntimeError, MemoryError):
            left.lost = True
            return
        left.saved = SavedContext(memory, scores, llm._sampler)

    def _put_back(self, generation: Generation) -> None:
        if generation.lost:
            raise SteeringError(_REFUSED)
        saved, generation.saved = generation.saved, None
        if saved is None:  # it begins
            return
        llm, n = self._llm, len(generation.tokens)
        llm.n_tokens = 0
        try:
            llm.context.memory.restore(0, saved.memory)
        except RuntimeError:
            generation.lost = True
            self.current = None
            raise SteeringError(_REFUSED) from None
        if saved.scores is not None:
            llm.scores[:n] = saved.scores
        llm._sampler = saved.sampler
        llm._requires_eval = True  # the logits in the context are another generation's
        self._cache.sequence = generation.sequence
        generation.live = False
        self._write(generation)

    def _rewrite(self, generation: Generation) -> None:
        """Undo changes by hand of the tokens between two steps."""
        n = len(generation.tokens)
        if generation.n_drawn and not (
            self._llm.n_tokens == n and self._cache.taken(n) == generation.steering
        ):
            self._write(generation)

    def _write(self, generation: Generation) -> None:
        assert generation.steering is not None
        self._cache.give(generation.steering)
        self._llm.n_tokens = len(generation.tokens)
        self._llm.input_ids[: len(generation.tokens)] = generation.tokens

    def note_latest(self, request: Request | None) -> None:
        """Record the tokens in the context, if they belong to the request's latest generation."""
        latest = None if request is None or request.ended else request.latest
        if latest is not None and latest is self.current:
            self.note(latest)

    def note(self, generation: Generation) -> None:
        """Record the tokens in the context, and their steering."""
        n = self._llm.n_tokens
        generation.tokens = self._llm.input_ids[:n].copy()
        generation.steering = self._cache.taken(n)

    @contextmanager
    def step(self, generation: Generation) -> Iterator[None]:
        """Run a step of a generation inside the `with` block.

        Raises:
            SteeringError: the generation cannot be put back.
        """
        self.take(generation)
        if not generation.live:  # a draft's logits are gone, so the draft is made again
            self._llm.n_tokens = min(self._llm.n_tokens, generation.n_accepted)
            generation.live = True
        outer, self.running = self.running, generation
        try:
            yield
        finally:
            self.running = outer
            self.note(generation)

    @contextmanager
    def own_sampler(self) -> Iterator[None]:
        """Hide the sampler of an open stream inside the `with` block, except in a step."""
        sampler = self._llm._sampler
        by_hand = self.running is None and self.current is not None and self.current.wanted
        if by_hand:
            self._llm._sampler = None
        try:
            yield
        finally:
            if by_hand:
                self._llm._sampler = sampler

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Run a request inside the `with` block; then give the context back to the running step.

        Callbacks of a request may make requests of their own.
        """
        outer, self.running = self.running, None
        if outer is not None:
            self.note(outer)
        try:
            yield
        finally:
            self.running = outer
            if outer is not None:
                self.take(outer)
