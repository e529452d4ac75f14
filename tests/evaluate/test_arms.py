"""From arms to requests."""

import numpy as np
import pytest

from pysteer import SteeringError, SteeringPack, SteeringVector
from pysteer.evaluate.arms import OWN, Arm, Steered, main_arms
from pysteer.pack.policy import Policy
from pysteer.prompts import Prompt
from pysteer.runtime.steered import IN_FORCE

VECTOR = SteeringVector({1: np.ones(64)})
PLAIN = SteeringPack({"a": VECTOR, "b": VECTOR}, policy=Policy(categories={"a": {"strength": 0.5}}))


@pytest.fixture
def routed(routed_pack):
    return Steered.of(SteeringPack.load(routed_pack), None)


def test_without_a_router_each_prompt_is_steered_by_its_own_category():
    steered = Steered.of(PLAIN, None)
    assert steered.gated == []
    assert steered.default() is OWN
    prompts = [Prompt("1", "b"), Prompt("2", "a"), *(Prompt(str(i)) for i in range(3, 6))]
    asked = steered.asked(Arm("x", OWN), prompts)
    # Those of no category of the pack's take turns, by their number.
    assert [one.steering for one in asked] == [
        {"b": 1.0},
        {"a": 0.5},
        {"a": 0.5},
        {"b": 1.0},
        {"a": 0.5},
    ]
    assert all(one.policy is None for one in asked)
    assert steered.asked(Arm("x", OWN), prompts[2:], start=3)[0].steering == {"b": 1.0}


def test_a_policy_that_does_something_decides():
    assert Steered.of(PLAIN, Policy(categories={"b": {"mode": "always"}})).default() is IN_FORCE


def test_a_router_decides_unless_the_policy_says_otherwise(routed):
    assert routed.default() is IN_FORCE
    assert routed.gated == ["says q", "says z"]
    assert routed.routes_all(IN_FORCE)
    assert routed.routes_all("auto")
    assert not routed.routes_all({"says q": "auto"})
    assert not routed.routes_all(OWN)
    off = Steered.of(routed.pack, Policy(categories={"says q": {"mode": "off"}}))
    assert not off.routes_all(IN_FORCE)


def test_a_factor_multiplies_forced_and_gated_strengths_alike(routed):
    half = Steered.of(routed.pack, Policy(categories={"says q": {"strength": 3.0}}))
    prompts = [Prompt("1", "says q")]
    (gated,) = half.asked(Arm("x", IN_FORCE, 0.5), prompts)
    assert gated.policy == Policy(
        categories={"says q": {"strength": 1.5}, "says z": {"strength": 0.5}}
    )
    (forced,) = half.asked(Arm("x", {"says q": 2.0}, 0.5), prompts)
    assert (forced.steering, forced.policy) == ({"says q": 1.0}, None)
    (own,) = half.asked(Arm("x", OWN, 0.5), prompts)
    assert (own.steering, own.policy) == ({"says q": 1.5}, None)
    (mixed,) = half.asked(Arm("x", {"says q": 2.0, "says z": "auto"}, 0.5), prompts)
    assert mixed.steering == {"says q": 1.0, "says z": "auto"}
    assert mixed.policy == gated.policy
    (plain,) = half.asked(Arm("x", None, 0.5), prompts)
    assert (plain.steering, plain.policy) == (None, None)


def test_arms_are_named_and_each_strength_is_run_once():
    arms = main_arms(OWN, [2.0, 1.0, 0.5, 0.0, 2.0])
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
def test_what_a_pack_cannot_do_is_an_error(steering, words):
    with pytest.raises(SteeringError, match=words):
        Steered.of(PLAIN, None).check(steering)
