"""Fitting a router, against scikit-learn on the explicit matrix and brute force over thresholds."""

import logging
import tracemalloc

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
from pysteer.extract import router as module
from pysteer.extract.router import MIN_PROMPTS, choose_threshold, fit_router, split
from pysteer.router import GATES

CATEGORIES = ["hate", "fraud"]


def a_data_set(counts=(60, 30, 30), layers=3, width=12, signal=None, seed=0, noise=1.0):
    """Activations with a large common mean, and the classes apart as `signal[layer]` says."""
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
    layers = options.pop("layers", [4 * i + 1 for i in range(h.shape[1])])
    return fit_router(h, labels, layers=layers, site="mlp", pooling="user", **options)


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


# ---- what is fitted --------------------------------------------------------------------------


def test_the_layer_that_tells_the_classes_apart_best_is_found(fitted):
    _, _, router = fitted
    assert (router.site, router.layer, router.pooling) == ("mlp", 5, "user")
    assert set(router.layer_scores) == {1, 5, 9}
    assert router.layer_scores[1] < router.layer_scores[9] < router.layer_scores[5]
    assert set(router.categories) == set(CATEGORIES)
    assert router.category_accuracy > 0.8
    assert router.benign_false_positive_rate < 0.3


@pytest.mark.parametrize(
    ("counts", "width"),
    [((60, 30, 30), 12), ((20, 12, 8), 90), ((40, 40), 6), ((20, 15), 90), ((200, 10, 6), 10)],
    ids=["tall", "wide", "one category", "wide, one category", "unequal"],
)
def test_the_probes_are_scikit_learns_on_the_standardised_training_part(counts, width):
    h, labels, _ = a_data_set(counts, layers=1, width=width, signal=[0.4])
    router = fit(h, labels)
    classes = renumbered(labels, router)
    train, _ = split(classes, 0)
    h = h[:, 0].astype(np.float64)
    multinomial = oracle().fit(h[train], classes[train])
    np.testing.assert_allclose(router.probabilities(h), multinomial.predict_proba(h), atol=0.01)
    for i in range(len(router.categories)):
        probe = oracle().fit(h[train], classes[train] == i + 1)
        np.testing.assert_allclose(
            router.probe_scores(h)[:, i], probe.decision_function(h), atol=0.02
        )
    assert router.train_counts.tolist() == np.bincount(classes[train]).tolist()


def test_centroids_are_means_and_conditions_unit_differences_from_the_rest(fitted):
    h, labels, router = fitted
    classes = renumbered(labels, router)
    train, _ = split(classes, 0)
    means = [h[train, 1][classes[train] == c].mean(axis=0, dtype=np.float64) for c in range(3)]
    np.testing.assert_allclose(router.centroids, means, rtol=1e-6, atol=1e-6)
    for i, condition in enumerate(router.conditions, 1):
        others = h[train, 1][classes[train] != i].mean(axis=0, dtype=np.float64)
        apart = means[i] - others
        np.testing.assert_allclose(condition, apart / np.linalg.norm(apart), atol=1e-6)


def test_dimensions_that_hardly_vary_are_not_blown_up():
    h, labels, _ = a_data_set(layers=1, signal=[0.6])
    h = np.concatenate([h, np.full((len(h), 1, 2), 3.0, np.float32)], axis=2)
    h[:, :, -1] += 1e-6 * np.random.default_rng(9).normal(size=(len(h), 1))
    router = fit(h, labels)
    shaken = h[:, 0] + 1e-3 * (np.arange(h.shape[2]) >= h.shape[2] - 2)
    np.testing.assert_allclose(router.probe_scores(shaken), router.probe_scores(h[:, 0]), atol=1.0)


# ---- held-out prompts ------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(60, 30, 30), (5, 5, 5, 5), (200, 5, 7), (6, 9, 100)])
def test_the_split_keeps_the_proportions_and_every_prompt_once(counts):
    classes = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    train, held_out = split(classes, 3)
    assert sorted([*train, *held_out]) == list(range(len(classes)))
    kept = np.bincount(classes[held_out], minlength=len(counts))
    assert (np.abs(kept - np.array(counts) / 5) <= 1).all()
    assert kept.min() >= 1
    assert not np.array_equal(split(classes, 4)[1], held_out)


def test_held_out_prompts_decide_nothing_but_the_report(fitted):
    h, labels, router = fitted
    _, held_out = split(renumbered(labels, router), 0)
    other = h.copy()
    other[held_out] = np.random.default_rng(8).normal(size=other[held_out].shape) * 30
    again = fit(other, labels)
    assert again.layer == router.layer
    assert dict(again.layer_scores) == dict(router.layer_scores)
    for name in ("weight", "bias", "probe_weight", "probe_bias", "centroids", "conditions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(router, name))
    for kind in GATES:
        np.testing.assert_array_equal(again.gates[kind].thresholds, router.gates[kind].thresholds)
        np.testing.assert_array_equal(again.gates[kind].above, router.gates[kind].above)
    assert again.confusion.tolist() != router.confusion.tolist()
    assert again.gates["probe"] != router.gates["probe"]


def test_the_report_is_what_the_stored_router_does_on_the_held_out_prompts(fitted):
    h, labels, router = fitted
    classes = renumbered(labels, router)
    _, held_out = split(classes, 0)
    h, classes = h[held_out, 1], classes[held_out]
    found = router.probabilities(h).argmax(axis=1)
    np.testing.assert_array_equal(router.confusion, confusion_matrix(classes, found))
    assert router.confusion.sum() == len(held_out) == 24
    for kind in GATES:
        gate, opens = router.gates[kind], router.opens(kind, h)
        for i in range(2):
            own, benign = classes == i + 1, classes == 0
            assert gate.true_positive_rates[i] == opens[own, i].mean()
            assert gate.false_positive_rates[i] == opens[benign, i].mean()
            assert gate.leak_rates[i] == opens[~own & ~benign, i].mean()


def youden(scores, own, threshold, above=True):
    opens = scores >= threshold if above else scores <= threshold
    return opens[own].mean() - opens[~own].mean()


def test_thresholds_maximise_youdens_j_of_scores_from_outside_the_fold(fitted):
    h, labels, router = fitted
    classes = renumbered(labels, router)
    train, _ = split(classes, 0)
    h, classes = h[train, 1].astype(np.float64), classes[train]
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


def test_a_condition_that_holds_below_its_threshold_is_seen():
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
def test_a_threshold_is_as_good_as_the_best_of_all(case, rate):
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


def test_a_threshold_lies_halfway_between_the_scores_it_parts():
    scores, own = np.array([5.0, 3.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert choose_threshold(scores, own, ~own) == (2.0, 1.0)


def test_a_threshold_parts_neighbouring_numbers():
    for low in (1.0, np.nextafter(1.0, 2)):
        scores, own = np.array([np.nextafter(low, 2), low]), np.array([True, False])
        threshold, _ = choose_threshold(scores, own, ~own)
        assert (scores >= threshold).tolist() == [True, False]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2])
def test_a_stated_false_positive_rate_is_kept_in_training_and_named(rate, fitted):
    h, labels, free = fitted
    router = fit(h, labels, false_positive_rate=rate)
    assert (free.threshold_rule, router.threshold_rule) == ("youden", f"fpr={rate:g}")
    np.testing.assert_array_equal(router.weight, free.weight)
    classes = renumbered(labels, router)
    train, _ = split(classes, 0)
    h, classes = h[train, 1].astype(np.float64), classes[train]
    scores = np.empty((len(h), 2))
    for rest, fold in StratifiedKFold(5, shuffle=True, random_state=0).split(h, classes):
        for i in range(2):
            probe = oracle().fit(h[rest], classes[rest] == i + 1)
            scores[fold, i] = probe.decision_function(h[fold])
    opens = scores[classes == 0] >= router.gates["probe"].thresholds
    assert (opens.mean(axis=0) <= rate + 0.5 / len(opens)).all()


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_other_false_positive_rates_are_refused(rate, fitted):
    with pytest.raises(SteeringError, match="false-positive rate"):
        fit(*fitted[:2], false_positive_rate=rate)


# ---- layers, memory, repeatability -----------------------------------------------------------


def test_a_deep_model_is_searched_in_two_passes():
    signal = [0.5 * np.exp(-(((layer - 21) / 6) ** 2)) for layer in range(40)]
    h, labels, _ = a_data_set((30, 30), layers=40, width=8, signal=signal, noise=0.4)
    h[:, 22] = 0  # the best of the first pass' neighbours is not one of the first pass
    h[:, 22] += h[:, 0]
    router = fit(h, labels, layers=range(40))
    assert 15 <= len(router.layer_scores) <= 20
    assert abs(router.layer - 21) <= 3
    assert router.layer_scores[router.layer] == max(router.layer_scores.values())


def test_a_memory_mapped_file_gives_the_same_and_is_never_copied_whole(tmp_path):
    h, labels, _ = a_data_set((40, 20), layers=30, width=512, signal=[0.2] * 30)
    file = np.memmap(tmp_path / "h", np.float32, "w+", shape=h.shape)
    file[:] = h
    file.flush()
    mapped = np.memmap(tmp_path / "h", np.float32, "r", shape=h.shape)
    tracemalloc.start()
    try:
        router = fit(mapped, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.75 * h.nbytes
    assert router == fit(h, labels)


def test_the_same_seed_gives_the_same_router_and_another_seed_another(fitted):
    h, labels, router = fitted
    assert fit(h, labels) == router
    assert fit(h, labels, seed=1) != router


def test_more_rows_than_are_needed_are_sampled_and_said_so(monkeypatch, caplog):
    monkeypatch.setattr(module, "_MAX_ROWS", 100)
    monkeypatch.setattr(module, "_SEARCH_ROWS", 40)
    h, labels, _ = a_data_set((400, 90, 10), layers=2, signal=[0.1, 1])
    router = fit(h, labels)
    assert router.layer == 5
    total = router.train_counts + router.confusion.sum(axis=1)
    assert total.sum() <= 105
    assert total.min() == MIN_PROMPTS
    assert "a sample of 100 of 500 prompts" in caplog.text


# ---- data that does not do -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, MIN_PROMPTS - 1])
def test_a_category_with_few_prompts_is_left_out_and_said_so(count, fitted, caplog):
    h, labels, router = fitted
    more = np.concatenate([h, h[:count] + 1])
    again = fit(more, [*labels, *["rare"] * count])
    assert again == router
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"rare has {count} prompts of the {MIN_PROMPTS}" in record.getMessage()


def test_a_category_with_just_enough_prompts_is_kept(caplog):
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
def test_labels_that_do_not_do_are_refused(labels, words):
    with pytest.raises(SteeringError, match=words):
        fit(np.random.default_rng(0).normal(size=(20, 1, 3)), labels)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused_and_the_layer_named(value):
    h, labels, _ = a_data_set((20, 20), layers=2, signal=[1, 1])
    h[3, 1, 2] = value
    with pytest.raises(SteeringError, match="layer 5 hold NaN"):
        fit(h, labels)


def test_activations_that_are_all_the_same_are_refused():
    with pytest.raises(SteeringError, match="the same"):
        fit(np.ones((20, 1, 3)), ["", "a"] * 10)


@pytest.mark.parametrize(
    ("h", "options", "words"),
    [
        (np.ones((20, 3)), {}, "shape"),
        (np.ones((20, 2, 3)), {"layers": [1]}, "1 layers"),
        (np.ones((20, 2, 3)), {"layers": [1, 1]}, "twice"),
        (np.ones((20, 2, 0)), {}, "shape"),
        (np.full((20, 2, 3), "1"), {}, "type"),
        (np.ones((20, 2, 3)), {"folds": 1}, "folds"),
    ],
    ids=["two dimensions", "layers", "a layer twice", "no width", "text", "folds"],
)
def test_other_arguments_are_refused(h, options, words):
    with pytest.raises(SteeringError, match=words):
        fit(h, ["", "a"] * 10, **{"layers": [1, 2], **options})
