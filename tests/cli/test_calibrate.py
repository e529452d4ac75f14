"""`pysteer calibrate`: output, users' mistakes, and Ctrl-C."""

import importlib
import json
import shlex
import subprocess
import sys

import pytest
from prompting import rows, write

from pysteer import SteeringPack
from pysteer.cli import run
from pysteer.evaluate.evaluation import evaluate
from pysteer.evaluate.judges import open_judge
from pysteer.evaluate.settings import EvaluateSettings, Sampling
from pysteer.prompts import load_prompts

OPTIONS = {
    "--methods": "mean",
    "--layers": "1,2",
    "--trials": 2,
    "--max-tokens": 4,
    "--parallel": 4,
    "--minutes": 60,
    "--max-degenerate": 1.0,
    "--threads": 1,
    "--context": 512,
}


@pytest.fixture
def calibrate(capsys, tmp_path, tiny_llama):
    """A function that runs the command and returns its exit code, standard output and error."""
    files = {
        "--model": tiny_llama,
        "--unsafe": write(
            tmp_path / "unsafe.jsonl", [*rows("harm", "hate", 18), *rows("harm", "malware", 18)]
        ),
        "--benign": write(tmp_path / "benign.jsonl", rows("please", "", 15)),
        "--output": tmp_path / "pack.gguf",
    }

    def call(*flags, **options):
        named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        pairs = {**files, **OPTIONS, **named}
        arguments = [str(part) for pair in pairs.items() for part in pair]
        capsys.readouterr()
        code = run(["calibrate", *arguments, *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_calibrate_writes_pack_picture_and_test_prompts(calibrate, tmp_path):
    code, out, err = calibrate(plot=tmp_path / "search.svg")
    assert code == 0
    pack = SteeringPack.load(tmp_path / "pack.gguf")
    assert set(pack.categories) == {"hate", "malware"}
    assert pack.router is not None
    for words in (
        "validation, the router deciding",
        "router, on held-out prompts",
        "2 trials",
        "evaluate",
    ):
        assert words in out
    assert "best after 2 trials of each category" in err
    assert "<svg" in (tmp_path / "search.svg").read_text()
    held = load_prompts(tmp_path / "pack.gguf.calibration" / "test_unsafe.jsonl")
    assert len(held) == 8
    assert {p.subcategory for p in held} == {"x", "y"}
    assert len(load_prompts(tmp_path / "pack.gguf.calibration" / "test_benign.jsonl")) == 3


def test_json_output_is_one_object_equal_to_the_provenance(calibrate, tmp_path):
    code, out, err = calibrate("--json", hold_out="subcategories", category_steps=3, trials=1)
    assert code == 0
    assert "best after 1 trial of each category" in err
    found = json.loads(out, parse_constant=pytest.fail)
    assert set(found) == {"pack", "seconds", "test", "evaluate", "router", "calibration"}
    assert found["calibration"]["settings"]["held_out"] == "subcategories"
    assert found["calibration"]["settings"]["category_steps"] == 3
    held = load_prompts(found["test"]["unsafe"])
    for name in ("hate", "malware"):
        assert len({p.subcategory for p in held if p.category == name}) == 1
    pack = SteeringPack.load(found["pack"])
    assert json.loads(json.dumps(found["calibration"])) == _plain(pack.provenance["calibration"])


def test_printed_command_measures_as_the_calibration_did(
    calibrate, tmp_path, tiny_llama, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "even.py").write_text("def judge(prompt, answer): return len(answer) % 2 == 0\n")
    judge = "python:even:judge"
    code, out, _ = calibrate(judge=judge, seed=3, output=tmp_path / "the pack.gguf")
    assert code == 0
    command = shlex.split(out.split("unseen prompts: ")[1].splitlines()[0])
    assert command[:2] == ["pysteer", "evaluate"]
    ran = subprocess.run(
        [sys.executable, "-m", "pysteer", *command[1:], "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = json.loads(ran.stdout)
    folder = tmp_path / "the pack.gguf.calibration"
    expected = evaluate(
        tiny_llama,
        tmp_path / "the pack.gguf",
        load_prompts(folder / "test_unsafe.jsonl"),
        load_prompts(folder / "test_benign.jsonl"),
        tmp_path / "again",
        settings=EvaluateSettings(Sampling(max_tokens=4, seed=3), parallel=4, context=512),
        judge=open_judge(judge),
        n_threads=1,
    )
    assert found["settings"]["judge"] == judge
    assert 0 < expected.overall["steered"].safe.k < 8  # a judge that tells answers apart
    data = json.loads(expected.model_dump_json())
    for key in ("settings", "overall", "categories", "benign"):
        assert found[key] == data[key]


def _plain(value):
    if hasattr(value, "items"):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": "magic"}, ["magic", "learned"]),
        ({"scopes": "sometimes"}, ["sometimes"]),
        ({"strengths": "2"}, ["--strengths 2", "LEAST:MOST"]),
        ({"strengths": "2:1"}, ["2.0 to 1.0"]),
        ({"hold_out": "luck"}, ["luck", "prompts, subcategories"]),
        ({"layers": "x"}, ["--layers x"]),
        ({"layers": "77"}, ["77"]),
        ({"engine": "llama", "methods": "learned"}, ["learned", "torch"]),
        ({"judge": "nobody"}, ["nobody"]),
        ({"unsafe": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"output": "nowhere/pack.gguf"}, ["nowhere"]),
        ({"plot": "picture.xyz"}, ["picture.xyz", ".png"]),
        ({"max_leak": "2"}, ["--max-leak must be at least 0 and below 1"]),
    ],
)
def test_user_mistake_is_one_line_and_exit_code_2(calibrate, options, words):
    code, out, err = calibrate(**options)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_files_of_others_are_refused_before_the_search(calibrate, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in (
        tmp_path / "pack.gguf",
        tmp_path / "trade-off.png",
        folder / "test_unsafe.jsonl",
        folder / "pack.gguf",
        folder / "validated.gguf",
    ):
        path.write_bytes(b"precious")
        code, out, err = calibrate(cache=folder, plot=tmp_path / "trade-off.png")
        assert (code, out) == (2, "")
        assert f"cannot write {path}: pysteer did not write" in err
        assert path.read_bytes() == b"precious"
        path.unlink()
        assert not any(folder.iterdir())


def test_interrupt_before_first_round_tells_how_to_resume(calibrate, tmp_path, monkeypatch):
    module = importlib.import_module("pysteer.calibrate.calibration")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "search", interrupted)
    code, out, err = calibrate()
    assert (code, out) == (130, "")
    assert "the same command resumes from there" in err.replace("\n", " ")
    assert not (tmp_path / "pack.gguf").exists()
    monkeypatch.undo()
    assert calibrate()[0] == 0
