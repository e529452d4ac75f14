"""`pysteer compare`: tables and JSON."""

import json
from functools import partial

import numpy as np
import pytest

from pysteer import SteeringPack, SteeringVector

WIDTH = 8


def vector(seed, layers=(1, 2, 3), **site):
    rng = np.random.default_rng(seed)
    return SteeringVector({layer: rng.normal(size=WIDTH) for layer in layers}, **site)


@pytest.fixture
def cli(cli):
    """A function that runs `compare` and returns its exit code, standard output and error."""
    return partial(cli, "compare")


@pytest.fixture
def packs(tmp_path):
    """Two packs that share two categories."""
    paths = tmp_path / "one.gguf", tmp_path / "two.gguf"
    SteeringPack({"hate": vector(1), "malware": vector(2), "x": vector(3)}).save(paths[0])
    SteeringPack({"malware": -2 * vector(2), "hate": vector(4, layers=(2, 3, 5))}).save(paths[1])
    return paths


def test_json_has_cosine_and_norm_ratio_for_each_category_and_layer(cli, packs):
    code, out, err = cli(*packs, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["first"], found["second"]) == tuple(map(str, packs))
    assert (found["only_in_first"], found["only_in_second"]) == (["x"], [])
    assert list(found["categories"]) == ["hate", "malware"]
    malware = found["categories"]["malware"]
    assert malware["layers"].keys() == {"1", "2", "3"}
    for pair in malware["layers"].values():
        assert pair == {"cosine": pytest.approx(-1), "norm_ratio": pytest.approx(2)}
    hate = found["categories"]["hate"]
    assert (hate["only_in_first"], hate["only_in_second"]) == ([1], [5])
    for layer in (2, 3):
        a, b = vector(1).direction(layer), vector(4, layers=(2, 3, 5)).direction(layer)
        lengths = np.linalg.norm(a), np.linalg.norm(b)
        assert hate["layers"][str(layer)] == {
            "cosine": pytest.approx(float(a @ b / lengths[0] / lengths[1]), rel=1e-5),
            "norm_ratio": pytest.approx(float(lengths[1] / lengths[0]), rel=1e-5),
        }


def test_table_has_the_figures_of_the_json(cli, packs):
    code, out, err = cli(*packs)
    assert (code, err) == (0, "")
    for path in packs:
        assert str(path) in out
    for word in ("hate", "malware", "-1.0000", "1-3", "2-3", "only in the first: x"):
        assert word in out
    assert "hate: layers only in the first: 1\n" in out
    assert "hate: layers only in the second: 5\n" in out
    a, b = vector(1).direction(3), vector(4, layers=(2, 3, 5)).direction(3)
    assert f"{a @ b / np.linalg.norm(a) / np.linalg.norm(b):.4f}" in out
    assert max(map(len, out.splitlines())) <= max(80, *(len(f"second: {p}") for p in packs))


def test_control_vectors_are_matched_whatever_their_names(cli, tmp_path):
    vector(1).save(tmp_path / "a[b].gguf")
    (2 * vector(1)).save(tmp_path / "c.gguf")
    code, out, err = cli(tmp_path / "a[b].gguf", tmp_path / "c.gguf")
    assert (code, err) == (0, "")
    assert "a[b] / c" in out
    code, out, _ = cli(tmp_path / "a[b].gguf", tmp_path / "c.gguf", "--json")
    category = json.loads(out)["categories"]["a[b]"]
    assert category["category_in_second"] == "c"
    assert category["layers"]["2"]["norm_ratio"] == pytest.approx(2)


def test_control_vector_is_compared_with_a_pack(cli, tmp_path):
    vector(1).save(tmp_path / "hate.gguf")
    SteeringPack({"hate": vector(1), "x": vector(2)}).save(tmp_path / "pack.gguf")
    code, out, _ = cli(tmp_path / "hate.gguf", tmp_path / "pack.gguf", "--json")
    assert code == 0
    assert json.loads(out)["categories"]["hate"]["layers"]["1"]["cosine"] == pytest.approx(1)


def test_cosine_of_a_zero_direction_is_null(cli, tmp_path):
    (0 * vector(1)).save(tmp_path / "a.gguf")
    vector(1).save(tmp_path / "b.gguf")
    code, out, _ = cli(tmp_path / "a.gguf", tmp_path / "b.gguf", "--json")
    assert code == 0
    pair = json.loads(out)["categories"]["a"]["layers"]["1"]
    assert pair == {"cosine": None, "norm_ratio": None}
    code, out, err = cli(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_user_mistake_is_one_line_and_exit_code_2(cli, tmp_path, packs, json_too):
    vector(1).save(tmp_path / "v.gguf")
    wide = SteeringVector({1: np.ones(WIDTH + 1)})
    SteeringPack({"hate": wide}).save(tmp_path / "wide.gguf")
    SteeringPack({"hate": vector(1, site="attention")}).save(tmp_path / "site.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"no")
    for arguments, words in [
        ([packs[0]], "second"),
        ([packs[0], tmp_path / "missing.gguf"], "missing.gguf"),
        ([tmp_path / "bad.gguf", packs[0]], "bad.gguf"),
        ([packs[0], tmp_path / "v.gguf"], "no category in common"),
        ([packs[0], tmp_path / "wide.gguf"], "width"),
        ([packs[0], tmp_path / "site.gguf"], "attention"),
    ]:
        code, out, err = cli(*arguments, *json_too)
        assert (code, out) == (2, ""), arguments
        assert len(err.splitlines()) == 1
        assert words in err.lower()


def test_help_lists_json_and_debug(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    assert "--json" in out
    assert "--debug" in out
