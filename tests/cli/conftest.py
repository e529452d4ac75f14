"""Fixtures of the commands' tests: a way to run commands, and models and sessions for the chat."""

import logging

import llama_cpp
import pytest
from chats import CONTEXT, LENGTH, towards
from packs import HATE, MALWARE, N_EMBD

from pysteer import BaseModel, SteeredLlama, SteeringPack, SteeringVector
from pysteer.cli import run
from pysteer.cli.chat_session import Session


@pytest.fixture(autouse=True)
def _logging():
    """Remove the log handler that commands add."""
    logger = logging.getLogger("pysteer")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


@pytest.fixture
def cli(capsys):
    """A function that runs a command and returns its exit code, standard output and error."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def pack_file(tmp_path):
    """Path of a pack of two categories for the tiny Llama."""
    path = tmp_path / "pack.gguf"
    SteeringPack(
        {"hate": HATE, "mal=ware": MALWARE},
        base_model=BaseModel("llama", "Tiny", 4, N_EMBD, 320),
        residual_norm={1: 4.0, 2: 8.0},
        provenance={"method": "mean difference", "n": 12},
    ).save(path)
    return path


@pytest.fixture(scope="module")
def letters(tiny_llama):
    """A pack that at strength 20 makes the tiny model say Q or Z and nothing else."""
    return SteeringPack(
        {
            "says q": SteeringVector({2: towards("Q", tiny_llama), 3: towards("Q", tiny_llama)}),
            "z": SteeringVector({3: towards("Z", tiny_llama)}, site="attention"),
        }
    )


@pytest.fixture(scope="module")
def shared(letters, tiny_llama):
    llm = SteeredLlama(
        tiny_llama, pack=letters, n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, verbose=False
    )
    yield llm
    llm.close()


@pytest.fixture
def llm(shared):
    """The tiny model with `letters`; a test's replacements in it are undone."""
    kept = dict(vars(shared))
    yield shared
    for name in vars(shared).keys() - kept.keys():
        delattr(shared, name)
    shared.reset()


@pytest.fixture
def session(llm):
    return Session(llm, max_tokens=LENGTH)


@pytest.fixture(scope="module")
def reference(tiny_llama):
    """A function from messages to the answer of plain llama_cpp.Llama, computed from the start."""
    llm = llama_cpp.Llama(
        str(tiny_llama), n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, verbose=False
    )

    def get(*texts, max_tokens=LENGTH, system=None):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        drawn = []

        def generate(*args, **kwargs):
            for token in original(*args, **kwargs):
                drawn.append(token)
                yield token

        original, llm.generate = llm.generate, generate
        llm.reset()
        # Streamed like the chat's: bytes that are not text differ in whole answers.
        chunks = llm.create_chat_completion(
            messages, max_tokens=max_tokens, temperature=0.0, stream=True
        )
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        llm.generate = original
        if len(drawn) <= max_tokens or llm.token_eos() in drawn[: max_tokens + 1]:
            return text
        # llama_cpp counts no tokens of an unfinished character, and goes on.
        return b"".join(llm.detokenize([t]) for t in drawn[:max_tokens]).decode(errors="replace")

    yield get
    llm.close()


@pytest.fixture
def letters_file(letters, tmp_path):
    letters.save(tmp_path / "letters.gguf")
    return tmp_path / "letters.gguf"
