"""Servers of llama.cpp's RPC backend on this machine, and models that are loaded onto them."""

import ctypes
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import llama_cpp

from pysteer.llama.devices import RpcServers

SERVER = Path(sys.prefix) / "bin" / "ggml-rpc-server"
N_SERVERS = 2


def _die_with_parent():
    """Linux: the server ends with the tests, however these end."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, process):
    """Wait until a process takes connections."""
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"{SERVER} does not start")


class Server:
    """A `ggml-rpc-server` on a free port of the loopback interface.

    Args:
        limit: called in the new process before the server starts.
    """

    def __init__(self, limit=lambda: None):
        def prepare():
            if sys.platform == "linux":
                _die_with_parent()
            limit()

        port = free_port()
        self.endpoint = f"127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [SERVER, "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=prepare,
        )
        wait_for(port, self.process)

    def kill(self):
        self.process.kill()
        self.process.wait()


@contextmanager
def servers(n=N_SERVERS):
    """Yield the endpoints of new servers, which end with the block."""
    started = []
    try:
        for _ in range(n):
            started.append(Server())
        yield [server.endpoint for server in started]
    finally:
        for server in started:
            server.kill()


@contextmanager
def loaded_onto(endpoints):
    """Load every model in the block onto servers: all layers, in equal parts.

    Also those of a plain `llama_cpp.Llama`. `n_gpu_layers`, `tensor_split` and `split_mode` are
    arguments as ever.
    """
    devices = RpcServers(endpoints).devices
    init, default_params = llama_cpp.Llama.__init__, llama_cpp.llama_cpp.llama_model_default_params

    def params():
        made = default_params()
        made.devices = ctypes.addressof(devices)
        return made

    @wraps(init)
    def loading(self, *args, **kwargs):
        kwargs.setdefault("n_gpu_layers", -1)
        kwargs.setdefault("tensor_split", [1.0] * len(endpoints))
        init(self, *args, **kwargs)

    llama_cpp.Llama.__init__ = loading
    llama_cpp.llama_cpp.llama_model_default_params = params
    try:
        yield
    finally:
        llama_cpp.Llama.__init__ = init
        llama_cpp.llama_cpp.llama_model_default_params = default_params
