"""Sides of an extraction: prompts by category, matched, paired and held out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import SteeringError
from pysteer.extract.sides import MAX_HELD_OUT, MIN_TO_HOLD_OUT, split_sides
from pysteer.prompts import Prompt


def some(count, category="", text="p", **rest):
    return [Prompt(f"{text} {category} {i}", category, **rest) for i in range(count)]


def split(unsafe, safe, **rest):
    given = {"matched": None, "paired": False, "held_out": 0.2, "seed": 0, **rest}
    return split_sides(unsafe, safe, **given)


# ---- splitting -------------------------------------------------------------------------------


@given(
    sizes=st.dictionaries(st.sampled_from("abc"), st.integers(1, 40), min_size=1),
    n_safe=st.integers(1, 40),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_partitions_every_group(sizes, n_safe, share, seed):
    unsafe = [p for name, size in sizes.items() for p in some(size, name)]
    safe = some(n_safe, text="s")
    sides = split(unsafe, safe, held_out=share, seed=seed)
    assert not sides.matched
    groups = [
        (sides.unsafe[name], sides.held_out_unsafe[name], [p for p in unsafe if p.category == name])
        for name in sizes
    ]
    groups.append((sides.safe_for("a"), sides.held_out_safe_for("a"), safe))
    for used, held_out, every in groups:
        assert Counter([*used, *held_out]) == Counter(every)
        assert used
        wanted = round(share * len(every))
        if share == 0 or len(every) < MIN_TO_HOLD_OUT:
            assert not held_out
        else:
            assert len(held_out) == min(max(wanted, 1), len(every) - 1)
    assert list(sides.unsafe) == list(sizes)


def test_seed_determines_the_split():
    unsafe, safe = [*some(30, "a"), *some(30, "b")], some(30, text="s")
    first, again, other = (split(unsafe, safe, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.held_out_unsafe != other.held_out_unsafe
    assert first.held_out_safe != other.held_out_safe
    # Other categories do not change a category's split.
    assert split(some(30, "a"), safe, seed=1).held_out_unsafe["a"] == first.held_out_unsafe["a"]


def test_held_out_prompts_are_capped():
    sides = split(some(5 * MAX_HELD_OUT + 50, "a"), some(9))
    assert len(sides.held_out_unsafe["a"]) == MAX_HELD_OUT


def test_category_too_small_to_hold_out_is_logged(caplog):
    sides = split([*some(1, "one"), *some(10, "ten")], some(10))
    assert len(sides.unsafe["one"]) == 1
    assert "category one has 1 prompts, too few to hold any out" in caplog.text
    assert "category ten" not in caplog.text


def test_uncategorised_unsafe_prompts_are_one_category_and_logged(caplog):
    sides = split([*some(3), *some(3, "a")], some(3))
    assert sorted(sides.unsafe) == ["a", "unsafe"]
    assert {p.category for p in sides.unsafe["unsafe"]} == {"unsafe"}
    assert "without a category are taken as the category 'unsafe'" in caplog.text


# ---- matched and generic safe prompts --------------------------------------------------------


def test_safe_prompts_of_every_category_are_matched():
    twins = [*some(6, "a", "s"), *some(6, "b", "s")]
    sides = split([*some(6, "a"), *some(6, "b")], [*twins, *some(6, "", "generic")])
    assert sides.matched
    for name in "ab":
        assert {p.category for p in sides.safe_for(name)} == {name}
        assert {p.category for p in sides.held_out_safe_for(name)} == {name}


def test_safe_prompts_missing_for_a_category_make_all_generic(caplog):
    safe = [*some(6, "a", "s"), *some(6, "", "s")]
    sides = split([*some(6, "a"), *some(6, "b")], safe, held_out=0)
    assert not sides.matched
    assert sides.safe_for("a") == sides.safe_for("b") == safe
    assert "no safe prompts of category 'b', so every category is held against all" in caplog.text


def test_generic_safe_prompts_alone_log_no_warning(caplog):
    split(some(6, "a"), some(6))
    assert caplog.text == ""


def test_generic_can_be_chosen_despite_twins():
    safe = some(6, "a", "s")
    sides = split(some(6, "a"), safe, matched=False, held_out=0)
    assert not sides.matched
    assert sides.safe_for("a") == safe


def test_category_without_safe_prompts_raises_with_name():
    with pytest.raises(SteeringError, match=r"no safe prompts of category 'b'.*generic"):
        split([*some(6, "a"), *some(6, "b")], some(6, "a", "s"), matched=True)


def test_safe_prompts_of_other_categories_are_left_out_and_logged(caplog):
    twins = some(6, "a", "s")
    sides = split(some(6, "a"), [*twins, Prompt("x"), Prompt("y", "z", source="f, line 8")])
    assert sides.matched
    assert "2 safe prompts have another category and are left out" in caplog.text
    found = [*sides.safe_for("a"), *sides.held_out_safe_for("a")]
    assert sorted(p.prompt for p in found) == sorted(p.prompt for p in twins)


# ---- pairs -----------------------------------------------------------------------------------


@given(
    order=st.permutations(range(12)),
    lone=st.integers(0, 5),
    seed=st.integers(0, 99),
    share=st.sampled_from([0, 0.3]),
)
def test_pairs_stay_together_in_any_order(order, lone, seed, share):
    unsafe = [Prompt(f"u{i}", "ab"[i % 2], pair_id=str(i)) for i in range(12)]
    safe = [Prompt(f"s{i}", pair_id=str(i)) for i in order if i != lone]
    sides = split(unsafe, safe, paired=True, held_out=share, seed=seed)
    seen = []
    for theirs, ours in (
        (sides.safe, sides.unsafe),
        (sides.held_out_safe, sides.held_out_unsafe),
    ):
        for name in "ab":
            for left, right in zip(ours[name], theirs[name], strict=True):
                assert left.pair_id == right.pair_id
                assert (left.prompt[0], right.prompt[0]) == ("u", "s")
                seen.append(int(left.pair_id))
    assert sorted(seen) == [i for i in range(12) if i != lone]


def test_prompts_without_a_pair_are_logged(caplog):
    unsafe = [Prompt("u1", "a", pair_id="1"), Prompt("u2", "a"), Prompt("u3", "a", pair_id="9")]
    sides = split(unsafe, [Prompt("s1", pair_id="1"), Prompt("s2")], paired=True)
    assert [p.prompt for p in sides.unsafe["a"]] == ["u1"]
    assert [p.prompt for p in sides.safe_for("a")] == ["s1"]
    assert "category a: 2 of 3 prompts have no pair and are left out" in caplog.text


def test_missing_pairs_raise():
    with pytest.raises(SteeringError, match="category 'b' shares a pair_id"):
        split(
            [Prompt("u", "a", pair_id="1"), Prompt("v", "b")],
            [Prompt("s", pair_id="1"), Prompt("t")],
            paired=True,
        )


def test_pairs_numbered_within_categories_stay_apart():
    unsafe = [Prompt(f"u{c}{i}", c, pair_id=str(i)) for c in "ab" for i in range(3)]
    safe = [Prompt(f"s{c}{i}", c, pair_id=str(i)) for c in "ba" for i in range(3)]
    sides = split(unsafe, safe, paired=True, held_out=0)
    for name in "ab":
        assert [p.prompt for p in sides.safe_for(name)] == [f"s{name}{i}" for i in range(3)]
    # A missing twin is not replaced by another category's.
    sides = split(unsafe, [p for p in safe if p.prompt != "sa1"], paired=True, held_out=0)
    assert [p.prompt for p in sides.unsafe["a"]] == ["ua0", "ua2"]


def test_shared_pair_id_raises_with_both_lines():
    safe = [
        Prompt("s", pair_id="1", source="s.jsonl, line 1"),
        Prompt("t", pair_id="1", source="s.jsonl, line 5"),
    ]
    with pytest.raises(SteeringError, match=r"s.jsonl, line 5: .*'1'.*s.jsonl, line 1"):
        split([Prompt("u", "a", pair_id="1")], safe, paired=True)


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["unsafe", "safe"])
def test_empty_side_raises(side):
    sides = {"unsafe": some(3, "a"), "safe": some(3), side: []}
    with pytest.raises(SteeringError, match=f"there are no {side} prompts"):
        split(**sides)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_share_out_of_range_raises(share):
    with pytest.raises(SteeringError, match="share to hold out"):
        split(some(3, "a"), some(3), held_out=share)


def test_blank_category_raises_with_line():
    with pytest.raises(SteeringError, match=r"u.jsonl, line 2: the category is blank"):
        split([Prompt("p", " \t", source="u.jsonl, line 2")], some(3))


def test_good_data_log_no_warning(caplog):
    split([*some(9, "a"), *some(9, "b")], some(9))
    assert caplog.text == ""
