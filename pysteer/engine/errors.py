"""What the engine raises besides the errors of the rest of pysteer."""

from __future__ import annotations

from pysteer.errors import SteeringError


class EngineBusyError(SteeringError):
    """The queue is full, and stayed full for as long as the caller was ready to wait."""


class EngineClosedError(SteeringError):
    """The engine was closed; what was still running has ended as cancelled."""
