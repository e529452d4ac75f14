"""Comparing packs: cosine and ratio of norms against numpy, and what belongs to what."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysteer import SteeringError, SteeringPack, SteeringVector
from pysteer.inspect.compare import category_cosines, compare, cosine, norms, separation

WIDTH = 6


def vector(seed, layers=(1, 2, 3), site="residual", width=WIDTH):
    rng = np.random.default_rng(seed)
    return SteeringVector({layer: rng.normal(size=width) for layer in layers}, site=site)


def pack(**categories):
    return SteeringPack(categories)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_comparison_equals_numpy_for_each_category_and_layer(seed):
    a = {name: vector(seed + i) for i, name in enumerate("abc")}
    b = {name: vector(seed + 50 + i) for i, name in enumerate("cab")}
    found = compare(SteeringPack(a), SteeringPack(b))
    assert list(found.categories) == ["a", "b", "c"]
    for name, category in found.categories.items():
        assert (category.first, category.second, category.site) == (name, name, "residual")
        assert list(category.layers) == [1, 2, 3]
        for layer, pair in category.layers.items():
            x, y = np.float64(a[name].direction(layer)), np.float64(b[name].direction(layer))
            lengths = np.sqrt((x**2).sum()), np.sqrt((y**2).sum())
            assert pair.cosine == pytest.approx((x * y).sum() / lengths[0] / lengths[1])
            assert pair.norm_ratio == pytest.approx(lengths[1] / lengths[0])
        assert category.only_in_first == category.only_in_second == ()
    assert found.only_in_first == found.only_in_second == ()


@pytest.mark.parametrize("factor", [2.0, -0.5, 1.0])
def test_multiple_has_cosine_of_its_sign_and_ratio_of_its_factor(factor):
    found = compare(pack(a=vector(1)), pack(a=factor * vector(1)))
    for pair in found.categories["a"].layers.values():
        assert -1 <= pair.cosine <= 1
        assert pair.cosine == pytest.approx(np.sign(factor))
        assert pair.norm_ratio == pytest.approx(abs(factor))


def test_categories_and_layers_of_one_pack_only_are_listed():
    first = pack(a=vector(1), b=vector(2, layers=(1, 4, 5)), x=vector(3))
    second = pack(y=vector(1), b=vector(4, layers=(0, 4)), a=vector(5), z=vector(6))
    found = compare(first, second)
    assert list(found.categories) == ["a", "b"]
    assert found.only_in_first == ("x",)
    assert found.only_in_second == ("y", "z")
    b = found.categories["b"]
    assert (list(b.layers), b.only_in_first, b.only_in_second) == ([4], (1, 5), (0,))


def test_single_categories_are_matched_whatever_their_names():
    found = compare(pack(a=vector(1)), pack(b=vector(1)))
    assert list(found.categories) == ["a"]
    assert (found.categories["a"].first, found.categories["a"].second) == ("a", "b")
    assert found.only_in_first == found.only_in_second == ()


def test_single_category_is_matched_by_name_with_several():
    with pytest.raises(SteeringError, match=r"no category in common.*a.*b, c"):
        compare(pack(a=vector(1)), pack(b=vector(1), c=vector(2)))
    found = compare(pack(c=vector(1)), pack(b=vector(1), c=vector(2)))
    assert list(found.categories) == ["c"]
    assert found.only_in_second == ("b",)


def test_other_width_site_or_layers_raise():
    with pytest.raises(SteeringError, match=r"width 6.*width 7"):
        compare(pack(a=vector(1)), pack(a=vector(1, width=7)))
    with pytest.raises(SteeringError, match=r"'a'.*residual.*attention"):
        compare(pack(a=vector(1)), pack(a=vector(1, site="attention")))
    with pytest.raises(SteeringError, match="no layer in common"):
        compare(pack(a=vector(1, layers=(1, 2))), pack(a=vector(1, layers=(3,))))


def test_category_without_common_layers_is_listed_beside_others():
    found = compare(
        pack(a=vector(1, layers=(1,)), b=vector(1)), pack(a=vector(1, layers=(2,)), b=vector(2))
    )
    assert dict(found.categories["a"].layers) == {}
    assert found.categories["a"].only_in_first == (1,)
    assert len(found.categories["b"].layers) == 3


def test_cosine_of_a_zero_direction_is_none():
    nothing = 0 * vector(1)
    pair = compare(pack(a=nothing), pack(a=vector(1))).categories["a"].layers[1]
    assert (pair.cosine, pair.norm_ratio) == (None, None)
    pair = compare(pack(a=vector(1)), pack(a=nothing)).categories["a"].layers[1]
    assert (pair.cosine, pair.norm_ratio) == (None, 0.0)


def test_cosine_stays_in_range_despite_rounding():
    for seed in range(200):
        row = np.random.default_rng(seed).normal(size=WIDTH)
        assert cosine(row, row) <= 1
        assert cosine(row, -row) >= -1


@pytest.mark.parametrize("size", [1e-44, 1.0, 3e38])
def test_cosine_and_norm_do_not_overflow(size):
    rows = np.full(WIDTH, size, np.float32)
    assert cosine(rows, -rows) == pytest.approx(-1)
    assert norms(SteeringVector({1: rows}))[1] == pytest.approx(
        float(np.float32(size)) * WIDTH**0.5, rel=1e-6
    )


def test_category_cosines_cover_common_layers_of_one_site():
    a, b = vector(1), vector(2, layers=(2, 3, 4))
    c, d = vector(3, site="attention"), vector(4, layers=(9,))
    found = category_cosines(pack(a=a, b=b, c=c, d=d))
    assert list(found) == [("a", "b")]
    assert list(found["a", "b"]) == [2, 3]
    for layer, value in found["a", "b"].items():
        x, y = np.float64(a.direction(layer)), np.float64(b.direction(layer))
        assert value == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)))
    assert category_cosines(pack(a=a, b=0 * b)) == {}


def with_provenance(separation):
    return SteeringPack(
        {"a": vector(1), "b": vector(2)}, provenance={"method": "mean", "separation": separation}
    )


def test_separation_is_read_from_the_provenance():
    found = separation(with_provenance({"b": {"10": 0.5, "2": 1}, "a": {}}))
    assert found == {"b": {2: 1.0, 10: 0.5}}
    assert list(found["b"]) == [2, 10]


@pytest.mark.parametrize(
    "other",
    [
        "yes",
        1,
        {"a": 1},
        {"unknown": {"1": 0.5}},
        {"a": {"x": 0.5}},
        {"a": {"1": 1.5}},
        {"a": {"1": -0.1}},
        {"a": {"1": "0.5"}},
        {"a": {"1": True}},
        {"a": {"9" * 9: 0.5}},
        {"a": {"\N{ARABIC-INDIC DIGIT THREE}": 0.5}},
    ],
    ids=str,
)
def test_separation_of_another_shape_is_empty(other):
    assert separation(with_provenance(other)) == {}
    assert separation(pack(a=vector(1))) == {}
