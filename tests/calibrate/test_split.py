"""Splits: disjoint and complete, twins together, even over subcategories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import SteeringError
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import PromptSet, split
from pysteer.prompts import Prompt

PARTS = ("train", "validation", "test")


def prompts(sizes, twins=False):
    """Return prompts from counts by category and subcategory."""
    return [
        Prompt(
            f"{'harmless ' if twins else ''}{category} {sub} {i}",
            category,
            pair_id=f"{category}/{sub}/{i}",
            subcategory=sub,
        )
        for category, subs in sizes.items()
        for sub, n in subs.items()
        for i in range(n)
    ]


sizes = st.dictionaries(
    st.sampled_from("abcd"),
    st.dictionaries(st.sampled_from(["x", "y", "z"]), st.integers(8, 12), min_size=2, max_size=3),
    min_size=1,
    max_size=3,
)


@given(
    sizes,
    st.integers(0, 40),
    st.sampled_from(["prompts", "subcategories"]),
    st.integers(0, 5),
)
def test_split_puts_each_prompt_in_one_part_and_twins_together(sizes, n_benign, held_out, seed):
    unsafe, safe = prompts(sizes), prompts(sizes, twins=True)
    benign = [Prompt(f"benign {i}") for i in range(n_benign)]
    settings = CalibrateSettings(held_out=held_out, seed=seed)
    parts = split(PromptSet(unsafe, safe, benign), settings)
    for kind, rows in (("unsafe", unsafe), ("safe", safe), ("benign", benign)):
        found = [p for part in PARTS for p in getattr(getattr(parts, part), kind)]
        assert sorted(found, key=rows.index) == rows
    for part in PARTS:
        there = getattr(parts, part)
        assert {p.pair_id for p in there.unsafe} == {p.pair_id for p in there.safe}
        assert {p.category for p in there.unsafe} == set(sizes)
    assert split(PromptSet(unsafe, safe, benign), settings) == parts


@given(sizes, st.integers(0, 5))
def test_split_gives_each_part_its_share_of_every_subcategory(sizes, seed):
    parts = split(PromptSet(prompts(sizes), [], []), CalibrateSettings(seed=seed))
    for category, subs in sizes.items():
        n = sum(subs.values())
        for part, share in (("validation", 0.2), ("test", 0.2)):
            rows = [p for p in getattr(parts, part).unsafe if p.category == category]
            assert len(rows) == max(2 if part == "validation" else 0, round(share * n))
            of_each = [sum(p.subcategory == sub for p in rows) for sub in subs]
            assert max(of_each) - min(of_each) <= 1


@given(sizes, st.integers(0, 5))
def test_split_holds_out_whole_subcategories(sizes, seed):
    settings = CalibrateSettings(held_out="subcategories", seed=seed)
    parts = split(PromptSet(prompts(sizes), [], []), settings)
    for category, subs in sizes.items():
        held = {p.subcategory for p in parts.test.unsafe if p.category == category}
        seen = {
            p.subcategory
            for p in (*parts.train.unsafe, *parts.validation.unsafe)
            if p.category == category
        }
        assert held
        assert held | seen == set(subs)
        assert not held & seen


def test_split_differs_with_seed():
    rows = prompts({"a": {"x": 9, "y": 9}})
    given = PromptSet(rows, [], [])
    found = [split(given, CalibrateSettings(seed=seed)).test.unsafe for seed in range(4)]
    assert len({tuple(p.prompt for p in one) for one in found}) > 1


def test_split_of_small_category_raises_with_its_name():
    with pytest.raises(SteeringError, match=r"category 'a' has 7 prompts, too few"):
        split(PromptSet(prompts({"a": {"x": 7}}), [], []), CalibrateSettings())
    unnamed = [Prompt(f"p {i}", "a") for i in range(20)]
    with pytest.raises(SteeringError, match="subcategor"):
        split(PromptSet(unnamed, [], []), CalibrateSettings(held_out="subcategories"))
