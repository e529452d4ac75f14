"""Every method against a formula of a few lines, or scikit-learn on the explicit matrix."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pysteer import SteeringError
from pysteer.extract.methods import METHODS, linear
from pysteer.extract.methods.arithmetic import from_means
from pysteer.extract.methods.base import ArrayMethod
from pysteer.extract.methods.contrast import contrast
from pysteer.extract.methods.guided import guided
from pysteer.extract.methods.linear import lda, logistic
from pysteer.extract.methods.means import mean, pruned
from pysteer.extract.methods.pca import PCA_VARIANTS, pca
from pysteer.settings import described

WIDTH = 12


def two_classes(n, m, *, width=WIDTH, seed=0, gap=1.0):
    """Return activations with a large common offset and one massive dimension, as in models."""
    rng = np.random.default_rng(seed)
    offset, apart = 5 * rng.normal(size=width), gap * rng.normal(size=width)
    scales = np.exp(rng.normal(size=width))
    scales[3] *= 30
    unsafe = offset + scales * rng.normal(size=(n, width))
    safe = offset + apart * scales + scales * rng.normal(size=(m, width))
    return unsafe.astype(np.float32), safe.astype(np.float32)


def pairs(n, *, width=WIDTH, seed=0):
    """Return pairs that share a topic and differ along one direction by varying amounts."""
    rng = np.random.default_rng(seed)
    topics = 4 * rng.normal(size=(n, width)) + 3
    direction = rng.normal(size=width)
    amounts = 2 + rng.normal(size=(n, 1))
    noise = 0.3 * rng.normal(size=(n, width))
    return topics.astype(np.float32), (topics + amounts * direction + noise).astype(np.float32)


# The methods that are formulas of activations; `learned` needs a model.
FUNCTIONS = {
    "mean": mean,
    "pruned": pruned,
    "guided": guided,
    "pca": pca,
    "logistic": logistic,
    "lda": lda,
    "contrast": contrast,
}


def every_method(unsafe, safe):
    """Yield each method and variant with its direction; the sides must have equal lengths."""
    masks = np.arange(len(unsafe)) % 3 > 0
    yield "mean", mean(unsafe, safe)
    yield "pruned", pruned(unsafe, safe, paired=False)
    yield "pruned pairs", pruned(unsafe, safe, paired=True)
    yield "guided", guided(unsafe, safe, confirmed_unsafe=masks)
    for variant in PCA_VARIANTS:
        yield variant, pca(unsafe, safe, variant=variant)
    yield "logistic", logistic(unsafe, safe)
    yield "lda", lda(unsafe, safe)
    yield "contrast", contrast(safe, unsafe)


def on_axis(axis, unsafe, safe):
    """Return the difference of the class means, projected on an axis of any length and sign."""
    axis = np.asarray(axis, np.float64).ravel()
    omega = safe.astype(np.float64).mean(0) - unsafe.astype(np.float64).mean(0)
    return axis * (axis @ omega) / (axis @ axis)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())


# ---- each method against its formula ---------------------------------------------------------


def test_mean_is_safe_minus_unsafe():
    unsafe, safe = two_classes(7, 11)
    expected = np.float64(safe).mean(axis=0) - np.float64(unsafe).mean(axis=0)
    assert_close(mean(unsafe, safe), expected)
    assert_close(from_means(unsafe.mean(0), safe.mean(0)), expected)


@pytest.mark.parametrize("n", [2, 5, 40, 3000])
def test_pruned_pairs_keep_differences_above_the_median(n):
    unsafe, safe = pairs(n)
    differences = np.float64(safe) - np.float64(unsafe)
    lengths = np.sqrt((differences**2).sum(axis=1))
    expected = differences[lengths > np.median(lengths)].mean(axis=0)
    assert_close(pruned(unsafe, safe, paired=True), expected)


@pytest.mark.parametrize("n", [2, 5, 40, 3000])
def test_pruned_without_pairs_measures_from_the_safe_mean(n):
    unsafe, safe = two_classes(n, 9)
    differences = np.float64(safe).mean(axis=0) - np.float64(unsafe)
    lengths = np.sqrt((differences**2).sum(axis=1))
    expected = differences[lengths > np.median(lengths)].mean(axis=0)
    assert_close(pruned(unsafe, safe, paired=False), expected)


def test_pruning_changes_the_direction():
    unsafe, safe = pairs(40)
    full = mean(unsafe, safe)
    assert not np.allclose(pruned(unsafe, safe, paired=True), full, rtol=1e-2)
    assert not np.allclose(pruned(unsafe, safe, paired=False), full, rtol=1e-2)


@pytest.mark.parametrize("judge_safe", [False, True])
@pytest.mark.parametrize("n", [6, 2500])
def test_guided_averages_prompts_that_the_judge_confirmed(n, judge_safe):
    unsafe, safe = two_classes(n, n + 3)
    rng = np.random.default_rng(5)
    bad, good = rng.random(n) < 0.5, rng.random(n + 3) < 0.5
    bad[0] = good[-1] = True
    kept = safe[good] if judge_safe else safe
    expected = np.float64(kept).mean(axis=0) - np.float64(unsafe[bad]).mean(axis=0)
    found = guided(
        unsafe,
        safe,
        confirmed_unsafe=bad.tolist(),
        confirmed_safe=good if judge_safe else None,
    )
    assert_close(found, expected)


def test_contrast_is_the_mean_of_paired_differences_towards_refusing():
    complying, refusing = pairs(9)
    expected = sum(np.float64(r) - np.float64(c) for r, c in zip(refusing, complying, strict=True))
    assert_close(contrast(refusing, complying), expected / 9)


@pytest.mark.parametrize(("n", "width"), [(2, 12), (30, 12), (600, 520), (9, 1)])
def test_pca_pairwise_is_component_about_midpoints(n, width):
    unsafe, safe = pairs(n, width=width)
    unsafe, safe = np.float64(unsafe), np.float64(safe)
    middle = (unsafe + safe) / 2
    axis = PCA(1, svd_solver="full").fit(np.concatenate([unsafe - middle, safe - middle]))
    assert_close(pca(unsafe, safe, variant="pairwise"), on_axis(axis.components_, unsafe, safe))


def test_pca_pairwise_is_uncentred_component_of_differences():
    unsafe, safe = pairs(30)
    axis = TruncatedSVD(1, algorithm="arpack", random_state=1).fit(np.float64(safe - unsafe))
    assert_close(pca(unsafe, safe), on_axis(axis.components_, unsafe, safe))


@pytest.mark.parametrize(("n", "m", "width"), [(2, 2, 12), (20, 30, 12), (300, 260, 530)])
def test_pca_centred_is_the_component_of_all(n, m, width):
    unsafe, safe = two_classes(n, m, width=width)
    axis = PCA(1, svd_solver="full").fit(np.concatenate([unsafe, safe]).astype(np.float64))
    assert_close(pca(unsafe, safe, variant="centred"), on_axis(axis.components_, unsafe, safe))


@pytest.mark.parametrize(("n", "width"), [(3, 12), (30, 12), (600, 520)])
def test_pca_difference_is_the_component_of_the_differences(n, width):
    unsafe, safe = pairs(n, width=width)
    unsafe, safe = np.float64(unsafe), np.float64(safe)
    axis = PCA(1, svd_solver="full").fit(safe - unsafe)
    assert_close(pca(unsafe, safe, variant="difference"), on_axis(axis.components_, unsafe, safe))


def test_pca_without_dominant_component_is_exact():
    rng = np.random.default_rng(0)
    unsafe, safe = rng.normal(size=(300, 540)), rng.normal(size=(300, 540)) + 0.3
    axis = PCA(1, svd_solver="full").fit(safe - unsafe)
    assert_close(pca(unsafe, safe, variant="difference"), on_axis(axis.components_, unsafe, safe))
    unsafe, safe = rng.normal(size=(600, 540)), rng.normal(size=(600, 540)) + 0.01
    axis = PCA(1, svd_solver="full").fit(np.concatenate([unsafe, safe]))
    assert_close(pca(unsafe, safe, variant="centred"), on_axis(axis.components_, unsafe, safe))


def test_pca_variants_differ():
    unsafe, safe = pairs(30)
    found = [pca(unsafe, safe, variant=variant) for variant in PCA_VARIANTS]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert not np.allclose(found[one], found[other], rtol=1e-2)


def test_logistic_is_normal_of_scikit_learns_decision():
    unsafe, safe = two_classes(60, 25, gap=0.4)
    rows, labels = np.concatenate([unsafe, safe]).astype(np.float64), np.repeat([0, 1], [60, 25])
    for c in (0.01, 1.0, 20.0):
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=5000)
        ).fit(rows, labels)
        # The decision is affine: its gradient, found by probing, is the normal.
        origin = model.decision_function(np.zeros((1, WIDTH)))
        normal = model.decision_function(np.eye(WIDTH)) - origin
        found = logistic(unsafe, safe, C=c)
        np.testing.assert_allclose(found, on_axis(normal, unsafe, safe), rtol=1e-3, atol=1e-4)


def test_lda_is_fishers_discriminant_with_shrinkage_and_equal_classes():
    unsafe, safe = two_classes(60, 25, gap=0.4)
    rows, labels = np.concatenate([unsafe, safe]).astype(np.float64), np.repeat([0, 1], [60, 25])
    # Another solver than the method's.
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto", priors=[0.5, 0.5])
    assert_close(lda(unsafe, safe), on_axis(model.fit(rows, labels).coef_, unsafe, safe))


def test_lda_with_many_prompts_is_the_inverse_covariance_times_omega():
    unsafe, safe = two_classes(40_000, 20_000, width=4)
    unsafe, safe = np.float64(unsafe), np.float64(safe)
    covariance = (np.cov(unsafe.T) + np.cov(safe.T)) / 2
    axis = np.linalg.solve(covariance, safe.mean(0) - unsafe.mean(0))
    np.testing.assert_allclose(lda(unsafe, safe), on_axis(axis, unsafe, safe), rtol=0.02, atol=0.02)


# ---- all methods -----------------------------------------------------------------------------


def test_every_method_gives_float32_direction_towards_safe():
    unsafe, safe = pairs(30)
    omega = np.float64(safe).mean(axis=0) - np.float64(unsafe).mean(axis=0)
    names = []
    for name, direction in every_method(unsafe, safe):
        names.append(name)
        assert direction.dtype == np.float32, name
        assert direction.shape == (WIDTH,), name
        assert direction @ omega > 0, name
    assert len(names) == len(FUNCTIONS) + 3  # two of pruned, three of pca


def test_swapped_sides_negate_the_direction():
    unsafe, safe = pairs(30)
    there, back = dict(every_method(unsafe, safe)), dict(every_method(safe, unsafe))
    for name in set(there) - {"pruned", "guided"}:  # these treat the sides differently
        np.testing.assert_allclose(
            back[name], -there[name], rtol=1e-3, atol=1e-3 * np.abs(there[name]).max()
        )


@pytest.mark.parametrize("name", [*PCA_VARIANTS, "logistic", "lda"])
def test_strength_one_moves_unsafe_mean_onto_safe_mean_along_axis(name):
    unsafe, safe = two_classes(40, 40)
    direction = np.float64(dict(every_method(unsafe, safe))[name])
    unit = direction / np.linalg.norm(direction)
    moved = np.float64(unsafe).mean(axis=0) + direction
    assert moved @ unit == pytest.approx(np.float64(safe).mean(axis=0) @ unit, rel=1e-5)


def test_equal_data_give_equal_bits():
    unsafe, safe = pairs(600, width=530)  # where iterative solvers are in use
    for variant in PCA_VARIANTS:
        once = pca(unsafe, safe, variant=variant)
        np.testing.assert_array_equal(once, pca(unsafe, safe, variant=variant))
    unsafe, safe = two_classes(30, 30)
    for (name, one), (_, other) in zip(
        every_method(unsafe, safe), every_method(unsafe, safe), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)


def test_memory_mapped_slices_and_half_precision_give_equal_directions(tmp_path):
    unsafe, safe = pairs(30)
    file = np.memmap(tmp_path / "cache", np.float32, "w+", shape=(60, 3, WIDTH))
    file[:30, 1], file[30:, 1] = unsafe, safe
    file.flush()
    mapped = np.memmap(tmp_path / "cache", np.float32, "r", shape=(60, 3, WIDTH))
    for (name, one), (_, other) in zip(
        every_method(unsafe, safe), every_method(mapped[:30, 1], mapped[30:, 1]), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)
        assert type(other) is np.ndarray
    halves = unsafe.astype(np.float16), safe.astype(np.float16)
    for (name, one), (_, other) in zip(
        every_method(*halves),
        every_method(halves[0].astype(np.float64), halves[1].astype(np.float64)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other, err_msg=name)


def test_inputs_are_not_changed():
    unsafe, safe = pairs(30)
    unsafe.setflags(write=False)
    safe.setflags(write=False)
    assert len(list(every_method(unsafe, safe))) == len(FUNCTIONS) + 3


def test_arithmetic_is_in_float64():
    # In float32 the small differences drown in the large values.
    rng = np.random.default_rng(0)
    unsafe = (30_000 + rng.normal(size=(5000, 3))).astype(np.float32)
    safe = (30_001 + rng.normal(size=(5000, 3))).astype(np.float32)
    expected = np.float64(safe).mean(axis=0) - np.float64(unsafe).mean(axis=0)
    for direction in (mean(unsafe, safe), contrast(safe, unsafe)):
        np.testing.assert_allclose(direction, expected, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([-3, -1, 0, 4]))
def test_directions_scale_with_activations_and_ignore_shifts(seed, exponent):
    unsafe, safe = (rows.astype(np.float64) for rows in pairs(12, seed=seed))
    shift = np.random.default_rng(seed).normal(size=WIDTH)
    scale = 2.0**exponent
    changed = dict(every_method(scale * unsafe + shift, scale * safe + shift))
    for name, direction in every_method(unsafe, safe):
        np.testing.assert_allclose(
            changed[name],
            scale * direction,
            rtol=1e-3,
            atol=1e-3 * scale * np.abs(direction).max(),
            err_msg=name,
        )


# ---- errors ----------------------------------------------------------------------------------


def needs_pairs(name, **options):
    method = METHODS[name]
    return method.needs_pairs(method.configured(options))


def call(name, unsafe, safe, **options):
    if name == "contrast":
        return contrast(safe, unsafe)
    defaults = {
        "pruned": {"paired": False},
        "guided": {"confirmed_unsafe": np.full(len(unsafe), True)},
    }
    return FUNCTIONS[name](unsafe, safe, **defaults.get(name, {}) | options)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_raise(name, value):
    for side in (0, 1):
        sides = [rows.copy() for rows in pairs(8)]
        sides[side][3, 2] = value
        with np.errstate(all="raise"), pytest.raises(SteeringError, match="NaN or infinity"):
            call(name, *sides)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_shapes_raise(name):
    unsafe, safe = pairs(8)
    for bad in (unsafe[0], unsafe[None], unsafe[:0], unsafe[:, :0], unsafe > 0):
        with pytest.raises(SteeringError):
            call(name, bad, safe)
        with pytest.raises(SteeringError):
            call(name, unsafe, bad)
    with pytest.raises(SteeringError, match=r"width 12.*width 11|width 11.*width 12"):
        call(name, unsafe, safe[:, 1:])


@pytest.mark.parametrize("name", ["pca", "logistic", "lda"])
def test_single_prompt_raises_for_fits(name):
    unsafe, safe = pairs(8)
    with pytest.raises(SteeringError, match=r"1 unsafe prompts.*2 or more"):
        call(name, unsafe[:1], safe)
    with pytest.raises(SteeringError, match=r"1 safe prompts.*2 or more"):
        call(name, unsafe, safe[:1])


def test_single_unsafe_prompt_raises_for_pruned_but_not_mean():
    unsafe, safe = pairs(8)
    with pytest.raises(SteeringError, match="1 unsafe prompts"):
        pruned(unsafe[:1], safe, paired=False)
    assert_close(mean(unsafe[:1], safe[:1]), np.float64(safe[0]) - unsafe[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pruned", {"paired": True}),
        ("pca", {"variant": "pairwise"}),
        ("pca", {"variant": "difference"}),
        ("contrast", {}),
    ],
)
def test_unequal_sides_raise_for_methods_with_pairs(name, options):
    unsafe, safe = pairs(8)
    assert name == "contrast" or needs_pairs(name, **options)
    with pytest.raises(SteeringError, match=r"needs pairs.*8.*7"):
        call(name, unsafe, safe[:7], **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mean", {}),
        ("pruned", {"paired": False}),
        ("guided", {}),
        ("pca", {"variant": "centred"}),
        ("logistic", {}),
        ("lda", {}),
    ],
)
def test_unequal_sides_pass_for_methods_without_pairs(name, options):
    unsafe, safe = two_classes(8, 5)
    assert not needs_pairs(name, **options)
    assert call(name, unsafe, safe, **options).shape == (WIDTH,)


def test_pca_default_variant_needs_pairs():
    unsafe, safe = pairs(8)
    assert needs_pairs("pca")
    with pytest.raises(SteeringError, match="pairwise needs pairs"):
        pca(unsafe, safe[:7])


@pytest.mark.parametrize("name", ["mean", "guided", "contrast"])
def test_averaging_methods_equal_from_means(name):
    unsafe, safe = pairs(8)
    streamed = from_means(np.float64(unsafe).mean(axis=0), np.float64(safe).mean(axis=0))
    np.testing.assert_allclose(call(name, unsafe, safe), streamed, rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_activations_raise(name):
    unsafe, _ = pairs(8)
    with pytest.raises(SteeringError, match=r"no direction|equally long"):
        call(name, unsafe, unsafe.copy(), **{"paired": True} if name == "pruned" else {})


def test_difference_of_rounding_errors_raises():
    unsafe, _ = pairs(8)
    safe = np.nextafter(unsafe, np.float32(np.inf))
    for direct in (mean, contrast, lda, logistic):
        with pytest.raises(SteeringError, match="no direction"):
            direct(unsafe, safe)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_constant_data_raise(name):
    rows = np.full((6, WIDTH), 0.1, np.float32)
    with pytest.raises(SteeringError, match=r"use mean|equal"):
        call(name, rows, rows[:6].copy())


def test_equal_differences_raise_for_pca_difference_and_pruned():
    unsafe, _ = pairs(8)
    safe = unsafe + np.linspace(1, 2, WIDTH, dtype=np.float32)  # the same but for rounding
    with pytest.raises(SteeringError, match="nothing varies"):
        pca(unsafe, safe, variant="difference")
    # The other variants find a direction.
    expected = np.linspace(1, 2, WIDTH)
    np.testing.assert_allclose(pca(unsafe, safe), expected, rtol=1e-4)
    with pytest.raises(SteeringError, match="equally long"):
        pruned(*(np.tile([[a, 0.0]], (6, 1)) for a in (1.0, 2.0)), paired=True)


def test_component_orthogonal_to_means_raises():
    # All variation is along the first axis, the means differ along the second alone.
    first = np.array([-3.0, -1, 1, 3])
    unsafe, safe = np.stack([first, 0 * first], 1), np.stack([first, 0 * first + 0.1], 1)
    with pytest.raises(SteeringError, match="do not differ along the axis"):
        pca(unsafe, safe, variant="centred")


def test_judge_confirming_no_row_raises():
    unsafe, safe = pairs(8)
    none, some = np.zeros(8, bool), np.arange(8) > 2
    with pytest.raises(SteeringError, match="0 of 8 answers unsafe"):
        guided(unsafe, safe, confirmed_unsafe=none)
    with pytest.raises(SteeringError, match="0 of 8 answers safe"):
        guided(unsafe, safe, confirmed_unsafe=some, confirmed_safe=none)


@pytest.mark.parametrize("verdicts", [[True], [1, 0] * 4, [0.5] * 8, "x", np.ones((8, 1), bool)])
def test_malformed_verdicts_raise(verdicts):
    unsafe, safe = pairs(8)
    with pytest.raises(SteeringError, match="one bool for each of 8 prompts"):
        guided(unsafe, safe, confirmed_unsafe=verdicts)


@pytest.mark.parametrize("c", [0, -1.0, float("nan"), float("inf")])
def test_invalid_logistic_penalty_raises(c):
    with pytest.raises(SteeringError, match="C of logistic"):
        logistic(*pairs(8), C=c)


def test_unconverged_fit_raises(monkeypatch):
    monkeypatch.setattr(linear, "_MAX_ITERATIONS", 1)
    with pytest.raises(SteeringError, match="smaller C"):
        logistic(*pairs(8))


@pytest.mark.parametrize("variant", ["", "center", None])
def test_unknown_pca_variant_raises(variant):
    with pytest.raises(SteeringError, match="pairwise, centred, difference"):
        pca(*pairs(8), variant=variant)


@pytest.mark.parametrize(
    ("low", "high"),
    [([1.0, 2.0], [1.0]), ([[1.0]], [[2.0]]), ([], []), ([1.0], [np.nan]), ([2.0, 3], [2.0, 3])],
)
def test_from_means_of_invalid_means_raises(low, high):
    with pytest.raises(SteeringError):
        from_means(low, high)


def test_direction_beyond_float32_raises():
    big = np.full((2, 3), 3e38)
    with pytest.raises(SteeringError, match="too large"):
        mean(-big, big)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if isinstance(m, ArrayMethod)])
def test_method_object_equals_its_function(name):
    unsafe, safe = pairs(8)
    keywords = [
        parameter.name
        for parameter in inspect.signature(FUNCTIONS[name]).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    method = METHODS[name]
    assert list(described(method.options)) == keywords
    options = method.configured({})
    np.testing.assert_array_equal(
        method.direction(unsafe, safe, options), call(name, unsafe, safe, **vars(options))
    )


def test_every_method_except_learned_has_a_function():
    assert set(METHODS) == {*FUNCTIONS, "learned"}
