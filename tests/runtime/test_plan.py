"""PlanCompiler: which requests it refuses, its cache, the keys of its plans, its injections."""

import itertools
from collections import UserDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import HookError, SteeringError, SteeringPack, SteeringVector, UnknownCategoryError
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import ResolvedPolicy
from pysteer.runtime.plan import INJECTIONS, UNSTEERED, PlanCompiler

N_LAYER, N_EMBD = 4, 3


def vector(*layers, site="residual", value=1.0):
    return SteeringVector({layer: np.full(N_EMBD, value) for layer in layers}, site=site)


PACK = SteeringPack(
    {
        "middle": vector(1, 2),
        "first": vector(0),
        "last": vector(3),
        "all": vector(0, 1, 2, 3),
        "attention": vector(1, site="attention"),
        "last attention": vector(3, site="attention"),
        "zero": vector(1, value=0.0),
    }
)


def compiler(pack=PACK, policy=None, **arguments):
    return PlanCompiler(pack, policy, n_layer=N_LAYER, n_embd=N_EMBD, **arguments)


def compiled(steering, *, pack=PACK, injection="auto"):
    return compiler(pack, injection=injection).compile(steering)


def keys(plan):
    """Return the cache key and the logits key of a sequence of one token."""
    sequence = plan.start(1, [], 8)
    return int(sequence.keys(0, 1)[0]), sequence.logits_key(0)


# ---- strengths ------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(list(PACK.categories)),
        st.one_of(
            st.floats(allow_nan=False, allow_infinity=False),
            st.integers(-(2**60), 2**60),
            st.fractions(max_denominator=100),
            st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32),
        ),
    )
)
def test_finite_strengths_become_floats_and_zero_is_left_out(steering):
    expected = {
        name: float(steering[name]) for name in PACK.categories if steering.get(name, 0) != 0
    }
    requested = ResolvedPolicy(PACK).requested(steering)
    assert list(requested.items()) == list(expected.items())


@pytest.mark.parametrize(
    "strength",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        np.float32("nan"),
        True,
        False,
        np.True_,
        "1.0",
        "",
        None,
        1j,
        [1.0],
        pytest.param(10**400, id="10**400"),
        np.array([1.0, 2.0]),
    ],
    ids=repr,
)
def test_strength_that_is_not_a_finite_number_raises(strength):
    with pytest.raises(SteeringError, match="middle"):
        ResolvedPolicy(PACK).requested({"first": 1.0, "middle": strength})


@pytest.mark.parametrize("steering", ["auto", {"middle": "auto"}])
def test_gating_without_a_router_raises(steering):
    with pytest.raises(SteeringError, match="no router"):
        compiled(steering)


@pytest.mark.parametrize("strength", [1.0, 0.0, "auto", float("nan")])
@pytest.mark.parametrize("category", ["Middle", "", 1, None])
def test_unknown_category_raises_at_any_strength(category, strength):
    with pytest.raises(UnknownCategoryError, match="middle, first"):
        ResolvedPolicy(PACK).requested({category: strength})


# ---- injections -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("categories", "fits_resident"),
    [
        (["middle"], True),
        (["last"], True),
        (["middle", "last"], True),
        (["zero"], True),
        (["first"], False),
        (["all"], False),
        (["attention"], False),
        (["last attention"], False),
        (["middle", "first"], False),
        (["middle", "attention"], False),
    ],
)
def test_only_residual_of_layers_above_0_fits_the_control_vector(categories, fits_resident):
    strengths = dict.fromkeys(categories, 1.0)
    assert compiled(strengths).native.fits_resident is fits_resident
    if fits_resident:
        assert compiled(strengths, injection="resident").native is not None
    else:
        with pytest.raises(HookError, match="resident"):
            compiled(strengths, injection="resident")


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("steering", [None, {}, {"middle": 0, "first": -0.0}])
def test_no_strengths_give_the_unsteered_plan(steering, injection):
    assert compiled(steering, injection=injection) is UNSTEERED
    assert UNSTEERED.start(3, [], 8) is None


# ---- the cache of plans ---------------------------------------------------------------------


class Opaque(UserDict):
    """A mapping whose repr does not depend on its content."""

    def __repr__(self):
        return "Opaque(...)"


def test_latest_plans_are_kept():
    made = compiler()
    first = made.compile({"middle": 1.0})
    assert made.compile({"middle": 1.0}) is first
    for strength in range(2, 40):
        made.compile({"middle": strength})
    assert made.compile({"middle": 1.0}) is not first


def test_mappings_that_print_alike_get_their_own_plans():
    made = compiler()
    found = [
        made.compile(Opaque(steering)).terms
        for steering in ({"middle": 1.0}, {"first": 2.0}, {"middle": 3.0})
    ]
    assert [(term.category, term.strength) for (term,) in found] == [
        ("middle", 1.0),
        ("first", 2.0),
        ("middle", 3.0),
    ]


def test_equal_mappings_of_any_type_share_a_plan():
    made = compiler()
    assert made.compile(Opaque({"middle": 1.0})) is made.compile({"middle": 1.0})


class Changing(UserDict):
    """A mapping that another thread changes after it was read once."""

    def items(self):
        found = list(super().items())
        self.data = {"first": 2.0}
        return found


def test_mapping_that_changes_meanwhile_gets_no_other_request_its_plan():
    made = compiler()
    for steering in (Changing({"middle": 1.0}), {"middle": 1.0}):
        (term,) = made.compile(steering).terms
        assert (term.category, term.strength) == ("middle", 1.0)


@pytest.mark.parametrize("same", [True, np.True_, ("middle", float, 1.0)], ids=repr)
def test_invalid_steering_raises_though_an_equal_request_is_cached(same):
    made = compiler()
    made.compile({"middle": 1.0})
    with pytest.raises(SteeringError):
        made.compile(same if isinstance(same, tuple) else {"middle": same})


def test_plans_of_different_policies_differ():
    made = compiler()
    policy = Policy(categories={"middle": {"scope": "first 2"}})
    assert not made.compile({"middle": 1.0}, policy).native.fits_resident
    assert made.compile({"middle": 1.0}).native.fits_resident


# ---- plans without a request ----------------------------------------------------------------


def test_policy_without_a_pack_raises():
    with pytest.raises(SteeringError, match="needs a pack"):
        compiler(None, Policy())
    with pytest.raises(SteeringError, match="needs a pack"):
        compiler(None).by_policy(Policy())
    assert compiler(None).by_policy() is UNSTEERED


def test_request_that_says_nothing_is_steered_by_the_modes():
    always = Policy(categories={"all": {"mode": "always", "strength": 0.5}})
    made = compiler(PACK, always)
    assert made.by_policy().terms == made.compile({"all": 0.5}).terms
    off = Policy(categories={"all": {"mode": "off"}})
    assert made.by_policy(off) is UNSTEERED


def test_category_of_strength_0_by_policy_is_left_out():
    assert (
        compiler(PACK, Policy(categories={"all": {"mode": "always", "strength": 0}})).by_policy()
        is UNSTEERED
    )


# ---- keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "in_cache_key"),
    [
        ("middle", True),
        ("first", True),
        ("all", True),
        ("attention", True),
        ("last", False),
        ("last attention", False),
    ],
)
def test_cache_key_leaves_out_categories_of_the_last_layer_alone(category, in_cache_key):
    cached, logits = keys(compiled({category: 2.0}))
    assert logits != 0
    assert (cached != 0) is in_cache_key


@given(
    st.dictionaries(st.sampled_from(list(PACK.categories)), st.floats(0.5, 4.0), min_size=1),
    st.randoms(use_true_random=False),
)
def test_keys_do_not_depend_on_the_order_of_the_request(strengths, random):
    shuffled = list(strengths.items())
    random.shuffle(shuffled)
    assert keys(compiled(dict(shuffled))) == keys(compiled(strengths))


def test_keys_differ_exactly_where_the_logits_may():
    requests = [{"middle": 1.0}, {"middle": 2.0}, {"first": 1.0}, {"attention": 1.0}]
    requests += [{"middle": 1.0, "first": 1.0}, {"last": 1.0}, {"last attention": 1.0}]
    found = [keys(compiled(request)) for request in requests]
    for a, b in itertools.combinations(found, 2):
        assert a[1] != b[1]
    renamed = SteeringPack({"other name": PACK["middle"]})
    assert keys(compiled({"other name": 1.0}, pack=renamed)) == found[0]


def test_keys_do_not_depend_on_the_injection():
    resident, hooked = (compiled({"middle": 1.0}, injection=way) for way in ("resident", "hooked"))
    assert keys(resident) == keys(hooked)


# ---- sums -----------------------------------------------------------------------------------

HUGE = 2e38  # twice this is more than the largest float32, 3.4e38


def big_pack(**values):
    return SteeringPack({name: vector(1, value=value) for name, value in values.items()})


@pytest.mark.parametrize("strength", [2.0, -2.0, 1e39, 1e300, -1e300])
def test_strength_that_takes_a_direction_past_float32_raises(strength):
    with pytest.raises(SteeringError, match=r"'a'.*layer 1"):
        compiled({"a": strength}, pack=big_pack(a=HUGE))


@pytest.mark.parametrize("strength", [1e39, -1e300])
def test_strength_past_float32_raises_even_for_a_zero_direction(strength):
    with pytest.raises(SteeringError, match="'zero'"):
        compiled({"zero": strength})


def test_sums_past_float32_raise_only_where_directions_meet():
    meet = SteeringPack(
        {
            "a": SteeringVector({1: [HUGE, HUGE, 0]}),
            "b": SteeringVector({1: [HUGE, -HUGE, 0]}),
        }
    )
    for steering in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": -1.0}):
        with pytest.raises(SteeringError, match="'b'"):
            compiled(steering, pack=meet)
    same = big_pack(a=HUGE, b=HUGE)
    compiled({"a": 1.0, "b": 1.0}, pack=same)  # which is one of them
    compiled({"a": 1.0, "b": -1.0}, pack=same)
    compiled({"a": 1.0, "b": 1.0}, pack=big_pack(a=HUGE, b=-HUGE))
    elsewhere = SteeringPack({"a": vector(1, value=HUGE), "b": vector(2, value=HUGE)})
    compiled({"a": 1.0, "b": 1.0}, pack=elsewhere)
    other_site = SteeringPack(
        {"a": vector(1, value=HUGE), "b": vector(1, value=HUGE, site="attention")}
    )
    compiled({"a": 1.0, "b": 1.0}, pack=other_site)


@pytest.mark.parametrize(("n_layer", "n_embd"), [(3, N_EMBD), (N_LAYER, 2), (N_LAYER, 4)])
def test_pack_that_does_not_fit_the_model_raises(n_layer, n_embd):
    with pytest.raises(SteeringError, match="'all'"):
        PlanCompiler(PACK, None, n_layer=n_layer, n_embd=n_embd).compile({"all": 1.0})
