"""Post-processing: each step against plain numpy, its limits, and how steps compose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysteer import SteeringError, SteeringVector
from pysteer.extract import postprocess
from pysteer.extract.methods.means import mean

WIDTH = 9
NORMS = {1: 10.0, 2: 20.0, 4: 30.0}
KINDS = [dict, SteeringVector, lambda rows: SteeringVector(rows, site="attention")]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["dict", "residual", "attention"])


def some(seed=0, layers=(1, 2, 4), width=WIDTH):
    rng = np.random.default_rng(seed)
    return {layer: rng.normal(size=width).astype(np.float32) for layer in layers}


def typical(massive=(), width=WIDTH):
    """Return mean magnitudes around 1, and 50 in the massive dimensions, by layer."""
    magnitudes = 1 + 0.1 * np.arange(width)
    magnitudes[list(massive)] = 50
    return dict.fromkeys((1, 2, 4), magnitudes)


def every_step(value):
    """Yield each step's name and its result for directions."""
    yield "mask_massive", postprocess.mask_massive(value, typical([2]))
    yield "top_k", postprocess.top_k(value, 4)
    other = some(9) if isinstance(value, dict) else SteeringVector(some(9), site=value.site)
    yield "orthogonalise", postprocess.orthogonalise({"a": value, "b": other})["a"]
    yield "project_out", postprocess.project_out(value, some(8))
    yield "unit_norm", postprocess.unit_norm(value)[0]
    yield "scale_to", postprocess.scale_to(value, NORMS, fraction=0.5)


# ---- all steps -------------------------------------------------------------------------------


@kinds
def test_every_step_keeps_kind_site_and_layers(kind):
    value = kind(some())
    before = {layer: row.copy() for layer, row in value.items()}
    for name, result in every_step(value):
        assert type(result) is type(value), name
        assert dict(result.items()).keys() == before.keys(), name
        if isinstance(value, SteeringVector):
            assert result.site == value.site, name
        changed = False
        for layer, row in result.items():
            assert row.dtype == np.float32, name
            assert row.shape == (WIDTH,), name
            changed |= not np.array_equal(row, before[layer])
        assert changed, name
    for layer, row in value.items():
        np.testing.assert_array_equal(row, before[layer])


def test_vector_and_mapping_give_equal_results():
    for (name, one), (_, other) in zip(
        every_step(some()), every_step(SteeringVector(some())), strict=True
    ):
        for layer, row in one.items():
            np.testing.assert_array_equal(row, other.direction(layer), err_msg=name)


def test_results_of_a_mapping_share_no_memory():
    result = postprocess.top_k(some(), WIDTH)
    result[1][:] = 7
    assert (result[2] != 7).all()


@pytest.mark.parametrize(
    "bad", [{}, {1: [np.nan, 1.0]}, {1: [1.0], 2: [1.0, 2.0]}, {1: [[1.0]]}, {-1: [1.0]}, {1: "x"}]
)
def test_invalid_directions_raise(bad):
    with pytest.raises(SteeringError):
        postprocess.top_k(bad, 1)


# ---- massive dimensions ----------------------------------------------------------------------


def test_massive_dimensions_exceed_ratio_times_median():
    magnitudes = [1.0, 2.0, 3.0, 29.9, 30.1]  # median 3
    found = postprocess.massive_dimensions({5: magnitudes, 6: magnitudes[:3]}, ratio=10)
    assert {layer: indices.tolist() for layer, indices in found.items()} == {5: [4], 6: []}
    found = postprocess.massive_dimensions({5: magnitudes}, ratio=9.5)
    assert found[5].tolist() == [3, 4]


@kinds
def test_masking_zeroes_only_massive_dimensions(kind):
    masked = postprocess.mask_massive(kind(some()), typical([2, 7]) | {2: np.ones(WIDTH)})
    for layer, row in masked.items():
        expected = some()[layer].copy()
        if layer != 2:  # each layer by its own activations
            expected[[2, 7]] = 0
        np.testing.assert_array_equal(row, expected)


def test_masking_removes_massive_dimensions_of_a_method():
    rng = np.random.default_rng(3)
    scale = np.ones(40)
    scale[[7, 21]] = 200
    unsafe, safe = (scale * rng.normal(size=(30, 40)) + shift for shift in (0.0, 0.5))
    raw = {3: mean(unsafe, safe)}
    magnitudes = {3: np.abs(np.concatenate([unsafe, safe])).mean(axis=0)}
    masked = postprocess.mask_massive(raw, magnitudes)
    assert np.abs(raw[3][[7, 21]]).min() > 5 * np.abs(masked[3]).max()
    assert (masked[3] == 0).nonzero()[0].tolist() == [7, 21]


def test_masking_without_layer_or_width_raises():
    with pytest.raises(SteeringError, match=r"layer 4 .*not for 0"):
        postprocess.mask_massive(some(), {1: np.ones(WIDTH), 2: np.ones(WIDTH)})
    with pytest.raises(SteeringError, match=r"for 9 dimensions, not for 8"):
        postprocess.mask_massive(some(), {layer: np.ones(8) for layer in NORMS})


def test_masking_a_whole_direction_raises():
    only = {1: np.eye(WIDTH)[2]}
    with pytest.raises(SteeringError, match="layer 1 lies wholly in massive dimensions"):
        postprocess.mask_massive(only, typical([2]))


@pytest.mark.parametrize("ratio", [1, 0, -3.0, float("nan"), float("inf")])
def test_invalid_ratio_raises(ratio):
    with pytest.raises(SteeringError, match="ratio"):
        postprocess.mask_massive(some(), typical(), ratio=ratio)


@pytest.mark.parametrize("bad", [[], [[1.0]], [-1.0, 1.0], [np.nan, 1.0]])
def test_invalid_typical_activations_raise(bad):
    with pytest.raises(SteeringError, match="layer 1"):
        postprocess.massive_dimensions({1: bad})


# ---- top k -----------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, WIDTH + 2))
def test_top_k_keeps_the_largest(seed, k):
    for layer, row in postprocess.top_k(some(seed), k).items():
        original = some(seed)[layer]
        kept = sorted(range(WIDTH), key=lambda i: -abs(original[i]))[:k]
        expected = np.zeros(WIDTH, np.float32)
        expected[kept] = original[kept]
        np.testing.assert_array_equal(row, expected)


def test_top_k_of_equal_magnitudes_keeps_the_first():
    found = postprocess.top_k({1: [1.0, -2.0, 2.0, 2.0]}, 2)
    assert found[1].tolist() == [0, -2, 2, 0]
    mixed = np.where(np.arange(500) % 2, -2.0, 1.0)
    found = postprocess.top_k({1: mixed}, 300)  # all 250 of size 2, and the first 50 of size 1
    assert found[1].nonzero()[0].tolist() == [i for i in range(500) if i % 2 or i < 100]


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_below_one_raises(k):
    with pytest.raises(SteeringError, match="k must be 1 or more"):
        postprocess.top_k(some(), k)


# ---- orthogonalisation -----------------------------------------------------------------------


@kinds
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6))
def test_each_category_is_orthogonal_to_all_others(kind, seed, n):
    rows = {str(i): some(seed * 10 + i) for i in range(n)}
    result = postprocess.orthogonalise({name: kind(row) for name, row in rows.items()})
    for name, changed in result.items():
        for layer, row in changed.items():
            others = np.stack([rows[key][layer] for key in rows if key != name]).astype(np.float64)
            # The projector off the span, from an orthonormal basis of it.
            basis, _ = np.linalg.qr(others.T)
            expected = rows[name][layer] - basis @ (basis.T @ rows[name][layer])
            np.testing.assert_allclose(row, expected, atol=1e-5)
            np.testing.assert_allclose(others @ row, 0, atol=1e-4)


def test_short_directions_are_removed_like_long_ones():
    a, b, c = some(1), some(2), some(3)
    short = {layer: 1e-8 * row for layer, row in b.items()}
    result = postprocess.orthogonalise({"a": a, "b": short, "c": c})
    for layer, row in result["a"].items():
        assert abs(row @ b[layer]) < 1e-5
        assert abs(row @ c[layer]) < 1e-5


def test_category_order_does_not_matter():
    categories = {str(i): some(i) for i in range(4)}
    there = postprocess.orthogonalise(categories)
    back = postprocess.orthogonalise(dict(reversed(categories.items())))
    for name, rows in there.items():
        for layer, row in rows.items():
            np.testing.assert_allclose(row, back[name][layer], atol=1e-6)


def test_layers_of_one_category_alone_stay():
    a, b = some(1, layers=(1, 2)), some(2, layers=(2, 3))
    result = postprocess.orthogonalise({"a": a, "b": b})
    np.testing.assert_array_equal(result["a"][1], a[1])
    np.testing.assert_array_equal(result["b"][3], b[3])
    assert not np.allclose(result["a"][2], a[2], atol=1e-3)


def test_other_sites_stay():
    a, b = SteeringVector(some(1)), SteeringVector(some(2), site="attention")
    assert postprocess.orthogonalise({"a": a, "b": b}) == {"a": a, "b": b}


def test_zero_direction_raises_for_orthogonalise():
    with pytest.raises(SteeringError, match="category 'b', layer 1: nothing is left"):
        postprocess.orthogonalise({"a": some(1), "b": {1: np.zeros(WIDTH)}, "c": some(3)})


def test_two_equal_categories_do_not_cancel_a_third():
    # The others' directions are dependent: their span is what counts.
    twin = some(2)
    result = {}
    for others in ({"b": twin}, {"b": twin, "c": {k: 3 * row for k, row in twin.items()}}):
        try:
            result[len(others)] = postprocess.orthogonalise({"a": some(1), **others})["a"]
        except SteeringError:  # the twins themselves cancel
            result[len(others)] = None
    assert result[1] is not None
    assert result[2] is None
    left = postprocess.project_out(some(1), twin)
    np.testing.assert_allclose(result[1][1], left[1], atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_direction_in_the_span_of_others_raises(seed):
    a, b = some(seed), some(seed + 100)
    both = {layer: 2 * a[layer] - 0.3 * b[layer] for layer in a}
    with pytest.raises(SteeringError, match=r"category '.*', layer 1: nothing is left"):
        postprocess.orthogonalise({"a": a, "b": b, "both": both})


def test_more_categories_than_dimensions_raise():
    with pytest.raises(SteeringError, match="nothing is left"):
        postprocess.orthogonalise({str(i): some(i, width=3) for i in range(4)})


def test_different_widths_raise():
    with pytest.raises(SteeringError, match="shape"):
        postprocess.orthogonalise({"a": some(1), "b": some(2, width=WIDTH + 1)})


@kinds
def test_project_out_removes_the_part_along_the_reference(kind):
    reference = some(5)
    for layer, row in postprocess.project_out(kind(some()), reference).items():
        r, original = np.float64(reference[layer]), np.float64(some()[layer])
        np.testing.assert_allclose(row, original - r * (original @ r) / (r @ r), atol=1e-6)
        assert abs(row @ r) < 1e-5


def test_project_out_without_reference_raises():
    for reference in (some(5, layers=(1, 2)), some(5) | {4: np.zeros(WIDTH)}):
        with pytest.raises(SteeringError, match="no reference direction for layer 4"):
            postprocess.project_out(some(), reference)
    with pytest.raises(SteeringError, match="sites"):
        postprocess.project_out(SteeringVector(some()), SteeringVector(some(5), site="attention"))
    with pytest.raises(SteeringError, match="nothing is left"):
        postprocess.project_out(some(), some())


# ---- norms and scales ------------------------------------------------------------------------


@kinds
def test_unit_norm_times_scale_is_the_direction(kind):
    value = kind(some())
    unit, scales = postprocess.unit_norm(value)
    for layer, row in unit.items():
        assert sum(float(x) ** 2 for x in row) == pytest.approx(1, rel=1e-6)
        np.testing.assert_allclose(scales[layer] * row, some()[layer], rtol=1e-6)
    assert scales == pytest.approx(postprocess.norms(value))


@kinds
@pytest.mark.parametrize("fraction", [0.1, 0.5, 3])
def test_scale_to_gives_fraction_of_residual_norm(kind, fraction):
    value = kind(some())
    scaled = postprocess.scale_to(value, NORMS, fraction=fraction)
    for layer, row in scaled.items():
        original = np.float64(some()[layer])
        expected = original * fraction * NORMS[layer] / np.sqrt((original**2).sum())
        np.testing.assert_allclose(row, expected, rtol=1e-6)
    assert postprocess.relative_strength(scaled, NORMS) == pytest.approx(
        dict.fromkeys(NORMS, fraction)
    )


def test_relative_strength_is_norm_over_norm():
    found = postprocess.relative_strength({1: [3.0, 4.0], 2: [0.0, 0.0]}, {1: 10.0, 2: 1.0, 3: 5})
    assert found == {1: 0.5, 2: 0.0}


def test_zero_direction_raises_for_unit_norm_and_scale():
    zero = some() | {2: np.zeros(WIDTH)}
    for step in (postprocess.unit_norm, lambda v: postprocess.scale_to(v, NORMS, fraction=1)):
        with pytest.raises(SteeringError, match="layer 2 must be above 0"):
            step(zero)


@pytest.mark.parametrize("norms", [{1: 1.0, 2: 1.0}, NORMS | {4: 0.0}, NORMS | {4: float("nan")}])
def test_unknown_typical_norm_raises(norms):
    for step in (
        lambda: postprocess.scale_to(some(), norms, fraction=0.5),
        lambda: postprocess.relative_strength(some(), norms),
    ):
        with pytest.raises(SteeringError, match="layer 4"):
            step()


@pytest.mark.parametrize("fraction", [0, -1, float("nan"), float("inf")])
def test_invalid_fraction_raises(fraction):
    with pytest.raises(SteeringError, match="fraction"):
        postprocess.scale_to(some(), NORMS, fraction=fraction)


def test_steps_compose():
    reference = some(8)
    value = SteeringVector(some())
    value = postprocess.mask_massive(value, typical([2]))
    value = postprocess.project_out(
        value, {k: np.where(np.arange(WIDTH) == 2, 0, r) for k, r in reference.items()}
    )
    value = postprocess.scale_to(value, NORMS, fraction=0.5)
    for layer, row in value.items():
        assert row[2] == 0
        assert np.linalg.norm(row) == pytest.approx(NORMS[layer] / 2, rel=1e-6)
