"""The scheduler: the thread that decodes, and finally frees the model."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from dataclasses import replace

from pysteer.engine.decoding import Decoder
from pysteer.engine.queue import RequestQueue
from pysteer.engine.request import Request
from pysteer.engine.running import RunningRequests
from pysteer.engine.statistics import EngineStatistics
from pysteer.llama.forks import bind_to_process
from pysteer.llama.hooked import HookedLlama

_log = logging.getLogger(__name__)

_all: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Decodes the requests of one model in its own thread until stopped.

    Args:
        llm: the model. The scheduler closes it when it ends.
        max_queue: number of requests that may wait for a slot.
        prompt_share: number of prompt tokens that a batch may have while other sequences generate.

    Attributes:
        queue: requests without a slot, and signals from other threads.
        running: requests with a slot.
        decoder: makes the batches.
        thread: the thread.
    """

    def __init__(self, llm: HookedLlama, *, max_queue: int, prompt_share: int) -> None:
        self._llm = llm
        self._statistics = EngineStatistics()
        self.queue = RequestQueue(max_queue)
        self.running = RunningRequests(llm.context, self._statistics)
        self.decoder = Decoder(
            llm.context, self.running, self._statistics, prompt_share=prompt_share
        )
        self.thread = threading.Thread(target=self._run, name="pysteer-engine", daemon=True)
        self.queue.thread = self.thread
        self.thread.start()
        _all.add(self)
        bind_to_process(self)

    def leave(self) -> None:
        """Become the copy in a forked process, which lacks the thread."""
        self.queue.leave()
        _all.discard(self)

    def statistics(self) -> EngineStatistics:
        """Return a copy of the counts; callable from any thread."""
        return replace(
            self._statistics,
            running=len(self.running.active),
            waiting=len(self.queue) + len(self.running.preempted),
        )

    def stop(self, *, drain: bool) -> None:
        """End; with `drain`, when all requests are done. Does not wait, and any thread may call."""
        self.queue.stop(drain=drain)

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while self.queue.wait(busy=bool(self.running.active or self.running.preempted)):
                try:
                    self._step()
                except Exception as error:  # a defect of ours: these requests end, not the engine
                    _log.exception("the engine's scheduler failed")
                    for request in list(self.running.active):
                        self.running.fail(request, error)
        except BaseException as error:  # not even that can be done
            _log.exception("the engine's scheduler broke down")
            failure = error
        self._end(failure)

    def _step(self) -> None:
        if self.queue.take_released():
            self.running.cache.clear()
        self._end_cancelled()
        self._admit()
        self.decoder.step()

    def _end_cancelled(self) -> None:
        gone = self.queue.take_cancelled()
        if gone is None:
            return
        running = self.running
        gone += [request for request in running.preempted if request.handle.cancelled]
        running.preempted = [request for request in running.preempted if request not in gone]
        for request in gone:
            request.finish("cancelled")
        for request in [request for request in running.active if request.handle.cancelled]:
            running.finish(request, "cancelled")

    def _admit(self) -> None:
        """Give slots to waiting requests, in their order, as long as their tokens fit."""
        while not self.running.full and self.running.settled:
            preempted = self.running.preempted
            request = preempted[0] if preempted else self.queue.first()
            if request is None:
                return
            try:
                if not self.running.place(request):
                    return
            except Exception as error:
                self._remove_waiting(request)
                self.running.fail(request, error)
            else:
                self._remove_waiting(request)

    def _remove_waiting(self, request: Request) -> None:
        if request in self.running.preempted:
            self.running.preempted.remove(request)
        else:
            self.queue.remove(request)

    def _end(self, failure: BaseException | None) -> None:
        queued = self.queue.close()
        for request in [*self.running.active, *self.running.preempted, *queued]:
            if failure is None:
                request.finish("cancelled")
            else:
                request.fail(failure)
        self.running.active.clear()
        self.running.preempted.clear()
        self.queue.wait_for_users()
        self._llm.close()


@atexit.register
def _stop_all() -> None:
    """The interpreter must not end while a thread is in llama.cpp."""
    left = list(_all)
    for scheduler in left:
        scheduler.stop(drain=False)
    for scheduler in left:
        scheduler.thread.join()
