"""pysteer: a steering runtime for llama.cpp."""

from pysteer.engine import Engine
from pysteer.errors import (
    FormatError,
    HookError,
    ModelMismatchError,
    SteeringError,
    UnknownCategoryError,
)
from pysteer.hooked import HookedLlama
from pysteer.pack import BaseModel, SteeringPack
from pysteer.policy import Policy
from pysteer.runtime.steered import SteeredLlama
from pysteer.vector import SteeringVector

__all__ = [
    "BaseModel",
    "Engine",
    "FormatError",
    "HookError",
    "HookedLlama",
    "ModelMismatchError",
    "Policy",
    "SteeredLlama",
    "SteeringError",
    "SteeringPack",
    "SteeringVector",
    "UnknownCategoryError",
]
