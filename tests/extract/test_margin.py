"""The margin gate's fit, against scikit-learn's ridge regression and thresholds counted by hand."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import StratifiedKFold

from pysteer.extract.routers import margin as module
from pysteer.extract.routers.margin import LOOK_ALIKE_RATE, PENALTIES, fit_margin, leads_of


def a_data_set(counts=(300, 60, 60, 60), width=20, signal=0.5, seed=0):
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    where = rng.normal(size=(len(counts), width))
    where[1:] += 2 * rng.normal(size=width) * (where[0].std() > 0)
    h = rng.normal(size=(len(classes), width)) + signal * where[classes]
    return h * rng.uniform(0.1, 9, width) + 20 * rng.normal(size=width), classes


def folds_of(classes, n=5):
    return list(StratifiedKFold(n, shuffle=True, random_state=0).split(classes, classes))


def oracle(h, classes, penalty):
    """scikit-learn's weighted ridge on the standardised rows: scores of any rows."""
    k = classes.max()
    mean, scale = h.mean(0), h.std(0)
    counts = np.bincount(classes)
    weights = np.where(classes == 0, 0.5, 0.5 / k) / counts[classes]
    weights /= weights.sum()
    z = (h - mean) / scale
    centred = z - weights @ z
    # The penalty is in units of the mean weighted squared length of a row.
    unit = (weights * (centred**2).sum(1)).sum() / len(h)
    fit = Ridge(alpha=penalty * unit).fit(z, np.eye(k + 1)[classes], sample_weight=weights)
    return lambda rows: fit.predict((rows - mean) / scale)


def out_of_fold(h, classes, folds, penalty):
    found = np.empty((len(h), classes.max() + 1))
    for fit, test in folds:
        found[test] = oracle(h[fit], classes[fit], penalty)(h[test])
    return found


@pytest.mark.parametrize("width", [20, 700], ids=["more prompts than dimensions", "fewer"])
def test_map_equals_scikit_learns_ridge(width):
    h, classes = a_data_set(width=width)
    fit = fit_margin(h, classes, folds_of(classes))
    r = h @ fit.weight.T + fit.bias
    harm, category = (oracle(h, classes, penalty)(h) for penalty in fit.penalties)
    np.testing.assert_allclose(r[:, 1:], category[:, 1:], atol=1e-6)
    apart = r[:, 0] - harm[:, 0]  # the threshold
    np.testing.assert_allclose(apart, apart[0], atol=1e-6)


def test_penalties_are_best_out_of_fold():
    h, classes = a_data_set(signal=0.25)
    folds = folds_of(classes)
    fit = fit_margin(h, classes, folds)
    harmful = classes > 0
    areas, accuracies = {}, {}
    for penalty in PENALTIES:
        r = out_of_fold(h, classes, folds, penalty)
        harm = -r[:, 0]
        areas[penalty] = (harm[harmful][:, None] > harm[~harmful]).mean()
        found = 1 + r[:, 1:].argmax(1)
        accuracies[penalty] = np.mean([(found == c)[classes == c].mean() for c in (1, 2, 3)])
    assert areas[fit.penalties[0]] == max(areas.values())
    assert accuracies[fit.penalties[1]] == max(accuracies.values())


@pytest.mark.parametrize("rate", [None, 0.0, 0.02, 0.1])
def test_benign_prompts_above_threshold_stay_within_rate(rate):
    h, classes = a_data_set(signal=0.25)
    folds = folds_of(classes)
    fit = fit_margin(h, classes, folds, false_positive_rate=rate)
    threshold = (h @ fit.weight.T + fit.bias)[0, 0]
    threshold -= oracle(h, classes, fit.penalties[0])(h)[0, 0]
    harm = -out_of_fold(h, classes, folds, fit.penalties[0])[:, 0]
    benign = harm[classes == 0]
    allowed = 0.005 if rate is None else rate
    assert (benign >= threshold + 1e-6).mean() <= allowed
    # Nor many fewer.
    assert (benign >= threshold - 1e-6).mean() >= allowed - 1.5 / len(benign)


@pytest.mark.parametrize(
    ("given", "rate"), [({}, LOOK_ALIKE_RATE), ({"look_alike_rate": 0.3}, 0.3)]
)
def test_stricter_of_benign_and_look_alike_bounds_counts(given, rate):
    h, classes = a_data_set(signal=0.25)
    folds = folds_of(classes)
    benign = np.flatnonzero(classes == 0)
    free = fit_margin(h, classes, folds, false_positive_rate=0.05)
    harm = -out_of_fold(h, classes, folds, free.penalties[0])[:, 0]
    order = benign[np.argsort(-harm[benign])]
    look_alikes = np.zeros(len(h), bool)
    look_alikes[order[:100]] = True  # those that look most harmful
    bounds = {"false_positive_rate": 0.05, **given}
    fit = fit_margin(h, classes, folds, look_alikes=look_alikes, **bounds)
    threshold, free_threshold = (
        (h @ one.weight.T + one.bias)[0, 0] - oracle(h, classes, one.penalties[0])(h)[0, 0]
        for one in (fit, free)
    )
    assert (harm[look_alikes] >= threshold + 1e-6).mean() <= rate
    assert (harm[look_alikes] >= threshold - 1e-6).mean() >= rate - 0.01
    assert threshold != pytest.approx(free_threshold)
    # Harmful prompts never count as look-alikes.
    again = fit_margin(h, classes, folds, look_alikes=look_alikes | (classes > 0), **bounds)
    np.testing.assert_array_equal(again.bias, fit.bias)
    every = fit_margin(h, classes, folds, look_alikes=classes == 0)  # there is no other benign one
    assert np.isfinite(every.bias).all()


@pytest.mark.parametrize("leak", [0.0, 0.05, 0.3])
def test_allowances_are_nonnegative_and_keep_the_leak_rate(leak):
    h, classes = a_data_set(signal=0.35)
    folds = folds_of(classes)
    fit = fit_margin(h, classes, folds, max_leak=leak)
    leads = leads_of(out_of_fold(h, classes, folds, fit.penalties[1])[:, 1:])
    for c in (1, 2, 3):
        others = leads[(classes > 0) & (classes != c), c - 1]
        allowance = fit.allowances[c - 1]
        assert allowance >= 0
        if allowance:
            assert (others + allowance >= 1e-6).mean() <= leak
            assert (others + allowance >= -1e-6).mean() > leak - 1 / len(others)
        else:
            assert (others >= 0).mean() >= leak


def test_single_category_has_zero_lead():
    h, classes = a_data_set((60, 40))
    fit = fit_margin(h, classes, folds_of(classes))
    assert fit.allowances.tolist() == [0]
    assert leads_of(np.array([[3.0], [-1.0]])).tolist() == [[0], [0]]


def test_lead_is_over_the_best_other():
    assert leads_of(np.array([[3.0, 5.0, 1.0], [2.0, 2.0, 0.0]])).tolist() == [
        [-2, 2, -4],
        [0, 0, -2],
    ]


def test_distant_classes_are_classified():
    h, classes = a_data_set(signal=9)
    fit = fit_margin(h, classes, folds_of(classes))
    r = h @ fit.weight.T + fit.bias
    harmful = classes > 0
    assert (r[harmful, 0] <= 0).all()
    assert (r[~harmful, 0] <= 0).mean() <= 0.005
    np.testing.assert_array_equal(1 + r[harmful, 1:].argmax(1), classes[harmful])


def test_fold_without_a_class_is_fitted():
    h, classes = a_data_set((30, 5, 20))
    one = np.flatnonzero(classes == 1)
    rest = np.flatnonzero(classes != 1)
    odd, even = rest[1::2], rest[::2]
    without_odd, without_even = np.concatenate([one, even]), np.concatenate([one, odd])
    fit = fit_margin(h, classes, [(rest, one), (without_odd, odd), (without_even, even)])
    assert np.isfinite(fit.weight).all()
    assert np.isfinite(fit.bias).all()


def test_untested_prompt_raises():
    h, classes = a_data_set()
    with pytest.raises(ValueError, match="NaN"):
        fit_margin(h, classes, folds_of(classes)[1:])


def test_threshold_is_above_scores_that_must_not_reach_it():
    scores = np.arange(200.0)
    assert (scores >= module._quantile(scores, 0.0)).sum() == 0
    for share in (0.005, 0.05, 0.1, 0.5):
        assert 0 <= 200 * share - (scores >= module._quantile(scores, share)).sum() <= 1
