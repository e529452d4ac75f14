"""Fitting a router, against scikit-learn on the explicit matrix and brute force over thresholds."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pysteer import SteeringError
from pysteer.extract.routers import fit as module
from pysteer.extract.routers.fit import fit_router
from pysteer.extract.routers.probes import choose_threshold
from pysteer.extract.routers.reads import default_reads
from pysteer.extract.routers.settings import MIN_PROMPTS, RouterSettings
from pysteer.extract.routers.split import split
from pysteer.pack.router import GATES, Read
from pysteer.settings import described

CATEGORIES = ["hate", "fraud"]


def a_data_set(counts=(60, 30, 30), layers=3, width=12, signal=None, seed=0, noise=1.0):
    """Return activations with a large common mean, and class distances `signal[layer]`."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    h = noise * rng.normal(size=(len(classes), layers, width)) + 20 * rng.normal(size=width)
    h *= rng.uniform(0.5, 5, size=width)
    where = rng.normal(size=(len(counts), width))
    for layer, strength in enumerate([0.2, 3, 1] if signal is None else signal):
        h[:, layer] += strength * where[classes]
    names = ["", *CATEGORIES, *(f"category {i}" for i in range(3, 20))]
    return h.astype(np.float32), [names[c] for c in classes], classes


def fit(h, labels, **options):
    reads = [Read(4 * i + 1, "user") for i in range(h.shape[1])]
    options = {"reads": reads, "site": "mlp", "gates": GATES, **options}
    chosen = {name: options.pop(name) for name in described(RouterSettings) if name in options}
    return fit_router(h, labels, settings=RouterSettings(**chosen), **options).router


def wide(h):
    """Return a router's input: all reads concatenated."""
    return h.reshape(len(h), -1).astype(np.float64)


def renumbered(labels, router):
    return np.array([["", *router.categories].index(label) for label in labels])


@pytest.fixture(scope="module")
def fitted():
    h, labels, _ = a_data_set()
    return h, labels, fit(h, labels)


def oracle():
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
    )


# ---- fits ------------------------------------------------------------------------------------


def test_fitted_router_records_its_inputs_and_is_accurate(fitted):
    _, _, router = fitted
    assert router.site == "mlp"
    assert router.reads == (Read(1, "user"), Read(5, "user"), Read(9, "user"))
    assert router.n_embd == 12
    assert set(router.categories) == set(CATEGORIES)
    assert router.category_accuracy > 0.8
    assert router.benign_false_positive_rate < 0.3


@pytest.mark.parametrize(
    ("counts", "width"),
    [((60, 30, 30), 12), ((20, 12, 8), 90), ((40, 40), 6), ((20, 15), 90), ((200, 10, 6), 10)],
    ids=["tall", "wide", "one category", "wide, one category", "unequal"],
)
def test_probes_equal_scikit_learn_on_standardised_rows(counts, width):
    h, labels, _ = a_data_set(counts, layers=1, width=width, signal=[0.4])
    router = fit(h, labels)
    classes = renumbered(labels, router)
    h = wide(h)
    multinomial = oracle().fit(h, classes)
    np.testing.assert_allclose(router.probabilities(h), multinomial.predict_proba(h), atol=0.01)
    for i in range(len(router.categories)):
        probe = oracle().fit(h, classes == i + 1)
        np.testing.assert_allclose(
            router.probe_scores(h)[:, i], probe.decision_function(h), atol=0.02
        )
    assert router.train_counts.tolist() == np.bincount(classes).tolist()


def test_centroids_are_means_and_conditions_unit_differences(fitted):
    h, labels, router = fitted
    classes = renumbered(labels, router)
    h = wide(h)
    means = [h[classes == c].mean(axis=0) for c in range(3)]
    np.testing.assert_allclose(router.centroids, means, rtol=1e-6, atol=1e-6)
    for i, condition in enumerate(router.conditions, 1):
        others = h[classes != i].mean(axis=0)
        apart = means[i] - others
        np.testing.assert_allclose(condition, apart / np.linalg.norm(apart), atol=1e-6)


def test_nearly_constant_dimensions_are_not_blown_up():
    h, labels, _ = a_data_set(layers=1, signal=[0.6])
    h = np.concatenate([h, np.full((len(h), 1, 2), 3.0, np.float32)], axis=2)
    h[:, :, -1] += 1e-6 * np.random.default_rng(9).normal(size=(len(h), 1))
    router = fit(h, labels)
    shaken = h[:, 0] + 1e-3 * (np.arange(h.shape[2]) >= h.shape[2] - 2)
    np.testing.assert_allclose(router.probe_scores(shaken), router.probe_scores(h[:, 0]), atol=1.0)


# ---- held-out prompts ------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(60, 30, 30), (5, 5, 5, 5), (200, 5, 7), (6, 9, 100)])
def test_split_keeps_proportions_and_each_prompt_once(counts):
    classes = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    train, held_out = split(classes, 3)
    assert sorted([*train, *held_out]) == list(range(len(classes)))
    kept = np.bincount(classes[held_out], minlength=len(counts))
    assert (np.abs(kept - np.array(counts) / 5) <= 1).all()
    assert kept.min() >= 1
    assert not np.array_equal(split(classes, 4)[1], held_out)


def measured_by_hand(h, labels, router, **options):
    """Return rates and confusion of a fit to the training part, on the held-out part."""
    classes = renumbered(labels, router)
    train, held_out = split(classes, 0)
    # The split of a fit only serves its figures, not its weights and thresholds.
    part = fit(h[train], [labels[i] for i in train], **options)
    assert part.categories == router.categories or set(part.categories) == set(router.categories)
    order = [0, *(1 + part.categories.index(name) for name in router.categories)]
    return part, order, wide(h[held_out]), classes[held_out]


def test_rates_are_those_of_the_training_fit_on_held_out_prompts(fitted):
    h, labels, router = fitted
    part, order, rows, classes = measured_by_hand(h, labels, router)
    found = np.argsort(order)[part.classes(rows)]
    np.testing.assert_array_equal(router.confusion, confusion_matrix(classes, found))
    assert router.confusion.sum() == len(rows) == 24
    for kind in GATES:
        gate = router.gates[kind]
        opens = part.opens(kind, rows)[:, [i - 1 for i in order[1:]]]
        for i in range(2):
            own, benign = classes == i + 1, classes == 0
            assert gate.true_positive_rates[i] == opens[own, i].mean()
            assert gate.false_positive_rates[i] == opens[benign, i].mean()
            assert gate.leak_rates[i] == opens[~own & ~benign, i].mean()


def test_router_is_fitted_to_all_and_measured_on_held_out_prompts(fitted):
    h, labels, router = fitted
    _, held_out = split(renumbered(labels, router), 0)
    other = h.copy()
    other[held_out] = np.random.default_rng(8).normal(size=other[held_out].shape) * 30
    again = fit(other, labels)
    for name in ("margin_weight", "weight", "probe_weight", "centroids", "conditions"):
        assert not np.allclose(getattr(again, name), getattr(router, name), atol=1e-3)
    assert router.train_counts.sum() == len(labels)
    # Held-out prompts are unknown to the fit: their noise is not recognised.
    assert again.category_accuracy < router.category_accuracy
    assert again.confusion.tolist() != router.confusion.tolist()


def youden(scores, own, threshold, above=True):
    opens = scores >= threshold if above else scores <= threshold
    return opens[own].mean() - opens[~own].mean()


def test_thresholds_maximise_out_of_fold_youden_j(fitted):
    h, labels, router = fitted
    classes = renumbered(labels, router)
    h = wide(h)
    scores = np.empty((len(h), 2))
    similarity = np.empty((len(h), 2))
    for rest, fold in StratifiedKFold(5, shuffle=True, random_state=0).split(h, classes):
        for i in range(2):
            probe = oracle().fit(h[rest], classes[rest] == i + 1)
            scores[fold, i] = probe.decision_function(h[fold])
            own = classes[rest] == i + 1
            c = h[rest][own].mean(axis=0) - h[rest][~own].mean(axis=0)
            b = np.tanh(h[fold] @ np.outer(c, c) / (c @ c))
            lengths = np.linalg.norm(h[fold], axis=1) * np.linalg.norm(b, axis=1)
            similarity[fold, i] = (h[fold] * b).sum(axis=1) / lengths
    for i in range(2):
        own = classes == i + 1
        probe, cast = router.gates["probe"], router.gates["cast"]
        best = max(youden(scores[:, i], own, t) for t in scores[:, i])
        assert probe.above[i]
        assert youden(scores[:, i], own, probe.thresholds[i]) == pytest.approx(best, abs=0.02)
        best = max(
            youden(similarity[:, i], own, t, side) for t in similarity[:, i] for side in (1, 0)
        )
        found = youden(similarity[:, i], own, cast.thresholds[i], cast.above[i])
        assert found == pytest.approx(best, abs=1e-9)


def test_condition_below_threshold_opens_the_gate():
    rng = np.random.default_rng(2)
    h = rng.normal(size=(80, 1, 6))
    h[:, 0, 0] -= 9  # benign prompts lie far out on the direction, the category's near zero
    h[40:, 0, 0] += 9
    router = fit(h, [""] * 40 + ["hate"] * 40)
    assert router.gates["cast"].above.tolist() == [False]
    assert router.gates["cast"].true_positive_rates[0] > 0.8
    assert router.gates["cast"].false_positive_rates[0] < 0.2


# ---- thresholds ------------------------------------------------------------------------------


@st.composite
def scored(draw):
    n = draw(st.integers(2, 30))
    grid = st.integers(-4, 4).map(float)
    scores = np.array(draw(st.lists(grid | st.floats(-5, 5), min_size=n, max_size=n)))
    classes = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    classes[:2] = [1, 0]
    return scores, classes


@settings(deadline=None)
@given(case=scored(), rate=st.none() | st.sampled_from([0.0, 0.01, 0.1, 0.34, 0.5, 0.99]))
def test_threshold_equals_brute_force_best(case, rate):
    scores, classes = case
    own, benign = classes == 1, classes == 0
    allowed = [
        youden(scores, own, t)
        for t in scores
        if rate is None or (scores[benign] >= t).mean() <= rate
    ]
    threshold, found = choose_threshold(scores, own, benign, false_positive_rate=rate)
    assert np.isfinite(threshold)
    assert youden(scores, own, threshold) == pytest.approx(found)
    assert found == pytest.approx(max(allowed) if allowed else 0.0)
    if rate is not None:
        assert (scores[benign] >= threshold).mean() <= rate
    if not allowed:
        assert not (scores >= threshold).any()


def test_threshold_lies_halfway_between_scores():
    scores, own = np.array([5.0, 3.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert choose_threshold(scores, own, ~own) == (2.0, 1.0)


def test_threshold_separates_neighbouring_floats():
    for low in (1.0, np.nextafter(1.0, 2)):
        scores, own = np.array([np.nextafter(low, 2), low]), np.array([True, False])
        threshold, _ = choose_threshold(scores, own, ~own)
        assert (scores >= threshold).tolist() == [True, False]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2])
def test_given_false_positive_rate_holds_out_of_fold_and_is_recorded(rate, fitted):
    h, labels, free = fitted
    router = fit(h, labels, false_positive_rate=rate)
    assert (free.threshold_rule, router.threshold_rule) == (
        "youden, margin fpr=0.005",
        f"fpr={rate:g}",
    )
    np.testing.assert_array_equal(router.weight, free.weight)
    classes = renumbered(labels, router)
    h = wide(h)
    scores = np.empty((len(h), 2))
    for rest, fold in StratifiedKFold(5, shuffle=True, random_state=0).split(h, classes):
        for i in range(2):
            probe = oracle().fit(h[rest], classes[rest] == i + 1)
            scores[fold, i] = probe.decision_function(h[fold])
    opens = scores[classes == 0] >= router.gates["probe"].thresholds
    assert (opens.mean(axis=0) <= rate + 0.5 / len(opens)).all()


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_false_positive_rate_out_of_range_raises(rate, fitted):
    with pytest.raises(SteeringError, match="false_positive_rate must be"):
        fit(*fitted[:2], false_positive_rate=rate)


# ---- memory, repeatability -------------------------------------------------------------------


def test_memory_mapped_activations_give_equal_router(tmp_path):
    h, labels, _ = a_data_set((40, 20), layers=3, width=20)
    file = np.memmap(tmp_path / "h", np.float32, "w+", shape=h.shape)
    file[:] = h
    file.flush()
    mapped = np.memmap(tmp_path / "h", np.float32, "r", shape=h.shape)
    assert fit(mapped, labels) == fit(h, labels)


def test_seed_determines_the_router(fitted):
    h, labels, router = fitted
    assert fit(h, labels) == router
    assert fit(h, labels, seed=1) != router


def test_excess_rows_are_sampled_and_logged(monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_PROMPTS", 100)
    h, labels, _ = a_data_set((400, 90, 10), layers=2, signal=[0.1, 1])
    router = fit(h, labels)
    assert router.train_counts.sum() <= 105
    assert router.train_counts.min() == MIN_PROMPTS
    assert "a sample of 100 of 500 prompts" in caplog.text


# ---- faulty data -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, MIN_PROMPTS - 1])
def test_small_category_is_left_out_and_logged(count, fitted, caplog):
    h, labels, router = fitted
    more = np.concatenate([h, h[:count] + 1])
    again = fit(more, [*labels, *["rare"] * count])
    assert again == router
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"rare has {count} prompts of the {MIN_PROMPTS}" in record.getMessage()


def test_category_with_enough_prompts_is_kept(caplog):
    h, labels, _ = a_data_set((60, 30, MIN_PROMPTS), layers=1, signal=[3])
    router = fit(h, labels)
    assert set(router.categories) == set(CATEGORIES)
    assert router.confusion.sum(axis=1).min() == 1
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a"] * 10 + ["b"] * 10, "benign prompts.*there are 0"),
        (["a"] * 17 + [""] * 3, "benign prompts.*there are 3"),
        ([""] * 20, "no category"),
        ([""] * 16 + ["a"] * 4, "no category.*'a': 4"),
        (["", "a"] * 9, "18 labels"),
    ],
    ids=["no benign", "few benign", "no category", "few of the category", "labels"],
)
def test_unusable_labels_raise(labels, words):
    with pytest.raises(SteeringError, match=words):
        fit(np.random.default_rng(0).normal(size=(20, 1, 3)), labels)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_activations_raise_with_layer(value):
    h, labels, _ = a_data_set((20, 20), layers=2, signal=[1, 1])
    h[3, 1, 2] = value
    with pytest.raises(SteeringError, match="layer 5 hold NaN"):
        fit(h, labels)


def test_equal_activations_raise():
    with pytest.raises(SteeringError, match="the same"):
        fit(np.ones((20, 1, 3)), ["", "a"] * 10)


DIFFERENT = np.random.default_rng(0).normal(size=(20, 2, 3))


@pytest.mark.parametrize(
    ("h", "options", "words"),
    [
        (np.ones((20, 3)), {}, "shape"),
        (np.ones((20, 2, 3)), {"reads": [Read(1, "user")]}, "1 reads"),
        (DIFFERENT, {"reads": [Read(1, "user")] * 2}, "twice"),
        (DIFFERENT, {"gates": ("svm",)}, "unknown item of gates 'svm'"),
        (DIFFERENT, {"gates": ("probe", "cast")}, "one of margin, multinomial"),
        (DIFFERENT, {"gates": ()}, "one of margin, multinomial"),
        (DIFFERENT, {"groups": ["a"] * 19}, "19 groups"),
        (DIFFERENT, {"look_alikes": [True] * 19}, "20 truth values"),
        (DIFFERENT, {"look_alikes": [1] * 20}, "20 truth values"),
        (DIFFERENT, {"max_leak": 1.5}, "max_leak must be.*not 1.5"),
        (DIFFERENT, {"look_alike_rate": -0.1}, "look_alike_rate must be.*not -0.1"),
        (np.ones((20, 2, 0)), {}, "shape"),
        (np.full((20, 2, 3), "1"), {}, "type"),
        (np.ones((20, 2, 3)), {"folds": 1}, "folds"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_invalid_arguments_raise(h, options, words):
    with pytest.raises(SteeringError, match=words):
        fit(h, ["", "a"] * 10, **{"reads": [Read(1, "user"), Read(2, "user")], **options})


# ---- groups ----------------------------------------------------------------------------------


def twins(n=60, seed=0, **options):
    """Return n pairs of an unsafe and a similar safe prompt, and 60 other prompts."""
    h, labels, _ = a_data_set((60, n // 2, n // 2), seed=seed, signal=[0.5, 0.5, 0.5])
    unsafe = np.flatnonzero([bool(label) for label in labels])
    rng = np.random.default_rng(seed)
    safe = h[unsafe] + 0.05 * rng.normal(size=h[unsafe].shape).astype(np.float32)
    groups = [("alone", i) for i in range(len(labels))]
    for i in unsafe:
        groups[i] = ("pair", i)
    return (
        np.concatenate([h, safe]),
        [*labels, *[""] * len(unsafe)],
        [*groups, *(("pair", i) for i in unsafe)],
        np.array([False] * len(labels) + [True] * len(unsafe)),
    )


def test_groups_stay_in_one_part_and_one_fold(monkeypatch):
    h, labels, groups, look_alikes = twins()
    numbers = [sorted(set(groups), key=str).index(group) for group in groups]
    seen, rates = [], []
    original = module.fit_margin

    def watch(h, classes, folds, **options):
        rates.append(options["look_alike_rate"])
        seen.append((h, [(set(map(int, fit)), set(map(int, test))) for fit, test in folds]))
        return original(h, classes, folds, **options)

    monkeypatch.setattr(module, "fit_margin", watch)
    fit(
        h,
        labels,
        groups=groups,
        look_alikes=look_alikes,
        look_alike_rate=0.25,
        gates=("margin",),
    )
    assert rates == [0.25, 0.25]
    (part, folds), (whole, all_folds) = seen
    group_of = {row.tobytes(): number for row, number in zip(wide(h), numbers, strict=True)}
    assert len(whole) == len(h)
    assert 0.7 * len(h) < len(part) < 0.9 * len(h)
    learned_from = {group_of[row.tobytes()] for row in part}
    assert len(learned_from) < len(set(numbers))
    held_out = [number for number in numbers if number not in learned_from]
    assert len(held_out) == len(h) - len(part)  # whole groups
    for rows, of in ((part, folds), (whole, all_folds)):
        assert len(of) == 5
        for fit_to, test in of:
            learned = {group_of[rows[i].tobytes()] for i in fit_to}
            assert learned.isdisjoint(group_of[rows[i].tobytes()] for i in test)
        assert sorted(i for _, test in of for i in test) == list(range(len(rows)))


@pytest.mark.parametrize("seed", range(3))
def test_split_by_groups_keeps_classes_and_proportions(seed):
    _, labels, groups, _ = twins()
    numbers = np.array([sorted(set(groups), key=str).index(group) for group in groups])
    classes = np.array([["", *CATEGORIES].index(label) for label in labels])
    train, held_out = split(classes, seed, numbers)
    assert set(numbers[train]).isdisjoint(numbers[held_out])
    assert sorted([*train, *held_out]) == list(range(len(classes)))
    kept = np.bincount(classes[held_out], minlength=3)
    assert (np.abs(kept - np.bincount(classes) / 5) <= 4).all()


def test_unsplittable_groups_are_ignored_and_logged(caplog):
    h, labels, _ = a_data_set((60, 30, 30))
    groups = [label or i for i, label in enumerate(labels)]  # all of a category is one group
    router = fit(h, labels, groups=groups, gates=("margin",))
    assert "too few groups" in caplog.text
    assert router == fit(h, labels, gates=("margin",))


# ---- reads and gates -------------------------------------------------------------------------


def test_default_reads_span_depths_below_the_last_layer():
    users, suffixes = (0, 4, 10, 14, 18), (8, 12, 16)
    expected = [Read(i, "user") for i in users] + [Read(i, "suffix") for i in suffixes]
    assert list(default_reads(30)) == expected
    for n_layer in range(1, 100):
        reads = default_reads(n_layer)
        assert len(set(reads)) == len(reads)
        assert {read.pooling for read in reads} == {"user", "suffix"}
        assert all(0 <= read.layer <= max(n_layer - 2, 0) for read in reads)


@pytest.mark.parametrize("kinds", [("margin",), ("multinomial",), ("probe", "margin")])
def test_router_has_the_gates_given(kinds, fitted):
    h, labels, every = fitted
    router = fit(h, labels, gates=kinds)
    assert list(router.gates) == [kind for kind in GATES if kind in kinds]
    for kind in kinds:
        np.testing.assert_allclose(
            router.scores(kind, wide(h)), every.scores(kind, wide(h)), rtol=1e-9, atol=1e-9
        )
        if "margin" in kinds:
            assert router.gates[kind] == every.gates[kind]


@pytest.mark.parametrize(
    ("kinds", "rate", "rule"),
    [
        (("margin",), None, "fpr=0.005"),
        (("margin",), 0.02, "fpr=0.02"),
        (("multinomial",), None, "youden"),
        (("multinomial", "margin"), None, "youden, margin fpr=0.005"),
        (("multinomial", "margin"), 0.02, "fpr=0.02"),
    ],
)
def test_threshold_rule_is_recorded(kinds, rate, rule, fitted):
    h, labels, _ = fitted
    assert fit(h, labels, gates=kinds, false_positive_rate=rate).threshold_rule == rule
