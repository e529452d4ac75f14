"""SteeringPack: what fits together, what fits a model, and what can be changed (nothing)."""

import copy
import dataclasses
import pickle

import pytest

from pysteer import (
    BaseModel,
    ModelMismatchError,
    SteeringError,
    SteeringPack,
    SteeringVector,
    UnknownCategoryError,
)

MODEL = BaseModel("llama", "Tiny", n_layer=4, n_embd=2, n_vocab=320)
HATE = SteeringVector({1: [1.0, 2.0], 3: [3.0, 4.0]})
MALWARE = SteeringVector({0: [5.0, 6.0]}, site="attention")


def a_pack(**changes):
    return SteeringPack({"hate": HATE, "malware": MALWARE}, **changes)


def test_categories_are_found_by_name():
    pack = a_pack()
    assert pack["hate"] is HATE
    assert pack["malware"] is MALWARE
    assert pack.n_embd == 2
    assert list(pack.categories) == ["hate", "malware"]


def test_an_unknown_category_is_told_which_there_are():
    with pytest.raises(UnknownCategoryError, match=r"'fraud'.*hate, malware"):
        a_pack()["fraud"]


@pytest.mark.parametrize("name", ["", " ", "\n", 1, None])
def test_a_category_needs_a_name(name):
    with pytest.raises(SteeringError, match="not a category name"):
        SteeringPack({name: HATE})


def test_a_pack_needs_a_category():
    with pytest.raises(SteeringError, match="at least one category"):
        SteeringPack({})


def test_the_categories_must_agree_on_the_width():
    with pytest.raises(SteeringError, match="width"):
        SteeringPack({"a": HATE, "b": SteeringVector({1: [1.0, 2.0, 3.0]})})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"n_embd": 3}, "n_embd 3"), ({"n_layer": 3}, "layer 3"), ({"n_layer": 1}, "layers 0 to 0")],
)
def test_the_directions_must_fit_the_base_model(changes, words):
    with pytest.raises(ModelMismatchError, match=words):
        a_pack(base_model=dataclasses.replace(MODEL, **changes))


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0, -1e-9])
def test_residual_norms_are_finite_and_not_negative(norm):
    with pytest.raises(SteeringError, match="layer 2"):
        a_pack(residual_norm={2: norm})


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "qwen2"},
        {"n_layer": 5},
        {"n_embd": 3},
        {"n_vocab": 321},
    ],
)
def test_another_model_than_the_base_is_refused_and_the_difference_named(changes):
    (what,) = changes
    other = dataclasses.replace(MODEL, **changes)
    with pytest.raises(ModelMismatchError, match=rf"Tiny with {what}.* has {what} "):
        a_pack(base_model=MODEL).check_fits(other)


def test_the_name_of_the_model_is_not_compared():
    a_pack(base_model=MODEL).check_fits(dataclasses.replace(MODEL, name="a fine-tune"))


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"architecture": "qwen2", "n_vocab": 7}, True),
        ({"n_layer": 400}, True),
        ({"n_embd": 3}, False),
        ({"n_layer": 3}, False),
    ],
)
def test_without_a_base_model_the_shape_alone_decides(changes, fits):
    model = dataclasses.replace(MODEL, **changes)
    if fits:
        a_pack().check_fits(model)
    else:
        with pytest.raises(ModelMismatchError):
            a_pack().check_fits(model)


def test_what_the_caller_does_to_its_mappings_later_does_not_reach_the_pack():
    categories, norms, provenance = {"hate": HATE}, {1: 2.0}, {"method": "mean"}
    pack = SteeringPack(categories, residual_norm=norms, provenance=provenance)
    categories["malware"] = MALWARE
    norms[2] = 3.0
    provenance["x"] = 1
    assert pack == SteeringPack(
        {"hate": HATE}, residual_norm={1: 2.0}, provenance={"method": "mean"}
    )


@pytest.mark.parametrize("name", ["categories", "residual_norm", "provenance"])
def test_nothing_in_a_pack_can_be_changed(name):
    pack = a_pack()
    with pytest.raises(TypeError):
        getattr(pack, name)["x"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(pack, name, {})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_model": MODEL},
        {"residual_norm": {1: 2.5}},
        {"provenance": {"method": "mean", "n": 3, "x": 0.5}},
    ],
)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_and_pickles_are_equal(duplicate, changes):
    pack = a_pack(**changes)
    again = duplicate(pack)
    assert again == pack
    assert again.base_model == pack.base_model
    assert dict(again.residual_norm) == dict(pack.residual_norm)
    assert dict(again.provenance) == dict(pack.provenance)
    if changes:
        assert again != a_pack()
