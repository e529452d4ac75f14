"""llama.cpp's log in a process of its own, whose standard error is read."""

import subprocess
import sys
import textwrap

import pytest

SLIDING = "gemma3"  # llama.cpp warns of the full-size cache of a sliding window


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


USES = {
    "SteeredLlama": """
        from pysteer import SteeredLlama
        llm = SteeredLlama(sys.argv[1], **ARGUMENTS)
        llm.create_completion("a b", max_tokens=2)
    """,
    "Engine": """
        from pysteer import Engine
        with Engine(sys.argv[1], max_sequences=2, **ARGUMENTS) as engine:
            engine.submit(prompt="a b", max_tokens=2).result()
    """,
    "LlamaCapture": """
        from pysteer.extract.llama_capture import LlamaCapture
        capture = LlamaCapture(sys.argv[1], n_ctx=64)
        capture.llm.capture(capture.prompt_tokens("a b"))
    """,
    "diagnose": """
        from pysteer.runtime.doctor import diagnose
        diagnose(sys.argv[1], n_threads=1)
    """,
}
HEAD = "import sys\nARGUMENTS = {'n_ctx': 64, 'verbose': False}\n"


@pytest.mark.parametrize("use", USES)
def test_quiet_model_writes_nothing(use, tiny_model):
    done = run(HEAD + textwrap.dedent(USES[use]), tiny_model(SLIDING))
    assert (done.stdout, done.stderr) == ("", "")


def test_plain_llama_without_pysteer_writes_a_warning(tiny_model):
    """A warning that the tests above would miss on another version of llama.cpp."""
    code = "import sys, llama_cpp\nllama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False)"
    assert "full-size SWA cache" in run(code, tiny_model(SLIDING)).stderr


def test_verbose_model_writes_the_log(tiny_model):
    code = "import sys\nfrom pysteer import HookedLlama\nHookedLlama(sys.argv[1], n_ctx=64)"
    errors = run(code, tiny_model(SLIDING)).stderr
    assert "full-size SWA cache" in errors
    assert "llama_model_loader" in errors


def test_error_of_a_quiet_model_is_in_the_exception_alone(tiny_model, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_model(SLIDING).read_bytes()[:-1000])
    code = """
        import sys
        from pysteer import HookedLlama, SteeringError
        for _ in range(2):  # the second time without the first one's errors
            try:
                HookedLlama(sys.argv[1], verbose=False)
            except SteeringError as error:
                print(error)
    """
    done = run(code, broken)
    first, second = done.stdout.splitlines()
    assert first == second
    assert "data is not within the file bounds" in first
    assert done.stderr == ""


@pytest.mark.parametrize("order", ["before", "after"])
def test_callback_of_the_program_stays(order, tiny_model):
    code = """
        import ctypes, sys, llama_cpp
        seen = []
        callback = llama_cpp.llama_log_callback(lambda level, text, _: seen.append(text))
        if sys.argv[2] == "before":
            llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        from pysteer import HookedLlama
        HookedLlama(sys.argv[1], n_ctx=64, verbose=False).close()
        if sys.argv[2] == "after":
            llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
            HookedLlama(sys.argv[1], n_ctx=64, verbose=False).close()
        assert any(b"full-size SWA cache" in text for text in seen), seen
    """
    assert run(code, tiny_model(SLIDING), order).stderr == ""
