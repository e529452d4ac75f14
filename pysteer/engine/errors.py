"""Errors that only the engine raises."""

from __future__ import annotations

import threading

from pysteer.errors import SteeringError


class EngineBusyError(SteeringError):
    """The queue is full, and stayed full until the timeout."""


class EngineClosedError(SteeringError):
    """The engine is closed; requests still running have ended as cancelled."""


def require_other_thread(decodes: threading.Thread | None) -> None:
    """Raise SteeringError if the caller is the thread that decodes, which would wait for itself."""
    if threading.current_thread() is decodes:
        raise SteeringError(
            "a logits processor or stopping criterion is a callback in the thread that decodes, "
            "and waiting here would block that thread forever; wait in another thread"
        )
