"""Progress of long operations: the library reports through one protocol, and commands draw bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

Advance: TypeAlias = Callable[[int], None]
"""Called with the number of units done since the last call."""


class Progress(Protocol):
    """Receiver of progress reports.

    Examples:
        >>> class Lines:
        ...     def start(self, stage, total, unit=""):
        ...         print(f"{stage}: {total} {unit}")
        ...         return lambda units: print(f"{units} more")
        >>> progress: Progress = Lines()
        >>> advance = progress.start("activations", 40, "tokens")
        activations: 40 tokens
        >>> advance(8)
        8 more
    """

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        """Begin a stage.

        Args:
            stage: a short description, such as "activations".
            total: number of units.
            unit: plural name of a unit, such as "tokens"; may be empty.

        Returns:
            The function to call as units are done.
        """
        ...


class Silent:
    """A `Progress` that discards its reports."""

    def start(self, stage: str, total: int, unit: str = "") -> Advance:
        """Begin a stage; see `Progress`."""
        return ignore


def ignore(units: int) -> None:
    """Discard a report; an `Advance` for callers without a `Progress`."""


SILENT: Final = Silent()
