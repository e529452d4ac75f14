"""The queue of requests, and signals from other threads to the thread that decodes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pysteer.engine.errors import EngineBusyError, EngineClosedError, require_other_thread
from pysteer.engine.request import Request
from pysteer.errors import SteeringError
from pysteer.llama.forks import left_behind

_CLOSED = "the engine is closed; create a new one"


class RequestQueue:
    """A bounded queue with one reader, `thread`.

    Its lock is never held while anything is decoded or a handle is told. A finaliser may take the
    lock again in the same thread.

    Args:
        max_queue: number of requests that may wait.

    Attributes:
        thread: the thread that decodes; set before the first request.
    """

    thread: threading.Thread

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[Request] = deque()
        self._next_order = 0
        self._users = 0
        self._stopping = False
        self._draining = False
        self._cancelling = False
        self._left = False  # True in the copy of a forked process
        self._idle = False  # the reader has nothing to do, except requests on hold
        self._holder: int | None = None  # the thread that makes a group
        self._held = False  # requests wait until all of a group are there
        self._released = False  # a group is complete, and wants an empty cache

    def __len__(self) -> int:
        return len(self._queue)

    # ---- called by any thread ----------------------------------------------------------------

    def leave(self) -> None:
        """Become the copy in a forked process, where nothing decodes."""
        self._changed = threading.Condition(threading.RLock())
        self._left = True

    @property
    def left(self) -> bool:
        """True in the copy of a forked process."""
        return self._left

    @property
    def open(self) -> bool:
        """Requests are accepted."""
        return not self._stopping and not self._draining

    @property
    def users(self) -> int:
        """Number of threads inside `kept`."""
        return self._users

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the model from being freed inside the `with` block.

        Raises:
            EngineClosedError: the model is freed, or about to be.
            SteeringError: this is a forked process.
        """
        with self._changed:
            self._require_own_process()
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
        """Queue a request, waiting for room up to `timeout` seconds; None waits without limit.

        Raises:
            EngineBusyError: the queue stayed full.
            EngineClosedError: the engine was stopped.
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
                    f"queue is full ({len(self._queue)} waiting); try again later, or make the "
                    "engine with a larger max_queue"
                )
            if not self.open:
                raise EngineClosedError(_CLOSED)
            request.order = self._next_order
            self._next_order += 1
            request.handle.attach(self.wake, self.require_waitable)
            self._queue.append(request)
            self._changed.notify_all()

    def hold(self) -> None:
        """Wait until nothing is running, and start nothing until `release`.

        Raises:
            EngineClosedError: the engine was stopped.
            SteeringError: called by the thread that decodes or holds already, or in a forked
                process.
        """
        self.require_waitable()
        with self._changed:
            self._require_own_process()
            self._changed.wait_for(
                lambda: not self.open or (self._idle and not self._held and not self._queue)
            )
            if not self.open:
                raise EngineClosedError(_CLOSED)
            self._held = True
            self._holder = threading.get_ident()

    def release(self) -> None:
        """Start all requests queued since `hold`, at once and from an empty cache."""
        with self._changed:
            self._held = False
            self._holder = None
            self._released = True
            self._changed.notify_all()

    def require_waitable(self) -> None:
        """Raise SteeringError if the calling thread would wait for itself.

        The thread that decodes would, and between `hold` and `release` the thread that holds.
        """
        require_other_thread(self.thread)
        if self._holder == threading.get_ident():
            raise SteeringError(
                "requests of a `with engine.together()` block start when the block ends; nest no "
                "blocks, and wait for results behind the block"
            )

    def wake(self) -> None:
        """Have the reader look for cancelled requests."""
        with self._changed:
            self._cancelling = True
            self._changed.notify_all()

    def stop(self, *, drain: bool) -> None:
        """Accept no more requests and end: with `drain`, when all are done. Does not wait."""
        with self._changed:
            self._draining = True
            if not drain:
                self._stopping = True
            self._changed.notify_all()

    def _require_own_process(self) -> None:
        if self._left:
            raise left_behind("the engine")

    # ---- called by the thread that decodes ---------------------------------------------------

    def wait(self, *, busy: bool) -> bool:
        """Wait for something to do, unless `busy`. False: end now, or once nothing is left."""
        with self._changed:
            while not (self._stopping or busy or (self._queue and not self._held)):
                if self._draining:
                    return False
                if not self._queue:
                    self._cancelling = False
                self._idle = True
                self._changed.notify_all()
                self._changed.wait()
            self._idle = False
            return not self._stopping

    def take_released(self) -> bool:
        """Tell, once, that a group was released."""
        with self._changed:
            released, self._released = self._released, False
        return released

    def take_cancelled(self) -> list[Request] | None:
        """Remove and return the cancelled requests; None if nothing was cancelled anywhere."""
        with self._changed:
            if not self._cancelling:
                return None
            self._cancelling = False
            gone = [request for request in self._queue if request.handle.cancelled]
            for request in gone:
                self._queue.remove(request)
            self._changed.notify_all()
        return gone

    def first(self) -> Request | None:
        """Return the request that waits longest."""
        with self._changed:
            return self._queue[0] if self._queue else None

    def remove(self, request: Request) -> None:
        """Remove a request that gets a slot, or has failed."""
        with self._changed:
            self._queue.remove(request)
            self._changed.notify_all()

    def close(self) -> list[Request]:
        """Accept no more requests; remove and return those that still wait."""
        with self._changed:
            self._draining = self._stopping = True
            queued = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        return queued

    def wait_for_users(self) -> None:
        """Wait until no thread is inside `kept`."""
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0)
