"""pysteer: a steering runtime for llama.cpp.

The public names load when they are first asked for, so that `import pysteer` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysteer.engine import Engine
    from pysteer.errors import (
        FormatError,
        HookError,
        ModelMismatchError,
        SteeringError,
        UnknownCategoryError,
    )
    from pysteer.llama.hooked import HookedLlama
    from pysteer.pack.pack import BaseModel, SteeringPack
    from pysteer.pack.policy import Policy
    from pysteer.pack.vector import SteeringVector
    from pysteer.runtime.steered import SteeredLlama

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

_MODULES = {
    "BaseModel": "pysteer.pack.pack",
    "Engine": "pysteer.engine",
    "HookedLlama": "pysteer.llama.hooked",
    "Policy": "pysteer.pack.policy",
    "SteeredLlama": "pysteer.runtime.steered",
    "SteeringPack": "pysteer.pack.pack",
    "SteeringVector": "pysteer.pack.vector",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pysteer' has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "pysteer.errors")), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
