"""SteeredLlama has every feature of llama_cpp.Llama, with the same results to the last bit.

Unsteered it equals llama_cpp.Llama; steered, llama_cpp.Llama with the same control vector.
"""

import json
from contextlib import ExitStack, closing
from itertools import combinations, islice

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFWriter
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from pysteer import SteeredLlama, SteeringError

ON = {"c": 1.0}
PROMPT = "The three largest cities of France are"
OTHER = "Once upon a time, in a small village,"
MESSAGES = [
    {"role": "system", "content": "Be brief."},  # the default model's own is longer
    {"role": "user", "content": "What is the capital of France?"},
]
GREEDY = {"temperature": 0.0, "max_tokens": 6}
SHORT = {**GREEDY, "max_tokens": 3}  # for log-probabilities llama_cpp sorts the whole vocabulary
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
}
LETTERS = llama_cpp.LlamaGrammar.from_string('root ::= [a-z]+ " " [A-Z]+', verbose=False)
TOOLS = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": SCHEMA}}
    for name in ("describe_city", "forget_city")
]
FORCED = {"type": "function", "function": {"name": "describe_city"}}
# A tiny model's bytes above 0x7f: llama_cpp waits for the rest of such a character, and a random
# model may never say it.
NO_HIGH_BYTES = dict.fromkeys(range(5 + 128, 5 + 256), -1e3)
# Different in every request, or only of SteeredLlama.
IGNORED = {"id", "created", "model", "steering"}


def clean(value):
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items() if key not in IGNORED}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return value


def content(result):
    return result["choices"][0]["message"]["content"]


# ---- requests: each takes a model and a steering ----------------------------------------------


def completion(llm, **how):
    return llm(PROMPT, **GREEDY, **how)


def sampled(llm, **how):
    return llm.create_completion(PROMPT, temperature=0.9, seed=7, max_tokens=8, **how)


def penalties_and_bias(llm, **how):
    banned = llm.tokenize(b" Paris", add_bos=False)
    penalties = {"repeat_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.2}
    result = llm(PROMPT, logit_bias=dict.fromkeys(banned, -100.0), **penalties, **GREEDY, **how)
    assert " Paris" not in result["choices"][0]["text"]
    return result


def stop_strings(llm, **how):
    whole = llm(PROMPT, **GREEDY, **how)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:3]
    result = llm(PROMPT, stop=["never seen", stop], **GREEDY, **how)
    assert result["choices"][0]["text"] == whole[: whole.index(stop)]
    assert result["choices"][0]["finish_reason"] == "stop"
    return result


def logprobs_and_echo(llm, **how):
    result = llm("France is", logprobs=3, echo=True, **SHORT, **how)
    assert result["choices"][0]["text"].startswith("France is")
    found = result["choices"][0]["logprobs"]
    assert len(found["tokens"]) > result["usage"]["completion_tokens"]
    assert all(np.isfinite(found["token_logprobs"][1:]))
    return result


def streaming(llm, **how):
    chunks = list(llm(PROMPT, logprobs=2, stream=True, **SHORT, **how))
    assert sum(chunk["choices"][0]["text"] != "" for chunk in chunks) > 1
    return chunks


def chat(llm, **how):
    return llm.create_chat_completion(MESSAGES, **GREEDY, **how)


def chat_streaming(llm, **how):
    chunks = list(llm.create_chat_completion(MESSAGES, stream=True, **GREEDY, **how))
    assert sum("content" in chunk["choices"][0]["delta"] for chunk in chunks) > 2
    return chunks


def chat_logprobs(llm, **how):
    result = llm.create_chat_completion(MESSAGES, logprobs=True, top_logprobs=3, **SHORT, **how)
    found = result["choices"][0]["logprobs"]["content"]
    assert len(found) == result["usage"]["completion_tokens"] > 0
    return result


def grammar(llm, **how):
    result = llm(PROMPT, grammar=LETTERS, **GREEDY, **how)
    assert result["choices"][0]["text"].replace(" ", "", 1).isalpha()
    return result


def json_schema(llm, **how):
    result = llm.create_chat_completion(
        MESSAGES,
        response_format={"type": "json_object", "schema": SCHEMA},
        logprobs=True,
        top_logprobs=2,
        temperature=0.0,
        **how,
    )
    assert set(json.loads(content(result))) == {"city", "large"}
    return result


def tool(llm, **how):
    result = llm.create_chat_completion(
        MESSAGES,
        tools=TOOLS,
        tool_choice=FORCED,
        logprobs=True,
        top_logprobs=2,
        temperature=0.0,
        **how,
    )
    (called,) = result["choices"][0]["message"]["tool_calls"]
    assert called["function"]["name"] == "describe_city"
    assert set(json.loads(called["function"]["arguments"])) == {"city", "large"}
    return result


def tool_streaming(llm, **how):
    arguments = {"tools": TOOLS, "tool_choice": FORCED, "logprobs": True, "top_logprobs": 2}
    stream = llm.create_chat_completion(MESSAGES, stream=True, temperature=0.0, **arguments, **how)
    return list(stream)


def tool_of_its_own_choice(llm, **how):
    """Use a chat handler that makes several completions: answer or call, then the call."""

    def call(tokens, scores):  # "message:" cannot begin, so "functions." has to
        lengths.append(len(tokens))
        if len(tokens) == lengths[0]:
            scores[with_m] = -np.inf
        return scores

    lengths = []
    with_m = [i for i in range(llm.n_vocab()) if b"m" in llm.detokenize([i])]
    before, llm.chat_format = llm.chat_format, "chatml-function-calling"
    try:
        result = llm.create_chat_completion(
            MESSAGES,
            tools=TOOLS,
            tool_choice="auto",
            logits_processor=llama_cpp.LogitsProcessorList([call]),
            **GREEDY,
            **how,
        )
    finally:
        llm.chat_format = before
    assert json.loads(result["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    return result


def processors(llm, **how):
    def no_spaces(_, scores):
        scores[spaces] = -np.inf
        return scores

    def at_six(tokens, _):
        return len(tokens) >= n_prompt + 6

    spaces = [i for i in range(2000) if b" " in llm.detokenize([i])]
    n_prompt = len(llm.tokenize(PROMPT.encode()))
    return llm(
        PROMPT,
        logits_processor=llama_cpp.LogitsProcessorList([no_spaces]),
        stopping_criteria=llama_cpp.StoppingCriteriaList([at_six]),
        **GREEDY,
        **how,
    )


def speculative(llm, **how):
    """Drafted tokens that turn out wrong are taken back."""
    drafts = []

    def draft(tokens):
        drafts.append(lookup(tokens))
        return drafts[-1]

    lookup = LlamaPromptLookupDecoding(num_pred_tokens=4)
    llm.draft_model = draft
    try:
        result = llm("one two three four one two three four one two", **GREEDY, **how)
    finally:
        llm.draft_model = None
    assert sum(map(len, drafts)) > 0
    return result


REQUESTS = [
    completion,
    sampled,
    penalties_and_bias,
    stop_strings,
    logprobs_and_echo,
    streaming,
    chat,
    chat_streaming,
    chat_logprobs,
    processors,
    speculative,
]
CONSTRAINED = [grammar, json_schema, tool, tool_streaming, tool_of_its_own_choice]


def fresh(ask, llm, **how):
    """Return the answer without traces of earlier requests.

    That is the context, which could change the last bits, and the sampler, which `sample` takes.
    """
    llm.reset()
    llm._sampler = None
    return clean(ask(llm, **how))


def check(ask, models):
    unsteered, steered = fresh(ask, models.plain), fresh(ask, models.native)
    assert unsteered != steered
    resident, hooked = models.steered
    assert fresh(ask, resident, steering=ON) == steered
    assert fresh(ask, resident, steering=None) == unsteered
    with hooked.steering(ON):
        assert fresh(ask, hooked) == steered
    assert fresh(ask, hooked) == unsteered


@pytest.mark.parametrize("ask", REQUESTS)
def test_requests_equal_llama_cpp(models, ask):
    check(ask, models)


@pytest.mark.parametrize("ask", CONSTRAINED)
def test_constrained_requests_equal_llama_cpp(tiny_models, ask):
    check(ask, tiny_models)


@pytest.mark.slow  # llama.cpp holds each of the 49152 tokens against the grammar
@pytest.mark.parametrize("ask", CONSTRAINED)
def test_constrained_requests_on_the_default_model_equal_llama_cpp(models, ask):
    check(ask, models)


# ---- the context: steering in force -----------------------------------------------------------


def eval_and_sample(llm):
    llm.eval(llm.tokenize(PROMPT.encode()))
    for _ in range(3):
        llm.eval([llm.sample(temp=0.0)])
    return llm.scores[: llm.n_tokens].tolist()


def generate(llm):
    return list(islice(llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0), 8))


def saved_state(llm):
    tokens = llm.tokenize(PROMPT.encode())
    llm.eval(tokens[:-2])
    state = llm.save_state()
    llm.reset()
    llm.eval(llm.tokenize(OTHER.encode()))
    llm.load_state(state)
    assert llm.n_tokens == len(tokens) - 2
    generated = list(islice(llm.generate(tokens, temp=0.0), 8))
    return generated, llm.scores[: llm.n_tokens].tolist()


@pytest.mark.parametrize("use", [eval_and_sample, generate, saved_state])
def test_evaluation_by_hand_equals_llama_cpp(tiny_models, use):
    unsteered, steered = fresh(use, tiny_models.plain), fresh(use, tiny_models.native)
    assert unsteered != steered
    for llm in tiny_models.steered:
        for steering, expected in ((None, unsteered), (ON, steered), (None, unsteered)):
            with llm.steering(steering):
                assert fresh(use, llm) == expected


@pytest.mark.parametrize("kind", [llama_cpp.LlamaRAMCache, llama_cpp.LlamaDiskCache])
def test_prompt_cache_equals_llama_cpp(tiny_models, tmp_path, kind):
    """Requests of different steering share one prompt cache."""
    found = []

    class Cache(kind):
        def __getitem__(self, key):
            found.append(super().__getitem__(key))
            return found[-1]

    def text(llm, prompt, **how):
        return llm(prompt, logit_bias=NO_HIGH_BYTES, **GREEDY, **how)["choices"][0]["text"]

    cache = Cache(tmp_path) if kind is llama_cpp.LlamaDiskCache else Cache()
    prompts = [PROMPT, OTHER, PROMPT + " Paris", PROMPT]
    unsteered, steered = (
        [fresh(text, llm, prompt=prompt) for prompt in prompts]
        for llm in (tiny_models.plain, tiny_models.native)
    )
    for llm in tiny_models.steered:
        llm.reset()
        llm.set_cache(cache)
        try:
            for prompt, off, on in zip(prompts, unsteered, steered, strict=True):
                assert off != on
                assert text(llm, prompt, steering=ON) == on
                assert text(llm, prompt, steering=None) == off
                llm.reset()
                assert text(llm, prompt, steering=ON) == on
        finally:
            llm.set_cache(None)
    assert found


# ---- arguments of the model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Write a random adapter of rank 2 for the tiny Llama's query and FFN projections."""
    path = tmp_path_factory.mktemp("lora") / "lora.gguf"
    rng = np.random.default_rng(5)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for layer in range(4):
        for name, rows, columns in (("attn_q", 64, 64), ("ffn_up", 128, 64)):
            for part, shape in (("lora_a", (2, columns)), ("lora_b", (rows, 2))):
                values = 0.2 * rng.standard_normal(shape)
                writer.add_tensor(f"blk.{layer}.{name}.weight.{part}", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_lora_and_steering_act_together(opened, tiny_llama, lora):
    tokens = [1, *range(270, 290)]

    def logits(llm):
        llm.eval(tokens)
        return llm.scores[: len(tokens)].copy()

    with ExitStack() as stack:
        pack = opened.pack((1, 2), 64, 0.5)
        bare = opened.models(stack, tiny_llama, pack)
        adapted = opened.models(stack, tiny_llama, pack, lora_path=str(lora), lora_scale=0.7)
        four = [fresh(logits, m) for m in (bare.plain, bare.native, adapted.plain, adapted.native)]
        for one, other in combinations(four, 2):
            assert np.abs(one - other).max() > 1e-2
        for unsteered, steered, models in ((*four[:2], bare), (*four[2:], adapted)):
            for llm in models.steered:
                for steering, expected in ((None, unsteered), (ON, steered)):
                    with llm.steering(steering):
                        np.testing.assert_array_equal(fresh(logits, llm), expected)


def test_vocabulary_without_weights_tokenizes(tiny_llama):
    arguments = {"vocab_only": True, "verbose": False}
    with (
        closing(llama_cpp.Llama(str(tiny_llama), **arguments)) as plain,
        closing(SteeredLlama(tiny_llama, **arguments)) as llm,
    ):
        tokens = llm.tokenize(PROMPT.encode())
        assert tokens == plain.tokenize(PROMPT.encode())
        assert llm.detokenize(tokens) == PROMPT.encode()


@pytest.mark.parametrize(
    "pooling", [llama_cpp.LLAMA_POOLING_TYPE_NONE, llama_cpp.LLAMA_POOLING_TYPE_MEAN]
)
def test_embeddings_equal_llama_cpp_and_raise_under_steering(opened, tiny_llama, pooling):
    """Embeddings are unsteered, after any steered request."""
    arguments = {"embedding": True, "pooling_type": pooling, "n_ctx": 128, "logits_all": False}

    def embeddings(llm):
        return [
            llm.embed(PROMPT),
            llm.embed(PROMPT, normalize=True),
            llm.embed([PROMPT, OTHER]),
            llm.create_embedding([PROMPT, OTHER]),
        ]

    with ExitStack() as stack:
        models = opened.models(stack, tiny_llama, opened.pack((1, 2), 64, 1.0), **arguments)
        expected = fresh(embeddings, models.plain)
        for llm in models.steered:
            with llm.steering(ON):
                llm.eval([10, 11, 12])
                for embed in (llm.embed, llm.create_embedding):
                    with pytest.raises(SteeringError, match="embed"):
                        embed(PROMPT)
            assert fresh(embeddings, llm) == expected
