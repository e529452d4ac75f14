"""How fast activations are captured, in prompt tokens per second, and the memory it takes.

Each variant is a process of its own, so that its peak memory is its own. Every round runs every
variant once over the same prompts, one after the other, in an order that changes from round to
round; what is printed are medians and their ratios.

- one by one: a loop over `AutoModelForCausalLM` in float32 with `output_hidden_states`;
- torch: `pysteer.extract`'s torch capture, in the precision it chooses for the processor;
- llama.cpp: its own prompt processing of the same tokens, 512 at a time, with nothing captured;
- llama: `pysteer.extract`'s capture from the GGUF file.

Both captures take the residual stream of every layer, averaged over the user's message.

usage: python tools/bench_extract.py [MODEL.gguf] [--prompts P.jsonl] [--rounds 5] [--json]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer import shipped
from pysteer.prompts import load_prompts

ONE_BY_ONE = "torch, one by one, float32"
TORCH = "torch capture"
LLAMA_CPP = "llama.cpp, prompt processing"
LLAMA = "llama capture"

_CHUNK = 512


def main(
    model: Annotated[Path | None, typer.Argument(help="A GGUF model; SmolLM2 by default.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL; the demonstration's.")] = None,
    rounds: int = 5,
    limit: Annotated[int, typer.Option(help="At most so many prompts.")] = 160,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure both captures against a plain loop and against llama.cpp itself."""
    path = str(model or shipped.default_model())
    rows = load_prompts(prompts) if prompts else list(chain(*shipped.demo_prompts()))
    texts = [row.prompt for row in rows][:limit]
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Any]] = {}
    for name in VARIANTS:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(name, path, texts, theirs), daemon=True)
        process.start()
        workers[name] = process, ours
        print(f"{name}: {ours.recv()}", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    order = list(workers)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            workers[name][1].send("go")
            taken = workers[name][1].recv()
            if number:  # the first round warms up
                seconds[name].append(taken)
    tokens, memory = {}, {}
    for name, (process, pipe) in workers.items():
        pipe.send("end")
        tokens[name], memory[name] = pipe.recv()
        process.join()
    rates = {name: tokens[name] / statistics.median(values) for name, values in seconds.items()}
    report = {
        "model": Path(path).name,
        "prompts": len(texts),
        "tokens": tokens,
        "tokens_per_second": rates,
        "peak_memory_mb": {name: kb / 1024 for name, kb in memory.items()},
        "torch_over_one_by_one": rates[TORCH] / rates[ONE_BY_ONE],
        "llama_over_llama_cpp": rates[LLAMA] / rates[LLAMA_CPP],
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['model']}; {len(texts)} prompts; {os.cpu_count()} cores; {rounds} rounds\n")
    print("| | tokens/s | peak memory, MB |\n|---|---|---|")
    for name in VARIANTS:
        print(f"| {name} | {rates[name]:.0f} | {report['peak_memory_mb'][name]:.0f} |")
    print(f"\ntorch capture over one by one: {report['torch_over_one_by_one']:.2f}")
    print(f"llama capture over llama.cpp's prompt processing: {report['llama_over_llama_cpp']:.2f}")


def _work(name: str, path: str, texts: list[str], pipe: Any) -> None:
    """A worker process: load, then run on request."""
    run, tokens = VARIANTS[name](path, texts)
    pipe.send("loaded")
    while pipe.recv() == "go":
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)
    pipe.send((tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


Variant = tuple[Callable[[], None], int]


def _one_by_one(path: str, texts: list[str]) -> Variant:
    import torch

    from pysteer.extract.torch_model import TorchModel

    model = TorchModel(path, dtype=torch.float32)
    prompts = [torch.tensor([model.prompt_tokens(text)]) for text in texts]

    def run() -> None:
        with torch.no_grad():
            for ids in prompts:
                states = model.model(ids, output_hidden_states=True).hidden_states
                for layer in states[1:]:
                    layer[0].mean(0)

    return run, sum(ids.shape[1] for ids in prompts)


def _capture(capture: Any, texts: list[str]) -> Variant:
    from pysteer.extract.capture import pooled_row, shared_ends

    ends = shared_ends(capture)
    rows = [pooled_row(capture.prompt_tokens(text), (), "user", ends) for text in texts]
    layers = capture.sites["residual"]

    def run() -> None:
        for _ in capture.activations(rows, site="residual", layers=layers):
            pass

    return run, sum(len(row.tokens) for row in rows)


def _torch(path: str, texts: list[str]) -> Variant:
    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    return _capture(TorchCapture(TorchModel(path)), texts)


def _llama(path: str, texts: list[str]) -> Variant:
    from pysteer.extract.llama_capture import LlamaCapture

    return _capture(LlamaCapture(path), texts)


def _llama_cpp(path: str, texts: list[str]) -> Variant:
    import llama_cpp

    from pysteer.extract.llama_capture import LlamaCapture

    capture = LlamaCapture(path)
    tokens = list(chain(*(capture.prompt_tokens(text) for text in texts)))
    capture.close()
    llm = llama_cpp.Llama(
        path, n_ctx=_CHUNK, n_batch=_CHUNK, n_ubatch=_CHUNK, n_threads=os.cpu_count(), verbose=False
    )

    def run() -> None:
        for start in range(0, len(tokens), _CHUNK):
            llm.reset()
            llm.eval(tokens[start : start + _CHUNK])

    return run, len(tokens)


VARIANTS: dict[str, Callable[[str, list[str]], Variant]] = {
    ONE_BY_ONE: _one_by_one,
    TORCH: _torch,
    LLAMA_CPP: _llama_cpp,
    LLAMA: _llama,
}


if __name__ == "__main__":
    typer.run(main)
