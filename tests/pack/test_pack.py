"""SteeringPack: parts that fit each other and the model, immutability, provenance, imports."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pysteer import (
    BaseModel,
    ModelMismatchError,
    SteeringError,
    SteeringPack,
    SteeringVector,
    UnknownCategoryError,
)
from pysteer.pack.router import Gate, Read, Router

MODEL = BaseModel("llama", "Tiny", n_layer=4, n_embd=2, n_vocab=320)
HATE = SteeringVector({1: [1.0, 2.0], 3: [3.0, 4.0]})
MALWARE = SteeringVector({0: [5.0, 6.0]}, site="attention")


def a_router(*categories, width=2, layer=3):
    k = len(categories)
    half = np.full(k, 0.5)
    return Router(
        site="residual",
        reads=[Read(0, "user"), Read(layer, "last")],
        categories=categories,
        margin_weight=np.ones((k + 1, 2 * width)),
        margin_bias=np.zeros(k + 1),
        allowances=np.zeros(k),
        gates={"margin": Gate(half, half > 0, half, half, half)},
        confusion=np.eye(k + 1, dtype=int),
        threshold_rule="youden",
        train_counts=np.ones(k + 1, int),
    )


def a_pack(**changes):
    return SteeringPack({"hate": HATE, "malware": MALWARE}, **changes)


def test_category_is_found_by_name():
    pack = a_pack()
    assert pack["hate"] is HATE
    assert pack["malware"] is MALWARE
    assert pack.n_embd == 2
    assert list(pack.categories) == ["hate", "malware"]


def test_unknown_category_raises_with_known_names():
    with pytest.raises(UnknownCategoryError, match=r"'fraud'.*hate, malware"):
        a_pack()["fraud"]


@pytest.mark.parametrize("name", ["", " ", "\n", 1, None])
def test_category_without_a_name_raises(name):
    with pytest.raises(SteeringError, match="not a category name"):
        SteeringPack({name: HATE})


def test_pack_without_categories_raises():
    with pytest.raises(SteeringError, match="at least one category"):
        SteeringPack({})


def test_categories_of_different_widths_raise():
    with pytest.raises(SteeringError, match="width"):
        SteeringPack({"a": HATE, "b": SteeringVector({1: [1.0, 2.0, 3.0]})})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"n_embd": 3}, "n_embd 3"), ({"n_layer": 3}, "layer 3"), ({"n_layer": 1}, "layers 0 to 0")],
)
def test_directions_that_do_not_fit_the_base_model_raise(changes, words):
    with pytest.raises(ModelMismatchError, match=words):
        a_pack(base_model=dataclasses.replace(MODEL, **changes))


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0, -1e-9])
def test_residual_norm_that_is_negative_or_not_finite_raises(norm):
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
def test_other_model_than_the_base_raises_with_the_difference(changes):
    (what,) = changes
    other = dataclasses.replace(MODEL, **changes)
    with pytest.raises(ModelMismatchError, match=rf"Tiny with {what}.* has {what} "):
        a_pack(base_model=MODEL).check_fits(other)


def test_name_of_the_model_is_not_compared():
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
def test_pack_without_a_base_model_compares_the_shape_alone(changes, fits):
    model = dataclasses.replace(MODEL, **changes)
    if fits:
        a_pack().check_fits(model)
    else:
        with pytest.raises(ModelMismatchError):
            a_pack().check_fits(model)


def test_later_changes_of_the_caller_s_mappings_do_not_reach_the_pack():
    categories, norms, provenance = {"hate": HATE}, {1: 2.0}, {"method": "mean"}
    pack = SteeringPack(categories, residual_norm=norms, provenance=provenance)
    categories["malware"] = MALWARE
    norms[2] = 3.0
    provenance["x"] = 1
    assert pack == SteeringPack(
        {"hate": HATE}, residual_norm={1: 2.0}, provenance={"method": "mean"}
    )


@pytest.mark.parametrize("name", ["categories", "residual_norm", "provenance"])
def test_pack_is_read_only(name):
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
        {"provenance": {"data": {"hashes": ["a", "b"], "counts": {"hate": 3}}, "seed": None}},
        {"router": a_router("malware", "hate")},
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
    assert again.router == pack.router
    if changes:
        assert again != a_pack()


# ---- the router ------------------------------------------------------------------------------


@pytest.mark.parametrize("categories", [["hate"], ["malware"], ["malware", "hate"]])
def test_router_may_know_only_some_categories(categories):
    router = a_router(*categories)
    assert a_pack(base_model=MODEL, router=router).router is router
    assert a_pack().router is None


def test_router_with_unknown_categories_raises():
    with pytest.raises(SteeringError, match=r"'fraud'.*the pack lacks"):
        a_pack(router=a_router("hate", "fraud"))


def test_router_of_another_width_raises():
    with pytest.raises(SteeringError, match=r"width 3.*width 2"):
        a_pack(router=a_router("hate", width=3))


def test_router_that_reads_a_missing_layer_raises():
    router = a_router("hate", layer=4)
    with pytest.raises(ModelMismatchError, match=r"router reads layer 4.*layers 0 to 3"):
        a_pack(base_model=MODEL, router=router)
    with pytest.raises(ModelMismatchError, match=r"router reads layer 4.*layers 0 to 3"):
        a_pack(router=router).check_fits(MODEL)
    a_pack(router=router).check_fits(dataclasses.replace(MODEL, n_layer=5))


def test_object_that_is_not_a_router_raises():
    with pytest.raises(SteeringError, match="not a router"):
        a_pack(router={"layer": 1})


# ---- provenance ------------------------------------------------------------------------------

NESTED = {
    "method": {"name": "mean", "options": {"layers": [1, 2, [3]], "scale": 0.5, "mask": None}},
    "counts": {"hate": 3},
    "seen": True,
}


def test_provenance_holds_any_json_data():
    pack = a_pack(provenance=NESTED)
    assert dict(pack.provenance) == NESTED
    assert pack.provenance["method"]["options"]["layers"] == [1, 2, [3]]
    assert json.loads(json.dumps(dict(pack.provenance))) == NESTED
    assert dict(a_pack(provenance={"pair": (1, "two")}).provenance) == {"pair": [1, "two"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["counts"].update(hate=4),
        lambda p: p["counts"].__setitem__("hate", 4),
        lambda p: p["counts"].__delitem__("hate"),
        lambda p: p["counts"].__ior__({"hate": 4}),
        lambda p: p["counts"].pop("hate"),
        lambda p: p["counts"].popitem(),
        lambda p: p["counts"].clear(),
        lambda p: p["counts"].setdefault("x", 1),
        *(
            lambda p, n=name, a=arguments: getattr(p["method"]["options"]["layers"], n)(*a)
            for name, arguments in {
                "append": [4],
                "extend": [[4]],
                "insert": [0, 4],
                "pop": [],
                "remove": [1],
                "clear": [],
                "sort": [],
                "reverse": [],
                "__setitem__": [0, 4],
                "__delitem__": [0],
                "__iadd__": [[4]],
                "__imul__": [2],
            }.items()
        ),
    ],
)
@pytest.mark.parametrize("duplicate", [lambda p: p, copy.deepcopy, copy.copy])
def test_provenance_is_read_only_at_any_depth(change, duplicate):
    pack = duplicate(a_pack(provenance=NESTED))
    with pytest.raises(TypeError, match="read-only"):
        change(pack.provenance)
    assert dict(pack.provenance) == NESTED


def test_later_changes_of_the_caller_s_provenance_do_not_reach_the_pack():
    mine = {"a": {"b": [1]}}
    pack = a_pack(provenance=mine)
    mine["a"]["b"].append(2)
    assert dict(pack.provenance) == {"a": {"b": [1]}}


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return {"x": value}


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ({"a": {"b": float("nan")}}, r"\['a'\]\['b'\]"),
        ({"a": [0, float("inf")]}, r"\['a'\]\[1\]"),
        ({"a": [object()]}, r"\['a'\]\[0\].*JSON"),
        ({"a": {1: 2}}, r"key of the provenance\['a'\]"),
        ({"a": {"\ud800": 2}}, "key"),
        ({"a": ["\ud800"]}, "not text"),
        ({"a": {2, 3}}, "JSON"),
        ({"a": b"x"}, "JSON"),
        ({"a": np.float32(1)}, "JSON"),
        ({"a": np.arange(3)}, "JSON"),
        (nested(16), "16 deep"),
        (nested(5000), "16 deep"),
        ([1], "not a mapping"),
        (None, "not a mapping"),
    ],
    ids=[*"abcdefghij", "17 deep", "5001 deep", "list", "None"],
)
def test_provenance_that_is_not_json_raises_with_its_place(provenance, words):
    with pytest.raises(SteeringError, match=words):
        a_pack(provenance=provenance)


def test_provenance_as_deep_as_allowed_is_kept():
    assert dict(a_pack(provenance=nested(15)).provenance) == nested(15)


def test_loading_a_pack_without_a_policy_imports_neither_pydantic_nor_yaml(tmp_path):
    path = tmp_path / "pack.gguf"
    a_pack(router=a_router("hate")).save(path)
    code = (
        "import sys; from pysteer import SteeringPack; SteeringPack.load(sys.argv[1]); "
        "print(sorted({'pydantic', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_mistyped_category_raises_with_the_nearest_name():
    pack = SteeringPack({"malware": SteeringVector({1: np.ones(4)})})
    with pytest.raises(UnknownCategoryError, match=r"'malwre'; .* did you mean 'malware'\?"):
        pack["malwre"]
    with pytest.raises(UnknownCategoryError, match=r"this pack has malware$"):
        pack["style"]
