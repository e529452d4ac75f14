"""Quantise a GGUF model with llama.cpp, for tests and measurements."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

FTYPES = {"F16": 1, "Q8_0": 7, "Q4_K_M": 15}  # enum llama_ftype


def quantize(source: Path, target: Path, ftype: str) -> Path:
    """Write the weights of a model as one of `FTYPES`; quantised weights are quantised again."""
    import llama_cpp  # late: writing a tiny model does not need llama.cpp

    if ftype not in FTYPES:
        raise ValueError(f"unknown ftype {ftype!r}; known: {', '.join(FTYPES)}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[ftype]
    params.nthread = os.cpu_count() or 1
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code} for {source} to {ftype}")
    return target
