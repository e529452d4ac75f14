"""The KV cache, or recurrent state, of a llama_context."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt


class ContextMemory:
    """The memory of a llama_context, by sequence and position.

    Args:
        context: the llama_context.
    """

    def __init__(self, context: llama_cpp.llama_context_p) -> None:
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)

    def cut(self, slot: int, start: int) -> None:
        """Forget the positions of a sequence from `start` on.

        Raises:
            RuntimeError: llama.cpp cannot cut the sequence there.
        """
        if not llama_cpp.llama_memory_seq_rm(self._memory, slot, start, -1):
            raise RuntimeError(f"llama.cpp cannot cut a sequence back to {start} tokens")

    def copy(self, source: int, target: int, stop: int) -> None:
        """Share the positions before `stop` with the sequence `target`."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, stop)

    def clear(self, *, data: bool = False) -> None:
        """Forget everything, so that the next token gets the first cell.

        Args:
            data: overwrite the contents with zeros as well.
        """
        if self._memory is not None:  # embedding models may have no memory
            llama_cpp.llama_memory_clear(self._memory, data)

    def save(self, slot: int) -> npt.NDArray[np.uint8]:
        """Return a copy of all cells of a sequence.

        Raises:
            RuntimeError: llama.cpp cannot copy the sequence.
            MemoryError: there is no room for the copy.
        """
        size = llama_cpp.llama_state_seq_get_size(self._context, slot)
        data = np.empty(size, np.uint8)
        if llama_cpp.llama_state_seq_get_data(self._context, _bytes(data), size, slot) != size:
            raise RuntimeError("llama.cpp cannot copy a sequence")
        return data

    def restore(self, slot: int, data: npt.NDArray[np.uint8]) -> None:
        """Replace all cells by a sequence that `save` returned, to the last bit; without logits.

        Raises:
            RuntimeError: llama.cpp cannot take the sequence; the memory is empty.
        """
        self.clear()  # the sequence then lies in the first cells, as if it had been computed alone
        if not llama_cpp.llama_state_seq_set_data(self._context, _bytes(data), data.size, slot):
            self.clear()
            raise RuntimeError("llama.cpp cannot put a sequence back")

    def is_whole(self, slot: int) -> bool:
        """Return True if the sequence still has its first position: a sliding window drops it."""
        return bool(llama_cpp.llama_memory_seq_pos_min(self._memory, slot) == 0)

    @property
    def is_empty(self) -> bool:
        """No position of sequence 0 is in memory."""
        return bool(llama_cpp.llama_memory_seq_pos_max(self._memory, 0) < 0)


def _bytes(data: npt.NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
