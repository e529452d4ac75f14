"""The KV cache, or recurrent state, of a llama_context."""

from __future__ import annotations

import llama_cpp


class ContextMemory:
    """The memory of a llama_context, by sequence and position.

    Args:
        context: the llama_context.
    """

    def __init__(self, context: llama_cpp.llama_context_p) -> None:
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

    def is_whole(self, slot: int) -> bool:
        """Return True if the sequence still has its first position: a sliding window drops it."""
        return bool(llama_cpp.llama_memory_seq_pos_min(self._memory, slot) == 0)

    @property
    def is_empty(self) -> bool:
        """No position of sequence 0 is in memory."""
        return bool(llama_cpp.llama_memory_seq_pos_max(self._memory, 0) < 0)
