"""The servers of `rpc_servers=`: a mistake is an error before llama.cpp ends the process."""

import socket
from contextlib import closing

import pytest

from pysteer import HookedLlama, SteeringError, _native
from pysteer.llama import devices
from pysteer.llama.versions import load_native

ENDPOINT = "127.0.0.1:50052"


def built_with_rpc():
    load_native()
    return bool(_native.function_address("ggml_backend_rpc_add_server"))


@pytest.mark.parametrize(
    "endpoint", ["localhost", "localhost:", ":50052", "localhost:0", "localhost:70000", "::1:50052"]
)
def test_malformed_endpoint_raises_with_the_form(tiny_llama, endpoint):
    with pytest.raises(SteeringError, match=f"expected HOST:PORT, found '{endpoint}'"):
        HookedLlama(tiny_llama, rpc_servers=[ENDPOINT, endpoint], verbose=False)


def test_build_without_rpc_raises_with_the_build_option(tiny_llama):
    if built_with_rpc():
        pytest.skip("this llama.cpp was built with RPC")
    with pytest.raises(SteeringError, match=r"without RPC.*CMAKE_ARGS=-DGGML_RPC=ON"):
        HookedLlama(tiny_llama, rpc_servers=[ENDPOINT], verbose=False)


def test_unreachable_server_raises_with_the_command_that_starts_it(tiny_llama, monkeypatch):
    monkeypatch.setattr(devices, "_add_server", lambda: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening: the port refuses connections
        port = taken.getsockname()[1]
        with pytest.raises(SteeringError, match=f"refused.*ggml-rpc-server -H 127.0.0.1 -p {port}"):
            HookedLlama(tiny_llama, rpc_servers=[f"127.0.0.1:{port}"], verbose=False)


def test_server_of_another_process_raises_instead_of_waiting(tiny_llama, monkeypatch):
    """The kernel takes the connection; the server comes to it when its client has gone."""
    monkeypatch.setattr(devices, "_add_server", lambda: None)
    monkeypatch.setattr(devices, "_TIMEOUT", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0))) as busy:
        endpoint = f"127.0.0.1:{busy.getsockname()[1]}"
        with pytest.raises(SteeringError, match="does not answer; a server serves one process"):
            HookedLlama(tiny_llama, rpc_servers=[endpoint], verbose=False)
