"""The dialects of pack files, told apart by their first bytes.

To add a dialect, write a module here with `read_pack(path)`, and add a line to `_DIALECTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pysteer.errors import FormatError, naming
from pysteer.files import opened
from pysteer.formats import gguf
from pysteer.formats.gguf import PackContent


class _Dialect(NamedTuple):
    """A kind of file.

    Attributes:
        name: for messages.
        start: first bytes of every file of this kind.
        read_pack: function that reads such a file.
    """

    name: str
    start: bytes
    read_pack: Callable[[Path], PackContent]


_DIALECTS = (_Dialect("GGUF", b"GGUF", gguf.read_pack),)


def read_pack(path: Path) -> PackContent:
    """Read a file of any dialect.

    Raises:
        FormatError: the file is damaged, or of no known dialect.
    """
    with naming(path), opened(path) as file:
        start = file.read(max(len(dialect.start) for dialect in _DIALECTS))
    for dialect in _DIALECTS:
        if start.startswith(dialect.start):
            return dialect.read_pack(path)
    raise FormatError(f"{path}: not a {' or '.join(dialect.name for dialect in _DIALECTS)} file")
