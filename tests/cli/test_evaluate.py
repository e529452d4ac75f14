"""`pysteer evaluate`, on a tiny model."""

import json
import re

import numpy as np
import pytest
from commands import check_mistake

from pysteer import SteeringPack, SteeringVector
from pysteer.cli import run
from pysteer.evaluate.report import Report
from pysteer.journal import Journal

OPTIONS = ("--context", 512, "--threads", 1, "--parallel", 2, "-n", 6)


@pytest.fixture
def files(tmp_path):
    rows = [{"prompt": f"the cat {i}", "category": "a" if i % 2 else "b"} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text("prompt\nzzz\nand so\n")
    return tmp_path


@pytest.fixture
def evaluate(capsys, files, tiny_llama):
    """A function that runs the command and returns its exit code, standard output and error."""
    rng = np.random.default_rng(0)
    vectors = {name: SteeringVector({2: 5 * rng.normal(size=64)}) for name in "ab"}
    SteeringPack(vectors).save(files / "pack.gguf")

    def call(*arguments, benign=True):
        given = ["-m", tiny_llama, "-s", files / "pack.gguf", "--prompts", files / "p.jsonl"]
        given += ["--benign", files / "b.csv"] if benign else []
        capsys.readouterr()
        code = run(
            [str(a) for a in ("evaluate", *given, "-o", files / "out", *OPTIONS, *arguments)]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_evaluate_prints_tables_and_writes_three_files(evaluate, files):
    code, out, err = evaluate("--strengths", "0.5", "--isolation", "forced")
    assert (code, err) == (0, "")
    mode = "steering: own (each prompt's category, forced)"
    assert out.splitlines()[0].endswith(f", pack pack (2 categories), {mode}")
    for words in ("own category, forced", "safe", "degenerate", "benign:", "made safe", "strength"):
        assert words in out
    assert str(files / "out" / "report.html") in out.replace("\n", "")
    names = sorted(path.name for path in (files / "out").iterdir())
    assert names == ["answers.jsonl", "report.html", "report.json"]
    report = Report.load(files / "out" / "report.json")
    assert [row.n for row in report.categories] == [2, 2]
    assert [point.strength for point in report.curve] == [0.0, 0.5, 1.0]
    assert report.benign["steered"].unchanged.n == 2


def test_style_is_reported_in_the_words_of_its_judge(evaluate, files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "pirate.py").write_text(
        "def judge(prompt, answer): return 'q' in answer\njudge.words = ('pirate', 'plain')\n"
    )
    arguments = ("--judge", "python:pirate:judge", "--strengths", "0.5", "--isolation", "forced")
    code, out, err = evaluate(*arguments)
    assert (code, err) == (0, "")
    for words in ("pirate", "plain answers made pirate", "other: ", "degenerate: of the target"):
        assert words in out
    for word in ("safe", "harm", "benign"):
        assert word not in out.lower()


def test_wide_matrix_keeps_every_cell_whole(evaluate, files):
    names = [f"category_{i}" for i in range(24)]
    rows = [{"prompt": f"the {name}", "category": name} for name in names]
    (files / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack = SteeringPack.load(files / "pack.gguf")
    SteeringPack(dict.fromkeys(names, pack["a"])).save(files / "pack.gguf")
    code, out, _ = evaluate("--isolation", "forced", "--no-fluency", "-n", 1, benign=False)
    assert code == 0
    cells = [
        cell
        for line in out.splitlines()
        if line.startswith(" category_")
        for cell in re.findall(r"\d+/\d+(?= |$)", line)
    ]
    assert len(cells) == 24 * 24


def test_json_is_the_report_without_its_answers(evaluate, files):
    code, out, err = evaluate("--json", "--no-fluency", "--steer", "a=0.5")
    assert code == 0
    assert err.endswith(", pack pack (2 categories), steering: a 0.5\n")
    assert err.count("\n") == 1
    found = json.loads(out, parse_constant=pytest.fail)
    report = Report.load(files / "out" / "report.json").model_dump(mode="json")
    del report["prompts"]
    assert {key: found[key] for key in report} == report
    assert set(found) - set(report) == {"report", "html", "seconds"}
    assert found["overall"]["steered"]["log_likelihood"]["n"] == 0


def test_interrupt_tells_how_to_resume_and_the_command_does(evaluate, files, monkeypatch):
    whole = json.loads(evaluate("--json")[1])
    lines = (files / "out" / "answers.jsonl").read_text().splitlines()
    for path in (files / "out").iterdir():
        path.unlink()
    put = Journal.put

    def interrupt(self, key, answers):
        put(self, key, answers)
        if len(self) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "put", interrupt)
    code, out, err = evaluate("--json")
    assert (code, out) == (130, "")
    assert f"kept in {files / 'out'}; the same command resumes" in err
    assert (files / "out" / "answers.jsonl").read_text().splitlines() == lines[:2]
    monkeypatch.setattr(Journal, "put", put)
    again = json.loads(evaluate("--json")[1])
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strengths", "a"], ["--strengths a"]),
        (["--strengths", "nan"], ["--strengths nan"]),
        (["--isolation", "both"], ["--isolation 'both'", "forced"]),
        (["--isolation", "gated"], ["no router"]),
        (["--judge", "nobody"], ["--judge nobody", "refusal"]),
        (["--reward", "refusal"], ["--reward refusal"]),
        (["--steer", "auto"], ["no router", "own"]),
        (["--steer", "a=auto"], ["no router"]),
        (["--steer", "c=1"], ["unknown category"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--limit", "0"], ["--limit"]),
        (["--prompts", "/no/such/file.jsonl"], ["/no/such/file.jsonl"]),
        (["--benign", "/no/such/file.jsonl"], ["/no/such/file.jsonl"]),
        (["-m", "/no/such/model.gguf"], ["/no/such/model.gguf"]),
        (["-s", "/no/such/pack.gguf"], ["/no/such/pack.gguf"]),
        (["--policy", "/no/such/policy.yaml"], ["/no/such/policy.yaml"]),
        (["--steer", "off"], ["--steer off", "no steering to evaluate"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_user_mistake_is_one_line_and_exit_code_2(arguments, words, evaluate):
    check_mistake(evaluate(*arguments), *words)


def test_output_file_or_missing_pack_is_an_error(evaluate, files, capsys, tiny_llama):
    (files / "out").write_text("")
    check_mistake(evaluate(), files / "out", "folder")
    code = run(["evaluate", "-m", str(tiny_llama), "--prompts", "x", "-o", "y"])
    assert (code, "--pack" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_report_of_others_is_refused_before_the_answers(name, evaluate, files):
    (files / "out").mkdir()
    (files / "out" / name).write_bytes(b"<p>precious")
    check_mistake(evaluate(), name, "did not write", "--force")
    assert [path.name for path in (files / "out").iterdir()] == [name]
    assert (files / "out" / name).read_bytes() == b"<p>precious"
    assert evaluate("--force", "--isolation", "none")[0] == 0
    assert evaluate("--isolation", "none")[0] == 0  # the reports of the run before
    Report.load(files / "out" / "report.json")


def test_several_packs_are_evaluated_as_one(evaluate, files):
    SteeringVector({2: np.ones(64)}).save(files / "more.gguf")
    code, out, err = evaluate("-s", files / "more.gguf", "--isolation", "none", "--json")
    assert code == 0, err
    found = json.loads(out)["pack"]
    assert found["file"] == "pack.gguf, more.gguf"
    assert found["categories"] == ["a", "b", "more"]


def test_missing_package_is_an_error_with_its_extra(evaluate, monkeypatch):
    monkeypatch.setattr("pysteer.cli.loading.find_spec", lambda name: None)
    check_mistake(evaluate(), "pip install 'pysteer-llama[evaluate]'")
