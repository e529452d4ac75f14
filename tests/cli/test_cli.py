"""The command line: results on standard output, users' mistakes as one line and exit code 2."""

import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from commands import check_mistake, strict_json
from packs import HATE, MALWARE, N_EMBD, OPTIONS

from pysteer import (
    FormatError,
    SteeringError,
    SteeringPack,
    SteeringVector,
)
from pysteer.cli import run

# ---- inspect ---------------------------------------------------------------------------------


def test_inspect_json_equals_the_pack(cli, pack_file):
    code, out, err = cli("inspect", pack_file, "--json")
    assert (code, err) == (0, "")
    found = strict_json(out)
    norms = {}
    for name, vector in (("hate", HATE), ("mal=ware", MALWARE)):
        norms[name] = found["categories"][name].pop("norms")
        assert norms[name].keys() == {str(layer) for layer in vector.layers}
        for layer, row in vector.items():
            expected = sum(float(x) ** 2 for x in row) ** 0.5
            assert norms[name][str(layer)] == pytest.approx(expected, rel=1e-5)
    assert found == {
        "file": str(pack_file),
        "base_model": {
            "architecture": "llama",
            "name": "Tiny",
            "n_layer": 4,
            "n_embd": 64,
            "n_vocab": 320,
        },
        "n_embd": 64,
        "categories": {
            "hate": {"site": "residual", "layers": [1, 2, 3]},
            "mal=ware": {"site": "attention", "layers": [0, 2]},
        },
        "residual_norm": {"1": 4.0, "2": 8.0},
        "provenance": {"method": "mean difference", "n": 12},
    }


def test_inspect_names_the_category_of_a_control_vector_after_the_file(cli, tmp_path):
    HATE.save(tmp_path / "kind.gguf")
    code, out, _ = cli("inspect", tmp_path / "kind.gguf", "--json")
    found = strict_json(out)
    assert code == 0
    assert list(found["categories"]) == ["kind"]
    assert found["categories"]["kind"]["layers"] == [1, 2, 3]
    assert (found["base_model"], found["residual_norm"], found["provenance"]) == (None, {}, {})


def test_inspect_prints_the_content_of_the_pack(cli, pack_file):
    code, out, err = cli("inspect", pack_file)
    assert (code, err) == (0, "")
    for word in ("hate", "mal=ware", "residual", "attention", "1-3", "0, 2", "Tiny", "320 tokens"):
        assert word in out
    assert "mean difference" in out
    relative = [
        float(np.linalg.norm(HATE.direction(layer))) / norm for layer, norm in [(1, 4), (2, 8)]
    ]
    assert f"{min(relative):.3g} to {max(relative):.3g}" in out


@pytest.mark.parametrize(
    "text", ["[bold]red[/]", "a [/] b", ":100:", "long " * 40 + "end"], ids=lambda text: text[:9]
)
def test_inspect_prints_provenance_verbatim(text, cli, tmp_path):
    SteeringPack({"a": HATE}, provenance={"data": text}).save(tmp_path / "p.gguf")
    code, out, _ = cli("inspect", tmp_path / "p.gguf", "--verbose")
    assert code == 0
    assert f"data: {text}\n" in out


def test_inspect_json_is_valid_for_huge_directions(cli, tmp_path):
    SteeringVector({1: np.full(N_EMBD, 3e38)}).save(tmp_path / "v.gguf")
    code, out, err = cli("inspect", tmp_path / "v.gguf", "--json")
    assert (code, err) == (0, "")
    norm = strict_json(out)["categories"]["v"]["norms"]["1"]
    assert norm == pytest.approx(3e38 * 8, rel=1e-6)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a pack"], ids=repr)
def test_inspect_of_another_file_is_an_error_with_its_name(content, cli, tmp_path):
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    check_mistake(cli("inspect", path), path)
    check_mistake(cli("inspect", path, "--json"), path)


def test_inspect_of_a_model_or_folder_is_an_error(cli, tmp_path, tiny_llama):
    check_mistake(cli("inspect", tiny_llama), tiny_llama, "llama")
    check_mistake(cli("inspect", tmp_path), tmp_path)


def test_inspect_of_a_name_with_a_newline_prints_one_line(cli, tmp_path):
    check_mistake(cli("inspect", tmp_path / "a\nb"))


# ---- the whole -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["--nonsense"], ["generate"], ["inspect", "--x"]]
)
def test_usage_error_points_to_the_help(arguments, cli):
    check_mistake(cli(*arguments), "--help")


COMMANDS = (
    "demo",
    "extract",
    "calibrate",
    "generate",
    "chat",
    "evaluate",
    "inspect",
    "compare",
    "doctor",
)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(arguments, cli):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    for command in COMMANDS:
        assert command in out
    assert "..." not in out.partition("Commands:")[2]  # no line is cut


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_json_and_debug(command, flag, cli):
    code, out, err = cli(command, flag)
    assert (code, err) == (0, "")
    assert "--json" in out
    assert "--debug" in out


def test_version_is_that_of_the_package(cli):
    assert cli("--version") == (0, f"pysteer {version('pysteer-llama')}\n", "")


def test_debug_raises_exceptions_of_one_run_only(cli, tmp_path):
    with pytest.raises(FormatError):
        run(["inspect", str(tmp_path), "--debug"])
    with pytest.raises(SteeringError):
        run(["generate", "--debug", "-p", "hi", "--steer", "a=1"])
    check_mistake(cli("inspect", tmp_path))


def test_debug_is_off_for_a_following_unknown_command(cli, tmp_path):
    with pytest.raises(FormatError):
        run(["inspect", str(tmp_path), "--debug"])
    check_mistake(cli("nonsense"))


def test_bug_is_one_line_and_exit_code_1(cli, tmp_path, monkeypatch):
    def fail(path):
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(SteeringPack, "load", fail)
    code, out, err = cli("inspect", tmp_path)
    assert (code, out) == (1, "")
    assert err == "pysteer: RuntimeError: broken in two lines (--debug shows where)\n"


def test_interrupt_is_exit_code_130(cli, tmp_path, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(SteeringPack, "load", interrupt)
    assert cli("inspect", tmp_path) == (130, "", "pysteer: interrupted\n")


@pytest.mark.parametrize("error", [EOFError("cut"), TypeError("not a number")], ids=repr)
def test_error_of_a_command_is_not_taken_for_an_interrupt(error, cli, tmp_path, monkeypatch):
    def fail(path):
        raise error

    monkeypatch.setattr(SteeringPack, "load", fail)
    code, out, err = cli("inspect", tmp_path)
    assert (code, out) == (1, "")
    assert err == f"pysteer: {type(error).__name__}: {error} (--debug shows where)\n"


def test_doctor_of_another_file_is_an_error(cli, tmp_path, pack_file):
    for wrong in (tmp_path / "missing.gguf", pack_file):
        check_mistake(cli("doctor", "-m", wrong), wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--category", "fraud"], ["fraud"]), (["--prompts", "0"], ["--prompts"])],
)
def test_bad_argument_of_demo_is_an_error(arguments, words, cli):
    check_mistake(cli("demo", *arguments), *words)


# ---- as a process ----------------------------------------------------------------------------


def test_python_m_pysteer_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "pysteer", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pysteer ")


def test_help_loads_no_heavy_package():
    heavy = ("llama_cpp", "torch", "sklearn", "scipy", "optuna", "jinja2", "prompt_toolkit")
    code = (
        "import sys; from pysteer.cli import run; run(['extract', '--help']); "
        f"sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "pysteer", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        **options,
    )


def test_process_with_a_missing_file_exits_with_2(tmp_path, tiny_llama):
    missing = tmp_path / "missing.gguf"
    done = process("generate", "-m", tiny_llama, "-p", "hi", "-s", missing, *OPTIONS)
    check_mistake((done.returncode, done.stdout, done.stderr), missing)


def test_process_reads_standard_input_and_prints_json_alone(tiny_llama):
    done = process(
        "generate", "-m", tiny_llama, "-p", "-", "-n", 4, "--json", *OPTIONS, input="the cat ü"
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert strict_json(done.stdout)["prompt"] == "the cat ü"


def test_process_with_debug_shows_the_traceback(tmp_path):
    done = process("inspect", tmp_path / "missing.gguf", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "FormatError" in done.stderr


def test_json_is_complete_on_a_terminal_without_utf8(tmp_path, pack_file):
    # A terminal that is not UTF-8.
    SteeringPack({"hass-über-χ": HATE}).save(tmp_path / "p.gguf")
    code = (
        "import sys; sys.stdout.reconfigure(encoding='ascii'); from pysteer.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "p.gguf"), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(strict_json(done.stdout)["categories"]) == ["hass-über-χ"]
