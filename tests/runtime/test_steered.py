"""SteeredLlama: every request gets its own steering, and reuses no tokens of another."""

import pickle
from contextlib import closing

import llama_cpp
import numpy as np
import pytest

from pysteer import (
    HookError,
    ModelMismatchError,
    SteeredLlama,
    SteeringError,
    SteeringPack,
    SteeringVector,
    UnknownCategoryError,
)

N_LAYER, N_EMBD = 4, 64
ARGUMENTS = {
    "n_ctx": 256,
    "logits_all": True,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,  # which is all cores otherwise
}
# Tokens of single bytes above 0x7f: llama_cpp.Llama waits for the rest of such a character and
# does not count meanwhile, and a random model never stops.
HIGH_BYTES = range(5 + 128, 5 + 256)
GREEDY = {"max_tokens": 12, "temperature": 0.0, "logit_bias": dict.fromkeys(HIGH_BYTES, -1e3)}
PROMPT = "the other hand in the air"
MESSAGES = [{"role": "user", "content": PROMPT}]


def vector(seed, layers=(1, 2), site="residual", scale=1.0):
    rng = np.random.default_rng(seed)
    return SteeringVector({i: scale * rng.standard_normal(N_EMBD) for i in layers}, site=site)


PACK = SteeringPack(
    {
        "a": vector(1),
        "b": vector(2),
        "first": vector(3, layers=[0]),
        "last": vector(4, layers=[3]),
        "attention": vector(5, site="attention"),
    }
)


@pytest.fixture
def llm(tiny_llama):
    with closing(SteeredLlama(tiny_llama, pack=PACK, **ARGUMENTS)) as llm:
        yield llm


@pytest.fixture
def plain(tiny_llama):
    with closing(llama_cpp.Llama(str(tiny_llama), **ARGUMENTS)) as plain:
        yield plain


def text(result):
    choice = result["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def from_scratch(path, steering, ask, **arguments):
    """Return the answer of a new model."""
    with closing(SteeredLlama(path, pack=PACK, **{**ARGUMENTS, **arguments})) as fresh:
        return ask(fresh, steering)


def complete(llm, steering, prompt=PROMPT):
    return text(llm.create_completion(prompt, steering=steering, **GREEDY))


def chat(llm, steering):
    return text(llm.create_chat_completion(MESSAGES, steering=steering, **GREEDY))


def call(llm, steering):
    return text(llm(PROMPT, steering=steering, **GREEDY))


def complete_streaming(llm, steering):
    return "".join(
        chunk["choices"][0]["text"]
        for chunk in llm.create_completion(PROMPT, steering=steering, stream=True, **GREEDY)
    )


def chat_streaming(llm, steering):
    return "".join(
        chunk["choices"][0]["delta"].get("content") or ""
        for chunk in llm.create_chat_completion(MESSAGES, steering=steering, stream=True, **GREEDY)
    )


WAYS = [complete, chat, call, complete_streaming, chat_streaming]


@pytest.mark.parametrize("ask", WAYS)
@pytest.mark.parametrize("category", list(PACK.categories))
def test_each_request_has_its_own_steering(tiny_llama, llm, ask, category):
    unsteered, steered = ask(llm, None), ask(llm, {category: 3.0})
    assert unsteered != steered
    assert ask(llm, None) == unsteered
    assert ask(llm, {category: 3.0}) == steered
    assert ask(llm, {category: 0.0}) == unsteered
    assert ask(llm, {}) == unsteered
    assert from_scratch(tiny_llama, {category: 3.0}, ask) == steered


@pytest.mark.parametrize("ask", [complete, chat, call])
def test_unsteered_answer_equals_llama_cpp(llm, plain, ask):
    def unsteered(model, _):
        if ask is chat:
            return text(model.create_chat_completion(MESSAGES, **GREEDY))
        return text(model(PROMPT, **GREEDY))

    ask(llm, {"a": 3.0})
    assert ask(llm, None) == unsteered(plain, None)


def test_steering_blocks_nest_and_end(llm):
    off, a, b = (complete(llm, s) for s in (None, {"a": 3.0}, {"b": 3.0}))
    assert len({off, a, b}) == 3

    def ask(**steering):
        return text(llm.create_completion(PROMPT, **GREEDY, **steering))

    with llm.steering({"a": 3.0}):
        assert ask() == a
        with llm.steering({"b": 3.0}):
            assert ask() == b
            assert ask(steering={"a": 3.0}) == a
            assert ask(steering=None) == off
            with llm.steering(None):
                assert ask() == off
        assert ask() == a
    assert ask() == off
    with pytest.raises(ZeroDivisionError), llm.steering({"a": 3.0}):
        raise ZeroDivisionError
    assert ask() == off


@pytest.mark.parametrize("method", ["create_completion", "create_chat_completion"])
def test_stream_keeps_the_steering_of_its_request(llm, method):
    argument = PROMPT if method == "create_completion" else MESSAGES

    def pieces(stream):
        for chunk in stream:
            choice = chunk["choices"][0]
            yield choice["text"] if "text" in choice else choice["delta"].get("content") or ""

    expected = text(getattr(llm, method)(argument, steering={"a": 3.0}, **GREEDY))
    with llm.steering({"a": 3.0}):
        inherited = getattr(llm, method)(argument, stream=True, **GREEDY)
    with llm.steering({"b": 3.0}):
        assert "".join(pieces(inherited)) == expected
    own = pieces(getattr(llm, method)(argument, steering={"a": 3.0}, stream=True, **GREEDY))
    with llm.steering({"b": 3.0}):
        assert "".join(own) == expected


def test_generate_accepts_sent_tokens(llm, plain):
    tokens = plain.tokenize(PROMPT.encode())

    def run(model):
        generator = model.generate(tokens, temp=0.0)
        return [next(generator), generator.send([7, 8]), next(generator), next(generator)]

    with llm.steering({"a": 3.0}):
        steered = run(llm)
    assert run(llm) == run(plain) != steered


# ---- the cache --------------------------------------------------------------------------------


class Counting:
    """Counts evaluated tokens."""

    computed = 0

    def eval(self, tokens):
        self.computed += len(tokens)
        super().eval(tokens)


class CountingLlama(Counting, SteeredLlama):
    pass


class CountingPlain(Counting, llama_cpp.Llama):
    pass


@pytest.fixture(scope="module")
def again(tiny_llama):
    """Number of tokens that llama_cpp.Llama evaluates for its latest prompt: 1 in some versions."""
    with closing(CountingPlain(str(tiny_llama), **ARGUMENTS)) as llm:
        for _ in range(2):
            llm.computed = 0
            llm.create_completion(list(range(10, 40)), **{**GREEDY, "max_tokens": 1})
        return llm.computed


@pytest.fixture
def counting(tiny_llama):
    with closing(CountingLlama(tiny_llama, pack=PACK, **ARGUMENTS)) as llm:
        yield llm


def cost(llm, steering, prompt, n=1):
    before = llm.computed
    llm.create_completion(prompt, steering=steering, **{**GREEDY, "max_tokens": n})
    return llm.computed - before


def test_request_recomputes_only_tokens_of_other_steering(counting, again):
    prompt = list(range(10, 40))
    longer = [*prompt, *range(40, 45)]
    assert cost(counting, {"a": 1.0}, prompt) == 30
    assert cost(counting, {"a": 1.0}, prompt) == again, "the very same request"
    assert cost(counting, {"a": 1.0}, longer) == 5, "a continuation"
    assert cost(counting, {"a": 0.5}, longer) == 35, "another strength"
    assert cost(counting, {"b": 0.5}, longer) == 35, "another category"
    assert cost(counting, None, longer) == 35, "no steering"
    assert cost(counting, {}, longer) == again, "no steering, said otherwise"
    assert cost(counting, {"a": 0.0}, longer) == again, "strength 0 is no steering"


def test_steering_the_last_block_keeps_the_cache_valid(counting, again):
    """Keys and values come from earlier blocks; only the logits must be computed again."""
    prompt = list(range(10, 40))
    assert cost(counting, None, prompt) == 30
    assert cost(counting, {"last": 1.0}, prompt) == 1
    assert cost(counting, {"last": 1.0}, prompt) == again
    assert cost(counting, {"last": 2.0}, [*prompt, 40, 41]) == 2
    assert cost(counting, {"last": 1.0, "a": 1.0}, prompt) == 30


@pytest.mark.parametrize("category", ["last", "attention"])
def test_reused_cache_gives_the_logits_of_a_fresh_run(tiny_llama, category):
    # With a cache in F16, some versions of llama.cpp round a token alone unlike in a batch.
    arguments = {**ARGUMENTS, "type_k": 0, "type_v": 0}
    with (
        closing(SteeredLlama(tiny_llama, pack=PACK, **arguments)) as llm,
        closing(SteeredLlama(tiny_llama, pack=PACK, **arguments)) as fresh,
        fresh.steering({category: 2.0}),
    ):
        complete(llm, None)
        complete(llm, {category: 2.0})
        tokens = llm.tokenize(PROMPT.encode())
        reused = llm.scores[len(tokens) - 1].copy()
        fresh.eval(tokens)
        np.testing.assert_allclose(reused, fresh.scores[len(tokens) - 1], atol=1e-5)


def test_generate_without_reset_recomputes_tokens_of_other_steering(tiny_llama, llm):
    """generate(reset=False) continues the tokens of the context, but not their old steering."""
    head, tail = list(range(10, 30)), list(range(30, 36))
    with llm.steering({"a": 3.0}):
        llm.eval(head)
    stream = llm.generate(tail, temp=0.0, reset=False)
    continued = [next(stream) for _ in range(6)]
    assert llm._input_ids[:26].tolist() == head + tail
    with closing(SteeredLlama(tiny_llama, pack=PACK, **ARGUMENTS)) as fresh:
        stream = fresh.generate(head + tail, temp=0.0)
        assert continued == [next(stream) for _ in range(6)]


def test_steering_changes_between_two_evaluated_tokens(tiny_llama, llm):
    """eval() appends: earlier tokens keep their steering."""
    head, tail = list(range(10, 20)), list(range(20, 24))
    with llm.steering({"a": 3.0}):
        llm.eval(head)
    with llm.steering({"b": 3.0}):
        llm.eval(tail)
    mixed = llm.scores[13].copy()
    answers = [from_scratch(tiny_llama, s, _last_logits) for s in ({"a": 3.0}, {"b": 3.0}, None)]
    assert all(np.abs(mixed - other).max() > 1e-3 for other in answers)
    # A request under either starts over.
    for steering in ({"a": 3.0}, {"b": 3.0}):
        assert complete(llm, steering) == from_scratch(tiny_llama, steering, complete)


def _last_logits(llm, steering):
    with llm.steering(steering):
        llm.eval(list(range(10, 24)))
    return llm.scores[13].copy()


def test_saved_state_remembers_its_steering(tiny_llama, llm):
    with llm.steering({"a": 3.0}):
        llm.eval(llm.tokenize(PROMPT.encode()))
    state = pickle.loads(pickle.dumps(llm.save_state()))
    for steering in ({"a": 3.0}, {"b": 3.0}, None):
        with closing(SteeredLlama(tiny_llama, pack=PACK, **ARGUMENTS)) as other:
            other.load_state(state)
            assert complete(other, steering) == from_scratch(tiny_llama, steering, complete)


def test_state_of_a_plain_llama_counts_as_unsteered(llm, plain):
    plain.eval(plain.tokenize(PROMPT.encode()))
    llm.load_state(plain.save_state())
    expected = text(plain.create_completion(PROMPT, **GREEDY))
    assert complete(llm, {"a": 3.0}) != expected
    llm.load_state(plain.save_state())
    assert complete(llm, None) == expected


def test_prompt_cache_keeps_steerings_apart(tiny_llama, llm):
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for steering in ({"a": 3.0}, None, {"b": 3.0}, {"a": 3.0}):
        assert complete(llm, steering) == from_scratch(tiny_llama, steering, complete)


def test_recurrent_model_starts_over_under_other_steering(tiny_model):
    """The state cannot be cut back, so a change of steering recomputes everything."""
    path = tiny_model("mamba")
    with closing(SteeredLlama(path, pack=PACK, **ARGUMENTS)) as llm:
        for steering in ({"a": 3.0}, None, {"b": 3.0}, {"a": 3.0}):
            assert complete(llm, steering) == from_scratch(path, steering, complete)
            with llm.steering({"b": 1.0}):
                llm.eval([10, 11])
        llm.reset()
        with llm.steering({"a": 3.0}):
            llm.eval([10, 11, 12])
        stream = llm.generate([13], temp=0.0, reset=False)
        continued = [next(stream) for _ in range(4)]
    with closing(SteeredLlama(path, pack=PACK, **ARGUMENTS)) as fresh:
        stream = fresh.generate([10, 11, 12, 13], temp=0.0)
        assert continued == [next(stream) for _ in range(4)]


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steering", "error", "message"),
    [
        ({"nope": 1.0}, UnknownCategoryError, "this pack has a, b, first, last, attention"),
        ({"a": float("nan")}, SteeringError, "finite"),
        ({"a": float("inf")}, SteeringError, "finite"),
        ({"a": 1e39}, SteeringError, "largest strength allowed"),
        ({"a": "1.0"}, SteeringError, "not a number"),
        ({"a": "auto"}, SteeringError, "no router"),
        ({"a": True}, SteeringError, "not a number"),
        ("a", SteeringError, "mapping"),
        ("auto", SteeringError, "no router"),
        (1.0, SteeringError, "mapping"),
    ],
)
@pytest.mark.parametrize("ask", WAYS)
def test_invalid_steering_raises_at_the_call(llm, ask, steering, error, message):
    with pytest.raises(error, match=message):
        ask(llm, steering)
    with pytest.raises(error, match=message), llm.steering(steering):
        pass
    assert ask(llm, None)


def test_strength_true_raises_though_a_plan_for_1_is_cached(llm):
    assert complete(llm, {"a": 1.0})
    with pytest.raises(SteeringError, match="not a number"):
        complete(llm, {"a": True})


def test_steering_without_a_pack_raises(tiny_llama):
    with closing(SteeredLlama(tiny_llama, **ARGUMENTS)) as llm:
        assert complete(llm, None)
        with pytest.raises(SteeringError, match="pack="):
            complete(llm, {"a": 1.0})


def test_pack_for_another_model_raises(tiny_llama, tiny_model):
    wide = SteeringPack({"a": SteeringVector({1: np.ones(N_EMBD * 2)})})
    deep = SteeringPack({"a": SteeringVector({N_LAYER: np.ones(N_EMBD)})})
    for pack in (wide, deep):
        with pytest.raises(ModelMismatchError):
            SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)
    with closing(SteeredLlama(tiny_model("qwen2"), **ARGUMENTS)) as qwen:
        made_for_qwen = SteeringPack(dict(PACK.categories), base_model=qwen.base_model)
    with pytest.raises(ModelMismatchError, match="architecture"):
        SteeredLlama(tiny_llama, pack=made_for_qwen, **ARGUMENTS)


def test_resident_injection_raises_for_other_sites(tiny_llama):
    with closing(SteeredLlama(tiny_llama, pack=PACK, injection="resident", **ARGUMENTS)) as llm:
        for category in ("first", "attention"):
            with pytest.raises(HookError, match="resident"):
                complete(llm, {category: 1.0})
    with pytest.raises(SteeringError, match="injection"):
        SteeredLlama(tiny_llama, pack=PACK, injection="other", **ARGUMENTS)


def test_control_vector_disabled_from_outside_raises(llm):
    """Without llama.cpp's control vector the graph adds nothing."""
    complete(llm, {"a": 1.0})
    llama_cpp.llama_set_adapter_cvec(llm.ctx, None, 0, N_EMBD, 0, 0)
    with pytest.raises(HookError, match="reached 0 of"):
        complete(llm, {"b": 1.0})
    assert llm.n_tokens == 0  # nothing continues from wrong results
    assert complete(llm, None)


def test_pack_without_router_warns_once(llm, caplog):
    llm.create_completion(PROMPT, **GREEDY)
    llm.create_completion(PROMPT, **GREEDY)
    warnings = [record for record in caplog.records if "the pack has no router" in record.message]
    assert len(warnings) == 1


def test_control_vector_file_is_a_pack_of_one_category(tiny_llama, tmp_path, llm):
    PACK["a"].save(tmp_path / "kindness.gguf")
    with closing(SteeredLlama(tiny_llama, pack=tmp_path / "kindness.gguf", **ARGUMENTS)) as other:
        assert complete(other, {"kindness": 3.0}) == complete(llm, {"a": 3.0})


def test_embed_inside_a_steering_block_raises(tiny_llama):
    with closing(SteeredLlama(tiny_llama, pack=PACK, embedding=True, **ARGUMENTS)) as llm:
        expected = llm.embed("the air")
        with llm.steering({"a": 3.0}):
            llm.eval([10, 11])
            with pytest.raises(SteeringError, match="embeddings"):
                llm.embed("the air")
        assert llm.embed("the air") == expected


def test_pickling_keeps_the_pack(llm):
    with closing(pickle.loads(pickle.dumps(llm))) as copy:
        assert complete(copy, {"a": 3.0}) == complete(llm, {"a": 3.0})


@pytest.mark.parametrize("steering", [None, {"a": 1.0}])
def test_window_that_dropped_its_first_tokens_is_recomputed(tiny_model, steering):
    """With swa_full=False llama.cpp cannot cut a sequence back to where prompts begin to differ."""
    path = tiny_model("gemma3", n_layer=6)  # the sixth sees all tokens
    arguments = {**ARGUMENTS, "n_ctx": 1024, "swa_full": False, "n_ubatch": 8}
    long = [*range(270, 320)] * 8
    other = [*long[:100], 11, 12, 13]
    with (
        closing(SteeredLlama(path, pack=PACK, **arguments)) as llm,
        closing(SteeredLlama(path, pack=PACK, **arguments)) as fresh,
    ):
        found = []
        for one, prompts in ((llm, (long, other)), (fresh, (other,))):
            with one.steering(steering):
                for prompt in prompts:
                    next(one.generate(prompt, temp=0.0))
            found.append(np.array(one.scores[len(other) - 1]))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_unknown_token_with_markers_raises(llm):
    """Markers need the text of each token, and llama.cpp ends the process over an unknown one."""
    policy = {"scope": {"tokens": "all", "exclude": ["ab", "c"]}}
    with (
        llm.steering({"a": 1.0}, policy=policy),
        pytest.raises(SteeringError, match="unknown token 99999"),
    ):
        next(llm.generate([10, 99999]))
    assert llm(PROMPT, steering={"a": 1.0}, **GREEDY)["choices"]
