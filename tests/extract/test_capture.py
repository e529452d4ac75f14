"""Captures agree with one-by-one transformers, with each other, and on the tokens of a prompt."""

from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import shipped
from pysteer.chat.form import form_of
from pysteer.chat.spans import message_span
from pysteer.errors import HookError, SteeringError
from pysteer.extract.capture import Row, pooled_row, run_once, token_batches
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.llama.batch import DecodeBatch

FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2"]
N_LAYER, N_EMBD = 4, 64
LAYERS = list(range(N_LAYER))
# llama.cpp's CPU backend reads GELU from a table in half precision.
LLAMA_TOLERANCE = {"gemma2": 8e-3, "gpt2": 8e-3}
TEXTS = ["a", "the ring of the sea", "tell me of it and of all the rest in there " * 3, "oil"]


def exact_cache():
    import llama_cpp

    return {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}


@pytest.fixture(scope="module")
def torch_model(tiny_model):
    models = {}

    def get(family):
        import torch

        from pysteer.extract.torch_model import TorchModel

        if family not in models:
            models[family] = TorchModel(str(tiny_model(family)), dtype=torch.float32)
        return models[family]

    return get


@pytest.fixture
def llama(tiny_model):
    opened = []

    def get(family, **arguments):
        opened.append(LlamaCapture(tiny_model(family), **{**exact_cache(), **arguments}))
        return opened[-1]

    yield get
    for capture in opened:
        capture.close()


def rows_for(capture):
    """Return rows of all poolings, of differing lengths."""
    ends = form_of(capture.prompt_tokens)
    prompts = [capture.prompt_tokens(text) for text in TEXTS]
    response = capture.response_tokens("of the sea")
    return [
        pooled_row(prompt, response, pooling, message_span(prompt, ends))
        for prompt in prompts
        for pooling in ("last", "prompt", "user", "response", (2, 9))
    ]


def collected(capture, rows, site, layers=LAYERS):
    found = np.full((len(rows), len(layers), N_EMBD), np.nan, np.float32)
    for index, means in capture.activations(rows, site=site, layers=layers):
        assert np.isnan(found[index]).all()  # each once
        found[index] = means
    return found


def one_by_one(model, row, site, layer):
    """Return transformers' means for one unpadded prompt; residuals by `output_hidden_states`."""
    import torch

    ids = torch.tensor([row.tokens])
    if site == "residual" and layer + 1 < N_LAYER:
        with torch.no_grad():
            states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        rows = states[layer + 1][0]
    else:  # the last hidden state comes after the final norm; other sites do not come at all
        kept = []
        block = model.blocks[layer]
        names = {"attention": ("self_attn", "attn"), "mlp": ("mlp",)}
        module = block
        if site != "residual":
            module = next(getattr(block, n) for n in names[site] if hasattr(block, n))
        handle = module.register_forward_hook(lambda _m, _i, output: kept.append(output))
        with torch.no_grad():
            model.model(ids, use_cache=False)
        handle.remove()
        rows = (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0]
    return rows[row.start : row.stop].double().mean(0).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_single_rows(torch_model, family, site):
    from pysteer.extract.torch_capture import TorchCapture

    model = torch_model(family)
    capture = TorchCapture(model, token_budget=200)
    assert capture.sites[site] == tuple(LAYERS)
    rows = rows_for(capture)
    assert len({len(row.tokens) for row in rows}) > 4
    found = collected(capture, rows, site)
    for row, means in zip(rows, found, strict=True):
        for layer in LAYERS:
            expected = one_by_one(model, row, site, layer)
            np.testing.assert_allclose(means[layer], expected, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_start_runs_once_and_equals_single_rows(torch_model, family, site):
    """A start longer than Gemma's tiny sliding window, and ranges before, across and behind it."""
    from pysteer.extract.torch_capture import TorchCapture

    model = torch_model(family)
    capture = TorchCapture(model, token_budget=60)
    start = tuple(range(40, 64))
    ends = [tuple(range(70, 70 + n)) for n in (1, 2, 9, 17, 5, 5, 30)]
    rows = [
        Row(start + end, first, last)
        for end in ends
        for first, last in ((0, 3), (20, 25), (24, 24 + len(end)))
    ]
    ran = []
    handle = model.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: ran.append(tuple(inputs[0].shape))
    )
    found = collected(capture, rows, site)
    handle.remove()
    assert ran[0] == (1, 24)
    # The trial runs two rows whole; afterwards the start never runs again.
    assert ran[1] == (2, 54)
    assert sum(n * length for n, length in ran[3:]) < 3 * sum(map(len, ends)) * 1.3
    for row, means in zip(rows, found, strict=True):
        for layer in LAYERS:
            expected = one_by_one(model, row, site, layer)
            np.testing.assert_allclose(means[layer], expected, atol=1e-4)


@pytest.mark.torch
def test_model_with_wrong_cache_runs_rows_whole(torch_model, monkeypatch, caplog):
    from pysteer.extract.torch_capture import TorchCapture

    model = torch_model("llama")
    rows = [Row((*range(40, 64), 70, n), 0, 26) for n in (71, 72, 73)]
    from transformers import DynamicCache

    def forget(cache, repeats):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys * 0, layer.values * 0
        original(cache, repeats)

    original = DynamicCache.batch_repeat_interleave
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", forget)
    caplog.set_level("INFO")
    found = collected(TorchCapture(model), rows, "residual")
    assert "activations change" in caplog.text
    for row, means in zip(rows, found, strict=True):
        for layer in LAYERS:
            expected = one_by_one(model, row, "residual", layer)
            np.testing.assert_allclose(means[layer], expected, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_and_torch_agree(torch_model, llama, family, site):
    from pysteer.extract.torch_capture import TorchCapture

    torch_capture, llama_capture = TorchCapture(torch_model(family)), llama(family)
    rows = rows_for(torch_capture)
    if family != "phi3":  # there transformers puts a space of its own behind special tokens
        assert rows == rows_for(llama_capture)
    assert torch_capture.base_model == llama_capture.base_model
    ours = collected(torch_capture, rows, site)
    theirs = collected(llama_capture, rows, site)
    assert np.abs(ours).max() > 0.5
    np.testing.assert_allclose(theirs, ours, atol=LLAMA_TOLERANCE.get(family, 1e-3))


@pytest.mark.torch
def test_capture_returns_only_wanted_layers(torch_model, llama):
    from pysteer.extract.torch_capture import TorchCapture

    for capture in (TorchCapture(torch_model("llama")), llama("llama")):
        rows = rows_for(capture)
        everything = collected(capture, rows, "residual")
        some = collected(capture, rows, "residual", [1, 2])
        np.testing.assert_allclose(some, everything[:, [1, 2]], atol=1e-6)


@pytest.mark.torch
def test_capture_leaves_the_model_unchanged(torch_model):
    import torch

    from pysteer.extract.torch_capture import TorchCapture

    model = torch_model("qwen3")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model.model(ids).logits
        collected(TorchCapture(model), rows_for(TorchCapture(model)), "mlp", [0])
        after = model.model(ids).logits
    assert torch.equal(before, after)


@pytest.mark.torch
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_are_greedy(torch_model, llama, family):
    """Batched and padded in torch, one by one in llama.cpp, against an argmax loop."""
    import torch

    model = torch_model(family)
    prompts = [model.prompt_tokens(text) for text in TEXTS]
    ends = {model.tokenizer.eos_token_id}
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                ids.pop()
                break
        expected.append(tuple(ids[len(prompt) :]))
    assert dict(model.answers(prompts, 6)) == dict(enumerate(expected))
    assert dict(llama(family).answers(prompts, 6)) == dict(enumerate(expected))


def test_special_tokens_in_a_response_are_text(llama):
    capture = llama("llama")
    special = capture.prompt_tokens("a")[0]  # <|im_start|>
    assert special not in capture.response_tokens("<|im_start|>")
    assert capture.text(capture.response_tokens("of the sea")) == "of the sea"


@pytest.mark.torch
def test_special_tokens_in_a_response_are_text_in_torch_too(torch_model, llama):
    model = torch_model("llama")
    text = "of <|im_end|> it"
    assert model.response_tokens(text) == llama("llama").response_tokens(text)


@pytest.mark.torch
def test_torch_and_llama_tokenize_the_default_template_alike(
    default_model, torch_model, monkeypatch
):
    """A byte-level tokenizer and a system message, on prompts of every kind."""
    from transformers import AutoModelForCausalLM

    from pysteer.extract.torch_model import TorchModel

    # No token depends on the weights, which take long to read: those of a tiny model stand in.
    weights = torch_model("llama").model
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: weights)
    model = TorchModel(str(default_model))
    texts = [p.prompt for rows in shipped.demo_prompts() for p in rows]
    texts += ["", " a  b\n\nc ", "\n\nA list:\n- 1\n", "naïve café 日本語 🙂", "<|im_end|>"]
    with closing(LlamaCapture(default_model)) as capture:
        for text in texts:
            assert model.prompt_tokens(text) == capture.prompt_tokens(text)
            assert model.response_tokens(text) == capture.response_tokens(text)
            assert capture.text(capture.response_tokens(text)) == text
        assert tuple(map(len, form_of(capture.prompt_tokens))) == (24, 6)


def test_response_tokens_follow_prompt_tokens_exactly(llama):
    """The response's tokens follow the prompt's, even where joint tokenization differs."""
    capture = llama("llama")
    prompt, response = capture.prompt_tokens("the r"), capture.response_tokens("ing of it")
    span = message_span(prompt, form_of(capture.prompt_tokens))
    row = pooled_row(prompt, response, "response", span)
    assert row.tokens[: row.start] == prompt
    assert row.tokens[row.start : row.stop] == response


def test_users_message_is_found_in_the_template(llama):
    capture = llama("llama")
    tokens = capture.prompt_tokens("the sea")
    start, stop = message_span(tokens, form_of(capture.prompt_tokens))
    assert capture.text(tokens[start:stop]) == "the sea"
    assert start > 0
    assert stop < len(tokens)


def test_without_a_template_prompts_run_as_they_are(tiny_model, tmp_path, caplog):
    data = tiny_model("llama").read_bytes()
    assert data.count(b"tokenizer.chat_template") == 1
    path = tmp_path / "bare.gguf"
    path.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_tempXXXX"))
    with closing(LlamaCapture(path)) as capture:
        assert not capture.has_chat_template
        assert "no chat template" in caplog.text
        bos, *rest = capture.prompt_tokens("the sea")
        assert bos == capture.llm.token_bos()
        assert tuple(rest) == capture.response_tokens("the sea")
        assert tuple(map(len, form_of(capture.prompt_tokens))) == (1, 0)


def test_recurrent_model_is_captured_row_by_row(llama):
    capture = llama("mamba")
    rows = rows_for(capture)
    found = collected(capture, rows, "residual")
    for row, means in zip(rows, found, strict=True):
        alone = capture.llm.capture(row.tokens, pool="mean", span=(row.start, row.stop))["residual"]
        np.testing.assert_allclose(means, np.stack([alone[i] for i in LAYERS]), atol=1e-5)
    with pytest.raises(HookError, match="no attention"):
        collected(capture, rows, "attention")


@pytest.mark.torch
def test_local_folder_loads_and_its_identity_changes_with_it(tmp_path):
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "the", "sea", "is", "blue"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    config = transformers.GPTNeoXConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )

    def loaded(seed):
        torch.manual_seed(seed)
        model = transformers.GPTNeoXForCausalLM(config)
        model.save_pretrained(tmp_path)
        return model, TorchCapture(TorchModel(str(tmp_path), dtype=torch.float32))

    model, capture = loaded(1)
    assert vars(capture.base_model) == {
        "architecture": "gptneox",
        "name": tmp_path.name,
        "n_layer": 2,
        "n_embd": 16,
        "n_vocab": 6,
    }
    tokens = capture.prompt_tokens("the sea is blue")
    assert tokens == (2, 3, 4, 5)
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    [(_, found)] = capture.activations([Row(tokens, 1, 4)], site="residual", layers=[0])
    np.testing.assert_allclose(found[0], states[1][0, 1:4].mean(0), atol=1e-5)
    _, again = loaded(2)
    assert again.identity != capture.identity
    assert TorchModel(str(tmp_path), dtype=torch.float32).identity == again.identity


def test_context_and_threads_follow_the_arguments(tiny_model):
    import llama_cpp

    with closing(LlamaCapture(tiny_model("llama"), n_ctx=256, n_threads=1)) as capture:
        assert capture.n_ctx == 256
        assert llama_cpp.llama_n_threads(capture.llm.ctx) == 1
        assert llama_cpp.llama_n_threads_batch(capture.llm.ctx) == 1


@pytest.mark.torch
def test_unloadable_model_raises_with_name(tmp_path):
    from pysteer.extract.torch_model import TorchModel

    with pytest.raises(SteeringError, match="no such file"):
        TorchModel(str(tmp_path / "none.gguf"))
    with pytest.raises(SteeringError, match="cannot load"):
        TorchModel(str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(SteeringError, match="cannot load"):
        TorchModel(str(tmp_path / "bad.gguf"))
    with pytest.raises(SteeringError, match=r"bad\.gguf"):
        LlamaCapture(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("pooling", "response", "expected"),
    [
        ("last", (), Row((1, 2, 3, 4, 5), 4, 5)),
        ("prompt", (), Row((1, 2, 3, 4, 5), 0, 5)),
        ("user", (9,), Row((1, 2, 3, 4, 5), 2, 4)),
        ("suffix", (9,), Row((1, 2, 3, 4, 5), 4, 5)),
        ("response", (8, 9), Row((1, 2, 3, 4, 5, 8, 9), 5, 7)),
        ((1, 3), (), Row((1, 2, 3, 4, 5), 1, 3)),
        ((4, 99), (8,), Row((1, 2, 3, 4, 5, 8), 4, 6)),
    ],
)
def test_pooling_selects_expected_tokens(pooling, response, expected):
    assert pooled_row((1, 2, 3, 4, 5), response, pooling, (2, 4)) == expected


def test_suffix_is_the_templates_end_or_the_last_token():
    prompt = (1, 2, 3, 4, 5, 6)
    assert pooled_row(prompt, (), "suffix", (1, 3)) == Row(prompt, 3, 6)
    assert pooled_row(prompt, (), "suffix", (1, 6)) == Row(prompt, 5, 6)


ranges = st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4)).map(
    lambda t: Row((t[0],) * 8, t[1], t[1] + t[2])
)


@given(st.lists(ranges, max_size=12), st.booleans())
def test_rows_with_equal_tokens_run_once(rows, disjoint):
    groups = run_once(rows, disjoint=disjoint)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        assert len({rows[i].tokens for i in group}) == 1
        at = [n for i in group for n in range(rows[i].start, rows[i].stop)]
        assert not disjoint or len(at) == len(set(at))
    if not disjoint:
        assert len(groups) == len({row.tokens for row in rows})


@pytest.mark.parametrize("engine", ["llama", pytest.param("torch", marks=pytest.mark.torch)])
def test_several_ranges_of_a_prompt_take_one_pass_and_equal_single_rows(
    engine, llama, torch_model, monkeypatch
):
    tokens = [tuple(range(40 + n, 60 + 2 * n)) for n in range(6)]
    rows = [Row(t, 3, 9) for t in tokens] + [Row(t, 9, len(t)) for t in tokens]
    if engine == "llama":
        capture = llama("llama", n_ctx=256, token_budget=128)
        decoded = []
        decode = DecodeBatch.decode
        monkeypatch.setattr(
            DecodeBatch,
            "decode",
            lambda batch, context: decoded.append(batch.n_rows) or decode(batch, context),
        )
    else:
        from pysteer.extract.torch_capture import TorchCapture

        model = torch_model("llama")
        capture = TorchCapture(model, token_budget=128)
        decoded = []
        handle = model.model.get_input_embeddings().register_forward_hook(
            lambda _module, inputs, _output: decoded.append(inputs[0].numel())
        )
    found = collected(capture, rows, "residual")
    # Padding and the trial of a shared start take a few tokens more; a second pass takes far more.
    assert sum(decoded) < 1.6 * sum(map(len, tokens))
    if engine == "torch":
        handle.remove()
    for row, means in zip(rows, found, strict=True):
        ((_, alone),) = capture.activations([row], site="residual", layers=LAYERS)
        np.testing.assert_allclose(means, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [("response", "no response"), ((5, 9), "no text"), ("mean", "unknown pooling")],
)
def test_empty_range_raises(pooling, message):
    with pytest.raises(SteeringError, match=message):
        pooled_row((1, 2, 3, 4, 5), (), pooling, (2, 4))


@given(
    st.lists(st.integers(1, 40), max_size=30),
    st.integers(1, 60),
    st.integers(1, 8),
    st.booleans(),
)
def test_batches_hold_each_row_once_within_budget(lengths, budget, max_rows, padded):
    batches = list(token_batches(lengths, budget, max_rows, padded=padded))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        total = max(sizes) * len(sizes) if padded else sum(sizes)
        assert len(batch) <= max_rows
        assert total <= budget or len(batch) == 1
