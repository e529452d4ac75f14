"""Append-only files of results, from which an interrupted run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pysteer.errors import SteeringError

_log = logging.getLogger(__name__)


class Journal:
    """JSON values by key, one line each; a later line replaces an earlier one of the same key.

    Every `put` reaches the file before it returns. A line that a crash cut short is skipped when
    the file is read, and never joins the line that follows.

    Args:
        path: a JSONL file. The file need not exist; its folder does.

    Raises:
        SteeringError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        try:
            text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
            with path.open("ab") as file:
                file.write(b"\n" if text and not text.endswith("\n") else b"")
        except OSError as error:
            raise SteeringError(f"{path}: {error.strerror}; name another folder") from None
        damaged = 0
        for line in text.split("\n"):
            if not line.strip():
                continue
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                damaged += 1
                continue
            if isinstance(key, str):
                self._values[key] = value
            else:
                damaged += 1
        if damaged:
            _log.warning(
                "%s: skipped %d damaged lines; their results are made again", path, damaged
            )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """Return the value of a key as JSON data, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Add one result.

        Args:
            key: any text.
            value: JSON data.

        Raises:
            SteeringError: the file cannot be written.
        """
        self.put_all([(key, value)])

    def put_all(self, results: Iterable[tuple[str, Any]]) -> None:
        """Add several results in one write; see `put`."""
        results = list(results)
        lines = "".join(json.dumps([key, value]) + "\n" for key, value in results)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise SteeringError(f"{self._path}: {error.strerror}; free some space") from None
        self._values.update(results)
