"""A whole extraction, held against formulas on activations taken one prompt at a time."""

import json
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pysteer import BaseModel, SteeringError, SteeringPack
from pysteer.extract import router as router_module
from pysteer.extract.answers import SAFE_ANSWERS
from pysteer.extract.capture import Row
from pysteer.extract.examples import split_sides
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.run import extract, fit_pack_routers
from pysteer.extract.session import Data
from pysteer.extract.settings import ExtractSettings
from pysteer.extract.typical import SAMPLE, measure
from pysteer.prompts import Prompt

LAYERS = (1, 3)
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
# As the method found them.
RAW = {"scale": 0.0, "mask_massive": None, "router": False, "layers": LAYERS}


def prompts(side, category, count, *, listed=None, seed=0):
    """Made-up texts, told apart by their first word."""
    rng = np.random.default_rng([seed, *f"{side} {category}".encode()])
    words = ["the", "of", "and", "a", "in", "it", "sea", "oil", "ring", "all"]
    found = []
    for i in range(count):
        text = " ".join([side, *category.split(), *rng.choice(words, rng.integers(2, 7))])
        found.append(
            Prompt(
                f"{text} {i}",
                listed if listed is not None else category,
                response=" ".join(["so", side, *rng.choice(words, 3)]),
                pair_id=str(i),
            )
        )
    return found


UNSAFE = [*prompts("harm", "hate", 11), *prompts("harm", "malware", 7)]
TWINS = [*prompts("calm", "malware", 7), *prompts("calm", "hate", 11)]
GENERIC = prompts("please", "any", 9, listed="")
MATCHED_DATA = Data(UNSAFE, TWINS)
GENERIC_DATA = Data(UNSAFE, GENERIC)


@pytest.fixture(scope="module")
def capture(tiny_llama):
    # Rows of several sequences a batch, and more than one batch.
    with closing(
        LlamaCapture(tiny_llama, n_ctx=256, token_budget=128, n_threads=1, n_threads_batch=1)
    ) as capture:
        yield capture


def tokens(capture, text):
    return capture.llm.tokenize(text.encode(), add_bos=False, special=True)


def alone(capture, chosen, *, site="residual", layers=LAYERS, pooling="user"):
    """Each prompt's activations, taken alone: float64 of shape (prompts, layers, n_embd)."""
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
    """The pack's directions are `expected(category)`, of shape (layers, n_embd)."""
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
def test_directions_are_the_methods_formula_on_what_is_not_held_out(
    name, matched, capture, tmp_path
):
    options, formula, paired = FORMULAS[name]
    data = MATCHED_DATA if matched else GENERIC_DATA
    chosen = ExtractSettings(method=name.split()[0], options=options, **RAW)
    pack = extract(capture, data, chosen, cache=tmp_path)
    sides = sides_of(data, paired=paired)
    assert sum(map(len, sides.held_out_unsafe.values())) == 3

    def expected(name):
        unsafe, safe = (alone(capture, side) for side in (sides.unsafe[name], sides.safe_for(name)))
        return per_layer(formula, unsafe, safe)

    # A principal component or a fit magnifies what batches round differently.
    check_directions(pack, expected, tolerance=2e-4 if name in ("mean", "pruned") else 5e-3)
    assert pack.provenance["safe_data"] == ("matched" if matched else "generic")


@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("pooling", ["last", "user", "response"])
def test_sites_and_poolings_arrive(site, pooling, capture, tmp_path):
    chosen = ExtractSettings(site=site, pooling=pooling, **{**RAW, "held_out": 0.0})
    pack = extract(capture, GENERIC_DATA, chosen, cache=tmp_path)
    assert {vector.site for vector in pack.categories.values()} == {site}

    def expected(name):
        unsafe = [p for p in UNSAFE if p.category == name]
        found = (alone(capture, p, site=site, pooling=pooling) for p in (unsafe, GENERIC))
        return per_layer(mean, *found)

    check_directions(pack, expected)


def test_guided_by_labels(capture, tmp_path):
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
    # Safe prompts without labels are what they are said to be.
    pack = extract(capture, Data(unsafe, GENERIC), chosen, cache=tmp_path)
    check_directions(pack, lambda name: expected(name, GENERIC))


def test_guided_by_a_judge_of_the_models_own_answers(capture, tmp_path):
    unsafe = [replace(p, response=None) for p in UNSAFE]
    read = {}

    def judge(prompt, answer):
        read[prompt] = answer
        return prompt[-1] in "0123"

    chosen = ExtractSettings(method="guided", **RAW, held_out=0.0)
    pack = extract(capture, Data(unsafe, GENERIC), chosen, cache=tmp_path, judge=judge)

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
    """The model's own answer: for each token everything anew, and the largest logit."""
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


def test_contrast_is_between_two_answers_to_the_same_prompts(capture, tmp_path):
    k = 3
    answers = [Prompt("", "malware", "certainly not that")]
    data = Data(UNSAFE, GENERIC, answers=answers)
    chosen = ExtractSettings(method="contrast", response_tokens=k, **RAW)
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


# ---- what is done to directions --------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(capture, tmp_path_factory):
    """Directions as `mean` finds them, category to (layers, n_embd)."""
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


def test_the_default_scale_is_a_share_of_the_residual_norm(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, scale=None)
    norms = np.array([[pack.residual_norm[layer]] for layer in LAYERS])
    check_directions(pack, lambda name: unit(raw[name]) * norms * 0.4 / np.sqrt(2))
    assert pack.provenance["fraction_of_residual_norm"] == pytest.approx(0.4 / np.sqrt(2))


def test_the_residual_norm_is_that_of_the_users_tokens(capture, tmp_path):
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


def test_a_scale_that_is_given(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, scale=0.25, site="mlp")
    for vector in pack.categories.values():
        for layer, direction in vector.items():
            wanted = 0.25 * pack.residual_norm[layer]
            assert np.linalg.norm(direction) == pytest.approx(wanted, rel=1e-5)


def test_unit_norm_keeps_the_norms(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, unit_norm=True, scale=None)
    check_directions(pack, lambda name: unit(raw[name]))
    for name, rows in raw.items():
        kept = pack.provenance["norms"][name]
        assert [kept[str(layer)] for layer in LAYERS] == pytest.approx(
            np.linalg.norm(rows, axis=1), rel=1e-3
        )


def test_top_k(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, top_k=5)
    check_directions(pack, lambda name: largest(raw[name], 5))


def test_massive_dimensions_are_masked_before_the_largest_are_chosen(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, mask_massive=1.3, top_k=5)
    masked = pack.provenance["massive_dimensions"]
    assert all(0 < len(masked[str(layer)]) < 60 for layer in LAYERS)

    def expected(name):
        rows = raw[name].copy()
        for i, layer in enumerate(LAYERS):
            rows[i, list(masked[str(layer)])] = 0
        return largest(rows, 5)

    check_directions(pack, expected)
    # Those dimensions are indeed the ones that are large on single tokens.
    size = np.abs(alone(capture, GENERIC)).mean(0)
    for i, layer in enumerate(LAYERS):
        inside = np.isin(np.arange(size.shape[1]), masked[str(layer)])
        assert size[i, inside].mean() > 1.2 * size[i, ~inside].mean()


def test_orthogonalised_against_each_other(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, orthogonalise="categories")

    def expected(name):
        mine, other = raw[name], unit(raw["malware" if name == "hate" else "hate"])
        return mine - (mine * other).sum(1, keepdims=True) * other

    check_directions(pack, expected)


def test_orthogonalised_against_the_benign_mean(capture, raw, tmp_path):
    pack = with_settings(capture, tmp_path, orthogonalise="benign")
    benign = unit(alone(capture, sides_of(GENERIC_DATA).safe[""]).mean(0))
    check_directions(
        pack, lambda name: raw[name] - (raw[name] * benign).sum(1, keepdims=True) * benign
    )


def test_typical_looks_at_single_tokens_of_the_range_and_never_at_the_first():
    rows = [Row(tuple(range(10 * i, 10 * i + 8)), start, stop) for i, (start, stop) in enumerate(
        [(0, 4), (2, 5), (0, 1), (7, 8)]
    )]  # fmt: skip
    asked = []

    def activations(chosen, site, layers):
        asked.extend(chosen)
        assert (site, layers) == ("mlp", (2, 5))
        values = np.array([[row.tokens[-1], -row.tokens[-1]] for row in chosen], np.float32)
        return np.stack([values, 2 * values], axis=1)

    typical = measure(activations, rows, site="mlp", layers=(2, 5), seed=3)
    assert len(asked) == SAMPLE
    last = []
    for row in asked:
        of = rows[row.tokens[0] // 10]
        at = len(row.tokens) - 1
        assert row == Row(of.tokens[: at + 1], at, at + 1)
        assert of.start <= at < of.stop
        assert at > 0 or of.stop == 1
        last.append(row.tokens[-1])
    assert len({row.tokens[0] for row in asked}) == len(rows)
    assert typical.norm[5] == pytest.approx(2 * np.sqrt(2) * np.median(last))
    assert typical.magnitude[2] == pytest.approx(np.mean(last) * np.ones(2))


# ---- figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [MATCHED_DATA, GENERIC_DATA], ids=["matched", "generic"])
def test_separation_is_the_share_of_held_out_pairs_in_order(data, capture, tmp_path):
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


def test_provenance_is_json_and_says_where_the_pack_is_from(capture, tmp_path):
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


# ---- the same again --------------------------------------------------------------------------


def contents(pack):
    return {
        name: {layer: row.tobytes() for layer, row in vector.items()}
        for name, vector in pack.categories.items()
    }


def test_the_same_seed_gives_the_same_pack_and_another_another(capture, tmp_path):
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


# ---- interrupted, resumed, reused ------------------------------------------------------------

WIDTH = 6


class StopError(Exception):
    """What a test interrupts with."""


@dataclass
class FakeCapture:
    """A model whose activations are made of its tokens; it counts what it runs, and can fail."""

    stop_after: int = 10**9
    identity: str = "a file"
    ran: Counter = field(default_factory=Counter)
    weights = "fake"
    base_model = BaseModel("fake", "", 4, WIDTH, 300)
    sites = {"residual": (0, 1, 2, 3), "attention": (1, 2), "mlp": ()}  # noqa: RUF012
    n_ctx = 200
    has_chat_template = True

    def prompt_tokens(self, prompt):
        return (290, *prompt.encode(), 291, 292)

    def response_tokens(self, text):
        return tuple(text.encode())

    def text(self, tokens):
        return bytes(tokens).decode()

    def answers(self, prompts, n_tokens):
        for index, prompt in enumerate(prompts):
            self._count(("answer", prompt))
            yield index, tuple(b"sure thing: " + bytes(prompt[1:6]))[:n_tokens]

    def activations(self, rows, *, site, layers):
        for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i)):
            row = rows[index]
            self._count((row, site, tuple(layers)))
            found = []
            for layer in layers:
                start = 1 if site == "residual" else 2
                part = bytes(t % 256 for t in row.tokens[: row.stop])
                seed = zlib.crc32(part + repr((row.start, site, layer)).encode())
                found.append(np.random.default_rng(seed).normal(start, 1, WIDTH))
                found[-1][0] += 3 * (b"harm" in part) + (b"hate" in part)
            yield index, np.array(found, np.float32)

    def _count(self, what):
        if self.stop_after == 0:
            raise StopError
        self.stop_after -= 1
        self.ran[what] += 1


METHODS = [
    {"method": "mean"},
    {"method": "guided"},
    {"method": "contrast", "response_tokens": 4},
    {"method": "lda", "site": "attention"},
    {"method": "pca", "pooling": "response"},
]


def fake_run(capture, folder, chosen, **given):
    judge = (lambda prompt, _: prompt[-1] in "0246") if chosen.method == "guided" else None
    unsafe = [replace(p, response=None) for p in UNSAFE] if judge else UNSAFE
    data = Data(unsafe, TWINS)
    return extract(capture, data, chosen, cache=folder, judge=judge, **given)


@hypothesis_settings(max_examples=20, deadline=None)
@given(which=st.sampled_from(METHODS), stops=st.lists(st.integers(0, 60), max_size=4))
def test_an_interrupted_extraction_goes_on_where_it_stopped(which, stops, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    chosen = ExtractSettings(router=False, layers=(1, 2), **which)
    whole = FakeCapture()
    expected = fake_run(whole, tmp_path_factory.mktemp("whole"), chosen)
    ran = Counter()
    for stop in stops:
        capture = FakeCapture(stop_after=stop)
        try:
            pack = fake_run(capture, folder, chosen)
        except StopError:
            assert sum(capture.ran.values()) == stop
        else:
            check_same(pack, expected)
        ran += capture.ran
    capture = FakeCapture()
    check_same(fake_run(capture, folder, chosen), expected)
    assert ran + capture.ran == whole.ran
    assert set(whole.ran.values()) == {1}


def check_same(pack, expected):
    assert pack.provenance == expected.provenance
    assert pack.residual_norm == expected.residual_norm
    for name, vector in expected.categories.items():
        for layer, row in vector.items():
            # Running means are summed in another order: in float64, then rounded.
            assert pack[name].direction(layer) == pytest.approx(row, rel=1e-6, abs=1e-7)


def test_an_exception_in_the_progress_callback_loses_nothing(tmp_path):
    class Reporter:
        def start(self, _what, _total, _unit):
            done = []

            def progress(units, rows):
                done.append(rows)
                if len(done) == 5:
                    raise KeyboardInterrupt

            return progress

    chosen = ExtractSettings(router=False, layers=(1, 2))
    ran = Counter()
    interrupted = 0
    for _ in range(100):
        capture = FakeCapture()
        try:
            fake_run(capture, tmp_path / "1", chosen, report=Reporter())
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            ran += capture.ran
    whole = FakeCapture()
    fake_run(whole, tmp_path / "2", chosen)
    assert interrupted > 10
    # The model may have been one row ahead of the progress.
    assert ran.keys() == whole.ran.keys()
    assert sum(ran.values()) <= sum(whole.ran.values()) + interrupted


def tail_of(row):
    """What `FakeCapture` puts behind a message."""
    return len(row.tokens) - 2, len(row.tokens)


def test_a_pack_s_router_is_what_is_fitted_without_directions(tmp_path):
    settings = ExtractSettings(layers=(1, 2), gates=("margin", "probe"), seed=3)
    benign = prompts("hello", "any", 12, listed="")
    data = Data(UNSAFE, TWINS, benign=benign)
    pack = extract(FakeCapture(), data, settings, cache=tmp_path / "1")
    capture = FakeCapture()
    (alone,) = fit_pack_routers(capture, [data], cache=tmp_path / "2", gates=settings.gates, seed=3)
    assert alone == pack.router
    assert list(alone.gates) == ["margin", "probe"]
    # Each prompt's message and suffix are all that ran, at the layers that it looks at.
    every = {p.prompt for p in [*UNSAFE, *TWINS, *benign]}
    assert {layers for _, _, layers in capture.ran} == {(0, 1, 2)}
    assert capture.ran.total() == 2 * len(every)
    assert {(row.start, row.stop) for row, *_ in capture.ran} == {
        span for row, *_ in capture.ran for span in ((1, len(row.tokens) - 2), tail_of(row))
    }
    again = FakeCapture()
    fit_pack_routers(again, [data], cache=tmp_path / "2", seed=4)
    assert not again.ran  # activations are kept


def test_routers_fitted_together_are_those_fitted_alone_and_no_prompt_runs_twice(tmp_path):
    benign = prompts("hello", "any", 12, listed="")
    whole, part = Data(UNSAFE, TWINS, benign), Data(UNSAFE[:-1], TWINS[:-1], benign[:9])
    capture = FakeCapture()
    together = fit_pack_routers(capture, [whole, part], cache=tmp_path / "together")
    every = {p.prompt for p in [*UNSAFE, *TWINS, *benign]}
    assert capture.ran.total() == 2 * len(every)
    alone = [
        fit_pack_routers(FakeCapture(), [data], cache=tmp_path / f"{i}")[0]
        for i, data in enumerate((whole, part))
    ]
    assert together == alone
    assert together[0] != together[1]


def test_twins_share_a_group_and_those_of_a_category_are_look_alikes(tmp_path, monkeypatch):
    found = {}
    original = router_module.fit_router

    def watch(h, labels, **options):
        found.update(options, labels=labels, h=h)
        return original(h, labels, **options)

    monkeypatch.setattr(router_module, "fit_router", watch)
    unsafe = [*UNSAFE, *(replace(p, pair_id=None) for p in prompts("harm", "hate", 3, seed=9))]
    benign = prompts("hello", "other", 12)
    safe = [*TWINS, *GENERIC]
    fit_pack_routers(
        FakeCapture(),
        [Data(unsafe, safe, benign)],
        cache=tmp_path,
        false_positive_rate=0.3,
        max_leak=0.2,
        look_alike_rate=0.4,
    )
    limits = ("false_positive_rate", "max_leak", "look_alike_rate")
    assert [found[name] for name in limits] == [0.3, 0.2, 0.4]
    order = [*{(p.prompt, p.category): p for p in unsafe}.values(), *safe, *benign]
    assert found["labels"] == [p.category if "harm" in p.prompt else "" for p in order]
    assert found["look_alikes"] == ["calm" in p.prompt for p in order]
    by_group = {}
    for group, prompt in zip(found["groups"], order, strict=True):
        by_group.setdefault(group, set()).add(prompt.pair_id)
    assert all(len(ids) == 1 for ids in by_group.values())
    assert len([1 for p in order if p.pair_id is None]) == sum(
        ids == {None} for ids in by_group.values()
    )
    reads = found["reads"]
    capture = FakeCapture()
    for index in (0, len(order) - 1):
        tokens = capture.prompt_tokens(order[index].prompt)
        spans = {"user": (1, len(tokens) - 2), "suffix": tail_of(Row(tokens, 0, 1))}
        for at, read in enumerate(reads):
            row = Row(tokens, *spans[read.pooling])
            ((_, alone),) = capture.activations([row], site="residual", layers=[read.layer])
            np.testing.assert_array_equal(found["h"][index, at], alone[0])


@pytest.mark.parametrize("method", ["mean", "lda"])
def test_the_router_changes_no_direction_and_no_row_runs_twice(method, tmp_path):
    packs, captures = [], []
    for router in (True, False):
        captures.append(FakeCapture())
        chosen = ExtractSettings(method=method, router=router, layers=(1, 2))
        packs.append(fake_run(captures[-1], tmp_path / str(router), chosen))
    assert contents(packs[0]) == contents(packs[1])
    assert packs[0].router is not None
    assert packs[1].router is None
    with_router = Counter(row for row, *_ in captures[0].ran.elements())
    assert set(with_router.values()) == {1}
    suffixes = {row for row in with_router if (row.start, row.stop) == tail_of(row)}
    assert len(suffixes) == len({p.prompt for p in [*UNSAFE, *TWINS]})
    assert with_router.keys() - suffixes == {row for row, *_ in captures[1].ran}


def test_what_the_router_saw_is_not_taken_for_another_site(tmp_path):
    found = []
    for router in (True, False):
        chosen = ExtractSettings(router=router, site="attention")
        found.append(contents(fake_run(FakeCapture(), tmp_path / str(router), chosen)))
    assert found[0] == found[1]


def test_a_model_file_that_changed_is_run_again(tmp_path):
    chosen = ExtractSettings(router=False, layers=(1, 2), method="contrast")
    first, second = FakeCapture(), FakeCapture(identity="the file, changed")
    fake_run(first, tmp_path, chosen)
    fake_run(second, tmp_path, chosen)
    assert first.ran == second.ran


def test_other_settings_reuse_what_they_share(tmp_path):
    fake_run(FakeCapture(), tmp_path, ExtractSettings(layers=(1, 2)))
    capture = FakeCapture()
    fake_run(capture, tmp_path, ExtractSettings(layers=(1, 2), method="lda", unit_norm=True))
    assert not capture.ran


def test_progress_ends_where_it_said(tmp_path):
    stages = []

    class Reporter:
        def start(self, what, total, unit):
            stage = [what, total, unit, 0]
            stages.append(stage)

            def progress(units, rows):
                assert rows >= 0
                stage[3] += units

            return progress

    for which in METHODS:
        chosen = ExtractSettings(layers=(1, 2), **which)
        fake_run(FakeCapture(), tmp_path / which["method"], chosen, report=Reporter())
    assert {unit for _, _, unit, _ in stages} == {"tokens", "answers"}
    for stage in stages:
        assert stage[1] == stage[3] > 0, stage


# ---- data that is not as it should be --------------------------------------------------------


def refused(words, data=GENERIC_DATA, folder=None, judge=None, capture=None, **given):
    """The message is right, and the model was asked for nothing."""
    capture = capture or FakeCapture()
    with pytest.raises(SteeringError, match=words):
        extract(capture, data, ExtractSettings(**given), cache=folder, judge=judge)
    assert not capture.ran


def at(row, line, **changed):
    return replace(row, source=f"u.jsonl, line {line}", **changed)


def test_what_would_stop_the_method_is_said_before_anything_is_computed(tmp_path):
    last = len(UNSAFE) - 1
    bad = [*UNSAFE[:-1], at(UNSAFE[last], 18, response=None)]
    here = {"folder": tmp_path}
    line = r"^u.jsonl, line 18: "
    for seed in range(4):  # whether the prompt is held out or not
        refused(f"{line}.*no response", Data(bad, GENERIC), pooling="response", seed=seed, **here)
        labelled = [replace(p, label="unsafe") for p in bad[:-1]] + bad[-1:]
        refused(f"{line}has no label", Data(labelled, GENERIC), method="guided", seed=seed, **here)
        full = [*UNSAFE[:-1], at(UNSAFE[last], 18, prompt="x" * 195)]
        refused(f"{line}.*answer of 8", Data(full, GENERIC), method="contrast", seed=seed, **here)
    long = [*UNSAFE[:-1], at(UNSAFE[last], 18, prompt="x" * 150, response=None)]
    judge = {"judge": lambda *_: True, "method": "guided"}
    refused(f"{line}.*answer of 64", Data(long, GENERIC), **judge, **here)
    empty = [*UNSAFE[:-1], at(UNSAFE[last], 18, prompt=" ")]
    refused(f"{line}the prompt is empty", Data(empty, GENERIC), **here)
    enormous = [*GENERIC, at(GENERIC[0], 18, prompt="x" * 300)]
    refused(f"{line}303 tokens, and the context holds 200", Data(UNSAFE, enormous), **here)
    benign = [at(GENERIC[0], 18, prompt="x" * 300)]
    refused(f"{line}303 tokens", Data(UNSAFE, GENERIC, benign=benign), **here)
    refused("shares a pair_id", Data([replace(p, pair_id=None) for p in UNSAFE], TWINS),
            method="pca", **here)  # fmt: skip
    refused("no safe prompts of category 'hate'", matched=True, **here)
    answers = [Prompt("", response="no"), at(Prompt("", response=" "), 18)]
    refused(f"{line}needs a 'response'", Data(UNSAFE, GENERIC, answers=answers),
            method="contrast", **here)  # fmt: skip
    refused("answers are for contrast and learned, not for mean",
            Data(UNSAFE, GENERIC, answers=answers[:1]), **here)  # fmt: skip
    refused("judge is for guided, not for mean", judge=lambda *_: True, **here)
    refused(r"no site residual at layers \[4\]; it has layers 0 to 3", layers=(1, 4), **here)
    refused("this model has no site mlp", site="mlp", **here)
    assert list(tmp_path.iterdir()) == []


def test_a_category_of_one_prompt_is_extracted_and_logged(tmp_path, caplog):
    data = Data([*UNSAFE, *prompts("harm", "theft", 1)], GENERIC)
    capture = FakeCapture()
    pack = extract(capture, data, ExtractSettings(layers=(1, 2)), cache=tmp_path)
    assert set(pack.categories) == {"hate", "malware", "theft"}
    assert set(pack.router.categories) == {"hate", "malware"}
    assert "category theft has 1 prompts, too few to hold any out" in caplog.text
    assert "theft has 1 prompts of the 5 that a router needs" in caplog.text
    assert "theft" not in pack.provenance["separation"]


def test_a_category_of_one_prompt_where_more_are_needed(tmp_path):
    data = Data([*UNSAFE, *prompts("harm", "theft", 1)], GENERIC)
    with pytest.raises(SteeringError, match="category 'theft', layer 1, method lda: 1 unsafe"):
        extract(FakeCapture(), data, ExtractSettings(method="lda", layers=(1, 2)), cache=tmp_path)


def test_categories_of_wildly_unequal_size_are_logged(tmp_path, caplog):
    data = Data([*prompts("harm", "hate", 30), *prompts("harm", "theft", 2)], GENERIC)
    extract(FakeCapture(), data, ExtractSettings(layers=(1, 2), router=False), cache=tmp_path)
    assert "the categories differ widely in size: {'hate': 24, 'theft': 2}" in caplog.text


@pytest.mark.parametrize(
    "data", [Data(UNSAFE[:4], GENERIC), Data(UNSAFE, GENERIC[:4])], ids=["unsafe", "safe"]
)
def test_too_few_prompts_for_a_router_is_logged(data, tmp_path, caplog):
    pack = extract(FakeCapture(), data, ExtractSettings(layers=(1, 2)), cache=tmp_path)
    assert pack.router is None
    assert "no router is fitted: that takes 5 prompts" in caplog.text


def test_benign_prompts_are_for_the_router_alone(tmp_path, caplog):
    benign = prompts("hello", "any", 6, listed="")
    data = [Data(UNSAFE, GENERIC), Data(UNSAFE, GENERIC, benign=benign)]
    packs = [
        extract(FakeCapture(), each, ExtractSettings(layers=(1, 2)), cache=tmp_path)
        for each in data
    ]
    assert contents(packs[0]) == contents(packs[1])
    assert packs[1].router.train_counts[0] > packs[0].router.train_counts[0]
    assert caplog.text == ""
    extract(FakeCapture(), data[1], ExtractSettings(layers=(1, 2), router=False), cache=tmp_path)
    assert "benign prompts are for the router alone" in caplog.text


def test_repeats_change_nothing_and_are_logged(tmp_path, caplog):
    twice = Data([*UNSAFE, *UNSAFE[3:5]], [*GENERIC, GENERIC[0]])
    packs = [
        extract(FakeCapture(), data, ExtractSettings(layers=(1, 2)), cache=tmp_path / str(i))
        for i, data in enumerate((GENERIC_DATA, twice))
    ]
    assert contents(packs[0]) == contents(packs[1])
    assert "2 unsafe prompts repeat others" in caplog.text
    assert "1 safe prompts repeat others" in caplog.text
    caplog.clear()
    benign = prompts("hello", "any", 6, listed="")
    once, again = (
        extract(
            FakeCapture(),
            Data(UNSAFE, GENERIC, benign=each),
            ExtractSettings(layers=(1, 2)),
            cache=tmp_path / "2",
        )
        for each in (benign, [*benign, *benign, *GENERIC])
    )
    assert once.router.train_counts.tolist() == again.router.train_counts.tolist()
    assert "6 benign prompts repeat others" in caplog.text


def test_what_is_unsafe_and_safe_is_logged(tmp_path, caplog):
    extract(
        FakeCapture(),
        Data(UNSAFE, [*GENERIC, replace(UNSAFE[0], category="")]),
        ExtractSettings(layers=(1, 2), router=False),
        cache=tmp_path,
    )
    assert "1 prompts are both unsafe and safe" in caplog.text


def test_answers_that_fit_nothing_are_logged(tmp_path, caplog):
    answers = [
        Prompt("", "hate", "no"),
        Prompt(UNSAFE[0].prompt, response="no"),
        Prompt("", "heat", "no", source="a.jsonl, line 3"),
        Prompt("another prompt", response="no"),
    ]
    data = Data(UNSAFE, GENERIC, answers=answers)
    chosen = ExtractSettings(method="contrast", layers=(1, 2), router=False)
    extract(FakeCapture(), data, chosen, cache=tmp_path)
    assert "2 answers fit no prompt and no category, the first at a.jsonl, line 3" in caplog.text


def test_a_judge_that_confirms_nothing_is_an_error(tmp_path):
    chosen = ExtractSettings(method="guided", layers=(1, 2), router=False)
    with pytest.raises(SteeringError, match=r"none of \d+ answers of hate unsafe.*method mean"):
        extract(FakeCapture(), MATCHED_DATA, chosen, cache=tmp_path, judge=lambda *_: False)


def test_a_model_that_refuses_by_itself_leaves_no_contrast(tmp_path, caplog):
    class Refusing(FakeCapture):
        def answers(self, prompts, n_tokens):
            for index, _ in enumerate(prompts):
                yield index, self.response_tokens("no, never")[:n_tokens]

    chosen = ExtractSettings(method="contrast", layers=(1, 2), router=False)
    data = Data(UNSAFE, GENERIC, answers=[Prompt("", response="no, never and not now")])
    with pytest.raises(SteeringError, match="category 'hate': the model complies with none"):
        extract(Refusing(), data, chosen, cache=tmp_path)
    assert "15 of 15 own answers are no contrast" in caplog.text


def test_learned_without_torch_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pysteer.extract.torch_capture", None)
    refused(r"torch; run: pip install 'pysteer\[extract\]'", method="learned", folder=tmp_path)


def test_the_same_prompts_on_every_side_give_no_direction(tmp_path):
    same = [replace(p, category="") for p in UNSAFE if p.category == "hate"]
    data = Data([p for p in UNSAFE if p.category == "hate"], same)
    chosen = ExtractSettings(layers=(1, 2), held_out=0.0, router=False)
    with pytest.raises(SteeringError, match="category 'hate', layer 1, method mean: no direction"):
        extract(FakeCapture(), data, chosen, cache=tmp_path)


def test_a_sample_does_for_the_router_of_very_many_prompts(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(router_module, "MAX_PROMPTS", 25)
    pack = extract(FakeCapture(), GENERIC_DATA, ExtractSettings(layers=(1, 2)), cache=tmp_path)
    assert "the router is fitted to 25 of 27 prompts" in caplog.text
    assert pack.router.train_counts.sum() <= 25


def test_a_model_without_a_chat_template_is_told_of(tmp_path, tiny_llama, caplog):
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
def test_torch_and_llama_give_the_same_pack_and_learned_composes(tiny_llama, capture, tmp_path):
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


def test_learned_needs_torch(capture, tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(SteeringError, match="learned directions need torch; use --engine torch"):
        extract(capture, GENERIC_DATA, ExtractSettings(method="learned"), cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_pack_can_be_written_and_read(capture, tmp_path):
    pack = extract(capture, GENERIC_DATA, ExtractSettings(layers=LAYERS), cache=tmp_path / "c")
    pack.save(tmp_path / "p.gguf")
    again = SteeringPack.load(tmp_path / "p.gguf")
    assert contents(again) == contents(pack)
    assert again.provenance == pack.provenance
    assert again.router == pack.router
