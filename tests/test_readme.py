"""The README's examples, and those of the documentation, run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pysteer import SteeringPack, shipped
from pysteer.prompts import grouped, load_prompts, write_prompts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line for language, text in BLOCKS if language == "console" for line in text.strip().splitlines()
]


def test_there_are_exactly_two_commands_for_a_fresh_clone():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert [line for line in COMMANDS if line.startswith("make")] == COMMANDS[:2]
    assert len(PYTHON) == 3
    assert len(COMMANDS) > 4


def test_python_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for text in PYTHON:
        exec(compile(text, "README.md", "exec"), names)
    without = names["answer"]["choices"][0]["message"]["content"]
    steered = names["refusal"]["choices"][0]["message"]["content"]
    assert without
    assert steered != without
    assert names["routed"]["steering"]["categories"]["privacy_violation"]["fired"]
    assert names["routed"]["choices"][0]["message"]["content"] == steered
    assert all(handle.done for handle in names["handles"])
    assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run, one after the other: with the two prompt files that some ask for.

    Eight prompts of each of four categories, which are enough for all of them, and take less time.
    """
    folder = tmp_path_factory.mktemp("readme")
    data = Path(shipped.__file__).parent / "data"
    for side, name in (("unsafe", "demo_unsafe.jsonl"), ("safe", "demo_harmless.jsonl")):
        groups = list(grouped(load_prompts(data / name)).values())
        few = [prompt for rows in groups[:4] for prompt in rows[:8]]
        write_prompts(few, folder / f"{side}.jsonl")
    return folder


def test_the_python_example_of_the_runtimes_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "runtime.md", "exec"), {})


def test_the_python_example_of_the_documentation(folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = (ROOT / "docs" / "extract.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "extract.md", "exec"), {})
    pack = SteeringPack.load("mine.gguf")
    assert {layer for vector in pack.categories.values() for layer in vector.layers} == {12, 15}
    assert pack.router is not None


def test_the_python_example_of_evaluations_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "evaluate.md", "exec"), {})
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "answers.jsonl",
        "report.html",
        "report.json",
    ]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("pysteer")])
def test_commands(folder, command):
    program, *arguments = shlex.split(command)
    path = Path(sys.executable).with_name(program)
    result = subprocess.run(
        [path, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert result.returncode == 0, result.stderr
    routed = "--steer auto" in command
    assert result.stderr == ("the router found: malware\n" if routed else "")
    assert result.stdout.strip()
