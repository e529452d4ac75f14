"""Captured activations in files from which capturing resumes: all rows, or running means."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError
from pysteer.extract.capture import Capture, Row
from pysteer.files import replacing
from pysteer.progress import Advance, ignore

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

Source = Callable[..., Iterator[tuple[int, Floats]]]
"""`Capture.activations`, or a function in its place."""

_FLUSH_EVERY = 64  # rows
_SAVE_EVERY = 10.0  # seconds
_OURS = re.compile(
    r"[0-9a-f]{64}\.(npy|done\.npy|means\.npz|learned\.npz|answers\.jsonl)"
    r"|\.[0-9a-f]{16}\.[0-9a-f]{8}\.part"  # of pysteer.files
)


def run_key(capture: Capture, rows: Sequence[Row], site: str, layers: Sequence[int]) -> str:
    """Return the SHA-256, in hex, of everything that the activations depend on."""
    model = capture.base_model
    sha = hashlib.sha256(
        json.dumps(
            [type(capture).__name__, capture.identity, vars(model), site, list(layers)],
            sort_keys=True,
        ).encode()
    )
    for row in rows:
        sha.update(np.asarray([len(row.tokens), row.start, row.stop, *row.tokens], "<i8").tobytes())
    return sha.hexdigest()


def clear(folder: Path) -> None:
    """Delete the files of caches in a folder, and the folder if it is empty then."""
    try:
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        _log.warning("the cache %s could not be deleted: %s", folder, error)


class ActivationCache:
    """Mean activations of every row, in a memory-mapped file.

    Two files: `<key>.npy`, float32 of shape (rows, layers, n_embd), and `<key>.done.npy`, uint64 of
    shape (rows,): 0 for a row that is missing, else 1 + CRC-32 of its bytes. After an interruption
    at any time the next `fill` captures the missing rows. A row whose bytes changed, as by a crash,
    is captured again, with a warning.

    Args:
        folder: folder of the files; created.
        capture: the model.
        rows: rows to run.
        site: site.
        layers: layers.

    Raises:
        SteeringError: the folder cannot be written, or has no room.
    """

    def __init__(
        self, folder: Path, capture: Capture, rows: Sequence[Row], site: str, layers: Sequence[int]
    ) -> None:
        self._capture, self._rows, self._site, self._layers = capture, rows, site, list(layers)
        key = run_key(capture, rows, site, layers)
        shape = (len(rows), len(layers), capture.base_model.n_embd)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.activations: Floats = _open(folder / f"{key}.npy", np.float32, shape)
            self._done = _open(folder / f"{key}.done.npy", np.uint64, shape[:1])
        except (OSError, ValueError) as error:
            raise SteeringError(f"cannot use {folder} as a cache: {error}") from None
        damaged = [int(i) for i in np.flatnonzero(self._done) if self._done[i] != self._sum(int(i))]
        if damaged:
            _log.warning(
                "%d rows of the cache %s are damaged and are captured again",
                len(damaged),
                folder / f"{key}.npy",
            )
            self._done[damaged] = 0

    @property
    def missing(self) -> list[int]:
        """Indices of the rows that are not captured yet."""
        return [int(i) for i in np.flatnonzero(self._done == 0)]

    def fill(self, advance: Advance = ignore, source: Source | None = None) -> Floats:
        """Capture the missing rows.

        Args:
            advance: called for every row with the number of its tokens.
            source: source of the activations; None is the model.

        Returns:
            float32 of shape (rows, layers, n_embd), memory-mapped.

        Raises:
            SteeringError: activations are not finite, or are missing for a row.
        """
        missing = self.missing
        rows = [self._rows[i] for i in missing]
        source = source or self._capture.activations
        stream = source(rows, site=self._site, layers=self._layers)
        pending: list[int] = []
        try:
            for number, means in stream:
                require_finite(means, self._layers)
                self.activations[missing[number]] = means
                pending.append(missing[number])
                advance(len(rows[number].tokens))
                if len(pending) == _FLUSH_EVERY:
                    self._mark(pending)
        finally:
            self._mark(pending)
        _require_all(self.missing)
        return self.activations

    def _sum(self, row: int) -> int:
        return 1 + zlib.crc32(self.activations[row].tobytes())

    def _mark(self, pending: list[int]) -> None:
        _flush(self.activations)  # rows before marks: a mark must not outlive its row
        for row in pending:
            self._done[row] = self._sum(row)
        _flush(self._done)
        pending.clear()


class RunningMeans:
    """Mean activations of groups of rows, without keeping the rows.

    Sums in float64. One file, `<key>.means.npz`, holds the sums and a mark for each row in them. It
    is written every few seconds and on interruption, and the next `fill` resumes from it. A damaged
    file is not used, with a warning.

    Args:
        folder: folder of the files; created.
        capture: the model.
        rows: rows to run.
        owners: group of each row.
        n_groups: number of groups.
        site: site.
        layers: layers.

    Raises:
        SteeringError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        capture: Capture,
        rows: Sequence[Row],
        owners: Sequence[int],
        n_groups: int,
        site: str,
        layers: Sequence[int],
    ) -> None:
        self._capture, self._rows, self._site, self._layers = capture, rows, site, list(layers)
        self._owners = list(owners)
        key = run_key(capture, rows, site, layers)
        key = hashlib.sha256(f"{key} {self._owners} {n_groups}".encode()).hexdigest()
        self._path = folder / f"{key}.means.npz"
        self._sums = np.zeros((n_groups, len(layers), capture.base_model.n_embd))
        self._done = np.zeros(len(rows), bool)
        self._adding = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._load()
        except OSError as error:
            raise SteeringError(f"cannot use {folder} as a cache: {error}") from None

    def _load(self) -> None:
        kept = load_arrays(self._path, {"sums": self._sums, "done": self._done})
        if kept is not None:
            self._sums, self._done = kept["sums"], kept["done"]

    @property
    def missing(self) -> list[int]:
        """Indices of the rows that are not captured yet."""
        return [int(i) for i in np.flatnonzero(~self._done)]

    def fill(
        self, advance: Advance = ignore, source: Source | None = None
    ) -> npt.NDArray[np.float64]:
        """Capture the missing rows.

        Args:
            advance: called for every row with the number of its tokens.
            source: source of the activations; None is the model.

        Returns:
            float64 of shape (n_groups, layers, n_embd); NaN for a group without rows.

        Raises:
            SteeringError: activations are not finite, or are missing for a row.
        """
        missing = self.missing
        rows = [self._rows[i] for i in missing]
        source = source or self._capture.activations
        saved = time.monotonic()
        try:
            for number, means in source(rows, site=self._site, layers=self._layers):
                require_finite(means, self._layers)
                self._adding = True
                self._sums[self._owners[missing[number]]] += means
                self._done[missing[number]] = True
                self._adding = False
                advance(len(rows[number].tokens))
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
        finally:
            self._save()
        _require_all(self.missing)
        counts = np.bincount(self._owners, minlength=len(self._sums)).astype(np.float64)
        counts[counts == 0] = np.nan
        means_of_groups: npt.NDArray[np.float64] = self._sums / counts[:, None, None]
        return means_of_groups

    def _save(self) -> None:
        if self._adding:  # interrupted between a row's sum and its mark
            return
        save_arrays(self._path, {"sums": self._sums, "done": self._done})


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays to an `.npz` file, wholly or not at all."""
    named: dict[str, Any] = dict(arrays)
    with replacing(path) as file:
        np.savez(file, **named)


def load_arrays(
    path: Path, like: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]] | None:
    """Read a file of `save_arrays`.

    Args:
        path: the file.
        like: arrays by name, of the shapes and types expected.

    Returns:
        The arrays by name. None: there is no file, or it is damaged, which is logged.
    """
    if not path.exists():
        return None
    try:
        with np.load(path) as kept:  # a ZIP file, whose reader compares checksums
            found = {name: np.asarray(kept[name]) for name in like}
        if any((found[n].shape, found[n].dtype) != (a.shape, a.dtype) for n, a in like.items()):
            raise ValueError("unexpected shape or type")
    except Exception as error:  # zipfile raises half a dozen kinds
        _log.warning("%s is damaged (%s); its contents are computed again", path, error)
        return None
    return found


def require_finite(means: Floats, layers: Sequence[int]) -> None:
    """Raise SteeringError for NaN and infinity, to which half precision may overflow."""
    finite = np.asarray(np.isfinite(means).all(axis=-1))
    if not finite.all():
        bad = [layer for layer, good in zip(layers, finite, strict=True) if not good]
        raise SteeringError(
            f"activations at layers {bad} overflow; extract with --dtype float32 or bfloat16"
        )


def _require_all(missing: Sequence[int]) -> None:
    if missing:
        raise SteeringError(
            f"the model gave no activations for {len(missing)} prompts; this is a bug"
        )


def _open(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    if path.exists():
        try:
            found = np.lib.format.open_memmap(path, mode="r+")
            if found.shape == shape and found.dtype == dtype:
                return found
            why = "unexpected shape or type"
        except Exception as error:  # numpy raises several kinds
            why = str(error)
        _log.warning("%s is damaged (%s); its contents are computed again", path, why)
        path.unlink()
    needed, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent)
    if needed > free.free:  # a write to a mapped file on a full disk kills the process
        raise ValueError(
            f"{needed / 1e9:.1f} GB are needed and {free.free / 1e9:.1f} GB are free; "
            "name another folder with --cache"
        )
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        _reserve(path)
    except OSError:
        path.unlink()
        raise
    return mapped


def _reserve(path: Path) -> None:
    """Take the room of a file on the disk, which another program may fill later."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _flush(array: Any) -> None:
    array.flush()
