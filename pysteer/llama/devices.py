"""Devices of a model: servers of llama.cpp's RPC backend, and the GPUs of this machine."""

from __future__ import annotations

import ctypes
import socket
from collections import Counter
from collections.abc import Sequence
from threading import Lock
from typing import Any, Final

import llama_cpp
from llama_cpp import Llama

from pysteer import _native
from pysteer.errors import SteeringError
from pysteer.llama.versions import load_native

_TIMEOUT: Final = 5.0  # seconds to connect to a server, and for its answer
_KINDS: Final = ("CPU", "GPU", "integrated GPU", "accelerator")  # ggml_backend_dev_type

_P, _S = ctypes.c_void_p, ctypes.c_char_p


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """Return a C function of ggml."""
    address = _native.function_address(name)
    if not address:
        raise SteeringError(f"this build of llama.cpp has no function {name}")
    return ctypes.CFUNCTYPE(result, *arguments)(address)


class RpcServers:
    """Servers that hold layers of a model, and the devices of the model.

    llama.cpp serves one process at a time, and ends this process if a server is gone: check the
    servers before each model is loaded.

    Args:
        endpoints: "host:port" of each server, as `ggml-rpc-server -H HOST -p PORT` was started.

    Attributes:
        endpoints: of all servers.
        devices: NULL-terminated array for `llama_model_params.devices`: the servers' devices in
            the order of `endpoints`, then the GPUs of this machine.

    Raises:
        SteeringError: a malformed endpoint, a llama.cpp built without RPC, or a server that does
            not answer.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        load_native()
        self.endpoints = tuple(endpoints)
        for endpoint in self.endpoints:
            _address(endpoint)
        add_server = _add_server()
        found: list[int] = []
        with _lock:
            for endpoint in self.endpoints:
                _require_answer(endpoint)
                registry = add_server(endpoint.encode())
                if not registry:
                    raise SteeringError(f"the RPC server {endpoint} has no devices")
                found += _registry_devices(registry)
            _connected.update(self.endpoints)
        self._released = False
        found += [device for device in _local_gpus() if device not in found]
        self.devices = (_P * (len(found) + 1))(*found, None)

    def release(self) -> None:
        """Record that the model is freed. May be called again."""
        with _lock:
            if not self._released:
                _connected.subtract(self.endpoints)
            self._released = True


_lock = Lock()
_connected: Counter[str] = Counter()  # models of this process by endpoint


def _address(endpoint: str) -> tuple[str, int]:
    host, colon, port = endpoint.partition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise SteeringError(f"rpc_servers: expected HOST:PORT, found {endpoint!r}")
    return host, int(port)


def _add_server() -> Any:
    """Return ggml_backend_rpc_add_server, which connects to an endpoint."""
    by_name = _function("ggml_backend_reg_by_name", _P, _S)
    address_of = _function("ggml_backend_reg_get_proc_address", _P, _P, _S)
    registry = by_name(b"RPC")
    address = address_of(registry, b"ggml_backend_rpc_add_server") if registry else None
    if not address:
        raise SteeringError(
            "this llama.cpp was built without RPC; install llama-cpp-python again with "
            "CMAKE_ARGS=-DGGML_RPC=ON (see docs/devices.md)"
        )
    return ctypes.CFUNCTYPE(_P, _S)(address)


def _require_answer(endpoint: str) -> None:
    """Raise SteeringError unless a server takes connections, and has no other client.

    llama.cpp would end the process, or wait for ever.
    """
    if _connected[endpoint] > 0:
        return  # this process is the client, and the server takes no second connection
    host, port = _address(endpoint)
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT) as connection:
            connection.shutdown(socket.SHUT_WR)  # a free server closes a connection that ends
            connection.recv(1)
    except TimeoutError:
        raise SteeringError(
            f"the RPC server {endpoint} does not answer; a server serves one process at a time: "
            "end the other process, or start another server"
        ) from None
    except OSError as error:
        raise SteeringError(
            f"the RPC server {endpoint} cannot be reached ({error.strerror or error}); "
            f"start it with `ggml-rpc-server -H {host} -p {port}`"
        ) from None


def _registry_devices(registry: int) -> list[int]:
    count = _function("ggml_backend_reg_dev_count", ctypes.c_size_t, _P)(registry)
    get = _function("ggml_backend_reg_dev_get", _P, _P, ctypes.c_size_t)
    return [get(registry, index) for index in range(count)]


def _local_devices() -> list[tuple[int, str]]:
    """Return the devices of this machine, each with its kind."""
    count = _function("ggml_backend_dev_count", ctypes.c_size_t)()
    get = _function("ggml_backend_dev_get", _P, ctypes.c_size_t)
    kind = _function("ggml_backend_dev_type", ctypes.c_int, _P)
    found = [get(index) for index in range(count)]
    return [(device, dict(enumerate(_KINDS)).get(kind(device), "other")) for device in found]


def _local_gpus() -> list[int]:
    """Return the devices that llama.cpp uses by itself: GPUs, else integrated GPUs."""
    devices = _local_devices()
    gpus = [device for device, kind in devices if kind == "GPU"]
    return gpus or [device for device, kind in devices if kind == "integrated GPU"]


def describe_devices() -> list[str]:
    """Return a line about each device of this machine: name, kind, description, memory.

    Raises:
        HookError: the loaded llama.cpp cannot be hooked.
    """
    load_native()
    name = _function("ggml_backend_dev_name", _S, _P)
    description = _function("ggml_backend_dev_description", _S, _P)
    size = ctypes.POINTER(ctypes.c_size_t)
    memory = _function("ggml_backend_dev_memory", None, _P, size, size)
    lines = []
    for device, kind in _local_devices():
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        text = f"{name(device).decode()}: {kind}, {description(device).decode().strip()}"
        lines.append(f"{text}, {total.value >> 20} MiB")
    return lines


class PlacedLlama(Llama):
    """A `llama_cpp.Llama` that can have layers on RPC servers.

    Args:
        model_path: a GGUF model.
        rpc_servers: "HOST:PORT" of each server. All layers are offloaded, unless n_gpu_layers is
            given.
        **llama_arguments: all arguments of `llama_cpp.Llama`.

    Raises:
        SteeringError: as `RpcServers`, or n_gpu_layers=0 with servers.
    """

    def __init__(
        self, model_path: str, *, rpc_servers: Sequence[str] = (), **llama_arguments: Any
    ) -> None:
        self._servers = RpcServers(rpc_servers) if rpc_servers else None
        if self._servers is not None and llama_arguments.setdefault("n_gpu_layers", -1) == 0:
            raise SteeringError("rpc_servers hold no layer with n_gpu_layers=0; leave it out")
        super().__init__(model_path, **llama_arguments)

    # llama_cpp.Llama.__init__ assigns fresh parameters to this name before it loads the model, and
    # has no argument for devices.
    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        """Parameters of the model."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        if self._servers is not None:
            # llama_cpp annotates the field as an array, and declares a pointer.
            address: Any = ctypes.addressof(self._servers.devices)
            params.devices = address
        self._model_params = params

    def close(self) -> None:
        """Free the model; may be called again."""
        if "_model_params" in self.__dict__:
            super().close()
        if (servers := self.__dict__.get("_servers")) is not None:
            servers.release()

    def __getstate__(self) -> dict[str, Any]:
        servers = () if self._servers is None else self._servers.endpoints
        return {**super().__getstate__(), "rpc_servers": servers}
