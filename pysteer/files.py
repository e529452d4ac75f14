"""Whole files: only regular files are read, and a failed write leaves the older file.

`replacing` writes into a part file beside the target, `.<hash>.<random>.part`, and renames it at
the end. The writer holds a lock on its part file. A part file without a lock is that of a killed
process, and the next writer of the same target removes such files.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

from pysteer.errors import FormatError, SteeringError, naming, quoted

try:
    import fcntl
except ImportError:  # Windows: part files of killed processes stay
    fcntl = None  # type: ignore[assignment]

IsOurs: TypeAlias = Callable[[Path], bool]
"""True if pysteer wrote the file, so that pysteer may replace it."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


# ---- reading -------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, in binary.

    Raises:
        FormatError: the path is not a regular file (a pipe would wait, a device never end), or
            another program changed the file while the block read it.
        OSError: the file cannot be opened.
    """
    _require_regular(path.stat())  # before the file is opened: to open a device may act on it
    with open(path, "rb", opener=_without_waiting) as file:  # Path has no opener
        before = os.fstat(file.fileno())
        _require_regular(before)
        try:
            yield file
        except FormatError:
            _require_unchanged(before, os.fstat(file.fileno()))
            raise
        _require_unchanged(before, os.fstat(file.fileno()))


def check_regular(path: Path) -> None:
    """Check that a path leads to a regular file, for readers that open the path themselves.

    Raises:
        FormatError: there is no file, or something that is not a regular file.
    """
    with naming(path):
        _require_regular(path.stat())


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        FormatError: as `opened`, or the file is larger.
        OSError: the file cannot be read.
    """
    with opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FormatError(f"the file is larger than {limit} bytes, the most that is read")
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # of a pipe put in the file's place


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"expected a regular file, found {_kind(status)}")


def _require_unchanged(before: os.stat_result, after: os.stat_result) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise FormatError("another program changed the file while it was read; read it again")


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "something else")


# ---- writing -------------------------------------------------------------------------------------


def check_replaceable(path: Path, is_ours: IsOurs | None) -> None:
    """Check that a file can be written at a path, before the work on its content.

    Args:
        path: the path; symbolic links are followed.
        is_ours: recognises the files that may be replaced; None lets any regular file be replaced.
            A file without content may always be replaced.

    Raises:
        SteeringError: the path leads to a pipe, a device, a folder or a loop of links, or to a
            file that must stay.
    """
    with _naming(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"the path is {_kind(status)}; name a file")
        if is_ours is not None and status.st_size > 0 and not is_ours(path):
            raise OSError(
                "pysteer did not write the file that is there; name another file, or replace it "
                "with --force (overwrite=True in Python)"
            )


@contextmanager
def replacing(path: Path, is_ours: IsOurs | None = None) -> Iterator[BinaryIO]:
    """Open an empty file that takes the place of a path at the end of the block, in one step.

    A block that fails leaves an older file whole. The new file has the older file's permissions.
    The open file has a `name`, for writers that open a path themselves.

    Args:
        path: the path; the file behind a symbolic link is replaced, not the link.
        is_ours: as for `check_replaceable`.

    Raises:
        SteeringError: as `check_replaceable`, or the file cannot be written.
    """
    check_replaceable(path, is_ours)
    with _naming(path):
        target = Path(os.path.realpath(path))
        tag = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}"
        _remove_abandoned(target.parent, tag)
        with _new_part(target.parent, tag) as file:
            part = Path(file.name)
            try:
                with suppress(FileNotFoundError):  # nobody else reads what the older file hides
                    part.chmod(stat.S_IMODE(target.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR)
                yield file
                file.flush()
                os.fsync(file.fileno())
                with suppress(FileNotFoundError):
                    part.chmod(stat.S_IMODE(target.stat().st_mode))
                if fcntl is None:
                    file.close()  # Windows renames no open file
                part.replace(target)  # still locked, so that no other writer removes the part
            finally:
                if fcntl is None:
                    file.close()
                part.unlink(missing_ok=True)


def write_text(path: Path, text: str, is_ours: IsOurs | None = None) -> None:
    """Write a text in UTF-8 by `replacing`."""
    with replacing(path, is_ours) as file:
        file.write(text.encode("utf-8"))


def begins_with(marker: bytes, within: int = 4096) -> IsOurs:
    """Return a test of files: the marker is among the first bytes."""

    def is_ours(path: Path) -> bool:
        with opened(path) as file:
            return marker in file.read(within)

    return is_ours


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of the block into SteeringErrors that name the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno is None and reason.endswith(" written"):  # numpy's error of a short write
            reason = f"no space is left, or another limit is reached ({reason})"
        raise SteeringError(f"cannot write {path}: {reason}") from None
    except SteeringError:
        raise
    except ValueError as error:  # an invalid path or text
        raise SteeringError(f"cannot write {quoted(str(path))}: {error}") from None


def _new_part(folder: Path, tag: str) -> BinaryIO:
    while True:
        part = folder / f"{tag}.{secrets.token_hex(4)}.part"
        file = part.open("x+b")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another writer has taken the new file for an abandoned one
            file.close()
            continue
        except OSError:  # a file system without locks, where no writer removes a part
            return file
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _remove_abandoned(folder: Path, tag: str) -> None:
    if fcntl is None:
        return
    for part in folder.glob(f"{tag}.*.part"):
        with suppress(OSError):  # the lock of a living writer among them
            number = os.open(part, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(number)
