"""Learning directions and routers: from transformers models, or from GGUF models without torch.

`pysteer.extract.torch_capture.TorchCapture` and `pysteer.extract.torch_model.TorchModel` need torch
and are imported from their own modules. The public names below load when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysteer.extract.data import Data
    from pysteer.extract.extraction import extract, fit_pack_routers
    from pysteer.extract.llama_capture import LlamaCapture
    from pysteer.extract.settings import ExtractSettings

__all__ = ["Data", "ExtractSettings", "LlamaCapture", "extract", "fit_pack_routers"]

_MODULES = {
    "Data": "data",
    "ExtractSettings": "settings",
    "LlamaCapture": "llama_capture",
    "extract": "extraction",
    "fit_pack_routers": "extraction",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pysteer.extract' has no attribute {name!r}")
    value = getattr(import_module(f"pysteer.extract.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
