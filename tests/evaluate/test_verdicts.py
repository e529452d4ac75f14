"""Recorded verdicts: no item is judged twice."""

import pytest

from pysteer.evaluate.verdicts import scores, verdicts
from pysteer.judge import Item, Verdict

ITEMS = [Item("p", f"answer {i}") for i in range(40)]


class Counting:
    name = "counting"

    def __init__(self, identity, fail_after=10**9):
        self.identity = identity
        self.seen = []
        self.fail_after = fail_after

    def judge(self, items):
        if len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += items
        return [Verdict(item.answer.endswith(("1", "3")), item.answer) for item in items]

    def score(self, items):
        self.seen += items
        return [{"length": float(len(item.answer))} for item in items]

    def close(self):
        pass


def test_equal_items_are_judged_once(tmp_path):
    judge = Counting(None)
    told = []
    found = verdicts(judge, ITEMS[:5] * 3, tmp_path / "v.jsonl", told.append)
    assert judge.seen == ITEMS[:5]
    assert sum(told) == 5
    assert found == {item: Verdict(item.answer[-1] in "13", item.answer) for item in ITEMS[:5]}
    assert not (tmp_path / "v.jsonl").exists()  # no record without an identity


def test_interrupted_judge_resumes_where_it_stopped(tmp_path):
    path = tmp_path / "v.jsonl"
    first = Counting("one", fail_after=16)
    with pytest.raises(KeyboardInterrupt):
        verdicts(first, ITEMS, path)
    path.write_bytes(path.read_bytes() + b'\n["half a li')
    second = Counting("one")
    found = verdicts(second, ITEMS, path)
    assert [*first.seen, *second.seen] == ITEMS
    assert found == verdicts(Counting(None), ITEMS, path)
    third = Counting("one")
    assert verdicts(third, ITEMS, path) == found
    assert third.seen == []


def test_verdicts_of_another_judge_are_not_used(tmp_path):
    path = tmp_path / "v.jsonl"
    verdicts(Counting("one"), ITEMS[:3], path)
    other = Counting("two")
    verdicts(other, ITEMS[:3], path)
    assert other.seen == ITEMS[:3]


def test_scores_are_recorded(tmp_path):
    path = tmp_path / "v.jsonl"
    found = scores(Counting("one"), ITEMS, path)
    again = Counting("one")
    assert scores(again, ITEMS, path) == found
    assert again.seen == []
    assert found[ITEMS[0]] == {"length": 8.0}
