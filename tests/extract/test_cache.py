"""Caches: they resume anywhere, and never serve another run's or damaged activations."""

import logging
import os
import sys
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysteer import BaseModel, SteeringError
from pysteer.extract import cache as cache_module
from pysteer.extract.cache import ActivationCache, RunningMeans, clear, run_key
from pysteer.extract.capture import Row

WIDTH = 5
LAYERS = (1, 3)
MODEL = BaseModel("fake", "", 4, WIDTH, 100)


class StopError(Exception):
    """Interrupts a test."""


def expected(row, site="residual", layers=LAYERS):
    """Return activations that depend on row, site and layer."""
    found = []
    for layer in layers:
        seed = zlib.crc32(repr((row, site, layer)).encode())
        found.append(np.random.default_rng(seed).normal(size=WIDTH))
    return np.array(found, np.float32)


@dataclass
class FakeCapture:
    """The part of a capture that caches use. It runs rows in another order, and records them."""

    base_model: BaseModel = MODEL
    identity: str = "a file"
    stop_after: int | None = None
    ran: list = field(default_factory=list)

    def activations(self, rows, *, site, layers):
        for number, index in enumerate(
            sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        ):
            if number == self.stop_after:
                raise StopError
            self.ran.append(rows[index])
            yield index, expected(rows[index], site, layers)


class OtherEngine(FakeCapture):
    """Another engine, as torch in place of llama.cpp."""


def some_rows(count):
    """Return distinct rows: row i ends in token i."""
    return [Row((*range(i % 3), 7, i), 0, 1 + i % 2) for i in range(count)]


def activation_cache(folder, capture, rows, site="residual", layers=LAYERS):
    return ActivationCache(folder, capture, rows, site, layers)


def running_means(folder, capture, rows, site="residual", layers=LAYERS):
    return RunningMeans(folder, capture, rows, owners(rows), 3, site, layers)


def owners(rows):
    return [i % 2 for i in range(len(rows))]  # none belongs to group 2


def check(found, rows):
    every = np.array([expected(row) for row in rows])
    if found.dtype == np.float32:
        assert np.array_equal(found, every)
        return
    assert np.isnan(found[2]).all()
    for group in (0, 1):
        mine = every[[owner == group for owner in owners(rows)]].astype(np.float64)
        assert found[group] == pytest.approx(mine.mean(axis=0), rel=1e-12)


both = pytest.mark.parametrize("kind", [activation_cache, running_means])


# ---- resuming --------------------------------------------------------------------------------


@both
@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=4))
def test_interrupted_runs_run_each_row_once(kind, stops, tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    rows = some_rows(9)
    ran = Counter()
    for in_progress, after in stops:
        capture = FakeCapture(stop_after=None if in_progress else after)
        done = []

        def progress(tokens, done=done, in_progress=in_progress, after=after):
            done.append(tokens)
            if in_progress and len(done) == after:
                raise StopError

        with suppress(StopError):
            kind(folder, capture, rows).fill(progress)
        assert done == [len(row.tokens) for row in capture.ran]
        ran.update(capture.ran)
    capture = FakeCapture()
    last = kind(folder, capture, rows)
    assert set(last.missing) == {i for i, row in enumerate(rows) if row not in ran}
    check(last.fill(), rows)
    ran.update(capture.ran)
    assert ran == Counter(rows)


@both
def test_interrupt_at_any_line_leaves_rows_right_and_counted_once(kind, tmp_path):
    # Ctrl-C arrives between any two lines, not only where a callback is called.
    rows = some_rows(4)
    at = 0
    while True:
        folder = tmp_path / str(at)
        lines = 0

        def trace(frame, event, _argument, at=at):
            nonlocal lines
            if frame.f_code.co_filename != cache_module.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            kind(folder, FakeCapture(), rows).fill()
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
        finally:
            sys.settrace(before)
        check(kind(folder, FakeCapture(), rows).fill(), rows)
        if not interrupted and at:
            break
        at += 1
    assert at > 30


@both
def test_full_cache_does_not_run_the_model(kind, tmp_path):
    rows = some_rows(5)
    kind(tmp_path, FakeCapture(), rows).fill()
    capture = FakeCapture()
    again = kind(tmp_path, capture, rows)
    assert again.missing == []
    check(again.fill(), rows)
    assert capture.ran == []


def test_means_are_saved_while_they_are_summed(tmp_path, monkeypatch):
    # A killed process runs no `finally`.
    rows = some_rows(6)
    monkeypatch.setattr(cache_module, "_SAVE_EVERY", 0.0)
    means = running_means(tmp_path, FakeCapture(), rows)
    seen = []
    means.fill(lambda *_: seen.append(len(running_means(tmp_path, FakeCapture(), rows).missing)))
    assert seen == [6, 5, 4, 3, 2, 1]


def test_means_keep_no_rows(tmp_path):
    sizes = []
    for count in (10, 1010):
        rows = [Row((7, i), 0, 1) for i in range(count)]
        folder = tmp_path / str(count)
        running_means(folder, FakeCapture(), rows).fill()
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes[1] - sizes[0] < 2 * 1000  # a row of activations has 40 bytes


# ---- keys ------------------------------------------------------------------------------------


CHANGES = {
    "a token": {"rows": lambda rows: [Row((*rows[0].tokens[:-1], 99), 0, 1), *rows[1:]]},
    "a range": {"rows": lambda rows: [Row(rows[0].tokens, 1, 2), *rows[1:]]},
    "the order": {"rows": lambda rows: rows[::-1]},
    "fewer": {"rows": lambda rows: rows[:-1]},
    "a layer": {"layers": (1, 2)},
    "order of layers": {"layers": (3, 1)},
    "the site": {"site": "attention"},
    "the file": {"capture": FakeCapture(identity="the file, changed")},
    "the model": {"capture": FakeCapture(base_model=replace(MODEL, architecture="other"))},
    "the engine": {"capture": OtherEngine()},
}


@both
@pytest.mark.parametrize("what", CHANGES)
def test_changed_inputs_miss_the_cache(kind, what, tmp_path):
    rows = some_rows(5)
    kind(tmp_path, FakeCapture(), rows).fill()
    change = dict(CHANGES[what])
    rows = change.pop("rows", lambda rows: rows)(rows)
    changed = kind(tmp_path, change.pop("capture", FakeCapture()), rows, **change)
    assert len(changed.missing) == len(rows)


def test_other_groups_miss_the_cache(tmp_path):
    rows = some_rows(4)
    running_means(tmp_path, FakeCapture(), rows).fill()
    for which, n_groups in (([1, 0, 1, 0], 3), (owners(rows), 2)):
        other = RunningMeans(tmp_path, FakeCapture(), rows, which, n_groups, "residual", LAYERS)
        assert len(other.missing) == 4


def test_row_boundaries_are_part_of_the_key():
    rows = [Row((1, 2), 0, 1), Row((3,), 0, 1)]
    other = [Row((1,), 0, 1), Row((2, 3), 0, 1)]
    keys = {run_key(FakeCapture(), each, "residual", LAYERS) for each in (rows, other)}
    assert len(keys) == 2


# ---- damage ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@both
def test_changed_bytes_never_reach_the_result(kind, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    rows = some_rows(4)
    kind(folder, FakeCapture(), rows).fill()
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    check(kind(folder, FakeCapture(), rows).fill(), rows)


@both
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "junk", "longer", "object array"])
def test_damaged_file_is_replaced(kind, damage, tmp_path, caplog):
    rows = some_rows(4)
    kind(tmp_path, FakeCapture(), rows).fill()
    names = sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        path = tmp_path / name
        whole = path.read_bytes()
        caplog.clear()
        path.unlink()
        if damage == "object array":
            np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
            (tmp_path / "x.npy").rename(path)
        elif damage != "gone":
            path.write_bytes(
                {
                    "empty": b"",
                    "half": whole[: len(whole) // 2],
                    "junk": b"junk" * 100,
                    "longer": whole + b"junk",
                }[damage]
            )
        check(kind(tmp_path, FakeCapture(), rows).fill(), rows)
        if damage not in ("gone", "longer"):
            assert str(path) in caplog.text or "are damaged and are captured again" in caplog.text


def test_only_damaged_rows_are_captured_again(tmp_path, caplog):
    rows = some_rows(4)
    cache = activation_cache(tmp_path, FakeCapture(), rows)
    cache.fill()
    cache.activations[2, 0, 0] += 1
    cache.activations.flush()
    capture = FakeCapture()
    check(activation_cache(tmp_path, capture, rows).fill(), rows)
    assert capture.ran == [rows[2]]
    assert "1 rows" in caplog.text


# ---- refusals --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_overflowing_activations_raise_and_are_not_kept(kind, bad, tmp_path):
    rows = some_rows(3)

    def source(rows, *, site, layers):
        for index, row in enumerate(rows):
            found = expected(row, site, layers)
            if index == 1:
                found[1, 2] = bad
            yield index, found

    with pytest.raises(SteeringError, match=r"layers \[3\] overflow.*--dtype"):
        kind(tmp_path, FakeCapture(), rows).fill(source=source)
    again = kind(tmp_path, FakeCapture(), rows)
    assert again.missing == [1, 2]
    check(again.fill(), rows)


@both
def test_skipped_row_raises(kind, tmp_path):
    rows = some_rows(3)

    def source(rows, *, site, layers):
        yield 0, expected(rows[0], site, layers)

    with pytest.raises(SteeringError, match="no activations for 2 prompts"):
        kind(tmp_path, FakeCapture(), rows).fill(source=source)


@both
def test_unusable_folder_raises_with_name(kind, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SteeringError, match=str(path)):
        kind(path, FakeCapture(), some_rows(2))


def test_full_disk_raises_before_capturing(tmp_path, monkeypatch):
    usage = cache_module.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SteeringError, match=r"needed.*free.*--cache"):
        activation_cache(tmp_path, FakeCapture(), some_rows(20))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no reserved room")
def test_room_is_reserved_before_capturing(tmp_path):
    """A write to a mapped file on a disk that has become full ends the process."""
    activation_cache(tmp_path, FakeCapture(), some_rows(2000))
    for path in tmp_path.iterdir():
        status = path.stat()
        assert 512 * status.st_blocks >= status.st_size > 4096


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no reserved room")
def test_disk_filled_by_another_program_raises(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fill)
    with pytest.raises(SteeringError, match="No space left"):
        activation_cache(tmp_path, FakeCapture(), some_rows(20))
    assert not list(tmp_path.iterdir())


# ---- clearing --------------------------------------------------------------------------------


def test_clear_removes_only_cache_files(tmp_path, caplog):
    folder = tmp_path / "deep" / "cache"
    rows = some_rows(3)
    activation_cache(folder, FakeCapture(), rows).fill()
    running_means(folder, FakeCapture(), rows).fill()
    mine = folder / "mine.npy"
    mine.write_text("keep")
    clear(folder)
    assert list(folder.iterdir()) == [mine]
    mine.unlink()
    running_means(folder, FakeCapture(), rows).fill()
    clear(folder)
    assert not folder.exists()
    assert folder.parent.is_dir()
    with caplog.at_level(logging.WARNING):
        clear(folder)
    assert str(folder) in caplog.text
