"""Objects that stay with their process: a fork copies their memory, but not their threads."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from pysteer.errors import SteeringError


class Stays(Protocol):
    """An object that cannot work in a forked process."""

    def leave(self) -> None:
        """Take note, in a forked process, that this is a copy; nobody may wait for its locks."""


_objects: weakref.WeakSet[Stays] = weakref.WeakSet()


def stays(what: Stays) -> None:
    """Call `leave` of an object in every process that is forked from this one."""
    _objects.add(what)


def left_behind(name: str) -> SteeringError:
    """Return the error of a copy in a forked process.

    Args:
        name: the object, such as "the model".
    """
    return SteeringError(
        f"{name} works only in the process that created it, and this process was forked from that "
        "one without its threads; create models and engines after the fork and none before, or "
        "start processes by multiprocessing's 'spawn'"
    )


def _leave_all() -> None:
    for what in list(_objects):
        what.leave()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_leave_all)
