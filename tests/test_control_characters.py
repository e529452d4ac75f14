"""Text out of files reaches no terminal with control characters in it."""

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from commands import check_mistake
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from pysteer import FormatError, SteeringError, SteeringPack, SteeringVector
from pysteer.cli import run
from pysteer.cli.console import plain
from pysteer.errors import UnknownCategoryError, has_control, printable
from pysteer.extract.sides import split_sides
from pysteer.pack.pack import BaseModel
from pysteer.pack.policy_error import PolicyError
from pysteer.prompts import Prompt

ATTACK = "\x1b]0;owned\x07\x1b[2J\u202egpj"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
VECTOR = SteeringVector({1: np.ones(64)})


@given(st.text())
def test_printable_text_has_no_control_characters(text):
    found = printable(text)
    assert not CONTROL.search(found)
    found.encode("utf-8")
    assert printable(found) == found
    assert not CONTROL.search(printable(text, "?"))
    if not has_control(text):
        assert found == text


@pytest.mark.parametrize("text", ["a\nb\tc", "für 日本 👩\u200d💻 \u0646\u200c\u062e", "a\\x1bb"])
def test_ordinary_text_stays(text):
    assert printable(text) == text


def test_text_of_a_file_is_shown_with_a_mark_for_each_control_character():
    assert plain("[b] 👩\u200d💻\n\x1b[2J\u202e") == "\\[b] 👩\u200d💻\n�[2J�"


@pytest.mark.parametrize("kind", [SteeringError, FormatError, UnknownCategoryError])
def test_message_of_an_error_is_printable(kind):
    error = kind(f"no category {ATTACK}")
    assert str(error) == r"no category \x1b]0;owned\x07\x1b[2J\u202egpj"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert not CONTROL.search(str(PolicyError(("a",), ATTACK)))


@pytest.mark.parametrize(
    "name", [ATTACK, "a\nb", "a\x00", "\x9b2J", "a\u2066b", "a\ud800", "a\u2028b"]
)
def test_category_name_with_control_characters_is_refused(name):
    with pytest.raises(SteeringError) as caught:
        SteeringPack({name: VECTOR})
    assert not CONTROL.search(str(caught.value))
    with pytest.raises(SteeringError, match=r"p\.jsonl, line 1: .*control characters"):
        split_sides(
            [Prompt("a", name, source="p.jsonl, line 1")],
            [Prompt("b")],
            matched=None,
            paired=False,
            held_out=0,
            seed=0,
        )


@pytest.mark.parametrize("name", ["für 日本", "👩\u200d💻", "\u0646\u200c\u062e", "a b", "x" * 300])
def test_category_name_in_any_script_is_kept(name, tmp_path):
    SteeringPack({name: VECTOR}).save(tmp_path / "p.gguf")
    assert list(SteeringPack.load(tmp_path / "p.gguf").categories) == [name]


def test_control_vector_whose_file_name_has_control_characters_is_refused(tmp_path):
    path = tmp_path / f"{ATTACK}.gguf".replace("/", "")
    VECTOR.save(path)
    with pytest.raises(FormatError, match="rename") as caught:
        SteeringPack.load(path)
    assert not CONTROL.search(str(caught.value))


def hostile_pack(path, category):
    writer = GGUFWriter(path, "pysteer")
    writer.add_uint32("pysteer.format_version", 1)
    writer.add_array("pysteer.categories", [category])
    writer.add_array("pysteer.sites", ["residual"])
    writer.add_tensor("category.0.direction.1", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def printed(capsys):
    """A function that runs a command, and checks its output for control characters."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert not CONTROL.search(captured.out), captured.out
        assert not CONTROL.search(captured.err), captured.err
        return code, captured.out, captured.err

    return call


def test_pack_with_control_characters_in_a_name_is_a_mistake(printed, tmp_path, tiny_llama):
    path = hostile_pack(tmp_path / "p.gguf", ATTACK)
    for command in (
        ["inspect", path],
        ["compare", path, path],
        ["generate", "-m", tiny_llama, "-s", path, "-p", "x", "--steer", "a=1"],
        ["chat", "-m", tiny_llama, "-s", path],
    ):
        check_mistake(printed(*command), "control characters", r"\x1b")


def test_model_name_provenance_and_paths_are_printed_plainly(printed, tmp_path, tiny_llama):
    model = BaseModel("llama", ATTACK, 4, 64, 320)
    provenance = {ATTACK: [ATTACK, {"x": ATTACK}]}
    pack = SteeringPack({"a": VECTOR}, base_model=model, provenance=provenance)
    folder = tmp_path / ATTACK.replace("/", "")
    folder.mkdir()
    path = folder / f"{ATTACK}.gguf"
    pack.save(path)
    assert printed("inspect", path)[0] == 0
    assert printed("compare", path, path)[0] == 0
    other = tmp_path / "other.gguf"
    replace(pack, base_model=replace(model, n_vocab=999)).save(other)
    generate = ["generate", "-m", tiny_llama, "-p", "x", "-t", 1, "--context", 64, "--steer", "a=1"]
    check_mistake(printed(*generate, "-s", other), "n_vocab 999")
    check_mistake(printed(*generate, "-s", path, "--steer", f"{ATTACK}=1"), "unknown category")
    check_mistake(printed("inspect", folder / f"{ATTACK}.npz"), "npz")
    (folder / "p.jsonl").write_text('{"prompt": 1}')
    check_mistake(printed("evaluate", "-s", path, "--prompts", folder / "p.jsonl", "-o", folder))
    assert printed(ATTACK)[0] == 2
