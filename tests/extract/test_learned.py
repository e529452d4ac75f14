"""Learned directions, against plain forward passes with hooks of the tests' own."""

import logging

import numpy as np
import pytest

from pysteer import SteeringError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from learning import WIDTH, examples, plain_logits, plain_losses, tokens  # noqa: E402

from pysteer.extract.learning import descent  # noqa: E402
from pysteer.extract.learning.descent import losses  # noqa: E402
from pysteer.extract.learning.learn import (  # noqa: E402
    Example,
    learn,
)
from pysteer.extract.learning.settings import LearnedSettings  # noqa: E402
from pysteer.extract.learning.steered_forward import Span, SteeredForward  # noqa: E402
from pysteer.extract.torch_model import TorchModel  # noqa: E402

pytestmark = pytest.mark.torch

QUICK = LearnedSettings(
    batch_size=4,
    benign_batch_size=4,
    shared_steps=6,
    category_steps=4,
    kl_tokens=3,
    check_every=2,
)


def learned_quickly(model, settings=QUICK, seed=1, **others):
    unsafe = {"a": examples(10, seed=seed), "b": examples(12, seed=seed + 1, answer_seed=98)}
    return learn(model, unsafe, tokens(12, seed=5), layers=[1], settings=settings, **others)


def test_learning_raises_answers_and_kl_term_holds_other_prompts(model):
    unsafe = examples(10, seed=1)
    pairs = [(e.prompt, e.answer) for e in unsafe]
    benign = tokens(12, seed=5)
    base = {"batch_size": 8, "shared_steps": 25, "category_steps": 5, "kl_tokens": 3}
    found = {}
    for weight in (0.0, 3.0):
        settings = LearnedSettings(kl_weight=weight, **base)
        result = learn(model, {"a": unsafe}, benign, layers=[1, 2], settings=settings)
        directions = result.categories["a"].directions
        assert list(directions) == [1, 2]
        assert all(d.shape == (WIDTH,) and d.dtype == np.float32 for d in directions.values())
        found[weight] = plain_losses(model, pairs, benign, directions, 4.0, 3)
    before, _ = plain_losses(model, pairs, [], {}, 4.0, 3)
    assert found[0.0][0] < before - 1
    assert found[3.0][0] < before - 0.2
    assert found[3.0][1] < 0.5 * found[0.0][1]


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_attention_and_mlp_sites_are_learned(model, site):
    unsafe = examples(10, seed=1)
    result = learn(model, {"a": unsafe}, tokens(12, seed=5), layers=[2], site=site, settings=QUICK)
    direction = result.categories["a"].directions[2]
    sequences = [(e.prompt, e.answer) for e in unsafe]

    def likelihood(directions):
        total = 0.0
        for prompt, answer in sequences:
            logits = plain_logits(model, prompt + answer, site, directions).log_softmax(-1)
            rows = range(len(prompt) - 1, len(prompt + answer) - 1)
            total += sum(float(logits[r, t]) for r, t in zip(rows, answer, strict=True))
        return total

    assert likelihood({2: direction}) > likelihood({}) + 1


def test_seed_determines_directions(model):
    first, again = learned_quickly(model), learned_quickly(model)
    for category in ("a", "b"):
        one, two = first.categories[category], again.categories[category]
        assert np.array_equal(one.directions[1], two.directions[1])
        assert one.validation_loss == two.validation_loss
    other = learned_quickly(model, LearnedSettings(**{**vars(QUICK), "seed": 1}))
    assert not np.array_equal(other.categories["a"].directions[1], first.shared.directions[1])
    assert not np.array_equal(
        other.categories["a"].directions[1], first.categories["a"].directions[1]
    )


def watched(monkeypatch):
    """Record every call of `losses`: whether gradients are on, spans, directions, values."""
    calls = []

    def record(forward, unsafe, benign, directions, settings):
        ce, kl = losses(forward, unsafe, benign, directions, settings)
        spans = [p.span for p in unsafe], [p.span for p in benign]
        calls.append((torch.is_grad_enabled(), spans, directions.detach().clone(), ce + kl))
        return ce, kl

    monkeypatch.setattr(descent, "losses", record)
    return calls


def test_best_state_is_kept_and_worsening_run_stops(model, monkeypatch):
    calls = watched(monkeypatch)
    settings = LearnedSettings(
        learning_rate=1.0,
        shared_steps=60,
        category_steps=0,
        kl_tokens=3,
        check_every=1,
        patience=3,
        min_prompts=5,
    )
    data = {"a": examples(10, seed=1)}
    found = learn(model, data, tokens(10, seed=5), layers=[1], settings=settings).shared
    assert found.steps == found.best_step + 3 < 60
    unsafe = [(e.prompt, e.answer) for e in data["a"]]
    looks = {}
    for graded, (us, bs), directions, _ in calls:
        if not graded:
            pairs = [(s.tokens[: s.start + 1], s.tokens[s.start + 1 :]) for s in us]
            assert set(pairs) < set(unsafe)
            benign = [s.tokens[: s.start + 1] for s in bs]
            ce, kl = plain_losses(
                model, pairs, benign, {1: directions[0]}, settings.first_token_weight, 3
            )
            looks[ce + settings.kl_weight * kl] = directions[0].numpy()
    assert len(looks) == found.steps + 1
    assert found.validation_loss == pytest.approx(min(looks), rel=1e-3)
    assert np.allclose(found.directions[1], looks[min(looks)])


def test_training_and_validation_prompts_are_disjoint(model, monkeypatch):
    calls = watched(monkeypatch)
    # Every prompt twice, with two answers.
    twice = {name: examples(10, s) + examples(10, s, s) for name, s in (("a", 1), ("b", 2))}
    learn(model, twice, tokens(12, seed=5), layers=[1], settings=QUICK)
    seen = {True: set(), False: set()}
    for graded, (us, bs), *_ in calls:
        seen[graded] |= {s.tokens[: s.start + 1] for s in us + bs}
    assert seen[True]
    assert not seen[True] & seen[False]
    for name in twice:
        prompts = {e.prompt for e in twice[name]}
        assert len(prompts & seen[False]) == 2  # a fifth of ten, of each category


def test_small_category_without_validation_takes_all_steps(model, caplog):
    data = {"many": examples(10, seed=1), "few": examples(1, seed=2)}
    found = learn(model, data, tokens(12, seed=5), layers=[1], settings=QUICK)
    few = found.categories["few"]
    assert (few.steps, few.best_step, few.n_prompts) == (4, 4, 1)
    assert few.validation_loss is None
    assert few.validation_kl is None
    assert found.categories["many"].validation_loss is not None
    assert "'few' has 1 prompts" in caplog.text
    assert "'many'" not in caplog.text
    assert few.directions[1].any()


def test_category_without_improvement_keeps_shared_vector(model, caplog):
    # Steps that drown the model's own activations, and a high weight of the KL term.
    settings = LearnedSettings(**{**vars(QUICK), "category_rate": 1e4, "kl_weight": 3.0})
    found = learned_quickly(model, settings)
    for category in ("a", "b"):
        one = found.categories[category]
        assert (one.best_step, one.steps) == (0, 4)
        assert np.array_equal(one.directions[1], found.shared.directions[1])
    assert "these categories keep the shared vector" in caplog.text
    assert "'a', 'b'" in caplog.text


class StopError(Exception):
    """Interrupts a test."""


class Reports:
    """A `Progress` that calls a function with the units done and the total."""

    def __init__(self, report):
        self.report = report

    def start(self, stage, total, unit=""):
        done = 0

        def advance(units):
            nonlocal done
            done += units
            self.report(done, total)

        return advance


def test_finished_runs_survive_an_interruption(model, tmp_path, monkeypatch):
    whole = learned_quickly(model)
    ran = []
    descend = descent.Descent._descend
    monkeypatch.setattr(
        descent.Descent,
        "_descend",
        lambda self, title, *rest: ran.append(title) or descend(self, title, *rest),
    )

    def stop(done, _total):
        if done == 6 + 4 + 2:  # in the midst of the second category
            raise StopError

    with pytest.raises(StopError):
        learned_quickly(model, folder=tmp_path, progress=Reports(stop))
    assert ran == ["shared", "a", "b"]
    resumed = learned_quickly(model, folder=tmp_path)
    assert ran[3:] == ["b"]
    again = learned_quickly(model, folder=tmp_path)
    assert ran[4:] == []
    for found in (resumed, again):
        for one, other in (
            (found.shared, whole.shared),
            *((found.categories[c], whole.categories[c]) for c in "ab"),
        ):
            assert np.array_equal(one.directions[1], other.directions[1])
            assert {**vars(one), "directions": 0} == {**vars(other), "directions": 0}


def test_kept_runs_of_other_settings_or_damaged_are_not_used(model, tmp_path, caplog):
    before = learned_quickly(model, folder=tmp_path).categories["a"].directions[1]
    names = set(tmp_path.iterdir())
    assert len(names) == 3
    settings = LearnedSettings(**{**vars(QUICK), "learning_rate": 0.3})
    for others in ({"settings": settings}, {"seed": 3}):
        found = learned_quickly(model, folder=tmp_path, **others)
        assert not np.array_equal(found.categories["a"].directions[1], before)
    assert len(set(tmp_path.iterdir())) == 9
    for path in names:
        path.write_bytes(path.read_bytes()[:-30])
    found = learned_quickly(model, folder=tmp_path)
    assert np.array_equal(found.categories["a"].directions[1], before)
    assert caplog.text.count("is damaged") == 3


def test_category_starts_from_shared_vector(model):
    alone = LearnedSettings(**{**vars(QUICK), "category_steps": 0})
    found = learned_quickly(model, alone)
    for category in ("a", "b"):
        assert np.array_equal(found.categories[category].directions[1], found.shared.directions[1])
    assert (
        learned_quickly(model, LearnedSettings(**{**vars(QUICK), "shared_steps": 0})).shared is None
    )


def test_model_is_unchanged_even_after_an_exception(load):
    for family in ("llama", "gpt2"):
        model = load(family)
        sequence = tokens(1, seed=3)[0]
        before = plain_logits(model, sequence)
        attributes = [set(vars(m)) for m in model.model.modules()]

        def stop(done, _total):
            if done == 3:
                raise KeyboardInterrupt

        learned_quickly(model)
        with pytest.raises(KeyboardInterrupt):
            learned_quickly(model, progress=Reports(stop))
        forward = SteeredForward(model, [0, 2])
        prepared = forward.prepare([Span(sequence, 0, 2)], final=False)
        with pytest.raises(RuntimeError):  # the second direction has the wrong width
            forward.logits(prepared, torch.zeros(2, WIDTH + 1))
        assert torch.equal(plain_logits(model, sequence), before)
        assert [set(vars(m)) for m in model.model.modules()] == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_replaced_forward_is_restored(model):
    block = model.blocks[0]
    original = block.forward

    def replaced(*args, **kwargs):
        return original(*args, **kwargs)

    block.forward = replaced
    try:
        learned_quickly(model)
        assert block.forward is replaced
    finally:
        del block.forward


def test_progress_reaches_the_total(model, caplog):
    seen = []
    with caplog.at_level(logging.DEBUG):
        learned_quickly(model, progress=Reports(lambda *now: seen.append(now)))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert {t for _, t in seen} == {6 + 2 * 4}
    assert done[-1] == 14
    assert "KL" in caplog.text


def test_end_of_turn_is_the_templates(model):
    (end,) = model.end_of_turn
    assert model.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"


def test_end_of_turn_without_template_is_end_of_text(tiny_llama, caplog):
    model = TorchModel(str(tiny_llama), dtype=torch.float32)
    model.tokenizer.chat_template = None
    assert model.end_of_turn == (model.tokenizer.eos_token_id,)
    model = TorchModel(str(tiny_llama), dtype=torch.float32)
    model.tokenizer.chat_template = model.tokenizer.eos_token = None
    assert model.end_of_turn == ()
    assert "no token that ends an answer" in caplog.text


def test_long_examples_are_left_out_and_logged(model, caplog):
    long = Example(tuple(range(5, 205)), (7, 8))
    settings = LearnedSettings(**{**vars(QUICK), "max_tokens": 100})
    data = {"a": [*examples(10, seed=1), long]}
    benign = [*tokens(12, seed=5), long.prompt]
    found = learn(model, data, benign, layers=[1], settings=settings)
    short = learn(model, {"a": data["a"][:-1]}, benign[:-1], layers=[1], settings=settings)
    assert np.array_equal(found.categories["a"].directions[1], short.categories["a"].directions[1])
    assert caplog.text.count("left out 1") == 2
    with pytest.raises(SteeringError, match="'a' has no examples of at most 100 tokens"):
        learn(model, {"a": [long]}, benign, layers=[1], settings=settings)


@pytest.mark.parametrize(
    ("unsafe", "benign", "others", "message"),
    [
        ({}, [(5, 6)], {}, "no categories"),
        ({"a": []}, [(5, 6)], {}, "no examples"),
        ({"a": [Example((), (5,))]}, [(5, 6)], {}, "empty prompt or answer"),
        ({"a": [Example((5,), ())]}, [(5, 6)], {}, "empty prompt or answer"),
        ({"a": [Example((5,), (6,))]}, [], {}, "no benign prompts"),
        ({"a": [Example((5,), (6,))]}, [(5, 6)], {"layers": [4]}, r"layers \[4\]"),
        ({"a": [Example((5,), (6,))]}, [(5, 6)], {"layers": []}, r"layers \[\]"),
        ({"a": [Example((5,), (6,))]}, [(5, 6)], {"site": "head"}, "site 'head'"),
    ],
)
def test_invalid_learning_data_raises(model, unsafe, benign, others, message):
    with pytest.raises(SteeringError, match=message):
        learn(model, unsafe, benign, **{"layers": [1], "settings": QUICK, **others})


def test_loss_that_never_falls_raises(model):
    settings = LearnedSettings(**{**vars(QUICK), "learning_rate": 1e4, "shared_steps": 2})
    with pytest.raises(SteeringError, match="no step lowered"):
        learned_quickly(model, settings)


def test_loss_of_nan_raises(model):
    with (
        model.blocks[3].register_forward_hook(lambda _m, _i, output: output * float("nan")),
        pytest.raises(SteeringError, match="NaN or infinite"),
    ):
        learned_quickly(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"batch_size": 0},
        {"kl_weight": -1.0},
        {"validation_share": 1.0},
        {"first_token_weight": float("inf")},
        {"shared_steps": 0, "category_steps": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_raise(wrong):
    with pytest.raises(SteeringError, match=next(iter(wrong))):
        LearnedSettings(**wrong)


def test_typical_size_is_the_median_component(model):
    sequences = tokens(3, seed=1)
    found = SteeredForward(model, [0, 2]).typical_sizes(sequences)
    for layer in (0, 2):
        with torch.no_grad():
            values = [
                model.model(torch.tensor([s]), output_hidden_states=True).hidden_states[layer + 1]
                for s in sequences
            ]
        sizes = np.sort(np.abs(np.concatenate([v.numpy().ravel() for v in values])))
        assert found[layer] == pytest.approx(sizes[(len(sizes) - 1) // 2], rel=1e-4)
