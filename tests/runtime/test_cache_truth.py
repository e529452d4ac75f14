"""A request gets the answer of a new context, after any history of its context.

A state machine drives one model through changes of steering, rewinds, saved states, streams that
take turns, threads, asyncio tasks, requests within requests, drafts and evaluation by hand, and
holds every answer against a second model that forgets everything first and drafts nothing.
"""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from drafts import Rubble
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule, run_state_machine_as_test
from images import ImageHandler, message, needs_kept_logits
from routers import router_for

from pysteer import SteeredLlama, SteeringError, SteeringPack, SteeringVector
from pysteer.pack.policy import Policy
from pysteer.runtime.ledger import CacheLedger

N_EMBD = 64
F32 = 0  # type of the KV cache: halves would hide differences
ARGUMENTS = {
    "n_ctx": 256,
    "logits_all": True,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
    "n_ubatch": 8,
    "type_k": F32,
    "type_v": F32,
    "chat_handler": ImageHandler(),
}
N_WRITTEN = 8
HIGH_BYTES = range(5 + 128, 5 + 256)  # kept out, so that every character is complete
GREEDY = {
    "max_tokens": N_WRITTEN,
    "temperature": 0.0,
    "logit_bias": dict.fromkeys(HIGH_BYTES, -1e3),
}
ROUTED = {
    "a": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    "b": [40, 41, 42, 43, 44, 45, 46, 47],
    "": [70, 71, 72, 73, 74, 75, 76, 77, 78, 79],
}

prompts = st.one_of(
    st.lists(st.sampled_from([10, 11, 40, 41, 266, 267]), min_size=1, max_size=9),
    st.sampled_from(list(ROUTED.values())),
)
steerings = st.sampled_from(
    [
        None,
        "auto",
        {"a": 1.0},
        {"a": "auto"},
        {"a": 0.5, "b": "auto"},
        {"unrouted": -1.0},
        {"a": 1.0, "b": -0.5},
        {"first": 1.0},
        {"last": 1.0},
        {"attention": 1.0},
    ]
)
policies = st.sampled_from(
    [
        None,
        {"scope": "response"},
        {"scope": "prompt"},
        {"scope": "first 2"},
        {"scope": "linear 6"},
        {"scope": "range 2 5"},
        {"recheck": 2, "scope": "response"},
        {"categories": {"a": {"when": "not a"}}},
        {"scope": {"tokens": "all", "exclude": ["ab", "c"]}},
    ]
)
requests = st.tuples(steerings, policies)
image_turns = st.lists(st.sampled_from(["the ", "sea", 1, 2]), min_size=1, max_size=4)


def vector(seed, layers=(1, 2), **options):
    rng = np.random.default_rng(seed)
    return SteeringVector({i: 2 * rng.standard_normal(N_EMBD) for i in layers}, **options)


def pack_for(path, site):
    return SteeringPack(
        {
            "a": vector(1),
            "b": vector(2),
            "unrouted": vector(3),
            "first": vector(4, layers=[0]),
            "last": vector(5, layers=[3]),
            "attention": vector(6, site=site),
        },
        router=router_for(path, ROUTED),
        policy=Policy(gate="probe"),
    )


def answer(llm, prompt, steering, policy, **options):
    """Return text, the logits that decided its tokens, and the report without scores."""
    result = llm.create_completion(prompt, steering=steering, policy=policy, **GREEDY, **options)
    rows = llm.scores[len(prompt) - 1 : len(prompt) - 1 + N_WRITTEN].copy()
    return result["choices"][0]["text"], rows, without_scores(result["steering"])


def chat_answer(llm, parts, steering, policy):
    """Return the same of a chat."""
    result = llm.create_chat_completion(
        [message(*parts)], steering=steering, policy=policy, **GREEDY
    )
    n = result["usage"]["prompt_tokens"]
    rows = llm.scores[n - 1 : n - 1 + N_WRITTEN].copy()
    return result["choices"][0]["message"]["content"], rows, without_scores(result["steering"])


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def without_scores(told):
    categories = {name: without(one, "score") for name, one in told["categories"].items()}
    return {**without(told, "scores", "ranks"), "categories": categories}


def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(60)


def in_task(call):
    async def run():
        return call()

    return asyncio.run(run())


class OpenStream:
    """A stream of the model under test, and the answer that it has to give."""

    def __init__(self, chunks, expected):
        self.chunks = chunks
        self.expected = expected
        self.text = ""
        self.report = None

    def advance(self, n):
        for _ in range(n):
            chunk = next(self.chunks, None)
            if chunk is None:
                assert self.text == self.expected[0]
                assert without_scores(self.report) == self.expected[2]
                return
            choice = chunk["choices"][0]
            self.text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            self.report = chunk.get("steering", self.report)


RUNS = [lambda call: call(), in_thread, in_task]


class Context(RuleBasedStateMachine):
    """`llm` is under test; `oracle` computes every answer from nothing."""

    llm: SteeredLlama
    oracle: SteeredLlama
    states = Bundle("states")
    streams = Bundle("streams")

    def __init__(self):
        super().__init__()
        self.llm.reset()
        self.left = []  # streams

    def expected(self, prompt, request):
        self.oracle.reset()
        self.oracle._cache._ledger = CacheLedger()  # reuse nothing, even if the ledger is wrong
        return answer(self.oracle, prompt, *request)

    def check(self, prompt, request, run=lambda call: call(), **options):
        expected = self.expected(prompt, request)
        found = run(lambda: answer(self.llm, prompt, *request, **options))
        assert found[0] == expected[0]
        np.testing.assert_allclose(found[1], expected[1], atol=5e-5)
        assert found[2] == expected[2]

    @rule(prompt=prompts, request=requests)
    def ask(self, prompt, request):
        self.check(prompt, request)

    @rule(prompt=prompts, request=requests)
    def go_on(self, prompt, request):
        """Ask as the next turn of a chat does: the beginning is in the context."""
        self.check([*self.llm._input_ids.tolist(), *prompt][-150:], request)

    @rule(request=requests)
    def ask_again(self, request):
        """Ask with the tokens in the context as the prompt."""
        if self.llm.n_tokens:
            self.check(self.llm._input_ids.tolist()[-150:], request)

    @rule(prompt=prompts, request=requests, n=st.integers(1, N_WRITTEN))
    def stream_and_leave(self, prompt, request, n):
        steering, policy = request
        stream = self.llm.create_completion(
            prompt, steering=steering, policy=policy, stream=True, **GREEDY
        )
        for _, _chunk in zip(range(n), stream, strict=False):
            pass
        stream.close()

    @rule(target=streams, prompt=prompts, request=requests)
    def open(self, prompt, request):
        steering, policy = request
        chunks = self.llm.create_completion(
            prompt, steering=steering, policy=policy, stream=True, **GREEDY
        )
        stream = OpenStream(chunks, self.expected(prompt, request))
        self.left.append(stream)
        return stream

    @rule(stream=streams, n=st.integers(1, 4), run=st.sampled_from(RUNS))
    def advance(self, stream, n, run):
        run(lambda: stream.advance(n))

    @rule(prompt=prompts, request=requests, run=st.sampled_from(RUNS))
    def ask_elsewhere(self, prompt, request, run):
        self.check(prompt, request, run)

    @rule(prompt=prompts, request=requests, inner_prompt=prompts, inner=requests)
    def ask_within(self, prompt, request, inner_prompt, inner):
        """A callback of the request makes another request, in the middle of a step."""
        expected = self.expected(inner_prompt, inner)
        found = []

        def criterion(tokens, logits):
            if not found:
                found.append(answer(self.llm, inner_prompt, *inner))
            return False

        self.check(prompt, request, stopping_criteria=criterion)
        assert found[0][0] == expected[0]  # `scores` are those of the outer request again
        assert found[0][2] == expected[2]

    @rule(parts=image_turns, request=requests, run=st.sampled_from(RUNS))
    def chat_with_images(self, parts, request, run):
        """The tokens of an earlier request are left where the images stand."""
        expected = self.expected_chat(parts, request)
        found = run(lambda: chat_answer(self.llm, parts, *request))
        assert found[0] == expected[0]
        np.testing.assert_allclose(found[1], expected[1], atol=5e-5)
        assert found[2] == expected[2]

    @rule(target=streams, parts=image_turns, request=requests)
    def open_chat_with_images(self, parts, request):
        steering, policy = request
        chunks = self.llm.create_chat_completion(
            [message(*parts)], steering=steering, policy=policy, stream=True, **GREEDY
        )
        stream = OpenStream(chunks, self.expected_chat(parts, request))
        if not self.llm.context.batches_sequences:
            stream.advance(1)  # else its last token is computed again, and its images cannot be
        self.left.append(stream)
        return stream

    def expected_chat(self, parts, request):
        self.oracle.reset()
        self.oracle._cache._ledger = CacheLedger()
        return chat_answer(self.oracle, parts, *request)

    @rule(tokens=prompts, request=requests)
    def evaluate(self, tokens, request):
        """Evaluate by hand; the steering may change between two tokens, but not behind an image."""
        if self.llm.n_tokens + len(tokens) < 200:
            with self.llm.steering(*request):
                if self.llm._cache._ledger.images()[: self.llm.n_tokens].any():
                    with contextlib.suppress(SteeringError):
                        self.llm.eval(tokens)
                else:
                    self.llm.eval(tokens)

    @rule(n=st.integers(0, 12))
    def rewind(self, n):
        if self.llm.context.batches_sequences:  # a recurrent state cannot be cut back
            self.llm.n_tokens = min(self.llm.n_tokens, n)

    @rule()
    def reset(self):
        self.llm.reset()

    @rule()
    def capture(self):
        self.llm.capture([10, 11])

    @rule(target=states)
    def save(self):
        return self.llm.save_state()

    @rule(state=states)
    def load(self, state):
        self.llm.load_state(state)

    def teardown(self):
        for stream in self.left:
            stream.advance(2 * N_WRITTEN)


def run_machine(path, site, examples, **arguments):
    pack = pack_for(path, site)
    with (
        closing(SteeredLlama(path, pack=pack, **ARGUMENTS, **arguments)) as llm,
        closing(SteeredLlama(path, pack=pack, **ARGUMENTS)) as oracle,
    ):
        machine = type("Context", (Context,), {"llm": llm, "oracle": oracle})
        run_state_machine_as_test(
            machine,
            settings=settings(max_examples=examples, stateful_step_count=16, deadline=None),
        )


@pytest.mark.parametrize("n", range(1, 6))
def test_answer_after_n_tokens_is_set_back_equals_answer_of_new_context(tiny_model, n):
    """The logits in the context are those of a token that is gone."""
    prompt = [10, 11, 40, 41, 266]
    with (
        closing(SteeredLlama(tiny_model("llama"), **ARGUMENTS)) as llm,
        closing(SteeredLlama(tiny_model("llama"), **ARGUMENTS)) as oracle,
    ):
        llm.create_completion(prompt, **GREEDY)
        llm.n_tokens = n
        found = llm.create_completion(prompt[:n], **GREEDY)["choices"]
        assert found == oracle.create_completion(prompt[:n], **GREEDY)["choices"]


# The blocks of mamba have no attention to steer, and its state cannot be cut back.
@pytest.mark.parametrize(
    ("family", "site", "examples"),
    [
        ("llama", "attention", 40),
        pytest.param("mamba", "residual", 12, marks=needs_kept_logits),
    ],
)
def test_answer_after_any_history_equals_answer_of_new_context(tiny_model, family, site, examples):
    run_machine(tiny_model(family), site, examples)


@pytest.mark.parametrize(
    ("family", "site", "examples"),
    [
        ("llama", "attention", 25),
        pytest.param("mamba", "residual", 5, marks=needs_kept_logits),
    ],
)
def test_answer_with_drafts_after_any_history_equals_answer_without(
    tiny_model, family, site, examples
):
    run_machine(tiny_model(family), site, examples, draft_model=Rubble())
