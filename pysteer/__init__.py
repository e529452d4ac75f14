"""pysteer: a steering runtime for llama.cpp."""

from pysteer.errors import (
    FormatError,
    HookError,
    ModelMismatchError,
    SteeringError,
    UnknownCategoryError,
)
from pysteer.hooked import HookedLlama
from pysteer.pack import BaseModel, SteeringPack
from pysteer.runtime.steered import SteeredLlama
from pysteer.vector import SteeringVector

__all__ = [
    "BaseModel",
    "FormatError",
    "HookError",
    "HookedLlama",
    "ModelMismatchError",
    "SteeredLlama",
    "SteeringError",
    "SteeringPack",
    "SteeringVector",
    "UnknownCategoryError",
]
