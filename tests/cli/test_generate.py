"""`pysteer generate`: answers, steering options and users' mistakes."""

import io
import sys
from contextlib import closing
from dataclasses import replace

import llama_cpp
import pytest
from chats import towards
from commands import check_mistake, strict_json
from packs import HATE, N_EMBD, OPTIONS, directions
from routers import router_for
from tiny_models import write_tiny

from pysteer import (
    BaseModel,
    HookedLlama,
    Policy,
    SteeredLlama,
    SteeringPack,
    SteeringVector,
    shipped,
)
from pysteer.cli.options import parse_steering


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
