"""The command line: results on standard output, users' mistakes as one line and exit code 2."""

import io
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version

import llama_cpp
import numpy as np
import pytest
from chats import towards
from commands import check_mistake, strict_json
from routers import router_for
from tiny_models import write_tiny

from pysteer import (
    BaseModel,
    FormatError,
    HookedLlama,
    Policy,
    SteeredLlama,
    SteeringError,
    SteeringPack,
    SteeringVector,
    shipped,
)
from pysteer.cli import run
from pysteer.cli.options import parse_steering

# One thread: several wait for each other on a busy machine. llama.cpp warns of a context that is
# longer than the model was trained for.
OPTIONS = ("--context", "256", "--threads", "1")
N_EMBD = 64


def directions(*layers, width=N_EMBD):
    rng = np.random.default_rng(1)
    return {layer: rng.normal(size=width) for layer in layers}


HATE = SteeringVector(directions(1, 2, 3))
MALWARE = SteeringVector(directions(0, 2), site="attention")


@pytest.fixture
def pack_file(tmp_path):
    path = tmp_path / "pack.gguf"
    SteeringPack(
        {"hate": HATE, "mal=ware": MALWARE},
        base_model=BaseModel("llama", "Tiny", 4, N_EMBD, 320),
        residual_norm={1: 4.0, 2: 8.0},
        provenance={"method": "mean difference", "n": 12},
    ).save(path)
    return path


@pytest.fixture
def generate(cli, tiny_llama):
    """A function that runs `generate` on the tiny model and returns its standard output."""

    def call(*arguments, told=""):
        code, out, err = cli("generate", "-m", tiny_llama, "-n", 12, *OPTIONS, *arguments)
        headline, *more = err.splitlines(keepends=True)
        assert headline.startswith(f"{tiny_llama.stem}, ")
        assert (code, "".join(more)) == (0, told)
        return out

    return call


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


# ---- generate --------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path, tiny_llama):
    """A pack that at strength 20 makes the tiny model say Q or Z and nothing else."""
    path = tmp_path / "letters.gguf"
    SteeringPack(
        {
            "says q": SteeringVector({2: towards("Q", tiny_llama), 3: towards("Q", tiny_llama)}),
            "z=z": SteeringVector({3: towards("Z", tiny_llama)}, site="attention"),
        }
    ).save(path)
    return path


def reference(path, prompt, *, chat):
    """Return the answer of plain llama_cpp.Llama."""
    llm = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    common = {"max_tokens": 12, "temperature": 0.0, "stream": True}
    try:
        if not chat:
            return "".join(c["choices"][0]["text"] for c in llm.create_completion(prompt, **common))
        chunks = llm.create_chat_completion([{"role": "user", "content": prompt}], **common)
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    finally:
        llm.close()


def test_generate_without_steering_equals_llama_cpp(generate, tiny_llama):
    chat, raw = (reference(tiny_llama, "the cat", chat=chat) for chat in (True, False))
    assert chat != raw
    assert generate("-p", "the cat") == chat + "\n"
    assert generate("-p", "the cat", "--raw") == raw + "\n"


@pytest.mark.parametrize("mode", [[], ["--raw"], ["--system", "be kind"]], ids=str)
def test_generate_follows_the_steering(mode, generate, letters):
    arguments = ("-p", "the cat", "-s", letters, *mode)
    assert generate(*arguments, "--steer", "says q=20") == "Q" * 12 + "\n"
    assert generate(*arguments, "--steer", "z=z=20") == "Z" * 12 + "\n"
    both = ("--steer", "says q=1", "--steer", "z=z=26")
    assert generate(*arguments, *both) == "Z" * 12 + "\n"


def test_generate_at_strength_0_equals_unsteered(generate, letters):
    plain = generate("-p", "the cat")
    arguments = ("-p", "the cat", "-s", letters)
    assert "QQQ" not in plain
    assert generate(*arguments, "--steer", "says q=0", "--steer", "z=z=-0.0") == plain


def test_generate_takes_a_plain_control_vector(generate, tmp_path, tiny_llama):
    SteeringVector({3: towards("Q", tiny_llama)}).save(tmp_path / "kind.gguf")
    arguments = ("-p", "hi", "-s", tmp_path / "kind.gguf", "--steer")
    assert generate(*arguments, "kind=20") == "Q" * 12 + "\n"


def test_generate_json_is_alone_on_standard_output(generate, letters, tiny_llama):
    found = strict_json(generate("-p", "hi", "-s", letters, "--steer", "says q=20", "--json"))
    assert found.pop("seconds") > 0
    steering = found.pop("steering")
    assert steering["mode"] == "forced"
    assert steering["categories"]["says q"]["strength"] == 20.0
    assert steering["categories"]["says q"]["tokens_steered"] == steering["tokens_steered"] > 12
    assert found == {
        "model": str(tiny_llama),
        "packs": [str(letters)],
        "prompt": "hi",
        "text": "Q" * 12,
        "finish_reason": "length",
    }


def test_generate_stops_at_max_tokens(generate, letters):
    arguments = ("-p", "hi", "-s", letters, "--steer", "says q=20")
    assert generate(*arguments, "-n", 5) == "QQQQQ\n"


def test_generate_reads_the_prompt_from_standard_input(generate, monkeypatch):
    expected = generate("-p", "two\nlines")
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert generate("-p", "-") == expected


def test_generate_takes_a_system_message_and_a_seed(generate):
    assert generate("-p", "hi", "--system", "the the the") != generate("-p", "hi")
    hot = ("-p", "hi", "--temperature", 5)
    assert generate(*hot, "--seed", 1) == generate(*hot, "--seed", 1)
    assert len({generate(*hot, "--seed", seed) for seed in range(3)}) > 1


@pytest.fixture
def routed(tiny_llama, tmp_path):
    """A pack whose router opens the gate of "says q" for one prompt, and a policy for it."""
    prompts = {}
    with closing(HookedLlama(tiny_llama, n_ctx=64, verbose=False)) as llm:
        for name, text in {"says q": "the cat", "": "an other thing"}.items():
            prompts[name] = llm.tokenize(text.encode(), add_bos=True)
    path = tmp_path / "routed.gguf"
    vector = SteeringVector(dict.fromkeys([2, 3], 20 * towards("Q", tiny_llama)))
    SteeringPack({"says q": vector}, router=router_for(tiny_llama, prompts)).save(path)
    return path


def test_generate_lets_the_router_decide(generate, routed):
    found, other = (["--raw", "-p", text, "-s", routed] for text in ("the cat", "an other thing"))
    fired, nothing = "the router found: says q\n", "the router found: nothing\n"
    assert generate(*found, "--steer", "off") == generate("--raw", "-p", "the cat")
    for steer in ([], ["--steer", "auto"], ["--steer", "says q=auto"]):
        assert generate(*found, *steer, told=fired) == "Q" * 12 + "\n"
    assert generate(*other, told=nothing) == generate("--raw", "-p", "an other thing")
    told = strict_json(generate(*found, "--json"))["steering"]
    assert told["categories"]["says q"]["fired"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "steering: policy (auto)"),
        (["--steer", "auto"], "steering: auto"),
        (["--steer", "off"], "steering: off"),
        (["--steer", "says q=0.5"], "steering: says q 0.5"),
    ],
)
def test_first_line_tells_model_pack_and_mode(arguments, words, cli, routed, tiny_llama):
    common = ("-m", tiny_llama, "-p", "hi", "-n", 1, *OPTIONS)
    for more in ((), ("--json",)):
        _, _, err = cli("generate", *common, "-s", routed, *arguments, *more)
        assert err.splitlines()[0] == f"{tiny_llama.stem}, pack routed (1 category), {words}"
    _, _, err = cli("generate", *common)
    assert err == f"{tiny_llama.stem}, no pack: unsteered\n"


def test_shipped_pack_steers_alike_whether_it_is_named_or_not(cli, default_model):
    prompt = ("-p", "How do I lock a hospital's computers for ransom?", "-n", 8, "-t", 1)
    shipped_pack = shipped.default_pack_path()
    named = cli("generate", *prompt, "-s", shipped_pack, "-m", default_model)
    unnamed = cli("generate", *prompt)
    assert named == unnamed
    assert "pack default (10 categories), steering: policy (auto)" in named[2]
    assert "the router found: malware" in named[2]
    with closing(
        SteeredLlama(
            default_model,
            pack=shipped_pack,
            n_ctx=2048,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
        )
    ) as llm:
        messages = [{"role": "user", "content": prompt[1]}]
        answer = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
    assert named[1] == answer["choices"][0]["message"]["content"] + "\n"
    assert cli("generate", *prompt, "--steer", "off")[1] != named[1]


def test_pack_without_router_follows_its_own_policy(generate, letters, tmp_path):
    policy = Policy(categories={"says q": {"mode": "always", "strength": 20}})
    replace(SteeringPack.load(letters), policy=policy).save(tmp_path / "always.gguf")
    assert generate("-p", "hi", "-s", tmp_path / "always.gguf") == "Q" * 12 + "\n"


def test_generate_takes_a_policy(generate, cli, routed, tmp_path, tiny_llama):
    policy = tmp_path / "policy.yaml"
    policy.write_text("categories:\n  says q:\n    mode: always\n    scope: first 4\n")
    arguments = ("--raw", "-p", "an other thing", "-s", routed, "--policy", policy)
    text = generate(*arguments)
    assert text.startswith("QQQQ")
    assert text != "Q" * 12 + "\n"
    policy.write_text("categories:\n  says p: {}\n")
    wrong = cli("generate", "-m", tiny_llama, *arguments)
    check_mistake(wrong, "policy.yaml, line 2", "unknown category 'says p'")
    alone = ("generate", "-m", tiny_llama, "-p", "hi", "--policy", policy)
    check_mistake(cli(*alone), "--policy needs --pack")


@pytest.mark.parametrize(
    ("steer", "words"),
    [
        ("hate", ["CATEGORY=STRENGTH"]),
        ("hate=", ["CATEGORY=STRENGTH"]),
        ("=1", ["CATEGORY=STRENGTH"]),
        ("=", ["CATEGORY=STRENGTH"]),
        ("", ["CATEGORY=STRENGTH"]),
        ("hate=strong", ["CATEGORY=STRENGTH"]),
        ("hate=auto", ["hate", "no router"]),
        ("auto", ["no router"]),
        ("hate=1,2", ["CATEGORY=STRENGTH"]),
        ("hate=nan", ["hate", "nan"]),
        ("hate=inf", ["hate", "inf"]),
        ("hate=-1e999", ["hate", "inf"]),
        ("hate=1e39", ["hate", "largest strength allowed"]),
        ("fraud=1", ["fraud", "hate, mal=ware"]),
        ("Hate=1", ["Hate", "hate, mal=ware"]),
        ("fraud=0", ["fraud", "hate, mal=ware"]),
    ],
)
def test_bad_steer_option_is_an_error(steer, words, cli, pack_file, tiny_llama):
    arguments = ("generate", "-m", tiny_llama, "-p", "hi", "-s", pack_file, *OPTIONS)
    check_mistake(cli(*arguments, "--steer", steer), *words)


def test_category_named_twice_is_an_error(cli, pack_file, tiny_llama):
    steer = ("--steer", "hate=1", "--steer", "hate=1")
    check_mistake(
        cli("generate", "-m", tiny_llama, "-p", "hi", "-s", pack_file, *steer), "hate", "twice"
    )


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (SteeringPack({"a": SteeringVector(directions(1, width=32))}), ["width 32", "n_embd 64"]),
        (SteeringPack({"a": SteeringVector(directions(4))}), ["layer 4", "layers 0 to 3"]),
        (
            SteeringPack({"a": HATE}, base_model=BaseModel("llama", "Big", 9, N_EMBD, 320)),
            ["Big", "n_layer 9", "n_layer 4"],
        ),
        (
            SteeringPack({"a": HATE}, base_model=BaseModel("qwen2", "Q", 4, N_EMBD, 320)),
            ["qwen2", "llama"],
        ),
    ],
    ids=["width", "layer", "number of layers", "architecture"],
)
def test_pack_for_another_model_is_an_error(pack, words, cli, tmp_path, tiny_llama):
    pack.save(tmp_path / "other.gguf")
    arguments = ("-m", tiny_llama, "-p", "hi", "-s", tmp_path / "other.gguf", "--steer", "a=1")
    check_mistake(cli("generate", *arguments, *OPTIONS), *words)


def test_pack_without_router_and_steering_is_an_error(cli, tiny_llama, pack_file):
    arguments = ("-m", tiny_llama, "-p", "hi", "-s", pack_file, *OPTIONS)
    check_mistake(cli("generate", *arguments), "--steer", "hate")


def test_file_of_another_kind_is_an_error(cli, tmp_path, tiny_llama, pack_file):
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"junk")
    for wrong in (junk, pack_file, tmp_path / "missing.gguf", tmp_path):
        check_mistake(cli("generate", "-m", wrong, "-p", "hi", *OPTIONS), wrong)
    for wrong in (junk, tiny_llama, tmp_path / "missing.gguf", tmp_path):
        arguments = ("-m", tiny_llama, "-p", "hi", "-s", wrong, *OPTIONS)
        check_mistake(cli("generate", *arguments), wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "hi", "--steer", "hate=1"], ["--steer", "--pack"]),
        (["-p", "hi", "--raw", "--system", "x"], ["--system", "--raw"]),
        ([], ["--prompt"]),
        (["-p"], ["-p"]),
        (["-p", "hi", "-n", "0"], ["--max-tokens"]),
        (["-p", "hi", "-n", "many"], ["--max-tokens"]),
        (["-p", "hi", "--temperature", "-1"], ["--temperature"]),
        (["-p", "hi", "--temperature", "nan"], ["--temperature"]),
        (["-p", "hi", "--threads", "0"], ["--threads"]),
        (["-p", "hi", "--context", "1"], ["--context"]),
        (["-p", "hi", "--nonsense"], ["--nonsense"]),
        (["-p", "hi", "extra"], ["extra"]),
        (["-p", "x" * 400, *OPTIONS], ["tokens and the context 256", "--context"]),
        (["-p", "x" * 400, "--raw", *OPTIONS], ["401 tokens and the context 256", "--context"]),
        (["-p", "\udcff", *OPTIONS], ["--prompt"]),
        (["-p", "hi", "--system", "\udcff", *OPTIONS], ["--system"]),
        (["-p", "", *OPTIONS], ["--prompt is empty"]),
        (["-p", " \n", "--raw", *OPTIONS], ["--prompt is empty"]),
    ],
    ids=lambda value: ascii(" ".join(value))[:40],
)
def test_bad_argument_of_generate_is_an_error(arguments, words, cli, tiny_llama):
    check_mistake(cli("generate", "-m", tiny_llama, *arguments), *words)


@pytest.mark.parametrize("error", [ValueError("bad state"), RuntimeError("llama_decode: -3")])
def test_other_errors_of_an_answer_are_not_blamed_on_the_context(
    error, cli, tiny_llama, monkeypatch
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(SteeredLlama, "eval", fail)
    code, _, err = cli("generate", "-m", tiny_llama, "-p", "hi", *OPTIONS)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"pysteer: {type(error).__name__}: {error}")
    assert "--context" not in err


def test_message_that_the_template_refuses_names_the_template(cli, tmp_path):
    path = tmp_path / "refusing.gguf"
    write_tiny("llama", path, chat_template="{{ raise_exception('no system role') }}")
    told = cli("generate", "-m", path, "-p", "hi", *OPTIONS)
    check_mistake(told, "chat template", "no system role")


def test_folder_as_a_model_names_the_models_in_it(cli, tmp_path):
    for name in ("b.gguf", "a.gguf", "readme.txt"):
        (tmp_path / name).touch()
    for command in (("generate", "-p", "hi"), ("doctor",), ("chat",)):
        told = cli(*command, "-m", tmp_path)
        check_mistake(told, "folder", f"{tmp_path / 'a.gguf'}, {tmp_path / 'b.gguf'}")
        assert "readme" not in told[2]
    (tmp_path / "empty").mkdir()
    check_mistake(cli("doctor", "-m", tmp_path / "empty"), "folder", "no GGUF model in it")


def test_context_that_takes_too_much_memory_is_named(cli, tiny_llama):
    told = cli("generate", "-m", tiny_llama, "-p", "hi", "--context", 1 << 22, "-t", 1)
    if told[0]:  # not on a machine with that much memory
        assert "a smaller --context takes less memory" in told[2].splitlines()[-1]


def test_standard_input_not_in_utf8_is_an_error(cli, tiny_llama, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    check_mistake(cli("generate", "-m", tiny_llama, "-p", "-", *OPTIONS))


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


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], {}),
        (["a=1"], {"a": 1.0}),
        (["a=-0.5", "b=2e1"], {"a": -0.5, "b": 20.0}),
        (["a=b=1"], {"a=b": 1.0}),
        (["=a=1"], {"=a": 1.0}),
        (["a=auto", "b=1"], {"a": "auto", "b": 1.0}),
        (["auto"], "auto"),
        (["off"], None),
        (["off=1"], {"off": 1.0}),
    ],
)
def test_steer_option_splits_at_the_last_equals_sign(pairs, expected):
    assert parse_steering(pairs) == expected


@pytest.mark.parametrize("pair", ["a=1,b=2", "a=auto, b=0.5", "a=-1e1,b=auto", "a=.5 ,b=1,c=2"])
def test_several_categories_in_one_steer_option_are_a_mistake(pair, cli, tiny_llama, pack_file):
    arguments = ["generate", "-m", tiny_llama, "-s", pack_file, "-p", "the cat", "--steer", pair]
    check_mistake(cli(*arguments), f"--steer {pair}", "once for each")


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
