"""Commands as processes: in any locale, with closed streams, and interrupted at any moment."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import strict_json

import pysteer
from pysteer.cli import streams

DATA = Path(pysteer.__file__).parent / "data"
SHIPPED, UNSAFE = DATA / "default.gguf", DATA / "demo_unsafe.jsonl"
FULL = Path("/dev/full")
LOCALES = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def started(*arguments, flags=(), **options):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    env |= options.pop("env", {})

    def heed_interrupts():  # which a shell's background jobs ignore, with all their children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *flags, "-m", "pysteer", *map(str, arguments)],
        env=env,
        preexec_fn=heed_interrupts,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def finished(*arguments, text=b"", **options):
    child = started(*arguments, stdin=subprocess.PIPE, **options)
    out, err = child.communicate(text, timeout=120)
    return child.returncode, out, err


# ---- encodings -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": "the cat → 😀", "category": "malware"}, {"prompt": "on", "category": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments_of(command, model, prompts, folder):
    tiny = ("-m", model, "-t", 1)
    return {
        "demo": ("--prompts", 1, "--category", "malware", "-n", 6, "-t", 1),
        "generate": (*tiny, "-p", "the cat", "-n", 60, "--context", 256),
        "chat": (*tiny, "-n", 20, "--context", 256),
        "evaluate": (
            *("--prompts", prompts, "-o", folder / "report", "-n", 4, "-t", 1, "--parallel", 1),
            *("--no-fluency", "--isolation", "none"),
        ),
        "inspect": (SHIPPED,),
        "compare": (SHIPPED, SHIPPED),
        "doctor": tiny,
    }[command]


COMMANDS = ("demo", "generate", "chat", "evaluate", "inspect", "compare", "doctor")


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_printed_ends_a_command_in_any_locale(
    command, locale, tiny_llama, prompt_file, tmp_path
):
    arguments = arguments_of(command, tiny_llama, prompt_file, tmp_path)
    talk = "the cat → 😀\n/help\n/nonsense\n".encode()
    code, out, err = finished(command, *arguments, text=talk, env=LOCALES[locale])
    assert code == 0, err
    assert out
    assert b"Traceback" not in err
    assert b"pysteer: " not in err
    assert (out + err).decode("cp1252" if locale == "cp1252" else "ascii")


@pytest.mark.parametrize(
    ("locale", "expected"),
    [
        ("C", rb"a -> b ? ... 'c' \xe9 \U0001f600 - \udcff"),
        ("cp1252", b"a -> b ? \x85 \x91c\x92 \xe9 \\U0001f600 \x97 \\udcff"),
    ],
)
def test_characters_that_the_encoding_lacks_are_spelled(locale, expected):
    code = (
        "from pysteer.cli import streams; streams.prepare(); import sys; "
        "text = 'a \\u2192 b \\ufffd \\u2026 \\u2018c\\u2019 \\xe9 \\U0001f600 \\u2014 \\udcff'; "
        "print(text); print(text, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | LOCALES[locale],
        capture_output=True,
        timeout=60,
    )
    assert [done.stdout, done.stderr] == [expected + b"\n"] * 2


@pytest.mark.parametrize("locale", LOCALES)
def test_text_of_the_user_is_utf8_in_any_locale(locale, tiny_llama):
    text = "the cat → 😀 ü"
    common = ("-m", tiny_llama, "-t", 1, "-n", 2, "--context", 256, "--json")
    options = {"env": LOCALES[locale]}
    _, piped, _ = finished("generate", *common, "-p", "-", text=text.encode(), **options)
    _, given, _ = finished("generate", *common, "-p", text, **options)
    _, said, _ = finished("chat", *common, text=text.encode(), **options)
    assert [strict_json(out)["prompt"] for out in (piped, given, said)] == [text] * 3


def test_piped_text_in_the_locale_is_read_by_the_locale(tiny_llama):
    common = ("-m", tiny_llama, "-t", 1, "-n", 2, "--context", 256, "--json", "-p", "-")
    _, out, _ = finished("generate", *common, text="für".encode("cp1252"), env=LOCALES["cp1252"])
    assert strict_json(out)["prompt"] == "für"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8", "utf-16"])
def test_writable_text_can_be_written(encoding):
    text = "a → b ↓ � … “é” 😀 ─│"
    found = streams.writable(text, encoding)
    assert found.encode(encoding)
    if encoding.startswith("utf"):
        assert found == text
    else:
        assert found.startswith("a -> b v ? ")


# ---- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", SHIPPED),
        ("inspect", SHIPPED, "--json"),
        ("compare", SHIPPED, SHIPPED),
        ("generate", "-p", "the cat", "-n", 20, "-t", 1),
        ("--help",),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[::2])),
)
def test_output_that_nobody_reads_ends_the_command_quietly(arguments):
    child = started(*arguments)
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(timeout=60) == 141
    assert [line for line in err.splitlines() if not line.startswith(b"SmolLM2")] == []


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_full_disk_is_one_line(more):
    with FULL.open("w") as full:
        code, _, err = finished("inspect", SHIPPED, *more, stdout=full)
    assert code == 1
    assert re.fullmatch(rb"pysteer: No space left on device .*\n", err)


def test_command_runs_without_standard_streams():
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m pysteer inspect '{SHIPPED}' <&- >&- 2>&-"], timeout=60
    )
    assert done.returncode == 0


# ---- interrupts ------------------------------------------------------------------------------

# Python 3.11 ends a module by the signal itself if the interrupt passed through exec(), and a shell
# reads both as 130.
INTERRUPTED = (130, -signal.SIGINT)


@pytest.mark.parametrize("module", ["dataclasses", "typer", "rich.console", "numpy", "llama_cpp"])
def test_interrupt_during_an_import_is_one_line(module, tiny_llama):
    arguments = ("generate", "-m", tiny_llama, "-p", "hi", "-n", 4000, "--context", 8192, "-t", 1)
    child = started(*arguments, flags=["-X", "importtime"], bufsize=0)
    threading.Thread(target=child.stdout.read, daemon=True).start()
    told = []
    for line in child.stderr:
        told.append(line)
        if line.split()[-1] == module.encode():
            child.send_signal(signal.SIGINT)
            break
    told += child.stderr.readlines()
    assert child.wait(timeout=60) in INTERRUPTED
    assert [line for line in told if not line.startswith(b"import time:")] == [
        b"pysteer: interrupted\n"
    ]


@pytest.mark.parametrize("delay", [0.05, 0.3])
def test_interrupt_of_an_answer_is_one_line(delay):
    child = started("generate", "-p", "Write a long story.", "-n", 2000, "-t", 1)
    assert child.stdout.read(1)
    threading.Thread(target=child.stdout.read, daemon=True).start()
    threading.Event().wait(delay)
    child.send_signal(signal.SIGINT)
    err = child.stderr.read()
    assert child.wait(timeout=60) in INTERRUPTED
    assert err.splitlines()[-1] == b"pysteer: interrupted"
    assert b"Traceback" not in err


@pytest.mark.parametrize("delay", [0.4, 0.6, 0.8, 1.2])
def test_interrupt_while_a_model_is_loaded_is_one_line(delay, tmp_path):
    child = started("evaluate", "--prompts", UNSAFE, "-o", tmp_path / "report", "-t", 1)
    threading.Event().wait(delay)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode in INTERRUPTED
    assert err.splitlines()[-1] == b"pysteer: interrupted"
    assert b"Traceback" not in err
