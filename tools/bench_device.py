"""Measure the cost of steering where layers are on devices: a GPU, or servers of llama.cpp's RPC.

As tools/bench_runtime.py: ratios of medians to an unsteered llama_cpp.Llama on the same devices,
all variants interleaved in one run.

usage: python tools/bench_device.py [MODEL.gguf] [--gpu-layers -1] [--rpc HOST:PORT ...]
           [--rounds 6] [--prompt 512] [--json]
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import typer
from bench_runtime import PLAIN, SEQUENCES, Bench, PlainLlama, ratios, table

from pysteer import HookedLlama, shipped
from pysteer.llama.devices import RpcServers


class DeviceLlama(PlainLlama):
    """llama.cpp without pysteer, with layers on servers."""

    servers: RpcServers | None = None

    @property
    def model_params(self) -> llama_cpp.llama_model_params:
        """The parameters the model was loaded with."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: llama_cpp.llama_model_params) -> None:
        if self.servers is not None:
            params.devices = ctypes.addressof(self.servers.devices)
        self._model_params = params


def main(
    model: Annotated[Path | None, typer.Argument()] = None,
    gpu_layers: int = -1,
    rpc: list[str] | None = None,
    rounds: int = 6,
    decode: int = 12,
    prompt: int = 512,
    threads: int = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure batches of steered sequences, routing and ablation on devices."""
    path = str(model or shipped.default_model())
    servers = rpc or []
    arguments: dict[str, Any] = {
        "n_ctx": prompt + SEQUENCES * (8 + decode * rounds) + 64,
        "n_batch": prompt,
        "n_ubatch": 512,
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": gpu_layers,
        "verbose": False,
    }
    with ExitStack() as stack:

        def opened(llm: Any) -> Any:
            return stack.enter_context(closing(llm))

        hooked = [
            opened(HookedLlama(path, max_sequences=SEQUENCES, rpc_servers=servers, **arguments))
            for _ in range(2)
        ]
        DeviceLlama.servers = RpcServers(servers) if servers else None
        sets = [(opened(DeviceLlama(path, **arguments)), llm) for llm in hooked]
        memories = sorted({node.backend for node in hooked[0].context.site_nodes})
        batched, single, whole = Bench(sets, prompt=prompt).measure(rounds, decode)
    report = {
        "model": Path(path).name,
        "machine": f"{platform.machine()}, {threads} threads; layers in {', '.join(memories)}",
        "rounds": rounds,
        "sixteen_sequences": ratios(batched),
        "one_token": ratios(single),
        "prompt": ratios(whole),
        "sixteen_sequences_ms": 1e3 * statistics.median(batched[PLAIN]),
        "one_token_ms": 1e3 * statistics.median(single[PLAIN]),
        "prompt_ms": 1e3 * statistics.median(whole[PLAIN]),
    }
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print(table(report, prompt))


if __name__ == "__main__":
    typer.run(main)
