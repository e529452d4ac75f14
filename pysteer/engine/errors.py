"""What the engine raises besides the errors of the rest of pysteer."""

from __future__ import annotations

import threading

from pysteer.errors import SteeringError


class EngineBusyError(SteeringError):
    """The queue is full, and stayed full for as long as the caller was ready to wait."""


class EngineClosedError(SteeringError):
    """The engine was closed; what was still running has ended as cancelled."""


def require_other_thread(decodes: threading.Thread | None) -> None:
    """See to it that the thread which decodes does not wait for itself.

    Raises:
        SteeringError: it is the one that calls.
    """
    if threading.current_thread() is decodes:
        raise SteeringError(
            "a logits processor or stopping criterion is a callback of the thread that decodes, "
            "which would wait here for itself; wait in another thread"
        )
