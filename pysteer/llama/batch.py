"""A llama_batch over numpy arrays, so that filling it costs no ctypes call per token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import llama_cpp
import numpy as np
import numpy.typing as npt

NO_ROW, LAST_ROW, EVERY_ROW = 0, 1, 2
"""Rows of a run with logits."""

ALL_SEQUENCES: Final = -1
"""In a `Run`, in place of a sequence: its rows belong to several sequences."""

Run: TypeAlias = tuple[int, int, int, int]
"""Consecutive rows of one sequence: sequence, position of the first row, number of rows, and rows
with logits (`NO_ROW`, `LAST_ROW` or `EVERY_ROW`)."""


def chunked(start: int, n_tokens: int, n_batch: int, outputs: int) -> list[Run]:
    """Return the runs of sequence 0 from `start` on, with at most `n_batch` tokens each."""
    stop = start + n_tokens
    return [(0, at, min(n_batch, stop - at), outputs) for at in range(start, stop, n_batch)]


class DecodeBatch:
    """Rows of tokens of several sequences for one `llama_decode`, and their description.

    Args:
        n_tokens: number of rows that fit.

    Attributes:
        runs: description of the rows, for the hook.
    """

    def __init__(self, n_tokens: int) -> None:
        self._tokens = np.zeros(n_tokens, np.int32)
        self._positions = np.zeros(n_tokens, np.int32)
        self._slots = np.zeros(n_tokens, np.int32)
        self._outputs = np.zeros(n_tokens, np.int8)
        self._counts = np.ones(n_tokens, np.int32)  # sequences of a token
        addresses = self._slots.ctypes.data + self._slots.itemsize * np.arange(n_tokens)
        self._own_pointers = addresses.astype(np.uintp)
        self._slot_pointers = self._own_pointers.copy()
        self._everyone = np.zeros(0, np.int32)
        self._n_shared = 0
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
        self.runs: list[Run] = []

    @property
    def n_rows(self) -> int:
        """Number of rows added."""
        return self._rows

    def clear(self) -> None:
        """Remove all rows."""
        self._rows = 0
        self.runs = []
        if self._n_shared:
            self._counts[: self._n_shared] = 1
            self._slot_pointers[: self._n_shared] = self._own_pointers[: self._n_shared]
            self._n_shared = 0

    def add(
        self,
        slot: int,
        start: int,
        tokens: npt.NDArray[np.intc] | Sequence[int],
        outputs: int = LAST_ROW,
    ) -> int:
        """Add consecutive tokens of one sequence.

        Args:
            slot: llama.cpp's sequence id.
            start: position of the first token.
            tokens: at least one.
            outputs: rows with logits: `NO_ROW`, `LAST_ROW` or `EVERY_ROW`.

        Returns:
            The row of the last token.
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
            self._outputs[first:last] = outputs == EVERY_ROW
        self._outputs[last] = outputs != NO_ROW
        self._rows = last + 1
        self.runs.append((slot, start, n, outputs))
        return last

    def add_shared(self, n_slots: int, tokens: Sequence[int], outputs: int) -> None:
        """Add the first tokens of the sequences 0 to `n_slots` - 1, as the batch's first rows."""
        assert self._rows == 0
        if len(self._everyone) < n_slots:
            self._everyone = np.arange(n_slots, dtype=np.int32)
        n = len(tokens)
        if n:
            self.add(0, 0, tokens, outputs)
            self._counts[:n] = n_slots
            self._slot_pointers[:n] = self._everyone.ctypes.data
            self._n_shared = n
        self.runs = [(ALL_SEQUENCES, 0, n, outputs)]

    def decode(self, context: Any) -> int:
        """Call llama_decode, which releases the GIL, and return its status."""
        self._native.n_tokens = self._rows
        status: int = llama_cpp.llama_decode(context, self._native)
        return status
