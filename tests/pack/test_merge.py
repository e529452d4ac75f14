"""Several packs as one."""

import ctypes
from contextlib import closing
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
from chats import towards
from commands import check_mistake, strict_json

from pysteer import Engine, ModelMismatchError, SteeredLlama, SteeringError, SteeringPack
from pysteer.cli import run
from pysteer.pack.merge import read_packs
from pysteer.pack.operators import Operator
from pysteer.pack.pack import BaseModel
from pysteer.pack.policy import Policy
from pysteer.pack.router import Gate, Read, Router
from pysteer.pack.vector import SteeringVector

WIDTH = 8
MODEL = BaseModel("llama", "Tiny", 4, WIDTH, 320)


def vector(value, **options):
    return SteeringVector({1: np.full(WIDTH, value)}, **options)


def a_router(*categories):
    k = len(categories)
    half = np.full(k, 0.5)
    return Router(
        site="residual",
        reads=[Read(2, "last")],
        categories=categories,
        gates={"multinomial": Gate(half, half > 0, half, half, half)},
        confusion=np.eye(k + 1, dtype=int),
        threshold_rule="youden",
        train_counts=[9] * (k + 1),
        weight=np.ones((k + 1, WIDTH)),
        bias=np.zeros(k + 1),
    )


ROUTED = SteeringPack(
    {"hate": vector(1), "malware": vector(2, site="mlp")},
    base_model=MODEL,
    residual_norm={1: 2.0, 2: 3.0},
    provenance={"method": "mean"},
    router=a_router("hate"),
    policy=Policy(conflict="first"),
)


def test_merged_pack_has_the_categories_of_all_in_order():
    more = SteeringPack(
        {"calm": vector(3, operator=Operator("ablate"))},
        base_model=replace(MODEL, name="Tiny, tuned"),
        residual_norm={1: 1.5, 3: 4.0},
    )
    merged = read_packs([ROUTED, more])
    assert dict(merged.categories) == {**ROUTED.categories, **more.categories}
    assert list(merged.categories) == ["hate", "malware", "calm"]
    assert merged.base_model == MODEL
    assert dict(merged.residual_norm) == {1: 1.5, 2: 3.0, 3: 4.0}
    assert merged.router == ROUTED.router
    assert merged.policy == ROUTED.policy
    assert merged.provenance == {
        "method": "merged",
        "packs": [
            {"categories": ["hate", "malware"], "provenance": {"method": "mean"}},
            {"categories": ["calm"], "provenance": {}},
        ],
    }
    assert dict(read_packs([more, ROUTED]).residual_norm) == dict(merged.residual_norm)


def test_single_pack_stays_as_given(tmp_path):
    assert read_packs([ROUTED]) is ROUTED
    ROUTED.save(tmp_path / "p.gguf")
    assert read_packs([tmp_path / "p.gguf"]) == ROUTED
    assert read_packs([str(tmp_path / "p.gguf")]) == ROUTED


def test_control_vectors_are_categories_by_their_files(tmp_path):
    for name in ("calm", "formal"):
        vector(1).save(tmp_path / f"{name}.gguf")
    merged = read_packs([tmp_path / "calm.gguf", ROUTED, tmp_path / "formal.gguf"])
    assert list(merged.categories) == ["calm", "hate", "malware", "formal"]
    assert merged.base_model == MODEL


def test_category_of_two_packs_raises_with_both(tmp_path):
    (tmp_path / "other").mkdir()
    files = [tmp_path / "calm.gguf", tmp_path / "other" / "calm.gguf"]
    for file in files:
        vector(1).save(file)
    with pytest.raises(SteeringError, match=r"'calm'.*rename") as caught:
        read_packs(files)
    for file in files:
        assert str(file) in str(caught.value)
    with pytest.raises(SteeringError, match="'hate' is in pack 1 and in pack 2"):
        read_packs([ROUTED, SteeringPack({"hate": vector(1)})])
    with pytest.raises(SteeringError, match="'calm'"):
        read_packs([files[0], files[0]])


@pytest.mark.parametrize("what", ["router", "policy"])
def test_two_packs_that_decide_raise_with_both(what):
    other = SteeringPack(
        {"calm": vector(1)},
        router=a_router("calm") if what == "router" else None,
        policy=Policy() if what == "policy" else None,
    )
    with pytest.raises(SteeringError, match=f"pack 1 and pack 3 each have a {what}"):
        read_packs([ROUTED, SteeringPack({"x": vector(1)}), other])


@pytest.mark.parametrize(
    ("what", "value"), [("architecture", "gemma"), ("n_layer", 5), ("n_vocab", 321)]
)
def test_packs_of_different_models_raise(what, value):
    other = SteeringPack({"calm": vector(1)}, base_model=replace(MODEL, **{what: value}))
    with pytest.raises(ModelMismatchError, match=f"{what}.*packs of one model"):
        read_packs([ROUTED, other])


def test_packs_of_different_widths_raise():
    with pytest.raises(SteeringError, match="width"):
        read_packs([ROUTED, SteeringPack({"calm": SteeringVector({1: np.ones(WIDTH + 1)})})])


def test_packs_that_do_not_fit_the_model_of_another_raise():
    deep = SteeringPack({"calm": SteeringVector({9: np.ones(WIDTH)})})
    with pytest.raises(ModelMismatchError, match="layer 9"):
        read_packs([ROUTED, deep])


@pytest.mark.parametrize("packs", [[], [None], [3], [ROUTED, b"x"], [[ROUTED]]])
def test_list_of_other_things_raises(packs):
    with pytest.raises(SteeringError):
        read_packs(packs)


# ---- in a model ------------------------------------------------------------------------------

QUIET = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
ARGUMENTS = {"logits_all": True, **QUIET}
GREEDY = {"max_tokens": 12, "temperature": 0.0}


def logits_of(llm):
    llm.reset()
    llm.eval([10, 70, 80])
    return llm.scores[:3].copy()


@pytest.fixture(scope="module")
def two_files(tiny_llama, tmp_path_factory):
    """Files of two control vectors, and the answer and logits of llama.cpp with both."""
    folder = tmp_path_factory.mktemp("vectors")
    # Towards letters, so that the answers are text.
    rows = {2: towards("Q", tiny_llama), 3: towards("Z", tiny_llama)}
    files = [folder / "one.gguf", folder / "two.gguf"]
    for file, (layer, row) in zip(files, rows.items(), strict=True):
        SteeringVector({layer: row}).save(file)
    with closing(llama_cpp.Llama(str(tiny_llama), **ARGUMENTS)) as llm:
        plain = llm.create_completion("the cat", **GREEDY)["choices"][0]["text"]
    with closing(llama_cpp.Llama(str(tiny_llama), **ARGUMENTS)) as llm:
        buffer = np.zeros((3, 64), np.float32)
        for layer, row in rows.items():
            buffer[layer - 1] = row
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(llm.ctx, pointer, buffer.size, 64, 1, 3) == 0
        both = llm.create_completion("the cat", **GREEDY)["choices"][0]["text"]
        logits = logits_of(llm)
    assert set(both) <= {"Q", "Z"}
    assert both != plain
    return files, both, logits


def test_two_packs_steer_as_two_control_vectors_of_llama_cpp(tiny_llama, two_files):
    files, expected, logits = two_files
    steering = {"one": 1.0, "two": 1.0}
    with closing(SteeredLlama(tiny_llama, pack=files, **ARGUMENTS)) as llm:
        assert list(llm.pack.categories) == ["one", "two"]
        found = llm.create_completion("the cat", steering=steering, **GREEDY)
        assert found["choices"][0]["text"] == expected
        with llm.steering(steering):
            assert np.array_equal(logits_of(llm), logits)
    with Engine(tiny_llama, pack=tuple(files), max_sequences=2, **QUIET) as engine:
        handle = engine.submit(prompt="the cat", steering=steering, **GREEDY)
        assert handle.result()["choices"][0]["text"] == expected


def test_repeated_option_merges(tiny_llama, two_files, capsys):
    files, expected, _ = two_files
    command = ["generate", "-m", tiny_llama, "--raw", "-p", "the cat", "-n", 12, "--json"]
    command += ["--context", 128, "-t", 1, "--steer", "one=1", "--steer", "two=1"]
    for file in files:
        command += ["-s", file]
    assert run([str(part) for part in command]) == 0
    found = strict_json(capsys.readouterr().out)
    assert found["text"] == expected
    assert found["packs"] == [str(file) for file in files]


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_category_of_two_files_is_a_mistake(command, tiny_llama, two_files, tmp_path, capsys):
    files, *_ = two_files
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "category": "b"}')
    options = {
        "generate": ["-p", "x", "--steer", "one=1"],
        "chat": [],
        "evaluate": ["--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "out"],
    }[command]
    twice = ["-s", files[0], "-s", files[0]]
    code = run([str(part) for part in [command, "-m", tiny_llama, *options, *twice]])
    captured = capsys.readouterr()
    check_mistake((code, captured.out, captured.err), "'one' is in", "give one of the two")
