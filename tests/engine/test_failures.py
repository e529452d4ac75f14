"""A failure ends only its own request, with its own error."""

import asyncio
import threading

import llama_cpp
import numpy as np
import pytest
from serving import (
    ARGUMENTS,
    GREEDY,
    PROMPTS,
    TOO_STRONG,
    outcome,
    pack_for,
    random_requests,
    solo_answers,
    text,
)

from pysteer import Engine, HookError, SteeringError
from pysteer.engine import EngineClosedError

REQUEST = {"prompt": PROMPTS[""], "max_tokens": 6, "steering": None, **GREEDY}


@pytest.fixture
def engine(tiny_llama):
    with Engine(
        tiny_llama, pack=pack_for(tiny_llama), max_sequences=4, max_queue=4, **ARGUMENTS
    ) as engine:
        yield engine


class Faulty:
    """An object with one method that raises, `left` times, instead of doing its work."""

    def __init__(self, what, method, error):
        self._what = what
        self._method = method
        self._error = error
        self.left = 0
        self.raised = 0

    def __getattr__(self, name):
        found = getattr(self._what, name)
        if name != self._method or self.left == 0:
            return found
        self.left -= 1
        self.raised += 1
        return self._fail

    def _fail(self, *_):
        raise self._error


def how_it_ended(handle):
    try:
        return outcome(handle.result(30))
    except SteeringError as error:
        return str(error)


def held_up(engine):
    """Hold the scheduler in a decode, so that requests submitted meanwhile start in one step.

    Returns the handle of that decode's request, and the way to let it go on.
    """
    batch = engine._scheduler.decoder.batch
    decode, started, go_on = batch.decode, threading.Event(), threading.Event()

    def waiting(context):
        started.set()
        assert go_on.wait(30)
        return decode(context)

    batch.decode = waiting
    handle = engine.submit(prompt=[5], max_tokens=1, **GREEDY)
    assert started.wait(30)

    def release():
        batch.decode = decode
        go_on.set()

    return handle, release


# ---- in a decode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batch", [512, 8])
def test_too_strong_steering_fails_only_its_request(tiny_llama, n_batch):
    """Neither in the same batch nor later, by NaN in released cells."""
    requests = random_requests(24, seed=5)
    solo = solo_answers(tiny_llama, requests)
    arguments = {**ARGUMENTS, "n_ctx": 1024, "n_batch": n_batch}
    with Engine(tiny_llama, pack=pack_for(tiny_llama), max_sequences=6, **arguments) as engine:
        handles, bad = [], []
        for k, request in enumerate(requests):
            handles.append(engine.submit(**request))
            if k % 4 == 0:
                steering = TOO_STRONG[k // 4 % len(TOO_STRONG)]
                asked = {**request, "steering": steering, "policy": None}
                bad.append(engine.submit(**asked))
        assert list(map(how_it_ended, handles)) == list(map(outcome, solo))
        assert all("not finite" in how_it_ended(handle) for handle in bad)


@pytest.mark.parametrize("family", ["llama", "mamba", "lfm2"])
def test_failed_prompt_leaves_nothing_in_its_slot(tiny_model, family):
    path = tiny_model(family)
    requests = random_requests(6, seed=2)
    solo = solo_answers(path, requests)
    with Engine(path, pack=pack_for(path), max_sequences=1, **ARGUMENTS) as engine:
        for request, alone, steering in zip(requests, solo, 2 * TOO_STRONG, strict=True):
            with pytest.raises(HookError, match="not finite"):
                engine.submit(**{**REQUEST, "steering": steering}).result()
            assert outcome(engine.submit(**request).result()) == outcome(alone)


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_failure_leaves_other_recurrent_states_alone(tiny_model, family):
    """The state of recurrent blocks is all that is left of the tokens read."""
    path = tiny_model(family)
    request = {**REQUEST, "max_tokens": 40}
    [alone] = solo_answers(path, [request])
    failures = []
    with Engine(path, pack=pack_for(path), max_sequences=4, **ARGUMENTS) as engine:

        def submit_some(tokens, logits):
            if len(tokens) % 5 == 0 and len(failures) < len(TOO_STRONG):
                steering = TOO_STRONG[len(failures)]
                failures.append(engine.submit(**{**REQUEST, "steering": steering}))
            return logits

        running = engine.submit(**request, logits_processor=[submit_some])
        assert outcome(running.result()) == outcome(alone)
        assert len(failures) == len(TOO_STRONG)
        assert all("not finite" in how_it_ended(handle) for handle in failures)


def test_failed_batch_is_decoded_in_parts(engine, tiny_llama):
    """Only a request that also fails alone has failed."""
    requests = random_requests(4, seed=7)
    solo = solo_answers(tiny_llama, requests)
    first, release = held_up(engine)
    handles = [engine.submit(**request) for request in requests]
    decoder = engine._scheduler.decoder
    decoder.batch = faulty = Faulty(decoder.batch, "decode", OSError("mine"))
    faulty.left = 1
    release()
    assert first.result()
    assert list(map(how_it_ended, handles)) == list(map(outcome, solo))
    assert faulty.raised == 1
    faulty.left = 100
    with pytest.raises(OSError, match="mine"):
        engine.submit(**REQUEST).result()
    assert faulty.raised == 2
    faulty.left = 0
    assert text(engine.submit(**REQUEST).result())


# ---- in callbacks and arguments ------------------------------------------------------------------


class _Outcome(BaseException):
    """Not an Exception, like those by which pytest skips a test and asyncio cancels a task."""


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, asyncio.CancelledError, _Outcome])
def test_raising_callback_ends_only_its_request(engine, where, error):
    def broken(tokens, logits):
        raise error("mine")

    other = engine.submit(**{**REQUEST, "max_tokens": 30})
    bad = engine.submit(**REQUEST, **{where: [broken] if where[0] == "l" else broken})
    for _ in range(2):
        with pytest.raises(error, match="mine"):
            bad.result(30)
        with pytest.raises(error, match="mine"):
            list(bad)
    assert other.result(30)["usage"]["completion_tokens"] == 30
    assert text(engine.submit(**REQUEST).result(30))


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (None, SteeringError),
        ("nonsense", ValueError),
        (np.zeros(3), SteeringError),
        (np.full(320, "a"), ValueError),
        (np.full(320, np.nan), SteeringError),
        (np.full(320, np.inf), SteeringError),
        (np.full(320, -np.inf), SteeringError),
        (np.full(320, 1e308), SteeringError),
    ],
    ids=["none", "text", "too short", "no numbers", "nan", "inf", "-inf", "beyond float32"],
)
def test_processor_that_returns_no_logits_raises(engine, returned, error):
    processors = llama_cpp.LogitsProcessorList([lambda tokens, logits: returned])
    request = {**REQUEST, "logit_bias": None, "logits_processor": processors}
    with pytest.raises(error):
        engine.submit(**request).result(30)


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), 1e300])
def test_bias_that_is_not_finite_raises_at_submit(engine, bias):
    with pytest.raises(SteeringError, match="logit_bias"):
        engine.submit(prompt=[10], logit_bias={5: bias})
    banned = engine.submit(prompt=[10], max_tokens=1, logit_bias={5: float("-inf")})
    assert banned.result(30)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mirostat_mode", [0, 1, 2])
def test_grammar_without_a_token_to_draw_ends_only_its_request(engine, temperature, mirostat_mode):
    """llama.cpp would end the process over a token that the grammar does not take."""
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "the"', verbose=False)
    other = engine.submit(**{**REQUEST, "max_tokens": 30})
    for left in ([], [40], [2]):  # a token outside of the grammar; the end of the text
        banned = dict.fromkeys(set(range(320)) - set(left), float("-inf"))
        bad = engine.submit(
            prompt=[10],
            grammar=grammar,
            logit_bias=banned,
            temperature=temperature,
            mirostat_mode=mirostat_mode,
        )
        with pytest.raises(SteeringError, match="no token can be drawn"):
            bad.result(30)
    assert other.result(30)["usage"]["completion_tokens"] == 30


def test_callback_that_waits_for_its_own_engine_raises(engine):
    """The thread that decodes calls it, and would wait for itself."""
    caught = []

    def attempt(what):
        try:
            what()
        except SteeringError as error:
            caught.append(str(error))

    def criterion(tokens, logits):
        handles = []
        attempt(lambda: [handles.append(engine.submit(**REQUEST)) for _ in range(9)])
        attempt(handles[0].result)
        attempt(lambda: next(iter(handles[0])))
        attempt(engine.together().__enter__)
        for handle in handles:
            handle.cancel()
        return True

    engine.submit(**REQUEST, stopping_criteria=criterion).result(30)
    assert ["max_queue" in message for message in caught] == [True, False, False, False]
    assert all("callback" in message for message in caught[1:])
    assert text(engine.submit(**REQUEST).result(30))


def test_callback_may_close_its_engine(tiny_llama):
    engine = Engine(tiny_llama, max_sequences=2, **ARGUMENTS)
    other = engine.submit(**{**REQUEST, "max_tokens": 400})
    handle = engine.submit(**REQUEST, stopping_criteria=lambda tokens, logits: engine.close())
    for ended in (handle, other):
        assert ended.result(30)["choices"][0]["finish_reason"] == "cancelled"
    engine.close()


# ---- in the engine itself ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["find", "open", "take", "rest"])
def test_defect_of_the_cache_loses_no_request(engine, method, caplog):
    scheduler = engine._scheduler
    first, release = held_up(engine)
    handles = [first, *[engine.submit(**REQUEST) for _ in range(4)]]
    scheduler.running.cache = faulty = Faulty(
        scheduler.running.cache, method, HookError("a defect")
    )
    faulty.left = 1
    release()
    ends = list(map(how_it_ended, handles))
    assert "a defect" in ends
    assert all(end == "a defect" or end[1] == "length" for end in ends)
    assert faulty.raised == 1
    assert scheduler.thread.is_alive()
    assert text(engine.submit(**REQUEST).result(30)), "it goes on"


def test_broken_scheduler_ends_every_request(engine):
    """A defect whose recovery fails, too: every request gets the reason, and the model is freed."""
    scheduler = engine._scheduler
    handle, release = held_up(engine)
    handles = [handle, *[engine.submit(**REQUEST) for _ in range(4)]]
    first = Faulty(scheduler.running.cache, "take", HookError("first defect"))
    scheduler.running.cache = second = Faulty(first, "recover", HookError("second defect"))
    first.left, second.left = 1, 1000
    release()
    scheduler.thread.join(30)
    assert not scheduler.thread.is_alive()
    assert list(map(how_it_ended, handles)) == ["first defect", *["second defect"] * 4]
    assert engine._llm.closed
    with pytest.raises(EngineClosedError):
        engine.submit(**REQUEST)


def test_request_whose_report_fails_keeps_no_other_from_ending(tiny_llama, monkeypatch):
    engine = Engine(tiny_llama, max_sequences=4, **ARGUMENTS)
    _, release = held_up(engine)
    handles = [engine.submit(**REQUEST) for _ in range(3)]

    def broken(*_):
        raise OSError("a defect")

    monkeypatch.setattr(engine._scheduler.queue.first().steering, "report", broken)
    engine._scheduler.stop(drain=False)
    release()
    engine.close()
    with pytest.raises(OSError, match="a defect"):
        handles[0].result(0)
    for handle in handles[1:]:
        assert handle.result(0)["choices"][0]["finish_reason"] == "cancelled"
    assert engine._llm.closed


def test_strength_too_small_for_any_effect_ends_normally(engine):
    """The category fires, and nothing has to be computed again."""
    policy = {"categories": {"a": {"strength": 1e-46}}}
    asked = {**REQUEST, "prompt": PROMPTS["a"], "steering": {"a": "auto"}, "policy": policy}
    result = engine.submit(**asked).result(30)
    assert result["steering"]["categories"]["a"]["fired"]
    unsteered = engine.submit(**{**asked, "steering": None}).result(30)
    assert text(result) == text(unsteered)


def test_moved_window_is_recomputed(tiny_model):
    """A sliding window keeps 256 tokens here, too few to cut back to where the steering begins."""
    path = tiny_model("gemma3", n_layer=6)  # the sixth sees all tokens
    rows = []
    request = {
        "prompt": [*range(270, 320)] * 8 + PROMPTS["a"],
        "steering": {"a": "auto"},
        "policy": {"scope": "range 156", "categories": {"a": {"threshold": -1e9}}},
        "max_tokens": 1,
        "temperature": 0.0,
        "logits_processor": llama_cpp.LogitsProcessorList(
            [lambda tokens, logits: rows.append(logits.copy()) or logits]
        ),
    }
    [alone] = solo_answers(path, [request])
    assert alone["steering"]["prompt_reprocessed"]
    arguments = {**ARGUMENTS, "swa_full": False, "n_ubatch": 8}
    with Engine(path, pack=pack_for(path), max_sequences=2, **arguments) as engine:
        assert outcome(engine.submit(**request).result()) == outcome(alone)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)
