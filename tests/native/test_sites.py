"""Sites of each family against transformers, captured and steered."""

import ctypes
import re
from contextlib import closing, contextmanager

import llama_cpp
import numpy as np
import pytest
from states import LAYER, components_of, reading_pack

from pysteer import (
    HookedLlama,
    HookError,
    SteeredLlama,
    SteeringError,
    SteeringPack,
    SteeringVector,
)
from pysteer.pack.operators import Operator

N_LAYER, N_EMBD = 4, 64
ATTENTION_FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]
# llama.cpp's CPU backend reads GELU from a table in half precision.
TOLERANCE = {"gemma2": 8e-3, "gemma3": 8e-3, "gpt2": 8e-3}
TOKENS = [int(t) for t in np.random.default_rng(8).integers(5, 320, 21)]
EXACT_CACHE = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
ARGUMENTS = {"n_ctx": 64, "n_ubatch": 8, "logits_all": True, "verbose": False, **EXACT_CACHE}


class Reference:
    """A GGUF file in transformers, with forward hooks on blocks, attention and MLP."""

    def __init__(self, path):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        inner = self.model.base_model
        self.blocks = inner.h if hasattr(inner, "h") else inner.layers

    def module(self, site, layer):
        block = self.blocks[layer]
        if site == "residual":
            return block
        if site == "mlp":
            return block.mlp
        return block.attn if hasattr(block, "attn") else block.self_attn

    @contextmanager
    def hooked(self, site, layer, function):
        def hook(module, inputs, output):
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        handle = self.module(site, layer).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def logits(self):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()

    def rows(self, site, layer):
        kept = []

        def keep(rows):
            kept.append(rows[0].detach().clone())
            return rows

        with self.hooked(site, layer, keep):
            self.logits()
        return kept[0].numpy()


@pytest.fixture(scope="module")
def reference(tiny_model):
    cache = {}

    def get(family):
        if family not in cache:
            cache[family] = Reference(tiny_model(family))
        return cache[family]

    return get


@pytest.mark.torch
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_captured_rows_equal_those_of_transformers(tiny_model, reference, family, site):
    with closing(HookedLlama(tiny_model(family), **ARGUMENTS)) as llm:
        assert llm.sites[site] == tuple(range(N_LAYER))
        captured = llm.capture(TOKENS, sites=[site], pool="all")[site]
    for layer in range(N_LAYER):
        expected = reference(family).rows(site, layer)
        assert np.abs(expected).max() > 0.1
        error = np.abs(captured[layer] - expected).max()
        assert error < TOLERANCE.get(family, 2e-4), f"layer {layer}"


@pytest.mark.torch
@pytest.mark.parametrize(
    ("site", "layer"),
    [("residual", 0), ("residual", 3), ("attention", 0), ("attention", 3), ("mlp", 0), ("mlp", 3)],
)
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_steered_logits_equal_those_of_transformers(tiny_model, reference, family, site, layer):
    direction = np.random.default_rng(layer).standard_normal(N_EMBD).astype(np.float32)
    pack = SteeringPack({"c": SteeringVector({layer: direction}, site=site)})
    with closing(SteeredLlama(tiny_model(family), pack=pack, **ARGUMENTS)) as llm:
        llm.eval(TOKENS)
        unsteered = llm.scores[: len(TOKENS)].copy()
        llm.reset()
        with llm.steering({"c": 1.0}):
            llm.eval(TOKENS)
        steered = llm.scores[: len(TOKENS)].copy()
    torch_direction = reference(family).torch.from_numpy(direction)
    with reference(family).hooked(site, layer, lambda rows: rows + torch_direction):
        expected = reference(family).logits()
    tolerance = TOLERANCE.get(family, 2e-4)
    assert np.abs(steered - unsteered).max() > 10 * tolerance
    assert np.abs(steered - expected).max() < tolerance


@pytest.fixture(scope="module")
def default_reference(default_model):
    """The default model in transformers, which reads a GGUF file slowly."""
    return Reference(default_model)


@pytest.mark.torch
@pytest.mark.parametrize("site", ["residual", "attention"])
def test_default_model_agrees_with_transformers(default_model, default_reference, site):
    """De-quantised weights against quantised arithmetic: close, and closer than the next layer."""
    layers = [5, 15, 25]
    with closing(HookedLlama(default_model, n_ctx=64, verbose=False)) as llm:
        captured = llm.capture(TOKENS, sites=[site], layers=layers, pool="all")[site]
    for layer in layers:
        here = _median_cosine(captured[layer], default_reference.rows(site, layer))
        assert here > 0.98
        assert here > _median_cosine(captured[layer], default_reference.rows(site, layer + 1))


def _median_cosine(a, b):
    return np.median((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def test_mamba_has_only_the_residual(tiny_model):
    with closing(HookedLlama(tiny_model("mamba"), **ARGUMENTS)) as llm:
        assert llm.sites == {"residual": (0, 1, 2, 3), "attention": (), "mlp": ()}
        with pytest.raises(HookError, match="no attention"):
            llm.capture(TOKENS, sites=["attention"])
    vector = SteeringVector({1: np.ones(N_EMBD)}, site="attention")
    pack = SteeringPack({"c": vector})
    with closing(SteeredLlama(tiny_model("mamba"), pack=pack, **ARGUMENTS)) as llm:
        with pytest.raises(HookError, match="site attention of layers"):
            llm.create_completion(TOKENS, steering={"c": 1.0})
        llm.eval(TOKENS)  # the refusal leaves the model usable
        assert llm.n_tokens == len(TOKENS)


def test_lora_is_part_of_the_attention_output(tiny_model, tmp_path):
    """The site is the whole projection: weight, bias and LoRA term."""
    base = tiny_model("gpt2")  # has a bias behind the product as well
    lora = tmp_path / "lora.gguf"
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, N_EMBD)), rng.standard_normal((N_EMBD, 2))
    _write_lora(lora, "gpt2", "blk.1.attn_output.weight", a, b)
    rows = {}
    for name, extra in (("plain", {}), ("lora", {"lora_path": str(lora)})):
        with closing(HookedLlama(base, **ARGUMENTS, **extra)) as llm:
            rows[name] = llm.capture(TOKENS, sites=["attention"], layers=[1], pool="all")
    plain, adapted = (rows[name]["attention"][1] for name in ("plain", "lora"))
    # Up to block 1 nothing differs, so the LoRA term is a rank-2 map of the same input.
    difference = adapted - plain
    assert np.abs(difference).max() > 0.1
    assert np.linalg.matrix_rank(difference, tol=1e-3) == 2


def _write_lora(path, architecture, weight, a, b):
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    writer.add_tensor(f"{weight}.lora_a", a.astype(np.float32))
    writer.add_tensor(f"{weight}.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ["nowhere"]}, "unknown site"),
        ({"layers": [4]}, "at layers \\[4\\]"),
        ({"layers": [-1]}, "at layers \\[-1\\]"),
        ({"layers": []}, "nothing to capture"),
        ({"pool": "max"}, "unknown pooling"),
        ({"span": (3, 3)}, "range"),
        ({"span": (0, 99)}, "range"),
        ({"tokens": []}, "cannot capture 0 tokens"),
        ({"tokens": [7] * 999}, "cannot capture 999 tokens"),
    ],
)
def test_invalid_capture_raises(tiny_llama, arguments, message):
    with closing(HookedLlama(tiny_llama, **ARGUMENTS)) as llm:
        with pytest.raises(SteeringError, match=message):
            llm.capture(arguments.pop("tokens", TOKENS), **arguments)
        assert llm.capture(TOKENS)["residual"][0].shape == (N_EMBD,)


@pytest.mark.parametrize("n_ubatch", [1, 5, 64])
@pytest.mark.parametrize("span", [None, (0, 1), (4, 17), (20, 21)])
def test_pooling_equals_numpy_on_all_rows(tiny_llama, n_ubatch, span):
    arguments = {**ARGUMENTS, "n_ubatch": n_ubatch}
    sites = ["residual", "attention"]
    with closing(HookedLlama(tiny_llama, **arguments)) as llm:
        everything = llm.capture(TOKENS, sites=sites, pool="all")
        rows, mean, last = (
            llm.capture(TOKENS, sites=sites, pool=pool, span=span)
            for pool in ("all", "mean", "last")
        )
    start, stop = span or (0, len(TOKENS))
    for site in sites:
        for layer in range(N_LAYER):
            expected = everything[site][layer][start:stop]
            np.testing.assert_array_equal(rows[site][layer], expected)
            np.testing.assert_array_equal(last[site][layer], expected[-1])
            np.testing.assert_allclose(
                mean[site][layer], expected.astype(np.float64).mean(0), rtol=1e-6
            )


@pytest.mark.parametrize("layers", [None, [1], [3]])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_capture_of_a_batch_equals_captures_of_single_sequences(tiny_model, family, layers):
    tolerance = TOLERANCE.get(family, 2e-5)
    sites = ["residual", "attention", "mlp"]
    sequences = [TOKENS, TOKENS[:1], TOKENS[3:12], TOKENS[::-1]]
    spans = [(0, 21), (0, 1), (8, 9), (5, 19)]
    arguments = {**ARGUMENTS, "n_ctx": 128}
    with closing(HookedLlama(tiny_model(family), max_sequences=4, **arguments)) as llm:
        together = llm.capture_means(sequences, spans, sites=sites, layers=layers)
        with pytest.raises(SteeringError, match="max_sequences=4"):
            llm.capture_means([TOKENS] * 5, [(0, 1)] * 5)
        with pytest.raises(SteeringError, match="of sequence 1"):
            llm.capture_means([TOKENS] * 2, [(0, 1), (3, 3)])
    with closing(HookedLlama(tiny_model(family), **ARGUMENTS)) as llm:
        for number, (tokens, span) in enumerate(zip(sequences, spans, strict=True)):
            alone = llm.capture(tokens, sites=sites, layers=layers, pool="mean", span=span)
            for site in sites:
                assert list(together[site]) == list(alone[site])
                for layer, row in alone[site].items():
                    np.testing.assert_allclose(together[site][layer][number], row, atol=tolerance)


@pytest.mark.parametrize("layers", [None, [1], [3]])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_capture_with_a_shared_start_equals_captures_of_whole_sequences(tiny_model, family, layers):
    """The borders of micro-batches lie anywhere in the shared start."""
    tolerance = TOLERANCE.get(family, 2e-5)
    sites = ["residual", "attention", "mlp"]
    ends = [TOKENS[:1], TOKENS[3:12], TOKENS[::-1]]
    sequences = [[*TOKENS[:9], *end] for end in ends]
    spans = [(9, 10), (11, 18), (9, 30)]
    arguments = {**ARGUMENTS, "n_ctx": 128}
    with closing(
        HookedLlama(tiny_model(family), max_sequences=4, **{**arguments, "n_batch": 40})
    ) as llm:
        found = llm.capture_means(sequences, spans, sites=sites, layers=layers, shared=9)
        for shared, ranges in ((10, spans), (9, [(8, 9), *spans[1:]]), (-1, spans)):
            with pytest.raises(SteeringError, match=f"share its first {shared} tokens"):
                llm.capture_means(sequences, ranges, sites=sites, shared=shared)
        with pytest.raises(SteeringError, match="cannot capture 58 tokens"):
            llm.capture_means(sequences, spans, sites=sites)
    with closing(HookedLlama(tiny_model(family), **arguments)) as llm:
        for number, (tokens, span) in enumerate(zip(sequences, spans, strict=True)):
            alone = llm.capture(tokens, sites=sites, layers=layers, pool="mean", span=span)
            for site in sites:
                for layer, row in alone[site].items():
                    np.testing.assert_allclose(found[site][layer][number], row, atol=tolerance)


@pytest.mark.parametrize("sizes", [{"n_batch": 4}, {"n_ctx": 4}])
def test_batch_smaller_than_its_sequences_raises(tiny_llama, sizes):
    """Without the check llama.cpp would end the process."""
    with pytest.raises(SteeringError, match="has no room"):
        HookedLlama(tiny_llama, max_sequences=8, **{**ARGUMENTS, **sizes})


def test_recurrent_model_captures_one_sequence_at_a_time(tiny_model):
    with closing(HookedLlama(tiny_model("mamba"), max_sequences=2, **ARGUMENTS)) as llm:
        assert not llm.context.batches_sequences
        with pytest.raises(HookError, match="one sequence at a time"):
            llm.capture_means([TOKENS, TOKENS], [(0, 2), (0, 2)])
        assert llm.capture_means([TOKENS], [(0, 2)])


def test_n_batch_does_not_change_the_capture(tiny_llama):
    with closing(HookedLlama(tiny_llama, **{**ARGUMENTS, "n_batch": 6, "n_ubatch": 4})) as split:
        parts = split.capture(TOKENS, pool="all")["residual"]
    with closing(HookedLlama(tiny_llama, **{**ARGUMENTS, "n_ubatch": 64})) as whole:
        at_once = whole.capture(TOKENS, pool="all")["residual"]
    for layer in range(N_LAYER):
        np.testing.assert_allclose(parts[layer], at_once[layer], atol=1e-5)


def test_capture_includes_steering(tiny_llama):
    """At the steered layer rows move by exactly the direction, before that layer not at all."""
    direction = np.random.default_rng(1).standard_normal(N_EMBD).astype(np.float32)
    for layer, injection in [(0, "hooked"), (2, "hooked"), (2, "resident"), (3, "resident")]:
        pack = SteeringPack({"c": SteeringVector({layer: direction})})
        with closing(SteeredLlama(tiny_llama, pack=pack, injection=injection, **ARGUMENTS)) as llm:
            plain = llm.capture(TOKENS, pool="all")["residual"]
            with llm.steering({"c": 1.0}):
                steered = llm.capture(TOKENS, pool="all")["residual"]
        np.testing.assert_array_equal(steered[layer], plain[layer] + direction)
        for before in range(layer):
            np.testing.assert_array_equal(steered[before], plain[before])


def test_capture_leaves_an_empty_context(tiny_llama):
    with closing(HookedLlama(tiny_llama, **ARGUMENTS)) as llm:
        llm.eval(TOKENS)
        expected = llm.scores[: len(TOKENS)].copy()
        llm.capture(TOKENS[:5])
        assert llm.n_tokens == 0
        llm.eval(TOKENS)
        np.testing.assert_array_equal(llm.scores[: len(TOKENS)], expected)


# ---- several rows of the residual for one token ---------------------------------------------

STREAMS = 4  # of Gemma 3n


class NodeReader:
    """The nodes l_out-N of a plain `llama_cpp.Llama`, read and changed in llama.cpp's own callback.

    Only accessors of ggml are used, independently of pysteer's native part.
    """

    def __init__(self, path, change=None):
        self.rows = {}
        lib = llama_cpp.llama_cpp._lib
        copy = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        for name, result, arguments in [
            ("ggml_get_name", ctypes.c_char_p, copy[:1]),
            ("ggml_nbytes", ctypes.c_size_t, copy[:1]),
            ("ggml_backend_tensor_get", None, copy),
            ("ggml_backend_tensor_set", None, copy),
        ]:
            getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments

        def callback(tensor, ask, _):
            name = re.fullmatch(r"l_out-(\d+)", lib.ggml_get_name(tensor).decode())
            if not name:
                return not ask
            if not ask:
                values = np.empty(lib.ggml_nbytes(tensor) // 4, np.float32)
                lib.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
                rows = values.reshape(STREAMS, -1, N_EMBD)
                if change is not None:
                    rows[:] = change(int(name[1]), rows)
                    lib.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
                self.rows.setdefault(int(name[1]), []).append(rows)
            return True

        self._callback = llama_cpp.ggml_backend_sched_eval_callback(callback)
        reader = self

        class Plain(llama_cpp.Llama):
            context_params = property(
                lambda self: self._params, lambda self, params: reader._install(self, params)
            )

        self.llm = Plain(str(path), **ARGUMENTS)

    def _install(self, llm, params):
        params.cb_eval = self._callback
        llm._params = params

    def eval(self, tokens):
        """Return the logits, and layer to rows (streams, tokens, n_embd)."""
        self.llm.eval(tokens)
        rows = {layer: np.concatenate(parts, axis=1) for layer, parts in self.rows.items()}
        return self.llm.scores[: len(tokens)].copy(), rows


def test_capture_of_streams_is_the_first_stream_of_the_node(tiny_model):
    path = tiny_model("gemma3n")
    reader = NodeReader(path)
    with closing(reader.llm):
        _, expected = reader.eval(TOKENS)
    with closing(HookedLlama(path, **ARGUMENTS)) as llm:
        assert llm.sites == dict.fromkeys(["residual", "attention", "mlp"], tuple(range(N_LAYER)))
        captured = llm.capture(TOKENS, pool="all")["residual"]
    for layer in range(N_LAYER):
        assert expected[layer].shape == (STREAMS, len(TOKENS), N_EMBD)
        assert np.abs(expected[layer][0] - expected[layer][1]).max() > 0.1
        np.testing.assert_array_equal(captured[layer], expected[layer][0])


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_operator_acts_on_each_stream_by_itself(tiny_model, layer):
    path = tiny_model("gemma3n")
    direction = np.random.default_rng(3).standard_normal(N_EMBD)
    unit = (direction / np.linalg.norm(direction)).astype(np.float32)

    def ablated(at, rows):
        return rows - (rows @ unit)[..., None] * unit if at == layer else rows

    logits = {}
    for name, change in (("plain", None), ("ablated", ablated)):
        reader = NodeReader(path, change)
        with closing(reader.llm):
            logits[name], _ = reader.eval(TOKENS)
    vector = SteeringVector({layer: direction}, operator=Operator("ablate"))
    with closing(SteeredLlama(path, pack=SteeringPack({"c": vector}), **ARGUMENTS)) as llm:
        with llm.steering({"c": 1.0}):
            llm.eval(TOKENS)
        steered = llm.scores[: len(TOKENS)].copy()
    assert np.abs(logits["ablated"] - logits["plain"]).max() > 0.1
    np.testing.assert_allclose(steered, logits["ablated"], atol=8e-3)


def test_gate_on_streams_reads_what_capture_reads(tiny_model):
    """The router's score is a component of the captured mean, and steering leaves no other row."""
    path = tiny_model("gemma3n")
    pack = reading_pack(N_EMBD, poolings=("prompt", "last"))
    with closing(SteeredLlama(path, pack=pack, **ARGUMENTS)) as llm:
        result = llm.create_completion(TOKENS, steering="auto", max_tokens=1)
    scores = list(result["steering"]["scores"].values())
    with closing(HookedLlama(path, **ARGUMENTS)) as llm:
        expected = [
            llm.capture(TOKENS, layers=[LAYER], pool=pool)["residual"][LAYER][component]
            for pool in ("mean", "last")
            for component in components_of(N_EMBD)
        ]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_batch_of_sequences_with_streams_equals_single_sequences(tiny_model):
    path = tiny_model("gemma3n")
    sequences, spans = [TOKENS, TOKENS[3:12], TOKENS[::-1]], [(0, 21), (8, 9), (5, 19)]
    with closing(HookedLlama(path, max_sequences=3, **{**ARGUMENTS, "n_ctx": 128})) as llm:
        together = llm.capture_means(sequences, spans)["residual"]
    with closing(HookedLlama(path, **ARGUMENTS)) as llm:
        for number, (tokens, span) in enumerate(zip(sequences, spans, strict=True)):
            alone = llm.capture(tokens, pool="mean", span=span)["residual"]
            for layer, row in alone.items():
                np.testing.assert_allclose(together[layer][number], row, atol=8e-3)
