"""The examples of the README and of docs/ run as they stand, and the picture is a real session."""

import html
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import picture
import pytest
import typer

from pysteer import SteeringPack, shipped
from pysteer.cli import app
from pysteer.prompts import grouped, load_prompts, write_prompts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line for language, text in BLOCKS if language == "console" for line in text.strip().splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the commands, with the prompt files that they read; they run in order.

    Six prompts of each of three categories are enough for all commands, and take less time.
    """
    folder = tmp_path_factory.mktemp("readme")
    data = Path(shipped.__file__).parent / "data"
    for side, name in (("unsafe", "demo_unsafe.jsonl"), ("safe", "demo_harmless.jsonl")):
        groups = list(grouped(load_prompts(data / name)).values())
        few = [prompt for rows in groups[:3] for prompt in rows[:6]]
        write_prompts(few, folder / f"{side}.jsonl")
    return folder


def run_page(name):
    """Run the python blocks of a page of docs/ in order, and return their names."""
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)
    assert blocks
    for text in blocks:
        exec(compile(text, name, "exec"), names)
    return names


def test_fresh_clone_needs_exactly_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert [line for line in COMMANDS if line.startswith("make")] == COMMANDS[:2]
    assert len(PYTHON) == 3
    assert len(COMMANDS) > 4


def test_python_examples_run_and_steer(tmp_path, monkeypatch, capsys):
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
    assert names["handles"][0].result()["steering"]["categories"]["malware"]["fired"]
    assert not names["handles"][1].result()["steering"]["tokens_steered"]
    assert capsys.readouterr().out.strip()


def test_python_examples_of_runtime_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("runtime.md")
    assert names["result"]["steering"]["categories"]["privacy_violation"]["fired"]


def test_python_examples_of_vectors_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("vectors.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack.gguf", "sea.gguf"]


def test_python_example_of_extract_page_writes_pack(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_page("extract.md")
    pack = SteeringPack.load("mine.gguf")
    assert {layer for vector in pack.categories.values() for layer in vector.layers} == {12, 15}
    assert pack.router is not None


def test_python_example_of_evaluate_page_writes_report(tmp_path, monkeypatch):
    """The example takes a prompt of each category; those of three categories are enough here."""
    monkeypatch.chdir(tmp_path)
    unsafe, harmless = shipped.demo_prompts()
    few = [prompt for rows in list(grouped(unsafe).values())[:3] for prompt in rows]
    monkeypatch.setattr(shipped, "demo_prompts", lambda: (few, harmless[:3]))
    run_page("evaluate.md")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "answers.jsonl",
        "report.html",
        "report.json",
    ]


def test_no_page_has_python_that_no_test_runs():
    pages = {path.name for path in DOCS.glob("*.md") if "```python" in path.read_text("utf-8")}
    elsewhere = {"policy.md"}  # tests/pack/test_policy.py
    assert pages - elsewhere == {"runtime.md", "vectors.md", "extract.md", "evaluate.md"}


PROGRESS = re.compile(r".+: \d+ of \d+.*, \d+ s")
FEW_PROMPTS = (
    "warning: fewer than 20 prompts in 'malware' (6), 'fraud_deception' (6), "
    "'hate_harass_violence' (6): a router learns their style rather than the category; add prompts"
)


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("pysteer")])
def test_commands_succeed(folder, command):
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
    beside = [line for line in result.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    if arguments[0] == "generate":
        assert beside.pop(0).startswith("SmolLM2-135M-Instruct")
        assert beside == ([] if "--steer" in arguments else ["the router found: malware"])
    elif arguments[0] == "extract":  # of 8 prompts a category, and perhaps beside other programs
        assert [line for line in beside if "other programs" not in line] == [FEW_PROMPTS]
    else:
        assert not beside
    assert result.stdout.strip()


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(((?!http)[^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.is_file(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
            assert not anchor or anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_paths_in_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`(pysteer(?:\.\w+)+)", text):
        if name.endswith((".gguf", ".jsonl", ".py")):
            continue
        parts = name.split(".")
        known = next(n for n in range(len(parts), 0, -1) if importable(".".join(parts[:n])))
        value = importlib.import_module(".".join(parts[:known]))
        for part in parts[known:]:
            value = getattr(value, part)
    for path in re.findall(r"[`( ]((?:pysteer|csrc|tools|tests|docs)/[\w./]*\w/?)", text):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: {path}"


def importable(name):
    """Return True if a module of this name exists."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not a package
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_in_pages_exist(page):
    commands = typer.main.get_command(app).commands.values()
    known = {name for c in commands for p in c.params for name in (*p.opts, *p.secondary_opts)}
    known |= {"--control-vector"}  # of llama-cli
    known |= {"--extra-index-url", "--no-cache-dir", "--only-binary"}  # of pip
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py"))
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text(encoding="utf-8")):
        assert option in known or option in sources, f"{page.name}: {option}"


def test_picture_is_small_and_shows_the_commands_that_its_tool_runs(tmp_path):
    def commands(path):
        bold = re.findall(r'<text class="s-r2"[^>]*>([^<]*)', path.read_text(encoding="utf-8"))
        return " ".join(html.unescape(text).replace("\N{NO-BREAK SPACE}", " ") for text in bold)

    shown = DOCS / "picture.svg"
    assert "](docs/picture.svg)" in README
    assert shown.stat().st_size < 60_000
    assert "url(http" not in shown.read_text(encoding="utf-8")
    picture.main(tmp_path / "picture.svg")
    assert "pysteer generate" in commands(shown)
    assert commands(shown) == commands(tmp_path / "picture.svg")
