"""ResolvedPolicy: each answer against a formula written out from the pack and the policies."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import SteeringError, SteeringPack, SteeringVector, UnknownCategoryError, shipped
from pysteer.pack.policy import CategorySettings, Policy
from pysteer.pack.resolved import AUTO, ResolvedPolicy
from pysteer.pack.router import GATES, Gate, Read, Router
from pysteer.pack.rules import Rule
from pysteer.pack.scope import Scope

N_EMBD = 4
NAMES = ("a", "b", "c", "d")  # of the pack
KNOWN = ("c", "a", "b")  # of the router, in another order
STORED = {
    "margin": (0.0, 0.0, 0.0),
    "multinomial": (0.5, 0.25, 0.75),
    "probe": (-1.5, 2.0, 0.125),
    "centroid": (0.5, -0.5, 0.0),
    "cast": (0.9, -0.25, 0.1),
}
ABOVE = dict.fromkeys(GATES, (True, True, True)) | {"cast": (True, False, False)}


def a_gate(kind):
    half = np.full(3, 0.5)
    return Gate(np.array(STORED[kind]), np.array(ABOVE[kind]), half, half, half)


def a_router(kinds=GATES):
    rng = np.random.default_rng(5)
    arrays = {
        "margin": {
            "margin_weight": rng.normal(size=(4, N_EMBD)),
            "margin_bias": np.zeros(4),
            "allowances": np.zeros(3),
        },
        "multinomial": {"weight": rng.normal(size=(4, N_EMBD)), "bias": np.zeros(4)},
        "probe": {"probe_weight": rng.normal(size=(3, N_EMBD)), "probe_bias": np.zeros(3)},
        "centroid": {"centroids": rng.normal(size=(4, N_EMBD))},
        "cast": {"conditions": rng.normal(size=(3, N_EMBD))},
    }
    return Router(
        site="residual",
        reads=[Read(1, "last")],
        categories=KNOWN,
        gates={kind: a_gate(kind) for kind in kinds},
        confusion=np.eye(4, dtype=int),
        threshold_rule="youden",
        train_counts=np.ones(4, int),
        **{name: values for kind in kinds for name, values in arrays[kind].items()},
    )


def a_pack(*, router=True, policy=None, kinds=GATES):
    return SteeringPack(
        {name: SteeringVector({1: np.ones(N_EMBD)}) for name in NAMES},
        router=a_router(kinds) if router else None,
        policy=None if policy is None else Policy.from_content(policy),
    )


def resolved(over=None, *, own=None, router=True):
    over = None if over is None else Policy.from_content(over)
    return ResolvedPolicy(a_pack(router=router, policy=own), over)


# ---- settings -------------------------------------------------------------------------------


def test_settings_without_a_policy_are_the_defaults():
    found = resolved()
    for name in KNOWN:
        assert found.settings(name) == CategorySettings(AUTO, 1.0, None, Scope(), Rule(name))
    assert found.settings("d") == CategorySettings("off", 1.0, None, Scope(), Rule("d"))


def test_settings_without_a_router_are_off_unless_a_mode_is_given():
    found = resolved({"categories": {"b": {"mode": "always"}}}, router=False)
    assert [found.settings(name).mode for name in NAMES] == ["off", "always", "off", "off"]


def test_settings_of_the_caller_go_before_the_pack_s_own_one_by_one():
    own = {
        "conflict": "sum",
        "scope": "response",
        "categories": {"a": {"strength": 2.0, "threshold": 0.5}, "d": {"when": "a or b"}},
    }
    found = resolved({"categories": {"a": {"strength": 3.0}}}, own=own)
    assert found.settings("a") == CategorySettings(AUTO, 3.0, 0.5, Scope("response"), Rule("a"))
    assert found.settings("d").mode == AUTO  # its rule names categories that the router knows
    found = found.merged(Policy(scope="all", categories={"a": {"mode": "off"}}))
    assert found.settings("a") == CategorySettings("off", 3.0, 0.5, Scope(), Rule("a"))


def test_scope_of_the_operator_replaces_scopes_of_the_pack_s_categories():
    own = {"scope": "prompt", "categories": {"a": {"scope": "first 8", "strength": 2.0}}}
    found = resolved({"scope": "response", "categories": {"b": {"scope": "first 2"}}}, own=own)
    assert found.settings("a") == CategorySettings(AUTO, 2.0, None, Scope("response"), Rule("a"))
    assert found.settings("b").scope == Scope("first", length=2)
    assert resolved({"recheck": 8}, own=own).settings("a").scope == Scope("first", length=8)
    request = found.merged(Policy(scope="prompt"))
    assert {request.settings(name).scope for name in NAMES} == {Scope("prompt")}


def test_scope_of_a_policy_file_replaces_scopes_of_the_shipped_pack(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("scope: first 1\n")
    pack = shipped.default_pack()
    assert {ResolvedPolicy(pack).settings(name).scope for name in pack.categories} == {Scope()}
    found = ResolvedPolicy(pack, Policy.load(path))
    assert {found.settings(name).scope for name in pack.categories} == {Scope("first", length=1)}


def test_gate_of_the_operator_ends_thresholds_in_another_unit():
    own = {"gate": "probe", "categories": {"a": {"threshold": -40.0, "strength": 2.0}}}
    found = resolved({"gate": "multinomial"}, own=own)
    assert found.thresholds["a"] == STORED["multinomial"][KNOWN.index("a")]
    assert found.settings("a").strength == 2.0
    assert resolved({"gate": "probe"}, own=own).thresholds["a"] == -40.0
    unnamed = {"categories": {"a": {"threshold": 0.75}}}  # of the router's margin
    assert resolved({"gate": "margin"}, own=unnamed).thresholds["a"] == 0.75
    assert resolved({"gate": "probe"}, own=unnamed).thresholds["a"] == STORED["probe"][1]
    back = resolved({"gate": "cast"}, own=own).merged(Policy(gate="probe"))
    assert back.thresholds["a"] == STORED["probe"][1]
    assert pickle.loads(pickle.dumps(back)).thresholds == back.thresholds


# ---- precedence -----------------------------------------------------------------------------

GIVEN_SCOPES = ["all", "prompt", "response", "first 3"]


def some(**parts):
    return st.fixed_dictionaries({}, optional=parts)


LAYERS = some(
    gate=st.sampled_from(["margin", "probe", None]),
    conflict=st.sampled_from(["sum", "strongest", "first"]),
    recheck=st.sampled_from([None, 1, 7]),
    scope=st.sampled_from(GIVEN_SCOPES),
    categories=some(
        **dict.fromkeys(
            KNOWN,
            some(
                mode=st.sampled_from(["auto", "always", "off", None]),
                strength=st.sampled_from([0.5, 2.0]),
                threshold=st.sampled_from([None, -1.5, 4.0]),
                scope=st.sampled_from([None, *GIVEN_SCOPES]),
                when=st.sampled_from([None, "a or b", "not c"]),
            ),
        )
    ),
)


def outermost(layers, key, default):
    """The value of the outermost layer that gives a key; layers come innermost first."""
    return next((layer[key] for layer in reversed(layers) if key in layer), default)


def expected_scope(layers, name):
    below_null = False
    for layer in reversed(layers):
        own = layer.get("categories", {}).get(name, {})
        if "scope" in own and not below_null:
            if own["scope"] is not None:
                return Scope.parse(own["scope"])
            below_null = True
        if "scope" in layer:
            return Scope.parse(layer["scope"])
    return Scope()


def expected_threshold(layers, name):
    kinds = []  # in force with the layers up to each
    for layer in layers:
        before = kinds[-1] if kinds else "margin"
        kinds.append((layer["gate"] or "margin") if "gate" in layer else before)
    for i in reversed(range(len(layers))):
        own = layers[i].get("categories", {}).get(name, {})
        if "threshold" in own:
            return own["threshold"]
        if kinds[i] != (kinds[i - 1] if i else "margin"):
            return None
    return None


@given(st.lists(LAYERS, min_size=3, max_size=3))
def test_precedence_of_every_key_equals_the_written_formula(layers):
    """Pack, operator, request: each layer's categories, then its top level, then the one below."""
    own, operator, request = layers
    found = resolved(operator, own=own).merged(Policy.from_content(request))
    assert found.gate == (outermost(layers, "gate", None) or "margin")
    assert found.policy.conflict == outermost(layers, "conflict", "strongest")
    assert found.policy.recheck == outermost(layers, "recheck", None)
    for name in KNOWN:
        inside = [layer.get("categories", {}).get(name, {}) for layer in layers]
        assert found.settings(name) == CategorySettings(
            mode=outermost(inside, "mode", None) or AUTO,
            strength=outermost(inside, "strength", 1.0),
            threshold=expected_threshold(layers, name),
            scope=expected_scope(layers, name),
            rule=Rule(outermost(inside, "when", None) or name),
        )


def test_settings_of_an_unknown_category_raise_with_the_known_names():
    with pytest.raises(UnknownCategoryError, match=r"'x'.*a, b, c, d"):
        resolved().settings("x")


def test_policy_that_does_not_fit_the_pack_raises():
    with pytest.raises(SteeringError, match="unknown category 'x'"):
        resolved({"categories": {"x": {}}})
    with pytest.raises(SteeringError, match="no gate for 'd'"):
        resolved().merged(Policy(categories={"d": {"mode": "auto"}}))


# ---- gates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GATES)
def test_thresholds_are_the_router_s_where_the_policy_gives_none(kind):
    found = resolved({"gate": kind, "categories": {"a": {"threshold": 0.3}}})
    assert found.gate == kind
    assert found.thresholds == dict(zip(KNOWN, STORED[kind], strict=True)) | {"a": 0.3}
    assert list(found.thresholds) == list(found.opens_above) == list(KNOWN)
    assert all(type(value) is float for value in found.thresholds.values())
    assert found.opens_above == dict(zip(KNOWN, ABOVE[kind], strict=True))


def test_gate_is_margin_where_the_router_has_it_else_multinomial():
    assert resolved().gate == "margin"
    assert ResolvedPolicy(a_pack(kinds=("multinomial", "probe"))).gate == "multinomial"


def test_pack_without_a_router_has_no_gates():
    found = resolved(router=False)
    assert found.gate is None
    assert (dict(found.thresholds), dict(found.opens_above)) == ({}, {})
    assert found.gateable == ()


def test_gateable_categories_are_those_whose_rules_the_router_knows():
    assert resolved().gateable == ("a", "b", "c")
    policy = {"conflict": "sum", "categories": {"d": {"when": "not c"}, "b": {"mode": "off"}}}
    assert resolved(policy).gateable == NAMES


SCORES = st.fixed_dictionaries(dict.fromkeys(KNOWN, st.floats(-2, 2) | st.sampled_from([-0.25])))


@given(st.sampled_from(GATES), SCORES, st.none() | st.floats(-1, 1))
def test_gate_opens_where_the_score_has_reached_the_threshold(kind, scores, given):
    if kind == "multinomial" and given is not None:
        given = abs(given)
    policy = {"gate": kind, "categories": {} if given is None else {"b": {"threshold": given}}}
    found = resolved(policy)
    for i, name in enumerate(KNOWN):
        threshold = given if name == "b" and given is not None else STORED[kind][i]
        reached = scores[name] >= threshold if ABOVE[kind][i] else scores[name] <= threshold
        assert found.opens(name, scores) is reached


@given(SCORES)
def test_gated_category_fires_where_its_rule_holds(scores):
    policy = {
        "gate": "cast",
        "conflict": "sum",
        "categories": {"a": {"threshold": 0.5}, "d": {"when": "a and not (b or c)"}},
    }
    a, b, c = scores["a"] <= 0.5, scores["b"] <= 0.1, scores["c"] >= 0.9
    assert resolved(policy).opens("d", scores) is (a and not (b or c))


def test_scores_are_needed_of_the_categories_in_the_rule_alone():
    assert resolved().opens("a", {"a": 0.0})


@pytest.mark.parametrize("router", [False, True])
def test_category_that_cannot_be_gated_raises(router):
    found = resolved(router=router)
    with pytest.raises(SteeringError, match=r"'d'.*no router for this category"):
        found.opens("d", dict.fromkeys(NAMES, 1.0))
    with pytest.raises(SteeringError, match=r"'d'.*no router for this category"):
        found.requested({"a": 1.0, "d": "auto"})


# ---- steering -------------------------------------------------------------------------------


def test_default_steering_follows_the_modes():
    assert dict(resolved().default_steering) == {"a": AUTO, "b": AUTO, "c": AUTO}
    policy = {
        "categories": {
            "a": {"mode": "off"},
            "b": {"mode": "always", "strength": -0.5},
            "c": {"strength": 2.0},
            "d": {"mode": "always"},
        }
    }
    assert list(resolved(policy).default_steering.items()) == [("b", -0.5), ("c", AUTO), ("d", 1.0)]
    assert dict(resolved(router=False).default_steering) == {}


def test_requested_categories_are_in_the_pack_s_order_as_floats():
    found = resolved().requested({"d": 2, "b": "auto", "c": 0, "a": np.float32(0.5)})
    assert list(found.items()) == [("a", 0.5), ("b", AUTO), ("d", 2.0)]
    assert [type(value) for value in found.values()] == [float, str, float]
    assert resolved().requested(found) == found


def test_auto_alone_requests_all_gateable_categories():
    assert resolved().requested("auto") == {"a": AUTO, "b": AUTO, "c": AUTO}
    with pytest.raises(SteeringError, match="no router"):
        resolved(router=False).requested("auto")


@pytest.mark.parametrize("steering", [None, {}, {"a": 0, "d": -0.0}])
def test_nothing_requested_is_an_empty_mapping(steering):
    assert resolved().requested(steering) == {}


@pytest.mark.parametrize("steering", ["on", 1.0, ["a"], {"a": "on"}, {"a": True}, {"a": 1e999}])
def test_invalid_steering_raises(steering):
    with pytest.raises(SteeringError):
        resolved().requested(steering)


# ---- a value --------------------------------------------------------------------------------


def test_resolved_policy_is_an_immutable_value():
    found = resolved({"categories": {"a": {"strength": 2.0}}}, own={"recheck": 8})
    assert found.policy == Policy(recheck=8, categories={"a": {"strength": 2.0}})
    assert found.merged(None) is found
    _ = found.thresholds, found.default_steering
    for again in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert again == found
        assert again.thresholds == found.thresholds
    assert found != resolved(own={"recheck": 8})
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.policy = Policy()
    for view in (found.thresholds, found.opens_above, found.default_steering):
        with pytest.raises(TypeError):
            view["a"] = 1.0
