"""Measure the cost of steering where layers are on devices: a GPU, or servers of llama.cpp's RPC.

As tools/bench_runtime.py: ratios of medians to an unsteered llama_cpp.Llama on the same devices,
all variants interleaved in one run.

usage: python tools/bench_device.py [MODEL.gguf] [--gpu-layers -1] [--rpc HOST:PORT ...]
           [--rounds 6] [--prompt 512] [--json]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_runtime import PLAIN, SEQUENCES, Bench, PlainLlama, ratios, table

from pysteer import HookedLlama, shipped


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
    arguments: dict[str, Any] = {
        "n_ctx": prompt + SEQUENCES * (8 + decode * rounds) + 64,
        "n_batch": prompt,
        "n_ubatch": 512,
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": gpu_layers,
        "rpc_servers": rpc or [],
        "verbose": False,
    }
    with ExitStack() as stack:

        def opened(llm: Any) -> Any:
            return stack.enter_context(closing(llm))

        sets = [
            (
                opened(PlainLlama(path, **arguments)),
                opened(HookedLlama(path, max_sequences=SEQUENCES, **arguments)),
            )
            for _ in range(2)
        ]
        memories = sorted({node.backend for node in sets[0][1].context.site_nodes})
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
