"""Many requests at once: continuous batching with steering by the request."""

from pysteer.engine.engine import Engine
from pysteer.engine.errors import EngineBusyError, EngineClosedError
from pysteer.engine.handle import Handle
from pysteer.engine.scheduler import EngineStatistics

__all__ = ["Engine", "EngineBusyError", "EngineClosedError", "EngineStatistics", "Handle"]
