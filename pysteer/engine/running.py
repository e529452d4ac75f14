"""Requests with a slot of the cache, and preempted requests."""

from __future__ import annotations

from pysteer.engine.cache import KvCache
from pysteer.engine.request import Request
from pysteer.engine.statistics import EngineStatistics
from pysteer.engine.text import FinishReason
from pysteer.llama.context import HookedContext

_HEADROOM = 16  # cells left for each running sequence to go on, when another is admitted


class RunningRequests:
    """Places requests in the cache, and takes them out when they end or older ones need room.

    Args:
        context: the model's context.
        statistics: counts reused tokens and preemptions.

    Attributes:
        cache: the cells and slots of the context.
        active: requests with a slot, oldest first.
        preempted: requests that made room for older ones, oldest first; they go before the queue.
    """

    def __init__(self, context: HookedContext, statistics: EngineStatistics) -> None:
        self._context = context
        self._statistics = statistics
        self.cache = KvCache(
            context.memory,
            n_cells=context.n_ctx * (context.max_sequences if context.is_recurrent else 1),
            n_slots=context.max_sequences,
            rewinds=context.batches_sequences,
        )
        self.active: list[Request] = []
        self.preempted: list[Request] = []

    @property
    def full(self) -> bool:
        """Every slot is in use."""
        return len(self.active) == len(self.cache.slots)

    def place(self, request: Request) -> bool:
        """Give a request a slot; False if its tokens do not fit now."""
        n = request.n_tokens
        limit = min(n - 1, request.steering.first_to_decode)  # the last token's logits are needed
        place = self.cache.find(request.tokens(0, n), request.steering.keys(0, n), limit)
        assert place is not None
        needed = n - place.reused + place.cells
        needed += sum(
            other.pending + min(_HEADROOM, other.writing.remaining) for other in self.active
        )
        if self.active and needed > self.cache.available:
            return False
        request.n_past = place.reused
        request.slot = self.cache.open(place, request.content)
        self.active.append(request)
        self.active.sort(key=lambda request: request.order)
        request.steering.restart()
        self._statistics.tokens_reused += place.reused
        self._context.set_sequence(request.slot.number, request.steering.native)
        return True

    def start_over(self) -> None:
        """Forget all cells, and have every request with a slot computed again."""
        self.cache.forget()
        for request in self.active:
            request.n_past = 0
            request.replaying = True
            request.steering.restart()

    @property
    def settled(self) -> bool:
        """True if no request is decoded alone or computed again, so that others may join."""
        return not any(request.alone or request.replaying for request in self.active)

    def make_room(self, n: int) -> bool:
        """Free `n` cells. False if a sequence was preempted: choose the batch anew then."""
        while self.cache.unheld < n:
            if not self.relieve(n - self.cache.unheld):
                return False
        return True

    def relieve(self, n: int) -> bool:
        """Free up to `n` idle cells; without any, preempt the youngest sequence: False."""
        if self.cache.evict(n):
            return True
        youngest = self.active[-1]
        if len(self.active) == 1:  # nobody else to make room: the context is full
            self.finish(youngest, "length")
        else:
            self._release(youngest)
            self.preempted.append(youngest)
            self.preempted.sort(key=lambda request: request.order)
            self._statistics.preemptions += 1
        return False

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request."""
        self._release(request)
        request.finish(reason)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request, with a slot or without, with an error."""
        try:
            if request.slot is not None:
                self.cache.recover(request.slot, 0)  # its content is unknown
                request.n_past = 0
                self._release(request)
        finally:
            request.fail(error)

    def _release(self, request: Request) -> None:
        slot = request.slot
        assert slot is not None
        self.cache.rest(slot)
        self._context.set_sequence(slot.number, None)
        request.slot = None
        self.active.remove(request)
