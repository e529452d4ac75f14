"""Models come and go, in any order and from any thread, without a crash or a leak."""

import gc
import subprocess
import sys
import threading
import weakref
from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from memory import in_own_process, measurable, resident_bytes

from pysteer import Engine, HookedLlama, SteeredLlama, SteeringError, SteeringPack, SteeringVector

ARGUMENTS = {
    "n_ctx": 64,
    "logits_all": True,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
}
PACK = SteeringPack(
    {
        "residual": SteeringVector({i: np.full(64, 0.5) for i in (1, 2, 3)}),
        "attention": SteeringVector({0: np.full(64, 0.5)}, site="attention"),
    }
)
TOKENS = list(range(10, 22))


def new(path, **arguments):
    return SteeredLlama(path, pack=PACK, **{**ARGUMENTS, **arguments})


def resident_after_cycles(path):
    """Return the resident memory after 60 cycles, and after 140 more."""

    def cycle():
        with closing(new(path)) as llm:
            for steering in ({"residual": 1.0}, {"attention": 1.0}, None):
                stream = llm.create_completion(
                    TOKENS, steering=steering, max_tokens=3, temperature=0.0, stream=True
                )
                for _ in stream:
                    pass
            llm.capture(TOKENS, pool="all")

    def cycles(n):
        for _ in range(n):
            cycle()
        return resident_bytes()

    return cycles(60), cycles(140)


@measurable
def test_200_cycles_keep_memory_flat(tiny_llama):
    warm, after = in_own_process(resident_after_cycles, tiny_llama)
    # The allocator's own ups and downs stay below 8 MB; a model that is not freed takes over 3 MB,
    # 140 of them over 400 MB.
    assert after - warm < 8_000_000


def test_closed_model_raises_on_every_call(tiny_llama):
    llm = new(tiny_llama)
    stream = llm.create_completion(TOKENS, max_tokens=8, temperature=0.0, stream=True)
    next(stream)
    generator = llm.generate(TOKENS)
    llm.close()
    llm.close()
    for call in (
        lambda: llm.eval(TOKENS),
        lambda: llm.create_completion(TOKENS),
        lambda: llm.create_chat_completion([{"role": "user", "content": "a"}]),
        lambda: llm(TOKENS),
        lambda: next(stream),
        lambda: next(generator),
        lambda: llm.tokenize(b"a"),
        lambda: llm.detokenize(TOKENS),
        lambda: llm.capture(TOKENS),
        lambda: llm.embed("a"),
        lambda: llm.save_state(),
        lambda: llm.create_completion(TOKENS, steering={"residual": 1.0}),
    ):
        with pytest.raises(SteeringError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="closed"):  # its tensors are freed
        llm.context._hook.set_sequence(0, None)


def test_models_streams_and_hooks_end_in_any_order(tiny_llama):
    """A model is collected while its stream is open, beside another, and in a reference cycle."""
    a, b = new(tiny_llama), new(tiny_llama)
    stream = a.create_completion(
        TOKENS, steering={"residual": 1.0}, max_tokens=8, temperature=0.0, stream=True
    )
    next(stream)
    del a
    gc.collect()
    assert len(list(stream)) > 0  # the stream keeps its model
    del stream
    gc.collect()
    b.itself = b
    del b
    gc.collect()
    with closing(new(tiny_llama)) as c:
        hook, context = c.context._hook, c._ctx
    del c
    gc.collect()
    assert hook.sites
    del hook
    gc.collect()
    assert context.ctx is None


def test_failed_construction_leaves_nothing_behind(tiny_llama, tmp_path):
    other = SteeringPack({"x": SteeringVector({1: np.ones(8)})})
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_llama.read_bytes()[:5000])
    for _ in range(3):
        with pytest.raises(ValueError, match="does not exist"):
            new(tmp_path / "missing.gguf")
        with pytest.raises(ValueError, match="Failed to load"):
            new(broken)
        with pytest.raises(SteeringError):
            SteeredLlama(tiny_llama, pack=other, **ARGUMENTS)
        with pytest.raises(SteeringError, match="vocab_only"):
            new(tiny_llama, vocab_only=True)
    gc.collect()
    new(tiny_llama).close()


def test_models_built_in_threads_keep_their_own_hooks(tiny_llama):
    """No thread sees the hook of another, and plain models built meanwhile have no hook."""
    expected = {}
    for name in (None, "residual", "attention"):
        with closing(new(tiny_llama)) as llm:
            expected[name] = _logits(llm, name)
    assert not np.array_equal(expected[None], expected["residual"])
    failures = []
    start = threading.Barrier(6)

    def work(name):
        start.wait()
        for _ in range(5):
            if name == "plain":
                with closing(llama_cpp.Llama(str(tiny_llama), **ARGUMENTS)) as plain:
                    bare = not plain.context_params.cb_eval
                    plain.eval(TOKENS)
                    same = np.array_equal(plain.scores[: len(TOKENS)], expected[None])
                    if not (bare and same):
                        failures.append(name)
            else:
                with closing(new(tiny_llama)) as llm:
                    if not np.array_equal(_logits(llm, name), expected[name]):
                        failures.append(name)

    names = [None, "residual", "attention", "plain", "residual", "plain"]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def _logits(llm, name):
    with llm.steering(None if name is None else {name: 1.0}):
        llm.eval(TOKENS)
    return llm.scores[: len(TOKENS)].copy()


@pytest.mark.parametrize("streaming", [True, False])
def test_close_from_another_thread_waits_or_ends_the_stream(tiny_llama, streaming):
    for delay in (0.0, 0.002, 0.01):
        llm = new(tiny_llama)
        outcome = []
        started = threading.Event()

        def work(llm=llm, outcome=outcome, started=started):
            started.set()
            try:
                for _ in range(200):
                    request = llm.create_completion(
                        TOKENS,
                        steering={"residual": 1.0},
                        max_tokens=20,
                        temperature=0.0,
                        stream=streaming,
                    )
                    if streaming:
                        for _ in request:
                            pass
                outcome.append("finished")
            except SteeringError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        threading.Event().wait(delay)
        llm.close()
        thread.join(30)
        assert not thread.is_alive()
        assert outcome
        assert outcome[0] == "finished" or "closed" in outcome[0]


def test_interpreter_exits_with_models_open(tiny_llama):
    program = (
        "import numpy as np\n"
        "from pysteer import *\n"
        "pack = SteeringPack({'c': SteeringVector({1: np.ones(64)})})\n"
        f"llm = SteeredLlama({str(tiny_llama)!r}, pack=pack, n_ctx=64, verbose=False)\n"
        "stream = llm.create_completion([5, 6, 7], steering={'c': 1.0}, stream=True)\n"
        "next(stream)\n"
        "keep = [llm, stream]; keep.append(keep)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("kind", [HookedLlama, SteeredLlama])
def test_properties_of_a_closed_model_raise(tiny_llama, kind):
    """llama.cpp would read freed memory."""
    llm = kind(tiny_llama, **ARGUMENTS)
    llm.eval(TOKENS)
    state = llm.save_state()
    llm.close()
    for call in (
        lambda: llm.base_model,
        llm.n_ctx,
        llm.n_embd,
        llm.n_vocab,
        llm.token_bos,
        llm.token_eos,
        llm.token_nl,
        llm.pooling_type,
        llm.reset,
        llm.sample,
        llm.save_state,
        lambda: llm.load_state(state),
        lambda: llm.embed("a"),
        lambda: llm.eval(TOKENS),
        lambda: llm.capture(TOKENS),
        lambda: llm.ctx,
        lambda: llm.model,
    ):
        with pytest.raises(SteeringError, match="closed"):
            call()
    assert llm.closed


def test_load_failure_names_the_file_and_the_cause(tiny_llama, tmp_path):
    missing, broken = tmp_path / "missing.gguf", tmp_path / "broken.gguf"
    broken.write_bytes(tiny_llama.read_bytes()[:5000])
    for path, cause in ((missing, "does not exist"), (broken, "Failed to load")):
        for kind in (HookedLlama, SteeredLlama, Engine):
            with pytest.raises(SteeringError, match=cause) as caught:
                kind(path, verbose=False)
            message = str(caught.value)
            assert message.startswith(f"{path}: ")
            assert message.count(str(path)) == 1
            assert message.endswith("; is it a GGUF model?")


def test_load_failure_of_an_argument_does_not_doubt_the_file(tiny_llama):
    with pytest.raises(SteeringError, match=r"Unknown value type for a: None$"):
        HookedLlama(tiny_llama, kv_overrides={"a": None}, verbose=False)


def test_model_is_freed_with_its_last_reference(tiny_llama):
    """As a `llama_cpp.Llama` is: not only when the collector looks for circles."""
    gc.collect()
    gc.disable()
    try:
        llm = new(tiny_llama)
        llm.create_completion("a", steering={"residual": 1.0}, max_tokens=1)
        alive = weakref.ref(llm)
        stream = llm.create_completion("a", steering={"residual": 1.0}, max_tokens=2, stream=True)
        del llm
        *_, last = stream
        assert last["steering"]["mode"] == "forced"
        del stream
        assert alive() is None
    finally:
        gc.enable()
