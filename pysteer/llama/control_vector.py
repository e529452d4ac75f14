"""llama.cpp's own control vector: one for the whole context."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from pysteer.errors import HookError


def set_native_control_vector(llm: llama_cpp.Llama, rows: npt.NDArray[np.float32]) -> None:
    """Give a model a control vector through llama.cpp's own function.

    On a `SteeredLlama` use `steering` instead: there the control-vector tensors are pysteer's.

    Args:
        llm: the model.
        rows: float32 (n_layer - 1, n_embd): the additions to the output of blocks 1 to
            n_layer - 1. All of them, because llama.cpp leaves layers beyond the buffer as they
            were.

    Raises:
        HookError: llama.cpp refused the vector.
    """
    set_control_vector(llm.ctx, rows)


def set_control_vector(context: Any, rows: npt.NDArray[np.float32]) -> None:
    """Give a llama_context a control vector; see `set_native_control_vector`."""
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_embd = rows.shape
    status = llama_cpp.llama_set_adapter_cvec(
        context, rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), rows.size, n_embd, 1, n_rows
    )
    if status != 0:
        raise HookError("llama.cpp refused a control vector for this model")
