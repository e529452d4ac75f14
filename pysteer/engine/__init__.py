"""Many requests at once: continuous batching with steering per request."""

from pysteer.engine.engine import Engine
from pysteer.engine.errors import EngineBusyError, EngineClosedError
from pysteer.engine.handle import Handle
from pysteer.engine.statistics import EngineStatistics

__all__ = ["Engine", "EngineBusyError", "EngineClosedError", "EngineStatistics", "Handle"]
