"""A llama_batch over numpy arrays, so that filling it costs no ctypes call per token."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt


class Batch:
    """Rows of tokens of several sequences, for one `llama_decode`.

    Args:
        n_tokens: how many rows fit.
    """

    def __init__(self, n_tokens: int) -> None:
        self._tokens = np.zeros(n_tokens, np.int32)
        self._positions = np.zeros(n_tokens, np.int32)
        self._slots = np.zeros(n_tokens, np.int32)
        self._outputs = np.zeros(n_tokens, np.int8)
        self._counts = np.ones(n_tokens, np.int32)  # every token belongs to one sequence
        addresses = self._slots.ctypes.data + self._slots.itemsize * np.arange(n_tokens)
        self._slot_pointers = addresses.astype(np.uintp)
        fields: dict[str, Any] = {field[0]: field[1] for field in llama_cpp.llama_batch._fields_}

        def pointer(name: str, array: npt.NDArray[Any]) -> Any:
            return ctypes.cast(array.ctypes.data, fields[name])

        self._native = llama_cpp.llama_batch(
            n_tokens=0,
            token=pointer("token", self._tokens),
            embd=None,
            pos=pointer("pos", self._positions),
            n_seq_id=pointer("n_seq_id", self._counts),
            seq_id=pointer("seq_id", self._slot_pointers),
            logits=pointer("logits", self._outputs),
        )
        self._rows = 0

    def clear(self) -> None:
        """Start anew."""
        self._rows = 0

    def add(self, slot: int, start: int, tokens: npt.NDArray[np.intc], *, output: bool) -> int:
        """Add tokens of one sequence; returns the row of the last, whose logits `output` asks for.

        Args:
            slot: llama.cpp's sequence id.
            start: position of the first token.
            tokens: at least one.
            output: whether the last row is to be sampled from.
        """
        first, n = self._rows, len(tokens)
        last = first + n - 1
        if n == 1:
            self._tokens[first] = tokens[0]
            self._positions[first] = start
            self._slots[first] = slot
        else:
            self._tokens[first : last + 1] = tokens
            self._positions[first : last + 1] = np.arange(start, start + n)
            self._slots[first : last + 1] = slot
            self._outputs[first:last] = 0
        self._outputs[last] = output
        self._rows = last + 1
        return last

    def decode(self, context: Any) -> int:
        """What llama_decode returns. Releases the GIL meanwhile."""
        self._native.n_tokens = self._rows
        status: int = llama_cpp.llama_decode(context, self._native)
        return status
