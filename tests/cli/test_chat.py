"""`pysteer chat`: its input, driven by a script, and by keys in a terminal."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise

import pexpect
import pytest
from chats import CONTEXT, LENGTH, Echo, only
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pysteer import SteeredLlama, shipped
from pysteer.cli import run
from pysteer.cli.answer_text import WordWrap
from pysteer.cli.chat_events import Goodbye, TextPiece
from pysteer.cli.chat_input import entries, unfinished
from pysteer.cli.chat_session import Session
from pysteer.cli.chat_terminal import prompt_text
from pysteer.cli.chat_view import Printer
from pysteer.prompts import load_prompts

PLAIN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

command = importlib.import_module("pysteer.cli.chat")  # pysteer.cli.chat is the function

# ---- input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hi", False),
        ("", False),
        ("hi\\", True),
        ("hi\\\nho", False),
        ("hi\\\nho\\", True),
        ('"""', True),
        ('""""', True),
        ('"""""', True),
        ('""""""', False),
        ('"""hi', True),
        ('"""hi\nho', True),
        ('"""hi\n"""', False),
        ('"""hi"""', False),
        ('  """hi"""  ', False),
        ('"""hi\\', True),
        ('say """', False),
    ],
)
def test_entry_is_unfinished_after_backslash_or_in_open_block(text, expected):
    assert unfinished(text) is expected


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT.filter(lambda text: '"""' not in text and text.strip()))
def test_block_arrives_verbatim(text):
    echo = Echo()
    text = text.strip('\n"') or "x"
    (entry,) = entries(io.StringIO(f'"""\n{text}\n"""\n', newline="\n"))
    list(Session(echo).handle(entry))
    assert [m[-1]["content"] for m, _ in echo.requests] == [text] * bool(text.strip())


@given(st.lists(TEXT.map(lambda text: text.replace("\n", "").rstrip("\\").strip()), min_size=1))
def test_lines_ending_in_a_backslash_are_one_message(lines):
    lines = ["the", *lines, "end"]
    echo = Echo()
    (entry,) = entries(io.StringIO("\\\n".join(lines) + "\n", newline="\n"))
    list(Session(echo).handle(entry))
    assert [m[-1]["content"] for m, _ in echo.requests] == ["\n".join(lines)]


def test_unfinished_entry_ends_with_the_input():
    assert list(entries(["a\n", "b"])) == ["a", "b"]
    assert list(entries(["a\\\n"])) == ["a\\"]
    assert list(entries(['"""a\n', "b\n"])) == ['"""a\nb']
    assert list(entries(["\n", "a\n"])) == ["", "a"]


# ---- driven by a script ----------------------------------------------------------------------


@pytest.fixture
def chat(capsys, monkeypatch, tiny_llama):
    """A function that chats with the tiny model and returns exit code, output and errors."""

    def call(text, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        options = ("-m", tiny_llama, "-n", LENGTH, "--context", CONTEXT, "-t", 1)
        capsys.readouterr()
        code = run([str(part) for part in ("chat", *options, *arguments)])
        return (code, *capsys.readouterr())

    return call


def test_standard_output_has_answers_only(chat, letters_file, reference):
    lines = ("the cat", "/steer says q 20", "the\\", "cat", "/foo", "/quit", "never read")
    code, out, err = chat("\n".join(lines) + "\n", "-s", letters_file)
    assert code == 0
    assert out == f"{reference('the cat')}\n{'Q' * LENGTH}\n"
    assert "steering: says q 20\n" in err
    assert "unknown command /foo" in err
    assert "Traceback" not in err


def test_json_output_has_one_object_per_answer(chat, letters_file, reference):
    lines = ("the cat", "/steer says q 20", "so", "/compare", "/why", "/help")
    code, out, _ = chat("\n".join(lines), "-s", letters_file, "--json", "--system", "be nice")
    plain = reference("the cat", system="be nice")
    first, second, compared = (json.loads(line) for line in out.splitlines())
    assert code == 0
    assert (first["prompt"], first["response"], first["requested"]) == ("the cat", plain, None)
    assert (second["prompt"], second["response"]) == ("so", "Q" * LENGTH)
    assert second["requested"] == {"says q": 20.0}
    assert {row["finish_reason"] for row in (first, second)} == {"length"}
    assert {row["system"] for row in (first, second)} == {"be nice"}
    assert compared["compare"]["steered"] == second
    assert compared["compare"]["unsteered"]["response"] == reference(
        "the cat", plain, "so", system="be nice"
    )


def test_steer_option_is_the_first_steering(chat, letters_file):
    code, out, err = chat("the cat\n", "-s", letters_file, "--steer", "says q=20")
    assert (code, out) == (0, "Q" * LENGTH + "\n")
    assert "pack letters (2 categories), steering: says q 20\n" in err


def test_compare_prints_both_answers(chat, letters_file, reference):
    code, out, _ = chat("/steer says q 20\nthe cat\n/compare\n", "-s", letters_file)
    assert code == 0
    answered, table = out.split("\n", 1)
    assert answered == "Q" * LENGTH
    assert "Q" * LENGTH in table
    assert "says q 20" in table
    assert "not steered" in table


def test_user_mistake_is_one_line_and_exit_code_2(chat, tmp_path, letters_file):
    bad = tmp_path / "bad.yaml"
    bad.write_text("categories:\n  fraud: {strength: 1}\n")
    for arguments, words in (
        (("-s", tmp_path / "missing.gguf"), ["missing.gguf"]),
        (("--temperature", "nan"), ["--temperature"]),
        (("--policy", tmp_path / "p.yaml"), ["--policy", "--pack"]),
        (("--policy", tmp_path / "p.yaml", "-s", letters_file), ["p.yaml"]),
        (("--policy", bad, "-s", letters_file), ["bad.yaml", "line 2", "fraud"]),
    ):
        code, out, err = chat("hi\n", *arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert err.startswith("pysteer: ")
        for word in words:
            assert word in err


def test_line_that_is_not_utf8_is_refused_alone(tiny_llama):
    # "\xff" is in no UTF-8 text.
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pysteer",
            "chat",
            *("-m", tiny_llama, "-n", "3"),
            "--context",
            "128",
            "-t",
            "1",
            "--json",
        ],
        input=b"bad \xff\nhi \xc3\xbc\n",
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["prompt"] == "hi ü"
    assert b"Unicode" in result.stderr


@pytest.fixture
def started(monkeypatch, capsys):
    """A function that starts a chat with an Echo and returns the steering of its requests."""

    def call(*arguments):
        echo, given = Echo(), {}

        def load(setup, **more):
            given["policy"] = setup.policy
            return echo

        monkeypatch.setattr(command, "load_setup", load)
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/off\nhi\n/policy\nhi\n"))
        assert run(["chat", *map(str, arguments)]) == 0
        capsys.readouterr()
        return [request[1].get("steering", "left out") for request in echo.requests], given

    return call


def test_first_steering_follows_policy_then_router(started, tmp_path, letters_file):
    assert started()[0] == ["left out", None, "left out"]  # the shipped pack has a policy
    replace(shipped.default_pack(), policy=None).save(tmp_path / "routed.gguf")
    # Without a policy the router decides, as in Python.
    assert started("-s", tmp_path / "routed.gguf")[0] == ["left out", None, "left out"]
    assert started("-s", letters_file)[0] == [None, None, None]
    assert started("--steer", "off")[0] == [None, None, "left out"]
    (tmp_path / "p.yaml").write_text("scope: response\n")
    asked, given = started("-s", letters_file, "--policy", tmp_path / "p.yaml")
    assert asked == ["left out", None, "left out"]
    assert str(given["policy"].scope) == "response"


# ---- driven by keys --------------------------------------------------------------------------


@contextmanager
def terminal(*arguments, width=200, **environment):
    """A chat in a pseudo-terminal."""
    child = pexpect.spawn(
        sys.executable,
        ["-m", "pysteer", "chat", *map(str, arguments)],
        env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
        | environment,
        encoding="utf-8",
        timeout=60,
        dimensions=(50, width),
    )
    try:
        child.expect_exact("or /help")
        yield child
    finally:
        child.close(force=True)


PROMPT_STARTS, PROMPT_ENDS = "\x1b[?2004h", "\x1b[?2004l"  # tells pasted text from typed text


def ready(child, steering="off"):
    """Wait for the next prompt."""
    child.expect_exact(PROMPT_STARTS)
    child.expect_exact(f"[steering: {steering}] >")


def enter(child, keys, steering="off"):
    """Type an entry, and wait until the session has handled it."""
    child.send(keys)
    child.expect_exact(PROMPT_ENDS)
    ready(child, steering)


def left(child):
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


@pytest.fixture
def tiny_options(tiny_llama, letters_file):
    options = ("-n", LENGTH, "--context", CONTEXT, "-t", 1)
    return ("-m", tiny_llama, "-s", letters_file, *options)


def test_terminal_completes_steers_and_quits(tiny_options):
    with terminal(*tiny_options) as child:
        ready(child)
        child.send("/steer sa\t")
        child.expect_exact("ys q")
        enter(child, "20\r", "says q 20")
        child.send("the cat\r")
        child.expect_exact("Q" * LENGTH + "\r\n")
        ready(child, "says q 20")
        child.send("/nonsense\r")
        child.expect_exact("unknown command /nonsense")
        ready(child, "says q 20")
        child.send("/quit\r")
        assert left(child) == 0


def test_terminal_takes_entries_of_several_lines(tiny_options, tmp_path):
    path = tmp_path / "chat.jsonl"
    with terminal(*tiny_options) as child:
        ready(child)
        enter(child, "a\\\rb\r")
        enter(child, "c\x1b\rd\r")
        enter(child, '"""\re\r/f\r"""\r')
        enter(child, "\x1b[200~g\nh\x1b[201~\r")  # pasted
        enter(child, "\x1b[A\r")  # up: the last entry once more
        enter(child, f"/save {path}\r")
        child.send("\x04")
        assert left(child) == 0
    prompts = [row.prompt for row in load_prompts(path)]
    assert prompts == ["a\nb", "c\nd", "e\n/f", "g\nh", "g\nh"]


def test_ctrl_c_at_the_prompt_clears_the_line(tiny_options, tmp_path):
    path = tmp_path / "chat.jsonl"
    with terminal(*tiny_options) as child:
        ready(child)
        enter(child, "not this\x03")
        enter(child, "this\r")
        enter(child, f"/save {path}\r")
        child.send("\x04")
        assert left(child) == 0
    assert [row.prompt for row in load_prompts(path)] == ["this"]


def test_ctrl_c_during_an_answer_stops_only_the_answer(default_model, tmp_path):
    path = tmp_path / "chat.jsonl"
    with terminal("-m", default_model, "-n", 1500, "-t", 1) as child:
        ready(child)
        child.send("Write a very long story about the sea.\r")
        child.expect_exact(PROMPT_ENDS)
        child.expect(r"\w+ \w+ \w+ \w+")  # more words than "reading the message"
        child.send("\x03")
        child.expect_exact("stopped")
        ready(child)
        enter(child, "What is the capital of France? Answer in one word.\r")
        enter(child, f"/save {path}\r")
        child.send("\x04")
        assert left(child) == 0
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["finish_reason"] == "interrupted"
    assert 0 < len(first["response"].split()) < 500
    assert second["finish_reason"] == "stop"
    assert "Paris" in second["response"]


def test_typing_during_an_answer_is_the_next_entry(default_model):
    with terminal("-m", default_model, "-n", 60, "-t", 1) as child:
        ready(child)
        child.send("Write a story about the sea.\r")
        child.expect_exact(PROMPT_ENDS)
        child.expect(r"\w+ \w+ \w+ \w+")  # more words than "reading the message"
        child.send("/quit\r")
        assert left(child) == 0


@pytest.fixture(scope="module")
def answer_about_the_sea(default_model):
    """The default model's answer in 60 tokens, steered by the policy of the shipped pack."""
    threads = {"n_threads": 1, "n_threads_batch": 1}
    with closing(
        SteeredLlama(
            default_model, pack=shipped.default_pack(), n_ctx=4096, verbose=False, **threads
        )
    ) as llm:
        messages = [{"role": "user", "content": "Tell me about the sea."}]
        result = llm.create_chat_completion(messages, max_tokens=60, temperature=0.0)
    return result["choices"][0]["message"]["content"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_on_a_terminal_are_no_wider_and_cut_no_word(width, answer_about_the_sea):
    expected = answer_about_the_sea
    assert len(expected) > 2 * width
    with terminal("-n", 60, "-t", 1, width=width) as child:
        banner = child.before
        ready(child, "policy")
        child.send("Tell me about the sea.\r")
        child.expect_exact(PROMPT_ENDS)
        child.expect_exact(PROMPT_STARTS)
        answer = child.before
        child.send("/why\r")
        child.expect_exact(PROMPT_ENDS)
        child.expect_exact(PROMPT_STARTS)
        why = child.before
        child.send("/compare\r")
        child.expect_exact("answering again, without steering")
        child.expect_exact("not steered")
        child.send("\x04")
        assert left(child) == 0
    banner, why = (" ".join(PLAIN.sub("", text).split()) for text in (banner, why))
    assert "pack default (10 categories), steering: policy (auto)" in banner
    for name in shipped.default_pack().categories:
        assert name in banner
        assert name in why or "all 10 categories" in why
    answer = PLAIN.sub("", answer).replace("\r", "")
    shown = answer[answer.index(expected[:8]) :]
    assert max(map(len, shown.splitlines())) <= width
    words = expected.split()
    assert shown.split()[: len(words)] == words


def test_terminal_without_utf8_talks(tiny_options):
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with terminal(*tiny_options, **poor) as child:
        ready(child)
        child.send("the cat ü\r")
        child.expect_exact(PROMPT_ENDS)
        ready(child)
        child.send("/help\r")
        child.expect_exact("/compare")
        child.send("\x04")
        assert left(child) == 0


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (None, "[steering: off] > "),
        ("policy", "[steering: policy] > "),
        ({"a": 0.5}, "[steering: a 0.5] > "),
        ({"a" * 20: 0.5, "b" * 20: "auto"}, "[steering: 2 categories] > "),
    ],
)
def test_prompt_shows_the_steering_in_few_columns(requested, expected):
    assert prompt_text(requested) == expected


@given(st.lists(st.text("abé-😀", min_size=1, max_size=8)), st.lists(st.integers(0, 9)))
def test_wrapped_text_has_the_same_words_and_fits(words, cuts):
    text, width = " ".join(words), 16
    wrap = WordWrap()
    pieces = [text[a:b] for a, b in pairwise([0, *sorted(accumulate(cuts)), len(text)])]
    wrapped = "".join(wrap.add(piece, width) for piece in pieces) + wrap.end(width)
    assert re.sub(r"\s", "", wrapped) == "".join(words)
    assert all(cell_len(line) <= width for line in wrapped.split("\n"))
    assert WordWrap().add(text + "\n", width) == wrapped + "\n"  # the pieces do not matter


def test_wrapped_text_breaks_between_words():
    def wrapped(*pieces, width):
        wrap = WordWrap()
        return "".join(wrap.add(piece, width) for piece in pieces) + wrap.end(width)

    assert wrapped("The se", "a is", " wi", "de.", width=10) == "The sea is\nwide."
    assert wrapped("one two", "\n  three", width=8) == "one two\n  three"
    assert wrapped("a " + 12 * "b" + " c", width=8) == "a " + 12 * "b" + " c"
    assert wrapped("ab 中中中中", width=8) == "ab 中中\n中中"
    assert wrapped("1234567 9", width=8) == "1234567\n9"


def test_control_characters_of_a_model_are_replaced_on_a_terminal(session, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printer = Printer(json=False)
    printer.show(iter([TextPiece("a\x1b[2Jb\x07\tü [red]‍\n")]))
    assert capsys.readouterr().out == "a�[2Jb�\tü [red]‍\n"


def test_import_of_chat_loads_no_prompt_toolkit():
    code = "import sys, pysteer.cli.chat; sys.exit('prompt_toolkit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_quit_ends_the_loop(session):
    assert isinstance(only(session, "/quit"), Goodbye)
    assert not Printer(json=False).show(session.handle("/quit"))
