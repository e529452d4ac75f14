"""Journals: results survive crashes at any byte, and damage costs the damaged line alone."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pysteer import SteeringError
from pysteer.journal import Journal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
RESULTS = st.lists(st.tuples(st.text(max_size=4), JSON), min_size=1, max_size=4)


def filled(folder, results):
    path = Path(folder, "j.jsonl")
    journal = Journal(path)
    for key, value in results:
        journal.put(key, value)
    return path


@given(RESULTS)
def test_journal_reopened_has_latest_value_of_each_key(results):
    with TemporaryDirectory() as folder:
        journal = Journal(filled(folder, results))
        assert len(journal) == len(dict(results))
        for key, value in dict(results).items():
            assert key in journal
            assert journal.get(key) == value
        assert "absent key" not in journal
        assert journal.get("absent key") is None


@given(RESULTS)
def test_put_all_equals_single_puts(results):
    with TemporaryDirectory() as folder:
        path = filled(folder, results)
        together = Path(folder, "together.jsonl")
        Journal(together).put_all(results)
        assert together.read_bytes() == path.read_bytes()


@given(JSON, JSON)
@settings(max_examples=30)
def test_line_torn_at_any_byte_costs_that_line_alone(first, last):
    assume(first != last)
    with TemporaryDirectory() as folder:
        path = filled(folder, [("one", first)])
        start = path.stat().st_size
        whole = filled(folder, [("last", last)]).read_bytes()
        for cut in range(start, len(whole) + 1):
            path.write_bytes(whole[:cut])
            journal = Journal(path)
            assert journal.get("one") == first
            kept = cut >= len(whole) - 1  # without its line break the line is still whole
            assert ("last" in journal) == kept
            journal.put("next", last)
            again = Journal(path)
            assert (again.get("one"), again.get("next")) == (first, last)
            assert ("last" in again) == kept


@given(RESULTS, st.binary(max_size=40), st.integers(0, 4))
def test_damaged_line_never_swallows_its_neighbours(results, damage, at):
    assume(b"\n" not in damage)
    with TemporaryDirectory() as folder:
        rows = [(f"{i} {key}", value) for i, (key, value) in enumerate(results)]
        lines = [json.dumps(row).encode() for row in rows]
        lines.insert(at, damage)
        path = Path(folder, "j.jsonl")
        path.write_bytes(b"\n".join(lines))
        journal = Journal(path)
        for key, value in rows:
            assert journal.get(key) == value


@pytest.mark.parametrize(
    "line",
    ["[]", "{}", '["a"]', '["a", 1, 2]', "[1, 2]", '"ab"', '{"a": 1, "b": 2}', "[" * 100_000, "é"],
)
def test_line_that_is_no_result_is_skipped_with_warning(line, tmp_path, caplog):
    path = tmp_path / "j.jsonl"
    path.write_text(f'{line}\n["key", 1]\n', encoding="latin-1")
    journal = Journal(path)
    assert (len(journal), journal.get("key")) == (1, 1)
    assert "skipped 1 damaged lines" in caplog.text


def test_write_that_fails_midway_does_not_join_the_next_line(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.put("one", 1)
    opened = Path.open

    def full(self, *arguments, **options):
        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                raise OSError(28, "No space left on device")

            def write(self, text):
                with opened(path, "a") as file:
                    file.write(text[:5])

        return Full()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(SteeringError, match="No space left on device; free some space"):
            journal.put("two", 2)
    assert "two" not in journal
    journal.put("three", 3)
    again = Journal(path)
    assert (again.get("one"), again.get("two"), again.get("three")) == (1, None, 3)


def test_missing_folder_raises_with_the_way_out(tmp_path):
    with pytest.raises(SteeringError, match="name another folder"):
        Journal(tmp_path / "absent" / "j.jsonl")
