"""From arms to requests."""

import numpy as np
import pytest

from pysteer import SteeringError, SteeringPack, SteeringVector
from pysteer.evaluate.arms import (
    OWN_CATEGORY,
    Arm,
    asks_router,
    check_steering,
    default_steering,
    main_arms,
    query,
)
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import ResolvedPolicy
from pysteer.prompts import Prompt
from pysteer.runtime.arguments import INHERIT

VECTOR = SteeringVector({1: np.ones(64)})
PLAIN = SteeringPack({"a": VECTOR, "b": VECTOR}, policy=Policy(categories={"a": {"strength": 0.5}}))


@pytest.fixture
def routed(routed_pack):
    return ResolvedPolicy(SteeringPack.load(routed_pack))


def test_default_steering_without_router_is_own_category():
    resolved = ResolvedPolicy(PLAIN)
    assert resolved.gateable == ()
    assert default_steering(resolved) is OWN_CATEGORY
    prompts = [Prompt("1", "b"), Prompt("2", "a"), *(Prompt(str(i)) for i in range(3, 6))]
    queries = [query(resolved, Arm("x", OWN_CATEGORY), p, i) for i, p in enumerate(prompts)]
    # Prompts of categories that the pack lacks take turns by number.
    assert [each.steering for each in queries] == [
        {"b": 1.0},
        {"a": 0.5},
        {"a": 0.5},
        {"b": 1.0},
        {"a": 0.5},
    ]
    assert all(each.policy is None for each in queries)
    assert query(resolved, Arm("x", OWN_CATEGORY), prompts[2], 3).steering == {"b": 1.0}


def test_default_steering_follows_policy_that_switches_on_a_category():
    resolved = ResolvedPolicy(PLAIN, Policy(categories={"b": {"mode": "always"}}))
    assert default_steering(resolved) is INHERIT


def test_default_steering_with_router_asks_router_for_all_categories(routed):
    assert default_steering(routed) is INHERIT
    assert routed.gateable == ("says q", "says z")
    assert asks_router(routed, INHERIT)
    assert asks_router(routed, "auto")
    assert not asks_router(routed, {"says q": "auto"})
    assert not asks_router(routed, OWN_CATEGORY)
    off = ResolvedPolicy(routed.pack, Policy(categories={"says q": {"mode": "off"}}))
    assert not asks_router(off, INHERIT)


def test_factor_multiplies_forced_and_gated_strengths(routed):
    half = ResolvedPolicy(routed.pack, Policy(categories={"says q": {"strength": 3.0}}))
    prompt = Prompt("1", "says q")
    gated = query(half, Arm("x", INHERIT, 0.5), prompt, 0)
    assert gated.policy == Policy(
        categories={"says q": {"strength": 1.5}, "says z": {"strength": 0.5}}
    )
    forced = query(half, Arm("x", {"says q": 2.0}, 0.5), prompt, 0)
    assert (forced.steering, forced.policy) == ({"says q": 1.0}, None)
    own = query(half, Arm("x", OWN_CATEGORY, 0.5), prompt, 0)
    assert (own.steering, own.policy) == ({"says q": 1.5}, None)
    mixed = query(half, Arm("x", {"says q": 2.0, "says z": "auto"}, 0.5), prompt, 0)
    assert mixed.steering == {"says q": 1.0, "says z": "auto"}
    assert mixed.policy == gated.policy
    plain = query(half, Arm("x", None, 0.5), prompt, 0)
    assert (plain.steering, plain.policy) == (None, None)


def test_main_arms_have_names_and_distinct_strengths():
    arms = main_arms(OWN_CATEGORY, [2.0, 1.0, 0.5, 0.0, 2.0])
    assert [(arm.name, arm.factor) for arm in arms] == [
        ("unsteered", 1.0),
        ("steered", 1.0),
        ("steered x0.5", 0.5),
        ("steered x2", 2.0),
    ]
    assert len({arm.described for arm in arms}) == 4


@pytest.mark.parametrize(
    ("steering", "words"),
    [("auto", "no router"), ({"a": "auto"}, "no router"), ({"c": 1.0}, "unknown category")],
)
def test_steering_that_pack_lacks_raises(steering, words):
    with pytest.raises(SteeringError, match=words):
        check_steering(ResolvedPolicy(PLAIN), steering)
