"""Append-only files of results, from which an interrupted run resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pysteer.errors import SteeringError
from pysteer.files import check_replaceable

_log = logging.getLogger(__name__)


class Journal:
    """JSON values by key, one line each; a later line replaces an earlier line of the same key.

    Every `put` reaches the operating system before it returns. A line that a crash cut short is
    skipped when the file is read, and never joins the line that follows.

    Args:
        path: a JSONL file. The file need not exist; its folder does.

    Raises:
        SteeringError: the file cannot be read or written.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Journal(Path(folder, "results.jsonl")).put("key", [1, 2])
        ...     Journal(Path(folder, "results.jsonl")).get("key")
        [1, 2]
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        check_replaceable(path, None)
        try:
            content = path.read_bytes() if path.exists() else b""
            path.open("ab").close()
        except OSError as error:
            raise SteeringError(f"{path}: {error.strerror}; name another folder") from None
        self._torn = not content.endswith(b"\n") and bool(content)
        damaged = 0
        for line in content.split(b"\n"):
            if not line.strip():
                continue
            row = _parsed(line)
            if row is None:
                damaged += 1
            else:
                self._values[row[0]] = row[1]
        if damaged:
            _log.warning(
                "%s: skipped %d damaged lines; their results are computed again", path, damaged
            )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

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
                file.write("\n" * self._torn + lines)
                self._torn = True  # until the file is closed: the write may stop anywhere
        except OSError as error:
            raise SteeringError(f"{self._path}: {error.strerror}; free some space") from None
        self._torn = False
        self._values.update(results)


def _parsed(line: bytes) -> tuple[str, Any] | None:
    """Return the key and the value of a line; None for a damaged line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
        return None
    return row[0], row[1]
