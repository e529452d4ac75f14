"""The steered forward pass, its losses and gradients, against plain passes with hooks."""

from contextlib import ExitStack

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from learning import START, WIDTH, examples, plain_logits, plain_losses, random_directions, tokens  # noqa: E402

from pysteer.extract.learning.descent import losses  # noqa: E402
from pysteer.extract.learning.settings import LearnedSettings  # noqa: E402
from pysteer.extract.learning.steered_forward import Span, SteeredForward  # noqa: E402

pytestmark = pytest.mark.torch

FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("site", "layers"),
    [
        ("residual", (1,)),
        ("residual", (0, 2, 3)),
        ("attention", (1, 2)),
        ("attention", (0,)),
        ("mlp", (2,)),
    ],
)
@pytest.mark.parametrize("start", [(), START], ids=["", "shared"])
def test_logits_equal_the_plain_model_with_hooks(load, family, site, layers, start):
    model = load(family)
    directions = random_directions(len(layers))
    forward = SteeredForward(model, layers, site=site, token_budget=64)
    sequences = tokens(4, seed=1, start=start)
    spans = [Span(s, len(start) + i, len(s) - i) for i, s in enumerate(sequences)]
    prepared = forward.prepare(spans, final=True)
    with torch.no_grad():
        steered, unsteered = forward.logits(prepared, directions)
    by_layer = dict(zip(layers, directions, strict=True))
    wanted = [plain_logits(model, s.tokens, site, by_layer)[s.start : s.stop] for s in spans]
    before = [plain_logits(model, s.tokens)[s.start : s.stop] for s in spans]
    assert torch.allclose(steered, torch.cat(wanted), atol=1e-4)
    assert torch.allclose(unsteered, torch.cat(before), atol=1e-4)
    assert not torch.allclose(steered, unsteered, atol=1e-2)


def test_blocks_below_the_directions_run_once(model):
    forward = SteeredForward(model, [2])
    spans = [Span(s, 0, len(s)) for s in tokens(3, seed=1)]
    ran = []
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            stack.enter_context(
                block.mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
            )
        prepared = forward.prepare(spans, final=False)
        assert ran == [0, 1, 2]
        ran.clear()
        forward.logits(prepared, torch.zeros(1, WIDTH))
        assert ran == [3]


def test_shared_start_runs_once(load):
    for family in FAMILIES:
        model = load(family)
        forward = SteeredForward(model, [1])
        sequences = tokens(3, seed=1, start=START)
        prepared = forward.prepare([Span(s, len(s) - 1, len(s)) for s in sequences], final=False)
        ran = []
        mlp = model.module("mlp", 3)
        with mlp.register_forward_hook(lambda _m, _i, out, ran=ran: ran.append(out.shape[:2])):
            forward.logits(prepared, torch.zeros(1, WIDTH))
        longest = max(map(len, sequences))
        assert ran == [(1, 20), (3, longest - 20)]


def test_block_that_reads_lower_blocks_turns_skipping_off(model, caplog):
    """Some models' upper blocks read keys and values of lower blocks."""
    lower = []

    def keep(_module, _inputs, output):
        lower.append(output)

    def mix(_module, _inputs, output):
        return output + lower.pop()

    spans = [Span(s, 0, len(s)) for s in tokens(3, seed=1)]
    directions = random_directions(1)
    with (
        model.blocks[0].mlp.register_forward_hook(keep),
        model.blocks[3].mlp.register_forward_hook(mix),
    ):
        forward = SteeredForward(model, [1])
        steered, _ = forward.logits(forward.prepare(spans, final=False), directions)
        wanted = [plain_logits(model, s.tokens, directions={1: directions[0]}) for s in spans]
    assert torch.allclose(steered, torch.cat(wanted), atol=1e-4)
    assert "slower" in caplog.text


def prepared_batch(model, forward, kl_tokens=3, start=()):
    unsafe = [(e.prompt, e.answer) for e in examples(4, seed=1, start=start)]
    benign = tokens(3, seed=2, start=start)
    answers = dict(model.answers(benign, kl_tokens - 1))
    u = [Span(p + a, len(p) - 1, len(p) + len(a) - 1) for p, a in unsafe]
    b = [Span(p + answers[i], len(p) - 1, len(p) + kl_tokens - 1) for i, p in enumerate(benign)]
    return unsafe, benign, forward.prepare(u, final=False), forward.prepare(b, final=True)


@pytest.mark.parametrize(("family", "start"), [("llama", ()), ("gemma2", START)])
def test_losses_equal_the_formula(load, family, start):
    model = load(family)
    forward = SteeredForward(model, [0, 2])
    unsafe, benign, u, b = prepared_batch(model, forward, start=start)
    directions = random_directions(2)
    settings = LearnedSettings(first_token_weight=3.0)
    ce, kl = losses(forward, u, b, directions, settings)
    by_layer = dict(zip([0, 2], directions, strict=True))
    wanted_ce, wanted_kl = plain_losses(model, unsafe, benign, by_layer, 3.0, 3)
    assert ce.item() / 4 == pytest.approx(wanted_ce, rel=1e-4)
    assert kl.item() / 3 == pytest.approx(wanted_kl, rel=1e-3)
    zero, _ = losses(forward, u, b, torch.zeros(2, WIDTH), settings)
    assert losses(forward, u, b, torch.zeros(2, WIDTH), settings)[1].item() < 1e-5
    assert abs(zero.item() - ce.item()) > 1e-2


@pytest.mark.parametrize("start", [(), START], ids=["", "shared"])
def test_gradient_equals_finite_differences(model, start):
    forward = SteeredForward(model, [0, 2])
    *_, u, b = prepared_batch(model, forward, start=start)
    settings = LearnedSettings()

    def loss(directions):
        ce, kl = losses(forward, u, b, directions, settings)
        return ce + 2 * kl

    at = random_directions(2).requires_grad_()
    loss(at).backward()
    rng = np.random.default_rng(0)
    for _ in range(3):
        # Partly along the gradient, so that the slope is not a small difference of large numbers.
        way = torch.tensor(rng.standard_normal((2, WIDTH)), dtype=torch.float32)
        way = way / way.norm() + at.grad / at.grad.norm()
        step = 1e-2
        with torch.no_grad():
            slope = (loss(at + step * way) - loss(at - step * way)) / (2 * step)
        assert slope.item() == pytest.approx((at.grad * way).sum().item(), rel=1e-2)
