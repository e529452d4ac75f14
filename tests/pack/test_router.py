"""Router: each score against its written-out formula, and invalid routers."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pysteer import SteeringError
from pysteer.pack.router import CLASSIFIERS, GATES, POOLINGS, Gate, Read, Router

values = st.floats(-8, 8, width=32)


def a_gate(k=2, **changes):
    parts = {
        "thresholds": np.linspace(0.25, 0.5, k),
        "above": [True] * k,
        "true_positive_rates": np.linspace(0.75, 1, k),
        "false_positive_rates": np.linspace(0, 0.125, k),
        "leak_rates": [0.5] * k,
    }
    return Gate(**{**parts, **changes})


READS = (Read(3, "user"), Read(1, "suffix"))


def a_router(k=2, n=6, seed=0, **changes):
    """n is the width of both reads together."""
    rng = np.random.default_rng(seed)
    parts = {
        "site": "residual",
        "reads": READS,
        "categories": [f"category {i}" for i in range(k)],
        "margin_weight": rng.normal(size=(k + 1, n)),
        "margin_bias": rng.normal(size=k + 1),
        "allowances": rng.uniform(0, 2, size=k),
        "weight": rng.normal(size=(k + 1, n)),
        "bias": rng.normal(size=k + 1),
        "probe_weight": rng.normal(size=(k, n)),
        "probe_bias": rng.normal(size=k),
        "centroids": rng.normal(size=(k + 1, n)),
        "conditions": rng.normal(size=(k, n)),
        "gates": {kind: a_gate(k) for kind in GATES},
        "confusion": np.arange(1, (k + 1) ** 2 + 1).reshape(k + 1, k + 1),
        "threshold_rule": "youden",
        "train_counts": np.arange(k + 1) + 4,
    }
    return Router(**{**parts, **changes})


@st.composite
def routers_and_rows(draw):
    k, n = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    arrays = {
        name: draw(hnp.arrays(np.float32, shape, elements=values))
        for name, shape in {
            "margin_weight": (k + 1, n),
            "margin_bias": (k + 1,),
            "weight": (k + 1, n),
            "bias": (k + 1,),
            "probe_weight": (k, n),
            "probe_bias": (k,),
            "centroids": (k + 1, n),
        }.items()
    }
    conditions = draw(
        hnp.arrays(np.float32, (k, n), elements=st.floats(0.125, 8, width=32))
        | hnp.arrays(np.float32, (k, n), elements=st.floats(-8, -0.125, width=32))
    )
    arrays["allowances"] = draw(hnp.arrays(np.float32, k, elements=st.floats(0, 8, width=32)))
    rows = draw(hnp.arrays(np.float32, (draw(st.integers(1, 4)), n), elements=values))
    return a_router(k, n, conditions=conditions, **arrays), rows


def cosine(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / lengths if lengths else 0.0


def leads_by_hand(r):
    """Lead of each category over the best of the others."""
    leads = []
    for own in range(1, len(r)):
        others = [r[j] for j in range(1, len(r)) if j != own]
        leads.append(r[own] - max(others) if others else 0.0)
    return leads


def by_hand(router, kind, h):
    """The score of one hidden state, category by category."""
    h = h.astype(np.float64)
    w, m, c = (
        np.asarray(getattr(router, n), np.float64) for n in ("weight", "centroids", "conditions")
    )
    categories = range(len(router.categories))
    if kind == "margin":
        v, b = (np.asarray(a, np.float64) for a in (router.margin_weight, router.margin_bias))
        r = [v[j] @ h + b[j] for j in range(len(v))]
        return [min(-r[0], leads_by_hand(r)[i] + float(router.allowances[i])) for i in categories]
    if kind == "multinomial":
        logits = [w[j] @ h + float(router.bias[j]) for j in range(len(w))]
        return [1 / sum(np.exp(other - logits[i + 1]) for other in logits) for i in categories]
    if kind == "probe":
        v, b = (np.asarray(a, np.float64) for a in (router.probe_weight, router.probe_bias))
        return [v[i] @ h + b[i] for i in categories]
    if kind == "centroid":
        return [cosine(h - m.mean(0), m[i + 1] - m.mean(0)) for i in categories]
    return [cosine(h, np.tanh(np.outer(c[i], c[i]) / (c[i] @ c[i]) @ h)) for i in categories]


@pytest.mark.parametrize("kind", GATES)
@settings(deadline=None, max_examples=50)
@given(case=routers_and_rows())
def test_scores_follow_their_formula_row_by_row(kind, case):
    router, rows = case
    with np.errstate(over="ignore"):
        expected = [by_hand(router, kind, row) for row in rows]
    found = router.scores(kind, rows)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(router.scores(kind, rows[0]), found[0], rtol=1e-9, atol=1e-12)


def test_probabilities_sum_to_one_with_benign_first():
    router = a_router()
    h = 1000 * np.random.default_rng(2).normal(size=(4, 6))
    found = router.probabilities(h)
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    largest = (h @ router.weight.T + router.bias).argmax(axis=1)
    assert found.argmax(axis=1).tolist() == largest.tolist()
    np.testing.assert_array_equal(router.scores("multinomial", h), found[:, 1:])


def test_class_is_benign_without_harm_else_the_category_ahead():
    rows = np.random.default_rng(3).normal(size=(200, 6))
    router = a_router(k=2)
    r = rows @ np.float64(router.margin_weight).T + router.margin_bias
    expected = [0 if -one[0] < 0 else 1 + int(np.argmax(one[1:])) for one in r]
    assert router.classes(rows).tolist() == expected
    assert router.classes(rows[7]) == expected[7]
    assert set(expected) == {0, 1, 2}
    probable = router.probabilities(rows).argmax(axis=1).tolist()
    assert probable != expected
    gates = {kind: gate for kind, gate in router.gates.items() if kind != "margin"}
    without = dict.fromkeys(("margin_weight", "margin_bias", "allowances"))
    assert dataclasses.replace(router, gates=gates, **without).classes(rows).tolist() == probable


def test_margin_gate_of_the_best_category_opens_for_harmful_prompts_alone():
    rows = np.random.default_rng(3).normal(size=(200, 6))
    zero = a_gate(3, thresholds=np.zeros(3))
    router = a_router(k=3, gates=dict.fromkeys(GATES, zero))
    opens, classes = router.opens("margin", rows), router.classes(rows)
    assert not opens[classes == 0].any()
    harmful = np.flatnonzero(classes)
    assert opens[harmful, classes[harmful] - 1].all()
    assert (opens[harmful].sum(axis=1) > 1).any()  # its allowance lets another open too


def test_ranks_are_lead_and_allowance_for_margin_gates_else_scores():
    rows = np.random.default_rng(3).normal(size=(50, 6))
    router = a_router(k=3)
    r = rows @ np.float64(router.margin_weight).T + router.margin_bias
    expected = [np.array(leads_by_hand(one)) + router.allowances for one in r]
    np.testing.assert_allclose(router.ranks("margin", rows), expected)
    for kind in GATES[1:]:
        np.testing.assert_array_equal(router.ranks(kind, rows), router.scores(kind, rows))


def test_gate_opens_at_its_threshold_and_on_its_side():
    gate = a_gate(thresholds=[1.0, -2.0], above=[True, False])
    scores = [[1.0, -2.0], [0.9, -1.9], [1.1, -2.1]]
    assert gate.opens(scores).tolist() == [[True, True], [False, False], [True, True]]
    assert gate.opens(scores[1]).tolist() == [False, False]


@pytest.mark.parametrize("kind", GATES)
def test_opens_uses_the_gates_of_the_kind_given(kind):
    rows = np.random.default_rng(5).normal(size=(20, 6))
    thresholds = np.median(a_router().scores(kind, rows), axis=0)
    never = a_gate(thresholds=[1e30, 1e30])
    gates = {**dict.fromkeys(GATES, never), kind: a_gate(thresholds=thresholds)}
    opens = a_router(gates=gates).opens(kind, rows)
    assert opens.sum(axis=0).tolist() == [10, 10]
    assert opens.tolist() == (a_router().scores(kind, rows) >= thresholds).tolist()


def test_unknown_gate_raises_with_known_kinds():
    with pytest.raises(SteeringError, match=r"'svm'.*margin, multinomial, probe, centroid, cast"):
        a_router().opens("svm", np.zeros(6))


def test_shares_come_from_the_confusion_table():
    router = a_router(confusion=[[6, 1, 1], [2, 5, 1], [0, 3, 9]])
    assert router.benign_false_positive_rate == 2 / 8
    assert router.category_accuracy == 14 / 20


@pytest.mark.parametrize("h", [np.zeros(3), np.zeros((2, 5)), np.zeros((1, 1, 6)), 0.0])
@pytest.mark.parametrize("kind", GATES)
def test_hidden_state_of_another_width_raises(kind, h):
    with pytest.raises(SteeringError, match="width 6"):
        a_router().scores(kind, h)


@pytest.mark.parametrize("kind", GATES)
def test_hidden_state_that_is_not_finite_raises(kind):
    with pytest.raises(SteeringError, match="NaN"):
        a_router().scores(kind, [0, 0, np.nan, 0, 0, 0])


ARRAYS_OF = {
    "margin": ["margin_weight", "margin_bias", "allowances"],
    "multinomial": ["weight", "bias"],
    "probe": ["probe_weight", "probe_bias"],
    "centroid": ["centroids"],
    "cast": ["conditions"],
}
ARRAYS = [name for names in ARRAYS_OF.values() for name in names]


def only(*kinds, **changes):
    """A router with these kinds of gate alone."""
    absent = [name for kind, names in ARRAYS_OF.items() if kind not in kinds for name in names]
    gates = {kind: a_gate() for kind in kinds}
    return a_router(**{"gates": gates, **dict.fromkeys(absent), **changes})


@pytest.mark.parametrize("kind", GATES)
def test_router_needs_a_classifier_and_may_have_any_other_gate(kind):
    rows = np.random.default_rng(0).normal(size=(3, 6))
    for classifier in CLASSIFIERS:
        router = only(classifier, kind)
        assert set(router.gates) == {classifier, kind}
        np.testing.assert_array_equal(router.scores(kind, rows), a_router().scores(kind, rows))
        assert (router.width, router.n_embd, router.last_layer) == (6, 3, 3)
        assert Router.from_content(router.content()) == router
        for other in set(GATES) - set(router.gates):
            with pytest.raises(SteeringError, match=f"no {other} gate; it has"):
                router.scores(other, rows)
    if kind not in CLASSIFIERS:
        with pytest.raises(SteeringError, match="one of margin, multinomial"):
            only(kind)
    for name in ARRAYS_OF[kind]:
        with pytest.raises(SteeringError, match=f"{name.replace('_', ' ')} are missing"):
            only("margin", "multinomial", kind, **{name: None})
        other = "multinomial" if kind == "margin" else "margin"
        with pytest.raises(SteeringError, match="belong to a gate that it lacks"):
            only(other, **{name: getattr(a_router(), name)})


def test_values_are_read_only_float32():
    mine = np.ones((3, 6))
    router = a_router(weight=mine)
    mine[:] = 2
    assert router.weight.tolist() == np.ones((3, 6)).tolist()
    for name in [*ARRAYS, "confusion", "train_counts"]:
        array = getattr(router, name)
        assert array.dtype == (np.float32 if name in ARRAYS else np.int64)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    for part in dataclasses.fields(Gate):
        with pytest.raises(ValueError, match="read-only"):
            getattr(router.gates["cast"], part.name)[0] = 0
    with pytest.raises(TypeError):
        router.gates["x"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        router.reads = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        router.reads[0].layer = 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_and_pickles_are_equal_and_read_only(duplicate):
    router = a_router()
    again = duplicate(router)
    assert again == router
    with pytest.raises(ValueError, match="read-only"):
        again.weight[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        again.gates["probe"].thresholds[0] = 0


DIFFERENT = {
    "site": "mlp",
    "reads": (Read(3, "user"), Read(2, "suffix")),
    "categories": ["category 0", "x"],
    **{name: np.ones_like(getattr(a_router(), name)) for name in ARRAYS},
    "gates": {**a_router().gates, "cast": a_gate(thresholds=[0, 1])},
    "confusion": np.eye(3, dtype=int),
    "threshold_rule": "fpr=0.01",
    "train_counts": [1, 2, 3],
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_any_difference_makes_routers_unequal_and_survives_as_plain_data(what):
    other = a_router(**{what: DIFFERENT[what]})
    assert other != a_router()
    assert Router.from_content(other.content()) == other


def test_equality_compares_every_part():
    assert set(DIFFERENT) == {part.name for part in dataclasses.fields(Router)}
    for part in dataclasses.fields(Gate):
        if part.name == "above":
            assert a_gate(above=[True, False]) != a_gate()
        else:
            assert a_gate(**{part.name: [0.0, 0.0]}) != a_gate()
    assert a_router() != "a router"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_router_accepts_every_pooling(pooling):
    router = a_router(reads=[Read(3, pooling), Read(4, "last")])
    assert router.reads == (Read(3, pooling), Read(4, "last"))
    assert router.last_layer == 4


@pytest.mark.parametrize(
    ("layer", "pooling", "words"),
    [
        (-1, "user", "invalid layer -1"),
        (True, "user", "invalid layer True"),
        (10**6, "user", "invalid layer"),
        (1.0, "user", "invalid layer"),
        (1, "mean", "unknown pooling.*last, prompt, user, suffix"),
        (1, None, "unknown pooling"),
    ],
)
def test_invalid_reads_raise(layer, pooling, words):
    with pytest.raises(SteeringError, match=words):
        Read(layer, pooling)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "output"}, "unknown site"),
        ({"site": None}, "unknown site"),
        ({"reads": ()}, "at least one read"),
        ({"reads": None}, "at least one read"),
        ({"reads": "user"}, "at least one read"),
        ({"reads": [(3, "user"), (1, "suffix")]}, "not a pysteer.pack.router.Read"),
        ({"reads": [Read(3, "user"), Read(3, "user")]}, "twice"),
        ({"reads": [Read(i, "user") for i in range(4)]}, "width 6, which is not .* 4$"),
        ({"allowances": [0.5, -0.5]}, "allowance .* negative"),
        ({"categories": []}, "at least one"),
        ({"categories": "ab"}, "list"),
        ({"categories": ["a", " "]}, "not a category name"),
        ({"categories": ["a", 1]}, "not a category name"),
        ({"categories": ["a", "a"]}, "twice"),
        ({"categories": ["a"]}, "one threshold for each category"),
        *(({name: np.ones((4, 4))}, "shape") for name in ARRAYS),
        *(
            ({name: np.full_like(getattr(a_router(), name), NAN)}, name.replace("_", " "))
            for name in ARRAYS
        ),
        ({"weight": np.full((3, 6), 1e39)}, "weight hold NaN or infinity"),
        ({"bias": [0, INFINITY, 0]}, "bias hold NaN or infinity"),
        ({"bias": ["0", "0", "0"]}, "bias"),
        ({"bias": [None, 0, 0]}, "bias"),
        ({"bias": [[0], 0, 0]}, "bias"),
        ({"bias": [10**400, 0, 0]}, "bias"),
        ({"conditions": [[1] * 6, [0] * 6]}, "condition vector .* zero"),
        ({"conditions": 1.0}, "conditions|weight"),
        ({"gates": {}}, "needs a gate that is one of margin, multinomial"),
        ({"gates": None}, "needs a gate"),
        ({"gates": {**a_router().gates, "svm": a_gate()}}, "unknown kind of gate 'svm'"),
        ({"gates": {kind: a_gate(3) for kind in GATES}}, "one threshold for each"),
        ({"gates": dict.fromkeys(GATES)}, "one threshold for each"),
        ({"confusion": np.eye(3)}, "confusion"),
        ({"confusion": np.eye(2, dtype=int)}, "confusion"),
        ({"confusion": -np.eye(3, dtype=int)}, "confusion"),
        ({"confusion": np.diag([1, 1, 0])}, "without a prompt"),
        ({"confusion": [[2**60, 0, 0], [0, 1, 0], [0, 0, 1]]}, "confusion"),
        ({"confusion": [[True, False, False]] * 3}, "confusion"),
        ({"train_counts": [1, 2]}, "train counts"),
        ({"train_counts": [1, 2, -1]}, "train counts"),
        ({"threshold_rule": "best"}, "unknown threshold rule"),
        ({"threshold_rule": None}, "unknown threshold rule"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_parts_that_do_not_fit_raise(changes, words):
    with pytest.raises(SteeringError, match=words):
        a_router(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"above": []}, "sides"),
        ({"above": [1, 1]}, "sides"),
        ({"above": True}, "for each category"),
        ({"thresholds": [0.5]}, "thresholds"),
        ({"thresholds": [0.5, NAN]}, "thresholds"),
        ({"thresholds": ["1", "2"]}, "thresholds"),
        ({"true_positive_rates": [0.5, 1.01]}, "true positive rates"),
        ({"false_positive_rates": [-0.01, 0.5]}, "false positive rates"),
        ({"leak_rates": [0.5, NAN]}, "leak rates"),
    ],
    ids=str,
)
def test_gates_that_do_not_fit_raise(changes, words):
    with pytest.raises(SteeringError, match=words):
        a_gate(**changes)
