"""Chats with images, which a chat handler decodes straight on the context."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from exactness import native_control_vector, same_bits
from images import (
    DRAWS_FROM_LOGITS,
    ImageHandler,
    answer_row_by_row,
    decode_rows,
    image_rows,
    message,
    needs_kept_logits,
    recorded_rows,
    rows_of,
)
from llama_cpp import llama_chat_format

from pysteer import HookError, SteeredLlama, SteeringError, SteeringPack, SteeringVector
from pysteer.pack.policy import Policy
from pysteer.pack.router import Gate, Read, Router

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
EXACT = {**ARGUMENTS, "logits_all": True, "n_ubatch": 8, "type_k": 0, "type_v": 0}  # float32
N_WRITTEN = 10
BANNED = range(5 + 128, 5 + 256)
OPTIONS = {
    "max_tokens": N_WRITTEN,
    "temperature": 0.0,
    "logit_bias": dict.fromkeys(BANNED, -1e4),
}
PACK = SteeringPack({"a": SteeringVector({1: 2 * np.random.default_rng(0).standard_normal(64)})})
CHATS = [
    [message("What is in ", 1, "?")],
    [message(2, "What is it")],
    [message("Two: ", 3, " and ", 4, ".")],
    [message("What is in ", 5, "?")],
    [message("no image at all")],
]


def models(path, pack=PACK):
    arguments = {**ARGUMENTS, "chat_handler": ImageHandler()}
    return (
        closing(llama_cpp.Llama(str(path), **arguments)),
        closing(SteeredLlama(path, pack=pack, **arguments)),
    )


def chat(llm, messages, **options):
    result = llm.create_chat_completion(messages, **OPTIONS, **options)
    return result["choices"], result["usage"]


def fresh(path, ask):
    with models(path)[0] as plain:
        return ask(plain)


@pytest.mark.parametrize("family", ["llama", pytest.param("mamba", marks=needs_kept_logits)])
@pytest.mark.parametrize("pack", [PACK, None])
def test_unsteered_image_chat_equals_llama_cpp_after_any_request(tiny_model, family, pack):
    path = tiny_model(family)
    expected = [fresh(path, lambda plain, m=m: chat(plain, m)) for m in CHATS]
    with models(path, pack)[1] as llm:
        for number in (0, 1, 2, 3, 4, 1, 3, 0, 2):
            assert chat(llm, CHATS[number], steering=None) == expected[number]
            if pack is not None:
                llm.create_completion([7, 8, 9, 10] * 5, steering={"a": 1.0}, **OPTIONS)


def test_text_after_an_image_chat_reuses_no_cell_of_the_image(tiny_llama):
    """In the place of an image, the tokens of an earlier request are left."""
    with models(tiny_llama)[1] as llm:
        for prompt in (list(range(270, 300)), llm.tokenize(b"What is in the other hand?")):
            expected = fresh(tiny_llama, lambda plain, p=prompt: plain(p, **OPTIONS)["choices"])
            for messages in CHATS:
                assert llm(prompt, steering=None, **OPTIONS)["choices"] == expected
                chat(llm, messages, steering=None)
                left = llm._input_ids.tolist()
                assert llm(prompt, steering=None, **OPTIONS)["choices"] == expected
                chat(llm, messages, steering=None)
                again = fresh(tiny_llama, lambda plain, p=left: plain(p, **OPTIONS)["choices"])
                assert llm(left, steering=None, **OPTIONS)["choices"] == again


@pytest.mark.parametrize("steering", [None, {"a": 1.0}])
def test_no_token_of_an_earlier_request_stands_for_an_image(tiny_llama, steering):
    """Samplers, and logits processors, see the tokens of the prompt."""
    seen = []

    def processor(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    with models(tiny_llama)[1] as llm:
        llm(list(range(270, 300)), steering=None, **OPTIONS)
        prompt = rows_of(llm, CHATS[0])
        llm.create_chat_completion(
            CHATS[0],
            steering=steering,
            max_tokens=1,
            logits_processor=llama_cpp.LogitsProcessorList([processor]),
        )
    assert seen[0] == [row if isinstance(row, int) else 0 for row in prompt]


def test_streams_of_image_chats_take_turns(tiny_llama):
    def text(chunks):
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    expected = [
        fresh(tiny_llama, lambda plain, m=m: chat(plain, m)[0][0]["message"]["content"])
        for m in CHATS
    ]
    with models(tiny_llama)[1] as llm:
        streams = [
            llm.create_chat_completion(m, steering=None, stream=True, **OPTIONS) for m in CHATS
        ]
        chunks = [[] for _ in CHATS]
        for _ in range(40):
            for stream, found in zip(streams, chunks, strict=True):
                found += [chunk for chunk in [next(stream, None)] if chunk is not None]
            llm.create_completion([60, 61], steering={"a": 1.0}, max_tokens=1)
    assert [text(found) for found in chunks] == expected


# ---- steered -------------------------------------------------------------------------------------

SCOPES = {
    "all": lambda p, n: 1.0,
    "prompt": lambda p, n: float(p < n),
    "response": lambda p, n: float(p >= n - 1),
    "first 3": lambda p, n: float(0 <= p - (n - 1) < 3),
    "linear 4": lambda p, n: max(1 - (p - n + 1) / 4, 0.0) if p >= n - 1 else 0.0,
    "cosine 4": lambda p, n: (
        (1 + math.cos(math.pi * (p - n + 1) / 4)) / 2 if 0 <= p - n + 1 < 4 else 0.0
    ),
    "values 1 0.5": lambda p, n: {0: 1.0, 1: 0.5}.get(p - (n - 1), 0.0),
    "range 9 11": lambda p, n: float(9 <= p < 11),  # within the first image of CHATS[0]
}


def steered(llm, messages, **options):
    """Return text, the logits that decided its tokens, and the report."""
    result = llm.create_chat_completion(messages, **OPTIONS, **options)
    n = result["usage"]["prompt_tokens"]
    rows = llm.scores[n - 1 : n - 1 + N_WRITTEN].copy()
    return result["choices"][0]["message"]["content"], rows, result["steering"]


def image_model(path, pack=PACK, handler=None, **arguments):
    arguments = {**EXACT, **arguments}
    return closing(
        SteeredLlama(path, pack=pack, chat_handler=handler or ImageHandler(), **arguments)
    )


@pytest.mark.parametrize("injection", ["auto", "resident", "hooked"])
@pytest.mark.parametrize(
    "image", [{}, {"n_batch": 2}, {"non_causal": True}], ids=["whole", "batches", "non-causal"]
)
def test_all_rows_equal_llama_cpps_control_vector_to_the_last_bit(tiny_llama, injection, image):
    arguments = {**EXACT, "n_ubatch": 64}
    for messages in CHATS:
        with closing(
            llama_cpp.Llama(str(tiny_llama), chat_handler=ImageHandler(**image), **arguments)
        ) as plain:
            native_control_vector(plain, PACK["a"], 4)
            expected = plain.create_chat_completion(messages, **OPTIONS)
            n = expected["usage"]["prompt_tokens"]
            logits = plain.scores[n - 1 : n - 1 + N_WRITTEN].copy()
        handler = ImageHandler(**image)
        with image_model(tiny_llama, handler=handler, n_ubatch=64, injection=injection) as llm:
            text, found, report = steered(llm, messages, steering={"a": 1.0})
        assert text == expected["choices"][0]["message"]["content"]
        assert same_bits(found, logits)
        assert report["tokens_steered"] == n + N_WRITTEN - 1
        assert handler.calls == 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("injection", ["auto", "hooked"])
def test_scope_steers_rows_of_text_and_images_by_their_factors(tiny_llama, scope, injection):
    factor = SCOPES[scope]
    with image_model(tiny_llama, injection=injection) as llm:
        for messages in CHATS:
            expected, tokens = answer_row_by_row(
                tiny_llama, messages, PACK["a"], factor, N_WRITTEN, BANNED, **EXACT
            )
            found = steered(llm, messages, steering={"a": 1.0}, policy={"scope": scope})
            np.testing.assert_allclose(found[1], expected, atol=5e-5)
            assert found[0].encode() == llm.detokenize(tokens)
            n = len(rows_of(llm, messages))
            acted = [factor(p, n) != 0 for p in range(n + N_WRITTEN - 1)]
            assert found[2]["tokens_steered"] == sum(acted)


# ---- gated ---------------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(7).standard_normal((1, 64))
LAYER = 1  # that the router reads
LAST, PROMPT = Read(LAYER, "last"), Read(LAYER, "prompt")


def gated_pack(read, threshold, *, vector=PACK["a"], recheck=None):
    gate = Gate(np.array([threshold]), np.ones(1, bool), *[np.zeros(1)] * 3)
    router = Router(
        site="residual",
        reads=[read],
        categories=["a"],
        gates={"probe": gate, "multinomial": gate},
        confusion=np.eye(2, dtype=np.int64),
        threshold_rule="youden",
        train_counts=np.ones(2, np.int64),
        weight=np.zeros((2, 64)),
        bias=np.zeros(2),
        probe_weight=WEIGHTS,
        probe_bias=np.zeros(1),
    )
    policy = Policy(gate="probe", recheck=recheck)
    return SteeringPack({"a": vector}, router=router, policy=policy)


def read_by_hand(path, messages, read):
    """The probe's score of a chat, from the rows of its tokens without those of its images."""
    arguments = {**EXACT, "chat_handler": ImageHandler()}
    with recorded_rows(path, f"l_out-{LAYER}", **arguments) as (plain, rows):
        plain.create_chat_completion(messages, **{**OPTIONS, "max_tokens": 1})
        prompt = rows_of(plain, messages)
        text = [k for k, row in enumerate(prompt) if isinstance(row, int)]
        read_rows = text[-1:] if read is LAST else text
        state = np.float64([rows[k] for k in read_rows]).mean(axis=0)
    return float(WEIGHTS[0] @ state)


@pytest.mark.parametrize("n_batch", [2, 256])
@pytest.mark.parametrize("read", [LAST, PROMPT], ids=["last", "prompt"])
def test_gate_reads_the_tokens_of_an_image_chat_and_not_its_images(tiny_llama, read, n_batch):
    with image_model(tiny_llama, gated_pack(read, 1e30), n_batch=n_batch) as llm:
        for messages in CHATS:
            score = read_by_hand(tiny_llama, messages, read)
            report = steered(llm, messages)[2]
            assert report["scores"]["a"] == pytest.approx(score, rel=1e-4, abs=1e-4)
            assert report["checks"] == 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("read", [LAST, PROMPT], ids=["last", "prompt"])
def test_fired_gate_steers_an_image_chat_as_if_forced(tiny_llama, read, scope):
    """At layers after the gate, so that the gate's own row is steered alike."""
    vector = SteeringVector({2: dict(PACK["a"].items())[1]})
    for number, messages in enumerate(CHATS):
        expected, tokens = answer_row_by_row(
            tiny_llama, messages, vector, SCOPES[scope], N_WRITTEN, BANNED, **EXACT
        )
        threshold = read_by_hand(tiny_llama, messages, read) - 1e-3
        pack, handler = gated_pack(read, threshold, vector=vector), ImageHandler()
        with image_model(tiny_llama, pack, handler) as llm:
            found = steered(llm, messages, policy={"scope": scope})
            assert found[2]["categories"]["a"]["fired"]
            np.testing.assert_allclose(found[1], expected, atol=5e-5)
            assert found[0].encode() == llm.detokenize(tokens)
            n = len(rows_of(llm, messages))
            acted = [SCOPES[scope](p, n) != 0 for p in range(n + N_WRITTEN - 1)]
            assert found[2]["tokens_steered"] == sum(acted)
            assert handler.calls <= (3 if number < 4 else 1)


@pytest.mark.parametrize("read", [LAST, PROMPT], ids=["last", "prompt"])
def test_closed_gate_leaves_an_image_chat_unchanged_to_the_last_bit(tiny_llama, read):
    for messages in CHATS:
        threshold = read_by_hand(tiny_llama, messages, read) + 1e-3
        with image_model(tiny_llama) as llm:
            expected = steered(llm, messages, steering=None)
        with image_model(tiny_llama, gated_pack(read, threshold)) as llm:
            found = steered(llm, messages)
        assert found[2]["categories"]["a"]["fired"] is False
        assert found[0] == expected[0]
        assert same_bits(found[1], expected[1])


AFTER_GATE = SteeringVector({LAYER + 1: dict(PACK["a"].items())[1]})


def rechecked(path, messages, read, threshold, written, every):
    """Logits from the last prompt row on, and flags of these rows: steered by the formula."""
    with recorded_rows(path, f"l_out-{LAYER}", **EXACT) as (plain, rows):
        prompt = [*rows_of(plain, messages), *written]
        last = len(prompt) - len(written) - 1
        flags, since, on = [], [], False
        for position, row in enumerate(prompt):
            at = len(rows)
            if not isinstance(row, int):
                decode_rows(plain, row[None], position)
                plain.n_tokens += 1
                continue
            plain.eval([row])
            since.append(rows[at])
            if position >= last and (position - last) % every == 0:
                state = np.float64(since[-1:] if read is LAST else since).mean(axis=0)
                on, since = float(WEIGHTS[0] @ state) >= threshold, []
                native_control_vector(plain, AFTER_GATE * float(on), 4)
                plain.n_tokens = position
                plain.eval([row])  # under its own decision
            flags.append(on)
        return plain.scores[last : len(prompt)].copy(), flags[-len(written) - 1 :]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("read", [LAST, PROMPT], ids=["last", "prompt"])
def test_recheck_decides_in_the_response_to_an_image(tiny_llama, read, every):
    changes = 0
    for messages in CHATS:
        threshold = read_by_hand(tiny_llama, messages, read) - 1e-3
        pack = gated_pack(read, threshold, vector=AFTER_GATE, recheck=every)
        with image_model(tiny_llama, pack) as llm:
            _, found, report = steered(llm, messages, policy={"scope": "response"})
            written = llm._input_ids[len(rows_of(llm, messages)) :].tolist()
        expected, flags = rechecked(tiny_llama, messages, read, threshold, written, every)
        assert report["checks"] == 1 + (N_WRITTEN - 1) // every
        np.testing.assert_allclose(found, expected, atol=5e-5)
        changes += len(set(flags)) > 1
    assert changes  # else the checks decide nothing


# ---- turns, streams, blocks and threads ----------------------------------------------------------

TWO_TURNS = [
    message("What is in ", 1, "?"),
    {"role": "assistant", "content": "A boat."},
    message("And in ", 2, "?"),
]
REQUESTS = [
    {"steering": {"a": 1.0}},
    {"steering": {"a": 1.0}, "policy": {"scope": "response"}},
    {"steering": {"a": 1.0}, "policy": {"scope": "range 9 11"}},
    {"steering": None},
    {},
]


@pytest.fixture
def fires_for_some(tiny_llama):
    """A pack whose gate opens for some of the chats."""
    scores = [read_by_hand(tiny_llama, messages, PROMPT) for messages in [*CHATS, TWO_TURNS]]
    return gated_pack(PROMPT, float(np.median(scores)) + 1e-3)


def same_answer(found, expected):
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=5e-5)
    assert found[2]["tokens_steered"] == expected[2]["tokens_steered"]
    assert found[2]["mode"] == expected[2]["mode"]


def fresh_answer(path, pack, messages, request):
    with image_model(path, pack) as llm:
        return steered(llm, messages, **request)


def test_image_chats_under_changing_steering_equal_those_of_new_models(tiny_llama, fires_for_some):
    """Two turns, one turn of the same chat, and texts in between, each under other steering."""
    chats = [TWO_TURNS[:1], TWO_TURNS, CHATS[4], TWO_TURNS, CHATS[0], CHATS[3]]
    expected = [
        [fresh_answer(tiny_llama, fires_for_some, messages, request) for request in REQUESTS]
        for messages in chats
    ]
    assert {e[-1][2]["categories"]["a"]["fired"] for e in expected} == {True, False}
    with image_model(tiny_llama, fires_for_some) as llm:
        for shift in range(len(REQUESTS)):
            for number, messages in enumerate(chats):
                request = (number + shift) % len(REQUESTS)
                found = steered(llm, messages, **REQUESTS[request])
                same_answer(found, expected[number][request])


def test_streams_of_steered_image_chats_take_turns(tiny_llama, fires_for_some):
    requests = list(zip(CHATS, REQUESTS, strict=True))
    expected = [fresh_answer(tiny_llama, fires_for_some, *request) for request in requests]
    with image_model(tiny_llama, fires_for_some) as llm:
        streams = [
            llm.create_chat_completion(messages, stream=True, **OPTIONS, **request)
            for messages, request in requests
        ]
        texts, reports = [""] * len(streams), [None] * len(streams)
        for _ in range(40):
            for k, stream in enumerate(streams):
                chunk = next(stream, None)
                if chunk is not None:
                    texts[k] += chunk["choices"][0]["delta"].get("content") or ""
                    reports[k] = chunk.get("steering", reports[k])
            llm.create_completion([60, 61], steering={"a": -1.0}, max_tokens=1)
    assert texts == [text for text, _, _ in expected]
    told = [report["tokens_steered"] for report in reports]
    assert told == [report["tokens_steered"] for _, _, report in expected]


def test_blocks_and_threads_steer_image_chats_of_their_own(tiny_llama, fires_for_some):
    pairs = [(CHATS[k], request) for k in (0, 2) for request in REQUESTS[:4]]
    expected = [fresh_answer(tiny_llama, fires_for_some, *pair) for pair in pairs]
    with image_model(tiny_llama, fires_for_some, logits_all=False) as llm:

        def ask(messages, request):
            with llm.steering(**request):
                result = llm.create_chat_completion(messages, **OPTIONS)
            return result["choices"][0]["message"]["content"], result["steering"]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda pair: ask(*pair), pairs * 3))
    for (text, report), answer in zip(found, expected * 3, strict=True):
        assert text == answer[0]
        assert report["tokens_steered"] == answer[2]["tokens_steered"]


@pytest.mark.skipif(DRAWS_FROM_LOGITS, reason="only with older versions of llama-cpp-python")
def test_image_chat_of_a_recurrent_model_raises_with_the_version_to_install(tiny_model):
    with image_model(tiny_model("mamba")) as llm, pytest.raises(SteeringError, match=r"0\.3\.32"):
        llm.create_chat_completion(CHATS[0], steering=None, **OPTIONS)


@needs_kept_logits
@pytest.mark.parametrize("scope", ["all", "prompt", "response", "range 9 11"])
def test_recurrent_model_steers_an_image_chat(tiny_model, scope):
    path = tiny_model("mamba")
    with image_model(path) as llm:
        for messages in CHATS:
            expected, tokens = answer_row_by_row(
                path, messages, PACK["a"], SCOPES[scope], N_WRITTEN, BANNED, **EXACT
            )
            found = steered(llm, messages, steering={"a": 1.0}, policy={"scope": scope})
            np.testing.assert_allclose(found[1], expected, atol=5e-5)
            assert found[0].encode() == llm.detokenize(tokens)


class Twice(ImageHandler):
    """Completes a second prompt, which goes on from the first, as handlers of tools do."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def __call__(self, *, llama, **options):
        super().__call__(llama=llama, **{**options, "max_tokens": len(self.first)})
        prompt = [*llama.input_ids[: llama.n_tokens].tolist(), self.first[-1]]
        asked = {name: options[name] for name in ("temperature", "logit_bias")}
        rest = N_WRITTEN - len(self.first)
        completion = llama.create_completion(prompt=prompt, max_tokens=rest, **asked)
        return llama_chat_format._convert_completion_to_chat(completion, stream=False)


def test_second_completion_of_an_image_chat_is_steered_or_refused(tiny_llama, fires_for_some):
    _, written = answer_row_by_row(
        tiny_llama, CHATS[0], PACK["a"], SCOPES["all"], N_WRITTEN, BANNED, **EXACT
    )
    with image_model(tiny_llama, fires_for_some, Twice(written[:4])) as llm:
        result = llm.create_chat_completion(CHATS[0], steering={"a": 1.0}, **OPTIONS)
        rest = result["choices"][0]["message"]["content"]
        assert rest.encode() == llm.detokenize(written[4:])
        refused(llm, CHATS[0], "a gate has to read a second prompt")


# ---- what cannot be steered ----------------------------------------------------------------------


class OtherPrompt(ImageHandler):
    """An image that has another size each time, as one behind a URL may."""

    def image(self, llama, seed):
        for _ in range(self.calls):
            super().image(llama, seed)


class SharedPositions(ImageHandler):
    """M-RoPE: the rows of an image stand at fewer positions."""

    def image(self, llama, seed):
        decode_rows(llama, image_rows(seed), llama.n_tokens + np.array([0, 0, 1, 1, 2]))
        llama.n_tokens += 3


class NoImage(ImageHandler):
    """Positions over which nothing was decoded."""

    def image(self, llama, seed):
        llama.n_tokens += 3


def refused(llm, messages, match, **request):
    with pytest.raises(SteeringError, match=match):
        llm.create_chat_completion(messages, **OPTIONS, **request)


def test_image_of_another_size_in_the_next_call_is_refused(tiny_llama, fires_for_some):
    with image_model(tiny_llama, fires_for_some, OtherPrompt()) as llm:
        refused(llm, CHATS[0], "made another prompt of the same messages")
        plain = fresh_answer(tiny_llama, fires_for_some, CHATS[4], {})
        same_answer(steered(llm, CHATS[4]), plain)


def test_rows_that_share_positions_are_steered_together_or_refused(tiny_llama):
    for scope in ("all", "prompt", "response"):
        with image_model(tiny_llama, handler=SharedPositions(), n_ubatch=64) as llm:
            found = steered(llm, CHATS[0], steering={"a": 1.0}, policy={"scope": scope})
        with closing(
            llama_cpp.Llama(
                str(tiny_llama), chat_handler=SharedPositions(), **{**EXACT, "n_ubatch": 64}
            )
        ) as plain:
            if scope == "all":
                native_control_vector(plain, PACK["a"], 4)
                expected = plain.create_chat_completion(CHATS[0], **OPTIONS)
                assert found[0] == expected["choices"][0]["message"]["content"]
                n = expected["usage"]["prompt_tokens"]
                assert same_bits(found[1], plain.scores[n - 1 : n - 1 + N_WRITTEN])
    with image_model(tiny_llama, handler=SharedPositions()) as llm:
        request = {"steering": {"a": 1.0}, "policy": {"scope": "range 9 10"}}
        refused(llm, CHATS[0], "5 rows stand at 3 positions", **request)
        assert steered(llm, CHATS[4], **request)[2]["tokens_steered"] == 1


def test_positions_without_rows_are_refused_where_steering_counts(tiny_llama):
    with image_model(tiny_llama, handler=NoImage()) as llm:
        refused(llm, CHATS[0], "0 rows stand at 3 positions", steering={"a": 1.0})


def test_overflow_in_an_image_names_the_steering_and_leaves_no_cell(tiny_llama):
    vector = SteeringVector({i: 3e38 * np.ones(64) for i in (1, 2)})
    pack = SteeringPack({"a": PACK["a"], "huge": vector})
    with image_model(tiny_llama, pack, max_relative_norm=None) as llm:
        for scope in ("all", "range 9 11"):
            with pytest.raises(HookError, match=r"not finite.*in force: huge=1"):
                llm.create_chat_completion(
                    CHATS[0], steering={"huge": 1.0}, policy={"scope": scope}, **OPTIONS
                )
            expected = fresh_answer(tiny_llama, PACK, CHATS[0], {"steering": {"a": 1.0}})
            same_answer(steered(llm, CHATS[0], steering={"a": 1.0}), expected)


def test_rows_decoded_by_hand_under_steering_are_refused(tiny_llama):
    with image_model(tiny_llama) as llm, llm.steering({"a": 1.0}):
        with pytest.raises(SteeringError, match="n_tokens was raised by hand"):
            ImageHandler().image(llm, 1)
        assert llm.n_tokens == 0


def test_failed_handler_leaves_the_model_to_other_requests(tiny_llama, fires_for_some):
    class Failing(ImageHandler):
        def image(self, llama, seed):
            super().image(llama, seed)
            raise ValueError("no such image")

    prompt = list(range(270, 290))
    expected = fresh(tiny_llama, lambda plain: plain(prompt, **OPTIONS)["choices"])
    with image_model(tiny_llama, fires_for_some, Failing()) as llm:
        uses = [
            lambda: llm(prompt, steering=None, **OPTIONS),
            lambda: llm.eval([60, 61]),
            lambda: next(llm.generate([60, 61], reset=False)),
            lambda: llm.load_state(llm.save_state()),
        ]
        for use in uses:
            with pytest.raises(ValueError, match="no such image"):
                llm.create_chat_completion(CHATS[0], **OPTIONS)
            use()
            assert llm(prompt, steering=None, **OPTIONS)["choices"] == expected


def test_saved_image_chat_is_not_reused_by_a_text(tiny_llama):
    """The tokens in the place of an image are those of a text."""
    with image_model(tiny_llama) as llm:
        steered(llm, CHATS[0], steering={"a": 1.0})
        state, prompt = llm.save_state(), llm._input_ids.tolist()
        expected = fresh(tiny_llama, lambda plain: plain(prompt, **OPTIONS)["choices"])
        llm.reset()
        llm.load_state(state)
        assert llm(prompt, steering=None, **OPTIONS)["choices"] == expected
