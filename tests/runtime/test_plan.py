"""From what a request asks for to plans: what is refused, what the keys say, what fits where."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import HookError, SteeringError, SteeringPack, SteeringVector, UnknownCategoryError
from pysteer.runtime.plan import UNSTEERED, PlanCompiler, Wanted, check_steering

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


def compiled(steering, *, pack=PACK, mode="auto"):
    return PlanCompiler(pack, None, n_layer=N_LAYER, n_embd=N_EMBD, mode=mode).compile(steering)


def keys(plan):
    """Of a sequence of one token: what its cache entry and its logits depend on."""
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
def test_finite_strengths_pass_as_floats_and_zero_is_dropped(steering):
    assert check_steering(PACK, steering) == [
        Wanted(name, float(steering[name]), False)
        for name in PACK.categories
        if steering.get(name, 0) != 0
    ]


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
def test_a_strength_that_is_no_finite_number_is_refused(strength):
    with pytest.raises(SteeringError, match="middle"):
        check_steering(PACK, {"first": 1.0, "middle": strength})


@pytest.mark.parametrize("steering", ["auto", {"middle": "auto"}])
def test_gating_needs_a_router(steering):
    with pytest.raises(SteeringError, match="no router"):
        compiled(steering)


@pytest.mark.parametrize("strength", [1.0, 0.0, "auto", float("nan")])
@pytest.mark.parametrize("category", ["Middle", "", 1, None])
def test_an_unknown_category_is_refused_at_any_strength(category, strength):
    with pytest.raises(UnknownCategoryError, match="middle, first"):
        check_steering(PACK, {category: strength})


# ---- the way in -----------------------------------------------------------------------------


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
def test_residual_from_layer_1_on_fits_the_control_vector_and_the_rest_does_not(
    categories, fits_resident
):
    strengths = dict.fromkeys(categories, 1.0)
    assert compiled(strengths).native.fits_resident is fits_resident
    if fits_resident:
        assert compiled(strengths, mode="resident").native is not None
    else:
        with pytest.raises(HookError, match="resident"):
            compiled(strengths, mode="resident")


@pytest.mark.parametrize("mode", ["auto", "resident", "hooked"])
@pytest.mark.parametrize("steering", [None, {}, {"middle": 0, "first": -0.0}])
def test_no_strengths_are_the_unsteered_plan(steering, mode):
    assert compiled(steering, mode=mode) is UNSTEERED
    assert UNSTEERED.start(3, [], 8) is None


def test_the_latest_plans_are_kept():
    compiler = PlanCompiler(PACK, None, n_layer=N_LAYER, n_embd=N_EMBD)
    first = compiler.compile({"middle": 1.0})
    assert compiler.compile({"middle": 1.0}) is first
    for strength in range(2, 40):
        compiler.compile({"middle": strength})
    assert compiler.compile({"middle": 1.0}) is not first


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
def test_what_acts_in_the_last_layer_alone_is_no_part_of_the_cache_key(category, in_cache_key):
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


def test_keys_differ_where_the_logits_may_and_nowhere_else():
    requests = [{"middle": 1.0}, {"middle": 2.0}, {"first": 1.0}, {"attention": 1.0}]
    requests += [{"middle": 1.0, "first": 1.0}, {"last": 1.0}, {"last attention": 1.0}]
    found = [keys(compiled(request)) for request in requests]
    for a, b in itertools.combinations(found, 2):
        assert a[1] != b[1]
    renamed = SteeringPack({"other name": PACK["middle"]})
    assert keys(compiled({"other name": 1.0}, pack=renamed)) == found[0]


def test_the_mode_is_no_part_of_the_keys():
    modes = [compiled({"middle": 1.0}, mode=mode) for mode in ("resident", "hooked")]
    assert keys(modes[0]) == keys(modes[1])


# ---- sums -----------------------------------------------------------------------------------

HUGE = 2e38  # twice this is more than the largest float32, 3.4e38


def big_pack(**values):
    return SteeringPack({name: vector(1, value=value) for name, value in values.items()})


@pytest.mark.parametrize("strength", [2.0, -2.0, 1e39, 1e300, -1e300])
def test_a_strength_that_takes_a_direction_past_float32_is_refused(strength):
    with pytest.raises(SteeringError, match=r"'a'.*layer 1"):
        compiled({"a": strength}, pack=big_pack(a=HUGE))


@pytest.mark.parametrize("strength", [1e39, -1e300])
def test_so_is_a_strength_past_float32_even_for_a_zero_direction(strength):
    with pytest.raises(SteeringError, match="'zero'"):
        compiled({"zero": strength})


def test_directions_of_categories_are_summed_where_they_meet_and_nowhere_else():
    same = big_pack(a=HUGE, b=HUGE)
    with pytest.raises(SteeringError, match="'b'"):
        compiled({"a": 1.0, "b": 1.0}, pack=same)
    compiled({"a": 1.0, "b": -1.0}, pack=same)
    compiled({"a": 1.0, "b": 1.0}, pack=big_pack(a=HUGE, b=-HUGE))
    elsewhere = SteeringPack({"a": vector(1, value=HUGE), "b": vector(2, value=HUGE)})
    compiled({"a": 1.0, "b": 1.0}, pack=elsewhere)
    other_site = SteeringPack(
        {"a": vector(1, value=HUGE), "b": vector(1, value=HUGE, site="attention")}
    )
    compiled({"a": 1.0, "b": 1.0}, pack=other_site)


@pytest.mark.parametrize(("n_layer", "n_embd"), [(3, N_EMBD), (N_LAYER, 2), (N_LAYER, 4)])
def test_a_pack_that_does_not_fit_is_refused(n_layer, n_embd):
    with pytest.raises(SteeringError, match="'all'"):
        PlanCompiler(PACK, None, n_layer=n_layer, n_embd=n_embd).compile({"all": 1.0})
