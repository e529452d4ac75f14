"""Objects that stay with their process: a fork copies their memory, but not their threads."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from pysteer.errors import SteeringError


class ProcessBound(Protocol):
    """An object that cannot work in a forked process."""

    def leave(self) -> None:
        """Become the unusable copy in a forked process, without waiting for a lock."""


_objects: weakref.WeakSet[ProcessBound] = weakref.WeakSet()


def bind_to_process(bound: ProcessBound) -> None:
    """Call `leave` of an object in every process that is forked from this process."""
    _objects.add(bound)


def left_behind(name: str) -> SteeringError:
    """Return the error of a copy in a forked process.

    Args:
        name: the object, such as "the model".
    """
    return SteeringError(
        f"{name} works only in the process that created it, and this process was forked "
        "from it without its threads; create models and engines after the fork and none before, or "
        "start processes by multiprocessing's 'spawn'"
    )


def _leave_all() -> None:
    for bound in list(_objects):
        bound.leave()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_leave_all)
