"""Data of an extraction: repeated prompts, and prompts on both sides."""

from hypothesis import given
from hypothesis import strategies as st

from pysteer.extract.data import distinct, warn_of_both
from pysteer.prompts import Prompt

SOME = [Prompt(f"p {category} {i}", category) for category in "ab" for i in range(4)]


@given(st.lists(st.sampled_from(SOME)))
def test_distinct_keeps_the_first_of_each(prompts):
    assert distinct(prompts, "unsafe") == list(dict.fromkeys(prompts))


def test_repeats_are_logged_with_first_line(caplog):
    prompts = [Prompt("a", source=f"u.jsonl, line {i}") for i in (1, 2, 3)]
    assert distinct(prompts, "unsafe") == prompts[:1]
    assert "2 unsafe prompts repeat others and are left out, the first at u.jsonl, line 2" in (
        caplog.text
    )
    caplog.clear()
    distinct([Prompt("a"), Prompt("a", response="x"), Prompt("a", "b")], "unsafe")
    assert caplog.text == ""


def test_prompts_on_both_sides_are_logged(caplog):
    warn_of_both([Prompt("a", "c", response="yes")], [Prompt("a", response="no")])
    assert caplog.text == ""
    warn_of_both([Prompt("a", "c")], [Prompt("b"), Prompt("a", source="s.jsonl, line 2")])
    assert "1 prompts are both unsafe and safe, the first at s.jsonl, line 2" in caplog.text
