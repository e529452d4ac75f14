"""The cells of the KV cache: their holders, and the content that new requests can reuse.

All sequences share the cells of one unified cache. A cell can belong to several sequences with the
same beginning; the cell is free again when the last of them lets go. A finished sequence keeps its
cells, as an idle slot, until another sequence needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pysteer.llama.memory import ContextMemory
from pysteer.runtime.ledger import Keys

Tokens: TypeAlias = npt.NDArray[np.intc]


class Content(NamedTuple):
    """Content of the cells of a slot: token and steering fingerprint by position."""

    tokens: Tokens
    keys: Keys


NOTHING = Content(np.zeros(0, np.intc), np.zeros(0, np.uint64))


class Slot:
    """One of llama.cpp's sequences.

    Attributes:
        number: llama.cpp's sequence id.
        cells: the cells, in the order of the positions.
        checked: number of first cells behind usable logits. Later cells can hide a value that is
            not finite.
        in_use: a request has the slot.
        content: returns the content of the cells.
        last_used: time of the last request's end, in requests.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.cells: list[int] = []
        self.checked = 0
        self.in_use = False
        self.content: Callable[[], Content] = lambda: NOTHING
        self.last_used = 0


class Place(NamedTuple):
    """A place for a request.

    Attributes:
        slot: an idle slot.
        source: the slot with the same beginning as the request; may be `slot` itself.
        reused: number of the request's tokens that need not be decoded.
        cells: number of the reused cells that no running sequence holds yet.
    """

    slot: Slot
    source: Slot
    reused: int
    cells: int


class KvCache:
    """The slots and cells of one context.

    Args:
        memory: llama.cpp's side of the cache.
        n_cells: number of cells.
        n_slots: number of sequences in the context.
        rewinds: a sequence can be cut back to any position. Recurrent states cannot, so a request
            reuses all of a slot's tokens or none.
    """

    def __init__(self, memory: ContextMemory, *, n_cells: int, n_slots: int, rewinds: bool) -> None:
        self._memory = memory
        self._rewinds = rewinds
        self._n_cells = n_cells
        self._unheld = list(range(n_cells - 1, -1, -1))
        self._holders = np.zeros(n_cells, np.int32)
        self._running_holders = np.zeros(n_cells, np.int32)
        self._running_cells = 0
        self._clock = 0
        self.slots = [Slot(number) for number in range(n_slots)]

    @property
    def unheld(self) -> int:
        """Number of cells that no slot holds."""
        return len(self._unheld)

    @property
    def available(self) -> int:
        """Number of cells that no running sequence holds."""
        return self._n_cells - self._running_cells

    # ---- requests come and go ----------------------------------------------------------------

    def find(self, tokens: Tokens, keys: Keys, limit: int) -> Place | None:
        """Return the best place for a request, or None if every slot is in use.

        Args:
            tokens: the request's tokens.
            keys: steering fingerprint of each token.
            limit: number of tokens that may be reused at most.
        """
        idle = [slot for slot in self.slots if not slot.in_use]
        if not idle:
            return None
        target = min(idle, key=lambda slot: (len(slot.cells) > 0, slot.last_used))
        best, source = 0, target
        for slot in self.slots:
            reused = self._match(slot, tokens, keys, limit)
            if reused > best or (reused == best > 0 and not slot.in_use):
                best, source = reused, slot
        if not source.in_use and best == len(source.cells):
            target = source  # the request goes on where this one ended
        unshared = self._running_holders[source.cells[:best]] == 0
        return Place(target, source, best, int(np.count_nonzero(unshared)))

    def _match(self, slot: Slot, tokens: Tokens, keys: Keys, limit: int) -> int:
        n = min(slot.checked, limit)
        if n == 0 or (not self._rewinds and (slot.in_use or len(slot.cells) > n)):
            return 0
        content = slot.content()
        same = (content.tokens[:n] == tokens[:n]) & (content.keys[:n] == keys[:n])
        matching = n if same.all() else int(same.argmin())
        if not self._rewinds:
            return matching if matching == len(slot.cells) else 0
        return matching if matching and self._memory.is_whole(slot.number) else 0

    def open(self, place: Place, content: Callable[[], Content]) -> Slot:
        """Take a place; `content` returns the content of the cells while the request runs."""
        slot, source, reused, _ = place
        if source is slot:
            self.cut(slot, reused)
        else:
            self.cut(slot, 0)
            if reused:
                self._memory.copy(source.number, slot.number, reused)
                slot.cells = source.cells[:reused]
                slot.checked = reused
                self._holders[slot.cells] += 1
        held = self._running_holders[slot.cells]
        self._running_cells += int(np.count_nonzero(held == 0))
        self._running_holders[slot.cells] = held + 1
        slot.in_use = True
        slot.content = content
        return slot

    def rest(self, slot: Slot) -> None:
        """Mark a slot as idle; its checked cells may serve another request."""
        self.cut(slot, slot.checked)
        content = slot.content()
        n = len(slot.cells)
        kept = Content(content.tokens[:n].copy(), content.keys[:n].copy())
        slot.content = lambda: kept
        held = self._running_holders[slot.cells] - 1
        self._running_cells -= int(np.count_nonzero(held == 0))
        self._running_holders[slot.cells] = held
        slot.in_use = False
        self._clock += 1
        slot.last_used = self._clock

    def clear(self) -> None:
        """Empty all slots, and forget when they were used; no request may be running."""
        for slot in self.slots:
            self.cut(slot, 0)
            slot.last_used = 0
        self._memory.clear()

    def forget(self) -> None:
        """Empty all slots, and overwrite the memory with zeros; running requests keep their slots.

        llama.cpp weights the cells of other sequences with 0, and 0 times NaN is NaN.
        """
        for slot in self.slots:
            slot.cells, slot.checked = [], 0
        self._unheld = list(range(self._n_cells - 1, -1, -1))
        self._holders[:] = self._running_holders[:] = 0
        self._running_cells = 0
        self._memory.clear(data=True)

    # ---- cells -------------------------------------------------------------------------------

    def take(self, slot: Slot, n: int) -> None:
        """Give a running sequence `n` more of the unheld cells."""
        if n == 1:
            cell = self._unheld.pop()
            self._holders[cell] = self._running_holders[cell] = 1
            slot.cells.append(cell)
        else:
            cells = self._unheld[len(self._unheld) - n :]
            del self._unheld[len(self._unheld) - n :]
            self._holders[cells] = 1
            self._running_holders[cells] = 1
            slot.cells += cells
        self._running_cells += n

    def cut(self, slot: Slot, length: int) -> int:
        """Cut a sequence back to `length` tokens, or empty it; return the number of tokens left."""
        if length >= len(slot.cells):
            return len(slot.cells)
        if not self._rewinds or (length and not self._memory.is_whole(slot.number)):
            length = 0
        self._memory.cut(slot.number, length)
        slot.checked = min(slot.checked, length)
        cells = slot.cells[length:]
        del slot.cells[length:]
        if slot.in_use:
            held = self._running_holders[cells] - 1
            self._running_cells -= int(np.count_nonzero(held == 0))
            self._running_holders[cells] = held
        held = self._holders[cells] - 1
        self._holders[cells] = held
        self._unheld += [
            cell for cell, holders in zip(cells, held.tolist(), strict=True) if not holders
        ]
        return length

    def recover(self, slot: Slot, length: int) -> int:
        """Cut a sequence after a failed decode, which may have left tokens without a cell."""
        length = self.cut(slot, length)
        self._memory.cut(slot.number, length)
        return length

    def evict(self, n: int) -> bool:
        """Free up to `n` cells of the least recently used idle slot; False if no slot is idle.

        Frees from the end, so that the rest still serves as a beginning.
        """
        idle = [slot for slot in self.slots if slot.cells and not slot.in_use]
        if not idle:
            return False
        slot = min(idle, key=lambda slot: slot.last_used)
        self.cut(slot, max(0, len(slot.cells) - n))
        return True
