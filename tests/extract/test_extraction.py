"""Whole extractions, against formulas on activations that are taken one prompt at a time."""

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from extraction import (
    GENERIC,
    GENERIC_DATA,
    MATCHED_DATA,
    UNSAFE,
    FakeJudge,
    contents,
    prompts,
)

from pysteer import SteeringError, SteeringPack
from pysteer.extract.answers import SAFE_ANSWERS
from pysteer.extract.capture import Row
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.settings import ExtractSettings
from pysteer.extract.sides import split_sides
from pysteer.extract.typical import SAMPLE, measure
from pysteer.prompts import Prompt

HELPERS = Path(__file__).parents[1] / "helpers"
LAYERS = (1, 3)
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
# Settings that keep directions as the method found them.
RAW = {"scale": 0.0, "mask_massive": None, "router": False, "layers": LAYERS}


@pytest.fixture(scope="module")
def capture(tiny_llama):
    # Several sequences a batch, and several batches.
    with closing(
        LlamaCapture(tiny_llama, n_ctx=256, token_budget=128, n_threads=1, n_threads_batch=1)
    ) as capture:
        yield capture


def tokens(capture, text):
    return capture.llm.tokenize(text.encode(), add_bos=False, special=True)


def alone(capture, chosen, *, site="residual", layers=LAYERS, pooling="user"):
    """Return activations, one prompt at a time: float64 of shape (prompts, layers, n_embd)."""
    found = []
    for prompt in chosen:
        row = tokens(capture, f"{HEAD}{prompt.prompt}{TAIL}")
        span = len(tokens(capture, HEAD)), len(row) - len(tokens(capture, TAIL))
        if pooling == "last":
            span = len(row) - 1, len(row)
        elif pooling == "response":
            answer = capture.llm.tokenize(prompt.response.encode(), add_bos=False)
            row, span = row + answer, (len(row), len(row) + len(answer))
        means = capture.llm.capture(row, sites=[site], layers=layers, pool="mean", span=span)
        found.append([means[site][layer] for layer in layers])
    return np.array(found, np.float64)


def sides_of(data, *, matched=None, paired=False, held_out=0.2, seed=0):
    return split_sides(
        data.unsafe, data.safe, matched=matched, paired=paired, held_out=held_out, seed=seed
    )


def check_directions(pack, expected, *, tolerance=2e-4, layers=LAYERS):
    """Check that the pack's directions are `expected(category)`, of shape (layers, n_embd)."""
    for name, vector in pack.categories.items():
        assert vector.layers == layers
        for layer, wanted in zip(layers, expected(name), strict=True):
            error = np.linalg.norm(vector.direction(layer) - wanted)
            assert error <= tolerance * np.linalg.norm(wanted), (name, layer)


def per_layer(formula, unsafe, safe):
    return [formula(unsafe[:, i], safe[:, i]) for i in range(unsafe.shape[1])]


# ---- each method -----------------------------------------------------------------------------


def mean(u, s):
    return s.mean(0) - u.mean(0)


def above_median(differences):
    norms = np.linalg.norm(differences, axis=1)
    return differences[norms > np.median(norms)].mean(0)


def along_first(rows):
    axis = np.linalg.svd(rows, full_matrices=False)[2][0]
    return lambda omega: axis * (axis @ omega)


def logistic(u, s):
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate([u, s])
    scale = rows.std(0)
    fit = LogisticRegression(class_weight="balanced", max_iter=1000).fit(
        (rows - rows.mean(0)) / scale, np.repeat([0, 1], [len(u), len(s)])
    )
    axis = fit.coef_[0] / scale
    return axis * (axis @ mean(u, s)) / (axis @ axis)


def lda(u, s):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fit = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
    axis = fit.fit(np.concatenate([u, s]), np.repeat([0, 1], [len(u), len(s)])).coef_[0]
    return axis * (axis @ mean(u, s)) / (axis @ axis)


def centred(rows):
    return rows - rows.mean(0)


FORMULAS = {
    "mean": ({}, mean, False),
    "pruned": ({}, lambda u, s: above_median(s.mean(0) - u), False),
    "pruned paired": ({"paired": True}, lambda u, s: above_median(s - u), True),
    "pca": ({}, lambda u, s: along_first(s - u)(mean(u, s)), True),
    "pca centred": (
        {"variant": "centred"},
        lambda u, s: along_first(centred(np.concatenate([u, s])))(mean(u, s)),
        False,
    ),
    "pca difference": (
        {"variant": "difference"},
        lambda u, s: along_first(centred(s - u))(mean(u, s)),
        True,
    ),
    "logistic": ({}, logistic, False),
    "lda": ({}, lda, False),
}


@pytest.mark.parametrize(
    ("name", "matched"),
    [(n, m) for n, (_, _, paired) in FORMULAS.items() for m in (True, False) if m or not paired],
)
def test_directions_equal_the_formula_on_used_prompts(name, matched, capture, tmp_path):
    options, formula, paired = FORMULAS[name]
    data = MATCHED_DATA if matched else GENERIC_DATA
    chosen = ExtractSettings(method=name.split()[0], options=options, **RAW)
    pack = extract(capture, data, chosen, cache=tmp_path)
    sides = sides_of(data, paired=paired)
    assert sum(map(len, sides.held_out_unsafe.values())) == 3

    def expected(name):
        unsafe, safe = (alone(capture, side) for side in (sides.unsafe[name], sides.safe_for(name)))
        return per_layer(formula, unsafe, safe)

    # Principal components and fits magnify rounding, which differs between batches.
    check_directions(pack, expected, tolerance=2e-4 if name in ("mean", "pruned") else 5e-3)
    assert pack.provenance["safe_data"] == ("matched" if matched else "generic")


@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("pooling", ["last", "user", "response"])
def test_sites_and_poolings_select_activations(site, pooling, capture, tmp_path):
    chosen = ExtractSettings(site=site, pooling=pooling, **{**RAW, "held_out": 0.0})
    pack = extract(capture, GENERIC_DATA, chosen, cache=tmp_path)
    assert {vector.site for vector in pack.categories.values()} == {site}

    def expected(name):
        unsafe = [p for p in UNSAFE if p.category == name]
        found = (alone(capture, p, site=site, pooling=pooling) for p in (unsafe, GENERIC))
        return per_layer(mean, *found)

    check_directions(pack, expected)


def test_guided_averages_prompts_with_confirming_labels(capture, tmp_path):
    unsafe = [replace(p, label="safe" if i % 3 else "unsafe") for i, p in enumerate(UNSAFE)]
    safe = [replace(p, label="unsafe" if i % 4 else "safe") for i, p in enumerate(GENERIC)]
    chosen = ExtractSettings(method="guided", **RAW, held_out=0.0)

    def expected(name, safe):
        bad = [p for p in unsafe if p.category == name and p.label == "unsafe"]
        return per_layer(mean, alone(capture, bad), alone(capture, safe))

    pack = extract(capture, Data(unsafe, safe), chosen, cache=tmp_path)
    good = [p for p in safe if p.label == "safe"]
    check_directions(pack, lambda name: expected(name, good))
    assert pack.provenance["confirmed"] == {"unsafe": {"hate": 4, "malware": 2}, "safe": {"": 3}}
    # Safe prompts without labels count as safe.
    pack = extract(capture, Data(unsafe, GENERIC), chosen, cache=tmp_path)
    check_directions(pack, lambda name: expected(name, GENERIC))


def test_guided_averages_prompts_whose_own_answers_a_judge_confirms(capture, tmp_path):
    unsafe = [replace(p, response=None) for p in UNSAFE]
    read = {}

    def is_safe(prompt, answer):
        read[prompt] = answer
        return prompt[-1] not in "0123"

    chosen = ExtractSettings(method="guided", **RAW, held_out=0.0)
    pack = extract(capture, Data(unsafe, GENERIC), chosen, cache=tmp_path, judge=FakeJudge(is_safe))

    def expected(name):
        bad = [p for p in UNSAFE if p.category == name and p.prompt[-1] in "0123"]
        good = [p for p in GENERIC if p.prompt[-1] not in "0123"]
        return per_layer(mean, alone(capture, bad), alone(capture, good))

    check_directions(pack, expected)
    assert read[GENERIC[0].prompt] == GENERIC[0].response
    row = capture.prompt_tokens(unsafe[0].prompt)
    ((_, answer),) = capture.answers([row], 64)
    assert read[unsafe[0].prompt] == capture.text(answer)


def greedy(capture, row, count):
    """Return the model's own answer: for each token the whole sequence, and the largest logit."""
    answer = []
    for _ in range(count):
        capture.llm.reset()
        capture.llm.eval([*row, *answer])
        logits = np.ctypeslib.as_array(
            capture.llm._ctx.get_logits_ith(-1), shape=(capture.llm.n_vocab(),)
        )
        token = int(np.argmax(logits))
        if token == capture.llm.token_eos():
            break
        answer.append(token)
    return answer


def test_contrast_is_between_two_answers_to_equal_prompts(capture, tmp_path):
    k = 3
    answers = [Prompt("", "malware", "certainly not that")]
    data = Data(UNSAFE, GENERIC, answers=answers)
    chosen = ExtractSettings(method="contrast", options={"response_tokens": k}, **RAW)
    pack = extract(capture, data, chosen, cache=tmp_path)
    used = [p for group in sides_of(data).unsafe.values() for p in group]
    differences = {"hate": [], "malware": []}
    for i, prompt in enumerate(used):
        row = tokens(capture, f"{HEAD}{prompt.prompt}{TAIL}")
        text = (
            answers[0].response
            if prompt.category == "malware"
            else SAFE_ANSWERS[i % len(SAFE_ANSWERS)]
        )
        refusing = capture.llm.tokenize(text.encode(), add_bos=False)[:k]
        both = []
        for answer in (greedy(capture, row, k), refusing):
            found = capture.llm.capture(
                row + answer, layers=LAYERS, pool="mean", span=(len(row), len(row) + len(answer))
            )["residual"]
            both.append(np.array([found[layer] for layer in LAYERS], np.float64))
        differences[prompt.category].append(both[1] - both[0])
    check_directions(pack, lambda name: np.mean(differences[name], axis=0))


# ---- post-processing -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(capture, tmp_path_factory):
    """The directions of `mean`, category to (layers, n_embd)."""
    pack = extract(
        capture, GENERIC_DATA, ExtractSettings(**RAW), cache=tmp_path_factory.mktemp("raw")
    )
    return {
        name: np.array([vector.direction(layer) for layer in LAYERS], np.float64)
        for name, vector in pack.categories.items()
    }


def with_settings(capture, folder, **given):
    return extract(capture, GENERIC_DATA, ExtractSettings(**{**RAW, **given}), cache=folder)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def largest(rows, k):
    rows = rows.copy()
    for row in rows:
        row[np.argsort(-np.abs(row))[k:]] = 0
    return rows


def test_default_scale_is_a_share_of_the_residual_norm(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, scale=None)
    norms = np.array([[pack.residual_norm[layer]] for layer in LAYERS])
    check_directions(pack, lambda name: unit(raw[name]) * norms * 0.4 / np.sqrt(2))
    assert pack.provenance["fraction_of_residual_norm"] == pytest.approx(0.4 / np.sqrt(2))


def test_residual_norm_is_of_the_users_tokens(capture, tmp_path):
    for site in ("residual", "attention"):  # always of the residual stream
        pack = with_settings(capture, tmp_path, site=site)
        for layer in LAYERS:
            norms = []
            for prompt in [*UNSAFE, *GENERIC]:
                row = tokens(capture, f"{HEAD}{prompt.prompt}{TAIL}")
                span = len(tokens(capture, HEAD)), len(row) - len(tokens(capture, TAIL))
                found = capture.llm.capture(row, layers=[layer], pool="all", span=span)
                norms += list(np.linalg.norm(found["residual"][layer], axis=1))
            assert pack.residual_norm[layer] == pytest.approx(np.median(norms), rel=0.1)


def test_given_scale_is_a_share_of_the_residual_norm(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, scale=0.25, site="mlp")
    for vector in pack.categories.values():
        for layer, direction in vector.items():
            wanted = 0.25 * pack.residual_norm[layer]
            assert np.linalg.norm(direction) == pytest.approx(wanted, rel=1e-5)


def test_unit_norm_records_the_norms(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, unit_norm=True, scale=None)
    check_directions(pack, lambda name: unit(raw[name]))
    for name, rows in raw.items():
        kept = pack.provenance["norms"][name]
        assert [kept[str(layer)] for layer in LAYERS] == pytest.approx(
            np.linalg.norm(rows, axis=1), rel=1e-3
        )


def test_top_k_keeps_the_largest_dimensions(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, top_k=5)
    check_directions(pack, lambda name: largest(raw[name], 5))


def test_massive_dimensions_are_masked_before_top_k(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, mask_massive=1.3, top_k=5)
    masked = pack.provenance["massive_dimensions"]
    assert all(0 < len(masked[str(layer)]) < 60 for layer in LAYERS)

    def expected(name):
        rows = raw[name].copy()
        for i, layer in enumerate(LAYERS):
            rows[i, list(masked[str(layer)])] = 0
        return largest(rows, 5)

    check_directions(pack, expected)
    # Those dimensions are large on single tokens, too.
    size = np.abs(alone(capture, GENERIC)).mean(0)
    for i, layer in enumerate(LAYERS):
        inside = np.isin(np.arange(size.shape[1]), masked[str(layer)])
        assert size[i, inside].mean() > 1.2 * size[i, ~inside].mean()


def test_orthogonalise_categories_removes_the_others(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, orthogonalise="categories")

    def expected(name):
        mine, other = raw[name], unit(raw["malware" if name == "hate" else "hate"])
        return mine - (mine * other).sum(1, keepdims=True) * other

    check_directions(pack, expected)


def test_orthogonalise_benign_removes_the_benign_mean(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, orthogonalise="benign")
    benign = unit(alone(capture, sides_of(GENERIC_DATA).safe[""]).mean(0))
    check_directions(
        pack, lambda name: raw[name] - (raw[name] * benign).sum(1, keepdims=True) * benign
    )


def test_typical_measures_single_tokens_after_the_first():
    rows = [Row(tuple(range(10 * i, 10 * i + 8)), start, stop) for i, (start, stop) in enumerate(
        [(0, 4), (2, 5), (0, 1), (7, 8)]
    )]  # fmt: skip
    asked = []

    def activations(chosen, site, layers):
        asked.extend(chosen)
        assert (site, layers) == ("mlp", (2, 5))
        at = [row.tokens[row.start] for row in chosen]
        values = np.array([[token, -token] for token in at], np.float32)
        return np.stack([values, 2 * values], axis=1)

    typical = measure(activations, rows, site="mlp", layers=(2, 5), seed=3)
    assert len(asked) == SAMPLE
    last = []
    for row in asked:
        of = rows[row.tokens[0] // 10]
        at = row.start
        assert row == Row(of.tokens[: len(row.tokens)], at, at + 1)
        assert of.start <= at < of.stop
        assert at > 0 or of.stop == 1
        last.append(row.tokens[at])
    sequences = {row.tokens for row in asked}
    assert len(sequences) == len(rows)  # each runs once, up to the last of its tokens
    ends = {row.tokens: max(r.stop for r in asked if r.tokens == row.tokens) for row in asked}
    assert all(len(tokens) == end for tokens, end in ends.items())
    assert typical.norm[5] == pytest.approx(2 * np.sqrt(2) * np.median(last))
    assert typical.magnitude[2] == pytest.approx(np.mean(last) * np.ones(2))


# ---- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [MATCHED_DATA, GENERIC_DATA], ids=["matched", "generic"])
def test_separation_is_share_of_held_out_pairs_in_order(data, capture, tmp_path):
    chosen = ExtractSettings(**RAW, held_out=0.4)
    pack = extract(capture, data, chosen, cache=tmp_path)
    sides = sides_of(data, held_out=0.4)
    for name, vector in pack.categories.items():
        unsafe = alone(capture, sides.held_out_unsafe[name])
        safe = alone(capture, sides.held_out_safe_for(name))
        for i, layer in enumerate(LAYERS):
            u, s = (rows[:, i] @ vector.direction(layer) for rows in (unsafe, safe))
            share = (s[:, None] > u[None, :]).mean()
            assert pack.provenance["separation"][name][str(layer)] == pytest.approx(share)


def test_few_prompts_do_not_wait_for_scikit_learn():
    """Neither a router nor held-out figures are possible, and the import takes seconds."""
    code = (
        "import sys; from pathlib import Path; from tempfile import mkdtemp; "
        f"sys.path.insert(0, {str(HELPERS)!r}); "
        "from extraction import UNSAFE, GENERIC, FakeCapture; "
        "from pysteer.extract import Data, extract; "
        "extract(FakeCapture(), Data(UNSAFE[:3], GENERIC[:3]), cache=Path(mkdtemp())); "
        "print('sklearn' in sys.modules, 'scipy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"


def test_provenance_is_json_with_settings_data_and_versions(capture, tmp_path):
    data = Data([*UNSAFE, UNSAFE[0]], GENERIC, benign=prompts("hello", "any", 6, listed=""))
    pack = extract(capture, data, ExtractSettings(layers=LAYERS, seed=4), cache=tmp_path / "1")
    found = json.loads(json.dumps(dict(pack.provenance)))
    assert found["method"] == "mean"
    assert found["settings"]["seed"] == 4
    assert found["layers"] == list(LAYERS)
    assert {name: part["prompts"] for name, part in found["data"].items()} == {
        "unsafe": 18, "safe": 9, "benign": 6,
    }  # fmt: skip
    assert found["counts"] == {
        "hate": {"used": 9, "held_out": 2},
        "malware": {"used": 6, "held_out": 1},
    }
    assert found["engine"] == "LlamaCapture"
    assert found["weights"] == capture.weights
    assert {"pysteer", "llama-cpp-python", "scikit-learn"} <= found["versions"].keys()
    assert len(found["date"]) == 10
    assert pack.base_model == capture.base_model
    assert set(pack.router.categories) == {"hate", "malware"}
    other = extract(
        capture, replace(data, safe=GENERIC[1:]), ExtractSettings(**RAW), cache=tmp_path / "2"
    )
    hashes = [p.provenance["data"] for p in (pack, other)]
    assert hashes[0]["safe"]["sha256"] != hashes[1]["safe"]["sha256"]
    assert hashes[0]["unsafe"]["sha256"] == hashes[1]["unsafe"]["sha256"]


# ---- seeds -----------------------------------------------------------------------------------


def test_seed_determines_the_pack(capture, tmp_path):
    packs = [
        extract(
            capture, GENERIC_DATA, ExtractSettings(layers=LAYERS, seed=seed), cache=tmp_path / n
        )
        for n, seed in (("1", 5), ("2", 5), ("3", 6))
    ]
    assert contents(packs[0]) == contents(packs[1])
    assert packs[0].provenance == packs[1].provenance
    assert packs[0].residual_norm == packs[1].residual_norm
    for i, pack in enumerate(packs):
        pack.save(tmp_path / f"{i}.gguf")
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    assert contents(packs[0]) != contents(packs[2])


# ---- a model without a chat template ----------------------------------------------------------


def test_model_without_chat_template_is_logged(tmp_path, tiny_llama, caplog):
    from gguf import GGUFReader

    path = tmp_path / "plain.gguf"
    content = bytearray(tiny_llama.read_bytes())
    key = b"tokenizer.chat_template"
    content[content.index(key) : content.index(key) + len(key)] = b"tokenizer.chat_templatx"
    path.write_bytes(content)
    assert "tokenizer.chat_template" not in GGUFReader(path).fields
    with closing(LlamaCapture(path, n_ctx=256, n_threads=1, n_threads_batch=1)) as capture:
        assert "has no chat template; prompts are taken as they are" in caplog.text
        pack = extract(capture, GENERIC_DATA, ExtractSettings(**RAW), cache=tmp_path / "cache")

        def expected(name):
            found = []
            used = sides_of(GENERIC_DATA)
            for chosen in (used.unsafe[name], used.safe_for(name)):
                rows = []
                for prompt in chosen:
                    row = capture.llm.tokenize(
                        prompt.prompt.encode()
                    )  # with BOS, which is left out
                    means = capture.llm.capture(row, layers=LAYERS, pool="mean", span=(1, len(row)))
                    rows.append([means["residual"][layer] for layer in LAYERS])
                found.append(np.array(rows, np.float64))
            return per_layer(mean, *found)

        check_directions(pack, expected)


# ---- torch -----------------------------------------------------------------------------------


@pytest.mark.torch
def test_torch_and_llama_agree_and_learned_composes(tiny_llama, capture, tmp_path):
    import torch

    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = TorchCapture(TorchModel(str(tiny_llama), dtype=torch.float32))
        chosen = ExtractSettings(layers=LAYERS)
        one, two = (
            extract(each, MATCHED_DATA, chosen, cache=tmp_path) for each in (capture, other)
        )
        assert one.base_model == two.base_model
        for name, vector in one.categories.items():
            for layer, row in vector.items():
                error = np.linalg.norm(two[name].direction(layer) - row)
                assert error < 2e-3 * np.linalg.norm(row)

        learned = ExtractSettings(method="learned", layers=(2,), top_k=9, router=False)
        pack = extract(other, MATCHED_DATA, learned, cache=tmp_path)
        for name, vector in pack.categories.items():
            assert np.count_nonzero(vector.direction(2)) == 9
            assert pack.provenance["learned"]["categories"][name]["steps"] > 0
        assert "fraction_of_residual_norm" not in pack.provenance
    finally:
        torch.set_num_threads(threads)


def test_learned_without_torch_capture_raises(capture, tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(SteeringError, match="learned directions need torch; use --engine torch"):
        extract(capture, GENERIC_DATA, ExtractSettings(method="learned"), cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_extracted_pack_survives_saving(capture, tmp_path):
    pack = extract(capture, GENERIC_DATA, ExtractSettings(layers=LAYERS), cache=tmp_path / "c")
    pack.save(tmp_path / "p.gguf")
    again = SteeringPack.load(tmp_path / "p.gguf")
    assert contents(again) == contents(pack)
    assert again.provenance == pack.provenance
    assert again.router == pack.router
