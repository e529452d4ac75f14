"""`pysteer extract`: the pack it writes, its report, users' mistakes, and Ctrl-C."""

import importlib
import io
import json
import os
import signal
from contextlib import closing

import numpy as np
import pytest
from commands import check_mistake, strict_json
from prompting import rows, write

from pysteer import SteeredLlama, SteeringPack, SteeringVector, shipped
from pysteer.cli import console
from pysteer.extract.llama_capture import LlamaCapture

# One thread, and a context that the tiny model was trained for; see test_cli.py.
OPTIONS = ("--context", "256", "--threads", "1")


@pytest.fixture
def files(tmp_path, tiny_llama):
    """Arguments of a successful run, by option."""
    unsafe = [*rows("harm", "hate", 20), *rows("harm", "malware", 20)]
    safe = [*rows("calm", "hate", 20), *rows("calm", "malware", 20)]
    return {
        "--model": tiny_llama,
        "--unsafe": write(tmp_path / "unsafe.jsonl", unsafe),
        "--safe": write(tmp_path / "safe.jsonl", safe),
        "--benign": write(tmp_path / "benign.jsonl", rows("hello", "x", 100)),
        "--output": tmp_path / "pack.gguf",
    }


@pytest.fixture
def extract(cli, files):
    """A function that runs `extract`; options replace those of `files`, None removes."""

    def call(*flags, **options):
        if "--no-router" in flags:
            options.setdefault("benign", None)
        given = {**files, **{f"--{k.replace('_', '-')}": v for k, v in options.items()}}
        pairs = [part for pair in given.items() if pair[1] is not None for part in pair]
        context = () if "--context" in given else OPTIONS
        return cli("extract", *pairs, *context, *flags)

    return call


@pytest.fixture
def interrupting(monkeypatch):
    """A function that sets after how many rows Ctrl-C is pressed; returns a list of rows run."""
    ran = []
    stop = [None]
    real = LlamaCapture.activations

    def activations(self, rows, **rest):
        for index, found in real(self, rows, **rest):
            if stop[0] is not None and len(ran) == stop[0]:
                signal.raise_signal(signal.SIGINT)
            ran.append(rows[index])
            yield index, found

    monkeypatch.setattr(LlamaCapture, "activations", activations)
    # Ctrl-C is ignored if the tests were started in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def after(count):
        ran.clear()
        stop[0] = count
        return ran

    yield after
    signal.signal(signal.SIGINT, before)


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def older_pack(path):
    """Save a pack, and return its bytes."""
    SteeringPack({"older": SteeringVector({1: np.ones(64)})}).save(path)
    return path.read_bytes()


# ---- packs -----------------------------------------------------------------------------------


def test_extract_writes_a_pack_that_steers_and_can_be_inspected(extract, cli, files, tiny_llama):
    code, out, err = extract(layers="1,3")
    assert (code, err) == (0, "")
    assert "hate" in out
    assert "malware" in out
    assert "the category of unsafe prompts is found: " in out
    assert "a gate opens for everyday prompts: " in out
    assert f"see it with pysteer inspect {files['--output']}\n" in out
    pack = SteeringPack.load(files["--output"])
    assert set(pack.categories) == {"hate", "malware"}
    assert all(vector.layers == (1, 3) for vector in pack.categories.values())
    assert set(pack.router.categories) == {"hate", "malware"}

    llm = SteeredLlama(
        tiny_llama, pack=files["--output"], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False
    )
    with closing(llm):

        def logits(steering):
            with llm.steering(steering):
                llm.reset()
                llm.eval([1, 5, 9])
                return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)).copy()

        plain, steered = (logits({name: s}) for name, s in (("hate", 0.0), ("hate", 1.0)))
        assert np.abs(plain - steered).max() > 1e-3

    code, out, _ = cli("inspect", files["--output"], "--json")
    assert code == 0
    found = strict_json(out)
    assert found["provenance"] == json.loads(json.dumps(dict(pack.provenance)))
    code, out, _ = cli("inspect", files["--output"])
    assert code == 0
    assert "hate" in out
    code, out, _ = cli("compare", files["--output"], files["--output"], "--json")
    assert code == 0
    assert '"cosine"' in out
    # No other files are left.
    folder = files["--output"].parent
    assert everything(folder) == ["benign.jsonl", "pack.gguf", "safe.jsonl", "unsafe.jsonl"]


def test_json_output_is_one_object_equal_to_the_pack(extract, files):
    code, out, err = extract("--json", false_positive_rate="0.1", seed=3)
    assert code == 0, err
    found = strict_json(out)
    pack = SteeringPack.load(files["--output"])
    assert found["pack"] == str(files["--output"])
    assert found["seconds"] > 0
    assert found["router"] == {
        "layers": [read.layer for read in pack.router.reads],
        "gates": ["margin"],
        "category_accuracy": pack.router.category_accuracy,
        "benign_false_positive_rate": pack.router.benign_false_positive_rate,
        "held_out": pack.provenance["router"],
    }
    assert 0 <= found["router"]["category_accuracy"] <= 1
    assert found["provenance"] == json.loads(json.dumps(dict(pack.provenance)))
    assert found["provenance"]["settings"]["seed"] == 3
    assert set(found["provenance"]["separation"]) == {"hate", "malware"}
    assert pack.router.threshold_rule == "fpr=0.1"


def test_no_router_leaves_the_router_out(extract, files):
    code, out, err = extract("--json", "--no-router")
    assert (code, err) == (0, "")
    assert strict_json(out)["router"] is None
    assert SteeringPack.load(files["--output"]).router is None
    code, out, _ = extract("--no-router", held_out=0)
    assert code == 0
    assert "router at layer" not in out


OPTIONS_AND_SETTINGS = [
    (("--method", "pruned", "--paired"), {"method": "pruned", "options": {"paired": True}}),
    (("--method", "pca", "--variant", "centred"), {"options": {"variant": "centred"}}),
    (("--method", "logistic", "--option", "C=0.5"), {"options": {"C": 0.5}}),
    (("--method", "guided"), {"method": "guided"}),
    (("--method", "contrast", "--response-tokens", "3"), {"options": {"response_tokens": 3}}),
    (("--site", "mlp", "--pooling", "last"), {"site": "mlp", "pooling": "last"}),
    (("--pooling", "2:9"), {"pooling": [2, 9]}),
    (("--layers", "all"), {"layers": [0, 1, 2, 3]}),
    (("--layers", "0,2-3"), {"layers": [0, 2, 3]}),
    (("--safe-data", "generic"), {"matched": False}),
    (("--no-mask-massive", "--top-k", "9"), {"mask_massive": None, "top_k": 9}),
    (("--orthogonalise", "benign", "--unit-norm"), {"orthogonalise": "benign", "unit_norm": True}),
    (("--orthogonalise", "none", "--scale", "0"), {"orthogonalise": "", "scale": 0.0}),
    (("--held-out", "0.4", "--seed", "9"), {"held_out": 0.4, "seed": 9}),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), OPTIONS_AND_SETTINGS, ids=lambda value: " ".join(value)[:40]
)
def test_options_reach_the_settings(arguments, expected, extract, files):
    code, out, err = extract("--json", "--no-router", *arguments)
    assert (code, err) == (0, "")
    found = strict_json(out)["provenance"]["settings"]
    assert {name: found[name] for name in expected} == expected


def test_gates_and_benign_prompts_reach_the_router(extract, files):
    code, _, err = extract("--json", gates="probe, multinomial")
    assert (code, err) == (0, "")
    router = SteeringPack.load(files["--output"]).router
    assert list(router.gates) == ["multinomial", "probe"]
    assert router.train_counts[0] == 40 + 100


def test_without_benign_prompts_the_router_learns_from_everyday_prompts(extract, files):
    assert extract(context=1024, threads=1, benign=None)[0] == 0
    pack = SteeringPack.load(files["--output"])
    everyday = shipped.everyday_prompts()
    assert pack.router.train_counts[0] == 40 + len(everyday)
    assert pack.provenance["data"]["benign"]["prompts"] == len(everyday)
    share = pack.provenance["router"]["everyday"]
    assert share["n"] == pytest.approx(len(everyday) / 5, abs=4)
    assert 0 <= share["low"] <= share["k"] / share["n"] <= share["high"] < 1


def test_without_everyday_prompts_nothing_is_said_about_them(extract, files):
    code, out, err = extract(benign="none")
    assert code == 0
    assert "no everyday prompts" in err
    assert "nothing is known of everyday prompts; name some with --benign" in out
    pack = SteeringPack.load(files["--output"])
    assert pack.router.train_counts[0] == 40
    assert set(pack.provenance["router"]) == {"caught", "category", "safe"}


def test_few_prompts_are_warned_of(extract, files, tmp_path):
    write(files["--unsafe"], [*rows("harm", "hate", 19), *rows("harm", "malware", 20)])
    code, _, err = extract("--json", benign=write(tmp_path / "b.jsonl", rows("hello", "x", 7)))
    assert code == 0
    assert "fewer than 20 prompts in 'hate' (19)" in err
    assert "only 7 everyday prompts" in err


def test_judge_and_answers_reach_the_methods(extract, files, tmp_path):
    code, _, err = extract("--no-router", "--json", method="guided", judge="refusal")
    # A random model refuses nothing, so that no safe prompt is confirmed.
    assert code == 2
    assert "judge found 0 of" in err
    answers = write(tmp_path / "answers.jsonl", [{"response": "never"}, {"response": "no"}])
    code, out, err = extract("--no-router", "--json", method="contrast", answers=answers)
    assert (code, err) == (0, "")
    assert strict_json(out)["provenance"]["data"]["answers"]["prompts"] == 2


def test_judge_of_evaluate_confirms_the_prompts_of_guided(extract, tmp_path, monkeypatch):
    (tmp_path / "opinions.py").write_text("def calm(prompt, answer): return 'calm' in prompt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = extract("--no-router", "--json", method="guided", judge="python:opinions:calm")
    assert (code, err) == (0, "")
    assert strict_json(out)["provenance"]["counts"]["hate"]["used"] > 0


def test_warnings_go_to_standard_error(extract, files, tmp_path):
    unsafe = rows("harm", "hate", 20)
    write(files["--unsafe"], [*unsafe, unsafe[2]])
    code, out, err = extract("--json")
    assert code == 0
    strict_json(out)
    assert err == (
        "warning: 1 unsafe prompts repeat others and are left out, the first at "
        f"{files['--unsafe']}, line 21\n"
    )


# ---- users' mistakes -------------------------------------------------------------------------


MISTAKES = [
    ({"method": "median"}, ["median", "contrast"]),
    ({"site": "brain"}, ["brain", "residual"]),
    ({"pooling": "first"}, ["first", "last"]),
    ({"pooling": "3:"}, ["--pooling 3:", "3:10"]),
    ({"pooling": "9:3"}, ["--pooling 9:3"]),
    ({"pooling": "-1:3"}, ["--pooling -1:3"]),
    ({"layers": ""}, ["--layers"]),
    ({"layers": "a"}, ["--layers a", "12,15,18"]),
    ({"layers": "1,"}, ["--layers 1,"]),
    ({"layers": "3-1"}, ["--layers 3-1"]),
    ({"layers": "1,3-2"}, ["--layers 1,3-2"]),
    ({"layers": "1-"}, ["--layers 1-"]),
    ({"layers": "0-99999999999"}, ["--layers"]),
    ({"layers": "1," * 3000 + "1"}, ["--layers"]),
    ({"layers": "4"}, ["no site residual at layers [4]", "0 to 3"]),
    ({"layers": "0-900000"}, ["no site residual at layers", "0 to 3"]),
    ({"safe_data": "some"}, ["--safe-data some", "matched"]),
    ({"safe_data": "matched"}, ["no safe prompts of category", "generic"]),
    ({"judge": "me"}, ["--judge me", "refusal"]),
    ({"judge": "refusal"}, ["judge is for guided"]),
    ({"gates": "margin,svm"}, ["svm", "multinomial"]),
    ({"gates": "probe"}, ["margin, multinomial"]),
    ({"orthogonalise": "all"}, ["all", "benign"]),
    (
        {"false_positive_rate": "2"},
        ["--false-positive-rate must be at least 0 and below 1, not 2.0"],
    ),
    ({"held_out": "1"}, ["--held-out must be at least 0 and below 1, not 1.0"]),
    ({"seed": "-1"}, ["--seed", "0"]),
    ({"seed": "x"}, ["seed"]),
    ({"scale": "-1"}, ["scale"]),
    ({"scale": "nan"}, ["scale"]),
    ({"top_k": "0"}, ["top-k"]),
    ({"variant": "centred"}, ["mean has no option 'variant'"]),
    ({"method": "pca", "variant": "middle"}, ["middle", "centred"]),
    ({"option": "C"}, ["--option C", "kl_weight=2"]),
    ({"option": "C=small"}, ["--option C=small", "kl_weight=2"]),
    ({"option": "C=2"}, ["mean has no option 'C'"]),
    ({"method": "logistic", "option": "D=2"}, ["logistic has no option 'D'"]),
    ({"method": "learned", "option": "seed=2"}, ["learned has no option 'seed'"]),
    ({"method": "learned", "option": "batch_size=1.5"}, ["batch_size must be an integer"]),
    ({"method": "learned", "option": "kl_weight=nan"}, ["kl_weight must be", "not nan"]),
    ({"method": "contrast", "pooling": "last"}, ["contrast", "pooling"]),
    ({"engine": "jax"}, ["--engine 'jax'", "torch"]),
    ({"engine": "llama", "dtype": "float32"}, ["--dtype", "--engine torch"]),
    ({"engine": "llama", "device_map": "auto"}, ["--device-map", "--engine torch"]),
    ({"engine": "llama", "method": "learned"}, ["learned", "--engine torch"]),
    ({"engine": "llama", "model": "some/model"}, ["some/model", "GGUF"]),
    ({"context": "4"}, ["context"]),
    ({"unsafe": None}, ["--unsafe"]),
    ({"output": None}, ["--output"]),
]


@pytest.mark.parametrize(
    ("options", "words"), MISTAKES, ids=lambda value: str(value)[:50] if value else "none"
)
def test_user_mistake_is_one_line_and_exit_code_2(options, words, extract, files):
    folder = files["--safe"].parent
    before = everything(folder)
    check_mistake(extract(**options), *words)
    assert everything(folder) == before


@pytest.mark.parametrize("option", ["model", "unsafe", "safe", "benign", "answers"])
def test_missing_file_is_an_error_with_its_name(option, extract, tmp_path):
    path = tmp_path / "missing.gguf"
    check_mistake(extract(**{option: path}), path)


def test_file_that_is_not_a_model_is_an_error_with_its_name(extract, files, tmp_path):
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"junk" * 100)
    check_mistake(extract(model=path), path, "GGUF")


def test_unwritable_output_is_refused_before_the_extraction(extract, files, tmp_path):
    check_mistake(extract(output=tmp_path / "no" / "pack.gguf"), "no folder", tmp_path / "no")
    check_mistake(extract(output=tmp_path), tmp_path, "is a folder")
    for option in ("--model", "--unsafe", "--safe"):
        before = files[option].read_bytes()
        check_mistake(extract(output=files[option]), files[option], "would replace")
        assert files[option].read_bytes() == before


def test_file_of_others_is_refused_before_the_extraction_without_force(
    interrupting, extract, files, tiny_llama, tmp_path
):
    output = files["--output"]
    ran = interrupting(None)
    for content in (tiny_llama.read_bytes(), b"my only copy"):
        output.write_bytes(content)
        check_mistake(extract(), output, "did not write", "--force")
        assert output.read_bytes() == content
    assert ran == []
    assert extract("--force", "--no-router")[0] == 0
    assert set(SteeringPack.load(output).categories) == {"hate", "malware"}
    assert extract("--no-router")[0] == 0  # the pack of the run before


def test_output_that_is_no_regular_file_is_refused(extract, tmp_path):
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for flags in ([], ["--force"]):
        check_mistake(extract(*flags, output=pipe), pipe, "a pipe")
    assert pipe.is_fifo()
    check_mistake(extract(output=tmp_path / "x.npz"), "x.npz", "ends in .gguf")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not a JSON object"),
        ('{"prompt": 1}', "needs a 'prompt'"),
        ('{"prompt": " ", "category": "hate"}', "the prompt is empty"),
        (
            json.dumps({"prompt": "word " * 400, "category": "hate"}),
            "tokens, and the context holds",
        ),
        ('{"prompt": "a", "category": " "}', "the category is blank"),
        ('{"prompt": "a", "label": "bad"}', "'label' is neither"),
    ],
)
@pytest.mark.parametrize("side", ["unsafe", "safe"])
def test_bad_line_is_an_error_with_file_and_line(line, words, side, extract, files):
    path = files[f"--{side}"]
    line = line.replace('"hate"', '"hate"' if side == "unsafe" else '""')
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    check_mistake(extract(), f"{path}, line 42: ", words)
    assert not files["--output"].exists()


def test_missing_package_is_an_error_with_its_extra(extract, monkeypatch, tmp_path):
    command = importlib.import_module("pysteer.cli.loading")
    real = command.find_spec
    missing = "torch"
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else real(name))
    for options in ({"method": "learned"}, {"dtype": "float32"}, {"model": tmp_path}):
        check_mistake(extract(**options), "torch", "pip install 'pysteer-llama[extract]'")
    assert extract()[0] == 0
    missing = "transformers"
    check_mistake(extract(engine="torch"), "transformers", "'pysteer-llama[extract]'")
    missing = "sklearn"
    check_mistake(extract(), "sklearn", "pip install 'pysteer-llama[extract-gguf]'")
    check_mistake(extract(engine="torch"), "sklearn", "pip install 'pysteer-llama[extract]'")


def test_failure_keeps_an_existing_pack_and_names_the_cache(extract, files):
    output = files["--output"]
    precious = older_pack(output)
    # One category is a multiple of the other, which shows only after the capture.
    hate = rows("harm", "hate", 8)
    write(files["--unsafe"], [*hate, *({**row, "category": "other"} for row in hate)])
    result = extract("--no-router", "--json", orthogonalise="categories", held_out=0)
    check_mistake(result, "nothing is left of the direction", "finished work is kept in")
    assert output.read_bytes() == precious
    cache = output.with_name("pack.gguf.cache")
    assert str(cache) in result[2]
    assert cache.is_dir()
    code, _, _ = extract("--no-router", held_out=0)
    assert code == 0
    assert not cache.exists()
    SteeringPack.load(output)


def test_terminal_shows_bars_with_time_left(extract, monkeypatch):
    from rich.console import Console

    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(console, "err", terminal)
    code, out, _ = extract("--json", method="contrast")
    assert code == 0
    strict_json(out)
    shown = screen.getvalue()
    for word in ("activations", "the model's own answers", "0:00:0"):
        assert word in shown


def test_bug_is_exit_code_1_and_keeps_the_cache(extract, files, monkeypatch):
    def broken(*_arguments, **_named):
        raise RuntimeError("out of memory")

    run_module = importlib.import_module("pysteer.extract.extraction")
    monkeypatch.setattr(run_module, "separation", broken)
    code, out, err = extract("--json")
    assert (code, out) == (1, "")
    first, last = err.splitlines()
    assert "finished work is kept in" in first
    assert last == "pysteer: RuntimeError: out of memory (--debug shows where)"
    assert files["--output"].with_name("pack.gguf.cache").is_dir()


# ---- Ctrl-C ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 50, 400])
def test_ctrl_c_keeps_the_cache_and_the_same_command_resumes(
    stop, interrupting, extract, files, tmp_path
):
    output = files["--output"]
    precious = older_pack(output)
    ran = interrupting(None)
    code, _, _ = extract(output=tmp_path / "whole.gguf")
    assert code == 0
    total = len(ran)
    assert total > 400

    interrupting(stop)
    code, out, err = extract("--json")
    assert (code, out) == (130, "")
    cache = tmp_path / "pack.gguf.cache"
    first, last = err.splitlines()
    assert first == f"finished work is kept in {cache}; the same command resumes from there"
    assert last == "pysteer: interrupted"
    assert cache.is_dir()
    assert output.read_bytes() == precious

    ran = interrupting(None)
    code, _, err = extract("--json")
    assert (code, err) == (0, "")
    assert len(ran) == total - stop
    assert not cache.exists()
    resumed, whole = SteeringPack.load(output), SteeringPack.load(tmp_path / "whole.gguf")
    for name, vector in whole.categories.items():
        for layer, row in vector.items():
            # The remaining rows make other batches, which round differently.
            assert resumed[name].direction(layer) == pytest.approx(row, rel=1e-3, abs=1e-5)


def test_named_cache_is_kept_and_reused(interrupting, extract, files, tmp_path):
    folder = tmp_path / "kept [1]"
    ran = interrupting(5)
    code, _, err = extract(cache=folder)
    assert code == 130
    assert str(folder) in err
    ran = interrupting(None)
    assert extract(cache=folder)[0] == 0
    assert ran
    ran = interrupting(None)
    assert extract(cache=folder)[0] == 0
    assert ran == []
    assert folder.is_dir()


def test_foreign_files_in_the_cache_survive(extract, files):
    folder = files["--output"].with_name("pack.gguf.cache")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert extract("--no-router")[0] == 0
    assert everything(folder) == ["notes.txt"]


# ---- torch -----------------------------------------------------------------------------------


@pytest.mark.torch
def test_torch_and_llama_find_the_same_directions(extract, files, cli, tmp_path):
    for engine in ("llama", "torch"):
        code, out, err = extract(
            "--json",
            engine=engine,
            output=tmp_path / f"{engine}.gguf",
            dtype="float32" if engine == "torch" else None,
        )
        assert code == 0, err  # transformers draws a bar on standard error
        assert engine in strict_json(out)["provenance"]["engine"].lower()
    code, out, _ = cli("compare", tmp_path / "llama.gguf", tmp_path / "torch.gguf", "--json")
    assert code == 0

    def cosines(part):
        if isinstance(part, dict):
            for key, value in part.items():
                if key == "cosine" and isinstance(value, float):
                    yield value
                yield from cosines(value)
        elif isinstance(part, list):
            for value in part:
                yield from cosines(value)

    found = list(cosines(strict_json(out)))
    assert found
    assert min(found) > 0.999
    check_mistake(extract(engine="torch", dtype="int8"), "--dtype 'int8'", "bfloat16")
    check_mistake(extract(engine="torch", model=tmp_path), tmp_path, "transformers cannot load")
