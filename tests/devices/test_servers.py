"""`rpc_servers=`: models on servers of their own, and servers that fail."""

import re
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack, closing
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from rpc import SERVER, Server, free_port, loaded_onto, servers, wait_for

from pysteer import Engine, SteeredLlama, SteeringError, SteeringPack, SteeringVector
from pysteer.llama import devices

pytestmark = pytest.mark.devices

TOKENS = [int(t) for t in np.random.default_rng(8).integers(5, 320, 21)]
ARGUMENTS = {"n_ctx": 128, "logits_all": True, "verbose": False}
PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


@pytest.fixture
def server():
    started = Server()
    yield started
    started.kill()


def memories(llm):
    return {node.backend for node in llm.context.site_nodes if node.site.name == "residual"}


def pack():
    direction = np.random.default_rng(0).standard_normal(64)
    return SteeringPack({"c": SteeringVector({1: direction}, site="mlp")})


def test_model_has_its_layers_on_its_own_servers(tiny_llama):
    """Other models of the process keep to theirs, before and after."""
    with servers() as endpoints, closing(SteeredLlama(tiny_llama, **ARGUMENTS)) as other:
        with closing(
            SteeredLlama(tiny_llama, pack=pack(), rpc_servers=endpoints, **ARGUMENTS)
        ) as llm:
            assert len(memories(llm)) == 2
            assert all(any(end in name for end in endpoints) for name in memories(llm))
            with llm.steering({"c": 1.0}):
                llm.eval(TOKENS)
            steered = llm.scores[: len(TOKENS)].copy()
        with loaded_onto(endpoints):
            plain = llama_cpp.Llama(str(tiny_llama), **ARGUMENTS)
        with closing(plain):
            plain.eval(TOKENS)
        assert np.abs(plain.scores[: len(TOKENS)] - steered).max() > 0.1
        with closing(SteeredLlama(tiny_llama, **ARGUMENTS)) as later:
            assert memories(later) == memories(other)
            assert not any(end in name for end in endpoints for name in memories(later))
        other.eval(TOKENS)
        np.testing.assert_array_equal(other.scores[: len(TOKENS)], plain.scores[: len(TOKENS)])


def test_engine_runs_on_servers(tiny_llama, server):
    with Engine(
        tiny_llama, pack=pack(), rpc_servers=[server.endpoint], max_sequences=2, verbose=False
    ) as engine:
        results = [
            engine.submit(prompt=TOKENS, steering=steering, max_tokens=4).result()
            for steering in (None, {"c": 1.0})
        ]
    assert [result["steering"]["tokens_steered"] > 0 for result in results] == [False, True]


def test_pickled_model_has_the_same_servers(tiny_llama, server):
    with closing(SteeredLlama(tiny_llama, rpc_servers=[server.endpoint], **ARGUMENTS)) as llm:
        assert llm.__getstate__()["rpc_servers"] == (server.endpoint,)


def test_no_layers_for_the_servers_raises(tiny_llama, server):
    with pytest.raises(SteeringError, match="n_gpu_layers=0"):
        SteeredLlama(tiny_llama, rpc_servers=[server.endpoint], n_gpu_layers=0)


def test_server_is_free_again_after_the_model_is_closed(tiny_llama, server):
    for _ in range(2):
        with closing(SteeredLlama(tiny_llama, rpc_servers=[server.endpoint], **ARGUMENTS)):
            pass
    assert not devices._connected[server.endpoint]


def test_many_models_of_a_process_share_a_server(tiny_llama, server):
    """A server has room for one waiting connection."""
    with ExitStack() as stack:
        for _ in range(4):
            llm = SteeredLlama(tiny_llama, rpc_servers=[server.endpoint], **ARGUMENTS)
            stack.enter_context(closing(llm)).eval(TOKENS)


def test_server_of_another_process_raises(tiny_llama, server, monkeypatch):
    monkeypatch.setattr(devices, "_TIMEOUT", 0.3)
    load = f"""
        import sys
        from pysteer import HookedLlama
        llm = HookedLlama({str(tiny_llama)!r}, rpc_servers=[{server.endpoint!r}], verbose=False)
        print("loaded", flush=True)
        sys.stdin.read()
        llm.close()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(load)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"loaded\n"
        with pytest.raises(SteeringError, match="serves one process at a time"):
            SteeredLlama(tiny_llama, rpc_servers=[server.endpoint], **ARGUMENTS)
        other.communicate()
    assert other.returncode == 0


def test_server_that_ended_before_loading_raises_and_the_process_lives(tiny_llama, server):
    with closing(SteeredLlama(tiny_llama, **ARGUMENTS)) as other:
        server.kill()
        with pytest.raises(SteeringError, match=f"{server.endpoint} cannot be reached"):
            SteeredLlama(tiny_llama, rpc_servers=[server.endpoint], **ARGUMENTS)
        other.eval(TOKENS)


@pytest.mark.parametrize("steering", [None, {"c": 1.0}])
def test_server_that_ends_during_a_decode_ends_the_process_with_a_message(
    tiny_llama, server, steering
):
    """llama.cpp calls abort() on a thread of its own: no exception can be raised instead."""
    run = f"""
        import os, signal
        import numpy as np
        from pysteer import SteeredLlama, SteeringPack, SteeringVector
        pack = SteeringPack({{"c": SteeringVector({{1: np.ones(64)}}, site="mlp")}})
        llm = SteeredLlama(
            {str(tiny_llama)!r}, pack=pack, rpc_servers=[{server.endpoint!r}], verbose=False
        )
        with llm.steering({steering!r}):
            llm.eval([5, 6, 7])
            os.kill({server.process.pid}, signal.SIGKILL)
            llm.eval([8])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(run)], capture_output=True, text=True, check=False
    )
    assert result.returncode == -signal.SIGABRT
    assert "RPC server crashed" in result.stderr


def test_server_without_memory_raises_and_serves_other_models(tiny_llama):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    small = Server(limit)
    try:
        with pytest.raises(SteeringError, match="llama_context"):
            SteeredLlama(
                tiny_llama, rpc_servers=[small.endpoint], **{**ARGUMENTS, "n_ctx": 1 << 22}
            )
        with closing(SteeredLlama(tiny_llama, rpc_servers=[small.endpoint], **ARGUMENTS)) as llm:
            llm.eval(TOKENS)
    finally:
        small.kill()


def test_commands_of_the_page_run(tmp_path, tiny_llama):
    """Two servers and one steered model across them, as docs/devices.md shows."""
    page = PAGE.read_text("utf-8")
    (block,) = re.findall(r"```console\n(ggml-rpc-server.*?)```", page, re.DOTALL)
    ports = {port: str(free_port()) for port in re.findall(r"\b\d{5}\b", block)}
    started = []
    try:
        for command_line in block.strip().splitlines():
            line = command_line
            for port, free in ports.items():
                line = line.replace(port, free)
            program, *arguments = shlex.split(line.removesuffix("&"))
            if program == SERVER.name:
                command = [SERVER, *arguments, "-t", "1"]
                started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
                wait_for(int(arguments[-1]), started[-1])
                continue
            command = [sys.executable, "-m", program, *arguments]
            if arguments[0] == "doctor":
                command += ["-m", tiny_llama]  # faster
            result = subprocess.run(
                command, capture_output=True, text=True, cwd=tmp_path, check=False
            )
            assert result.returncode == 0, result.stderr
            assert result.stdout.strip()
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert len(started) == 2
