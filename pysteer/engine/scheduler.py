"""The thread that decodes: who gets a slot, what goes into each batch, what is drawn from it."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pysteer.engine.batch import Batch
from pysteer.engine.cache import KvCache, LlamaMemory
from pysteer.engine.errors import EngineBusyError, EngineClosedError, require_other_thread
from pysteer.engine.request import Request
from pysteer.engine.sampling import Candidates
from pysteer.engine.text import FinishReason
from pysteer.errors import HookError
from pysteer.llama.hooked import HookedLlama

_NO_ROOM = 1  # llama_decode: no cells for this batch; nothing was changed

_CLOSED = "the engine is closed; create a new one"

_HEADROOM = 16  # cells left for each running sequence to go on, when another is admitted

_log = logging.getLogger(__name__)

_all: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@dataclass
class EngineStatistics:
    """Counts since the engine was made.

    Attributes:
        decodes: calls of llama_decode.
        tokens_decoded: rows of all their batches.
        tokens_reused: prompt tokens that were in the cache already.
        preemptions: sequences that had to make room for older ones, and were decoded again later.
        running: sequences that have a slot now.
        waiting: requests in the queue now.
    """

    decodes: int = 0
    tokens_decoded: int = 0
    tokens_reused: int = 0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0


class _Run(NamedTuple):
    """Consecutive tokens of one request in a batch."""

    request: Request
    n: int


class _NoRoom(Exception):
    """The batch found no cells."""


class Scheduler:
    """Decodes the requests of one model, in a thread of its own, until it is stopped.

    Args:
        llm: the model. The scheduler closes it when it ends.
        max_queue: how many requests may wait for a slot.
        prompt_share: how many prompt tokens a batch may have while other sequences generate.
    """

    def __init__(self, llm: HookedLlama, *, max_queue: int, prompt_share: int) -> None:
        self._llm = llm
        self._max_queue = max_queue
        self._prompt_share = prompt_share
        # In a batch of several sequences llama.cpp orders the rows of such models by itself, and
        # their state cannot be cut back.
        self._one_by_one = not llm.batches_sequences
        n_cells = llm.n_ctx() * (llm.max_sequences if llm._is_recurrent else 1)
        self._cache = KvCache(
            LlamaMemory(llm.ctx),
            n_cells=n_cells,
            n_slots=llm.max_sequences,
            rewinds=not self._one_by_one,
        )
        self._batch = Batch(llm.n_batch)
        self._candidates = Candidates(llm.n_vocab())
        self._active: list[Request] = []  # in the order of their age
        self._preempted: list[Request] = []  # likewise; they go before the queue
        self._statistics = EngineStatistics()
        # Shared with other threads, under this lock, which is never held while anything is decoded
        # or a handle is told. A finaliser may take it again in the same thread.
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[Request] = deque()
        self._next_order = 0
        self._users = 0
        self._stopping = False
        self._draining = False
        self._cancelling = False
        self._idle = False  # the thread has nothing to do, or only what is held
        self._held = False  # requests wait in the queue until all of a group are there
        self._clearing = False  # what the cache holds is to be forgotten first
        self.thread = threading.Thread(target=self._run, name="pysteer-engine", daemon=True)
        self.thread.start()
        _all.add(self)

    # ---- called by other threads -------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether requests are accepted."""
        return not self._stopping and not self._draining

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the model from being freed meanwhile.

        Raises:
            EngineClosedError: it is free, or about to be.
        """
        with self._changed:
            if self._stopping:
                raise EngineClosedError(_CLOSED)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def put(self, request: Request, timeout: float | None) -> None:
        """Queue a request, waiting for room up to `timeout` seconds; None is as long as it takes.

        Raises:
            EngineBusyError: there was none.
            EngineClosedError: it was stopped.
        """
        if threading.current_thread() is self.thread:
            timeout = 0  # in a callback of some request: nobody else makes room
        with self._changed:
            if self._held and self.open and len(self._queue) >= self._max_queue:
                timeout = 0  # nothing leaves the queue before the group is complete
            if not self._changed.wait_for(
                lambda: not self.open or len(self._queue) < self._max_queue, timeout
            ):
                raise EngineBusyError(
                    f"{len(self._queue)} requests are waiting, and no more may; try again later, "
                    "or make the engine with a larger max_queue"
                )
            if not self.open:
                raise EngineClosedError(_CLOSED)
            request.order = self._next_order
            self._next_order += 1
            request.handle.attach(self.wake, self.thread)
            self._queue.append(request)
            self._changed.notify_all()

    def hold(self) -> None:
        """Wait until nothing is running, and start nothing until `release`.

        Raises:
            EngineClosedError: it was stopped.
            SteeringError: called by its own thread.
        """
        require_other_thread(self.thread)
        with self._changed:
            self._changed.wait_for(
                lambda: not self.open or (self._idle and not self._held and not self._queue)
            )
            if not self.open:
                raise EngineClosedError(_CLOSED)
            self._held = True

    def release(self) -> None:
        """Start what was queued since `hold`, all at once and from an empty cache."""
        with self._changed:
            self._held = False
            self._clearing = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Look for cancelled requests."""
        with self._changed:
            self._cancelling = True
            self._changed.notify_all()

    def stop(self, *, drain: bool) -> None:
        """Accept nothing more and end: with `drain`, when all requests are done. Does not wait."""
        with self._changed:
            self._draining = True
            if not drain:
                self._stopping = True
            self._changed.notify_all()

    def statistics(self) -> EngineStatistics:
        """A copy."""
        with self._changed:
            return replace(
                self._statistics,
                running=len(self._active),
                waiting=len(self._queue) + len(self._preempted),
            )

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while self._wait():
                try:
                    self._step()
                except Exception as error:  # a defect of ours: these requests end, not the engine
                    _log.exception("the engine's scheduler failed")
                    for request in list(self._active):
                        self._fail(request, error)
        except BaseException as error:  # not even that can be done
            _log.exception("the engine's scheduler broke down")
            failure = error
        self._end(failure)

    def _wait(self) -> bool:
        """Wait for work; False when there is none and will be none."""
        with self._changed:
            while not (self._stopping or self._active or self._preempted or self._startable):
                if self._draining:
                    return False
                if not self._queue:
                    self._cancelling = False
                self._idle = True
                self._changed.notify_all()
                self._changed.wait()
            self._idle = False
            return not self._stopping

    @property
    def _startable(self) -> bool:
        return bool(self._queue) and not self._held

    def _end(self, failure: BaseException | None) -> None:
        with self._changed:
            self._draining = self._stopping = True
            queued = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for request in [*self._active, *self._preempted, *queued]:
            if failure is None:
                request.finish("cancelled")
            else:
                request.fail(failure)
        self._active.clear()
        self._preempted.clear()
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0)
        self._llm.close()

    def _step(self) -> None:
        if self._clearing:
            self._clearing = False
            self._cache.clear()
        self._end_cancelled()
        self._admit()
        runs = self._choose()
        while runs and not self._make_room(sum(run.n for run in runs)):
            runs = self._choose()  # of those that are left; nobody is admitted before they go on
        if not runs:
            return
        together = []
        for run in runs:
            if self._one_by_one or run.request.alone:
                self._decode([run])
            else:
                together.append(run)
        self._decode(together)

    def _end_cancelled(self) -> None:
        with self._changed:
            if not self._cancelling:
                return
            self._cancelling = False
            gone = [request for request in self._queue if request.handle.cancelled]
            for request in gone:
                self._queue.remove(request)
            self._changed.notify_all()
        gone += [request for request in self._preempted if request.handle.cancelled]
        self._preempted = [request for request in self._preempted if request not in gone]
        for request in gone:
            request.finish("cancelled")
        for request in [request for request in self._active if request.handle.cancelled]:
            self._finish(request, "cancelled")

    # ---- slots -------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give slots to those that wait, in their order, as long as their tokens fit."""
        while len(self._active) < len(self._cache.slots):
            with self._changed:
                waiting = self._preempted or self._queue
                if not waiting:
                    return
                request = waiting[0]
            try:
                if not self._place(request):
                    return
            except Exception as error:
                self._remove_waiting(request)
                self._fail(request, error)

    def _place(self, request: Request) -> bool:
        """Give a slot to one that waits; False if its tokens do not fit now."""
        n = request.n_tokens
        limit = min(n - 1, request.steering.first_to_decode)  # the last token's logits are needed
        place = self._cache.find(request.tokens(0, n), request.steering.keys(0, n), limit)
        assert place is not None
        needed = n - place.reused + place.cells
        needed += sum(
            other.pending + min(_HEADROOM, other.writing.remaining) for other in self._active
        )
        if self._active and needed > self._cache.available:
            return False
        self._remove_waiting(request)
        request.n_past = place.reused
        request.slot = self._cache.open(place, request.content)
        self._active.append(request)
        self._active.sort(key=lambda request: request.order)
        request.steering.restart()
        self._statistics.tokens_reused += place.reused
        self._llm._set_sequence(request.slot.number, request.steering.native)
        return True

    def _remove_waiting(self, request: Request) -> None:
        with self._changed:
            for waiting in (self._preempted, self._queue):
                if request in waiting:
                    waiting.remove(request)
            self._changed.notify_all()

    def _make_room(self, n: int) -> bool:
        """See to `n` unheld cells. False if a sequence had to go for it: choose anew then."""
        while self._cache.unheld < n:
            if not self._relieve(n - self._cache.unheld):
                return False
        return True

    def _relieve(self, n: int) -> bool:
        """Give up idle cells if there are any. Otherwise the youngest sequence goes: False."""
        if self._cache.evict(n):
            return True
        youngest = self._active[-1]
        if len(self._active) == 1:  # nobody else to make room: the context is full
            self._finish(youngest, "length")
        else:
            self._release(youngest)
            self._preempted.append(youngest)
            self._preempted.sort(key=lambda request: request.order)
            self._statistics.preemptions += 1
        return False

    def _release(self, request: Request) -> None:
        slot = request.slot
        assert slot is not None
        self._cache.rest(slot)
        self._llm._set_sequence(slot.number, None)
        request.slot = None
        self._active.remove(request)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._release(request)
        request.finish(reason)

    def _fail(self, request: Request, error: BaseException) -> None:
        try:
            if request.slot is not None:
                self._cache.recover(request.slot, 0)  # nobody knows what it holds
                request.n_past = 0
                self._release(request)
        finally:
            request.fail(error)

    # ---- decoding ----------------------------------------------------------------------------

    def _choose(self) -> list[_Run]:
        """The next batch: a token of each sequence that generates, and parts of prompts.

        While some generate, those that read share `prompt_share` tokens evenly, so that no prompt
        holds up the others' text, nor another prompt, for longer.
        """
        generating = [request for request in self._active if request.pending == 1]
        reading = [request for request in self._active if request.pending > 1]
        runs = [_Run(request, 1) for request in generating]
        room = self._llm.n_batch - len(runs)
        if runs:
            room = min(room, self._prompt_share)
        reading.sort(key=lambda request: request.pending)
        for left, request in zip(range(len(reading), 0, -1), reading, strict=True):
            n = min(request.pending, room // left)
            if n:
                runs.append(_Run(request, n))
            room -= n
        return runs

    def _decode(self, runs: Sequence[_Run]) -> None:
        runs = [run for run in runs if run.request.slot is not None]
        if not runs:
            return
        rows: list[int] = []
        described: list[tuple[int, int, int, int]] = []
        self._batch.clear()
        for request, n in runs:
            start, stop = request.n_past, request.n_past + n
            assert request.slot is not None
            slot = request.slot.number
            last = stop == request.n_tokens
            rows.append(self._batch.add(slot, start, request.tokens(start, stop), output=last))
            described.append((slot, start, n, int(last)))
        try:
            with self._llm._decoding(described):
                status = self._batch.decode(self._llm.ctx)
                if status == _NO_ROOM:
                    raise _NoRoom
                if status != 0:
                    raise HookError(f"llama.cpp could not decode a batch (status {status})")
        except _NoRoom:
            self._relieve(1)
            return
        except Exception as error:
            if len(runs) == 1:
                self._fail(runs[0].request, error)
            else:  # whose fault it is shows when each has a batch of its own
                _log.info("a batch of %d sequences failed: %s", len(runs), error)
                for run in runs:
                    self._set_apart(run)
            return
        self._statistics.decodes += 1
        self._statistics.tokens_decoded += sum(run.n for run in runs)
        for request, n in runs:
            assert request.slot is not None
            self._cache.take(request.slot, n)
            request.n_past += n
        for (request, _), row in zip(runs, rows, strict=True):
            if request.pending == 0:
                try:
                    self._draw(request, row)
                # Of a stopping criterion or a logits processor, and not only an Exception: nothing
                # that one request's callback does may end the others.
                except BaseException as error:
                    self._fail(request, error)

    def _set_apart(self, run: _Run) -> None:
        """Take back a failed decode of one of its sequences, which is to be decoded alone then."""
        request = run.request
        assert request.slot is not None
        request.alone_until = request.n_past + run.n
        kept = min(request.n_past, request.steering.first_to_decode)
        request.n_past = self._cache.recover(request.slot, kept)

    def _draw(self, request: Request, row: int) -> None:
        """Draw the next token of a request from the logits of the batch's row `row`."""
        if request.steering.wants_reprocess:
            assert request.slot is not None
            changed = request.steering.hold(request.n_past)
            if changed < request.n_past:
                request.n_past = self._cache.cut(request.slot, changed)
                return
        if request.keep_first_logits and request.handle.first_logits is None:
            request.handle.first_logits = self._logits(row).copy()
        if request.stopping_criteria is not None and request.stopping_criteria(
            request.tokens(0, request.n_past), self._logits(row)
        ):
            self._finish(request, "stop")
            return
        token = request.sampler.sample(self._candidates, self._llm.ctx, row)
        ended = request.writing.add(token)
        if ended is not None:
            self._finish(request, ended)
            return
        text = request.writing.take()
        if text:
            request.handle.push(text)
        if request.n_tokens == request.length_limit:
            self._finish(request, "length")
            return
        request.append(token)

    def _logits(self, row: int) -> npt.NDArray[np.float32]:
        """A view of the logits of the batch's row `row`, shape (n_vocab,)."""
        return np.ctypeslib.as_array(
            self._llm._ctx.get_logits_ith(row), shape=(self._llm._n_vocab,)
        )


@atexit.register
def _stop_all() -> None:
    """The interpreter must not end while a thread is in llama.cpp."""
    left = list(_all)
    for scheduler in left:
        scheduler.stop(drain=False)
    for scheduler in left:
        scheduler.thread.join()
