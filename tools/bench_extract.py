"""Measure the capture of activations: prompt tokens per second, and peak memory.

Each variant has a process of its own, and so a peak memory of its own. Every round runs all
variants once over the same prompts, in an order that changes from round to round. Prints medians
and their ratios.

- one by one: a loop over `AutoModelForCausalLM` in float32 with `output_hidden_states`;
- torch: pysteer's torch capture, in the precision that it chooses for the processor;
- llama.cpp: plain prompt processing of the same tokens, 512 at a time, without a capture;
- llama: pysteer's capture from the GGUF file;
- cvector-generator: llama.cpp's program, if a build is given: the first half of the prompts against
  the second, `--method mean`, including the time to load the model.

Both captures take the residual stream of every layer, averaged over the user's message.

usage: python tools/bench_extract.py [MODEL.gguf] [--ftype Q8_0] [--prompts P.jsonl] [--rounds 5]
           [--cvector-generator PATH] [--json]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from quantized import quantize

from pysteer import shipped
from pysteer.prompts import load_prompts

ONE_BY_ONE = "torch, one by one, float32"
TORCH = "torch capture"
LLAMA_CPP = "llama.cpp, prompt processing"
LLAMA = "llama capture"
CVECTOR = "cvector-generator"

_CHUNK = 512

Loaded = tuple[Callable[[], None], int]
"""A function that runs all prompts once, and their number of tokens."""

Variant = Callable[[str, list[str]], Loaded]
"""Loads a model file and tokenizes prompts."""

Variants = dict[str, Variant]


def main(
    model: Annotated[Path | None, typer.Argument(help="A GGUF model; SmolLM2 by default.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL; by default the demo's.")] = None,
    rounds: int = 5,
    limit: Annotated[int, typer.Option(help="Use at most this many prompts.")] = 160,
    ftype: Annotated[str | None, typer.Option(help="Quantise the model first.")] = None,
    cvector_generator: Annotated[Path | None, typer.Option(help="Path of the program.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure both captures against a plain loop in torch and against llama.cpp."""
    path = model or shipped.default_model()
    rows = load_prompts(prompts) if prompts else list(chain(*shipped.demo_prompts()))
    texts = [row.prompt for row in rows][:limit]
    with tempfile.TemporaryDirectory() as folder:
        if ftype is not None:
            path = quantize(path, Path(folder) / f"{path.stem}-{ftype}.gguf", ftype)
        variants = dict(VARIANTS)
        if cvector_generator is not None:
            variants[CVECTOR] = partial(_cvector_generator, cvector_generator)
        report = _measure(variants, str(path), texts, rounds)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['model']}; {len(texts)} prompts; {os.cpu_count()} cores; {rounds} rounds\n")
    print("| | tokens/s | peak memory, MB |\n|---|---|---|")
    for name, rate in report["tokens_per_second"].items():
        print(f"| {name} | {rate:.0f} | {report['peak_memory_mb'][name]:.0f} |")
    print(f"\ntorch capture over one by one: {report['torch_over_one_by_one']:.2f}")
    print(f"llama capture over llama.cpp's prompt processing: {report['llama_over_llama_cpp']:.2f}")
    if cvector_generator is not None:
        print(f"llama capture over cvector-generator: {report['llama_over_cvector_generator']:.2f}")


def _measure(variants: Variants, path: str, texts: list[str], rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Any]] = {}
    for name, variant in variants.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(variant, path, texts, theirs))
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
    report: dict[str, Any] = {
        "model": Path(path).name,
        "prompts": len(texts),
        "tokens": tokens,
        "tokens_per_second": rates,
        "peak_memory_mb": {name: kb / 1024 for name, kb in memory.items()},
        "torch_over_one_by_one": rates[TORCH] / rates[ONE_BY_ONE],
        "llama_over_llama_cpp": rates[LLAMA] / rates[LLAMA_CPP],
    }
    if CVECTOR in rates:
        report["llama_over_cvector_generator"] = rates[LLAMA] / rates[CVECTOR]
    return report


def _work(variant: Variant, path: str, texts: list[str], pipe: Any) -> None:
    """Load in a worker process, then run on request."""
    run, tokens = variant(path, texts)
    pipe.send("loaded")
    while pipe.recv() == "go":
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)
    whose = resource.RUSAGE_CHILDREN if isinstance(variant, partial) else resource.RUSAGE_SELF
    pipe.send((tokens, resource.getrusage(whose).ru_maxrss))


def _one_by_one(path: str, texts: list[str]) -> Loaded:
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


def _capture(capture: Any, texts: list[str]) -> Loaded:
    from pysteer.extract.inputs import Tokenizer, rows_of
    from pysteer.prompts import Prompt

    prompts = [Prompt(text) for text in texts]
    rows = rows_of(capture, list(map(Tokenizer(capture), prompts)), "user")
    layers = capture.sites["residual"]

    def run() -> None:
        for _ in capture.activations(rows, site="residual", layers=layers):
            pass

    return run, sum(len(row.tokens) for row in rows)


def _torch(path: str, texts: list[str]) -> Loaded:
    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    return _capture(TorchCapture(TorchModel(path)), texts)


def _llama(path: str, texts: list[str]) -> Loaded:
    from pysteer.extract.llama_capture import LlamaCapture

    return _capture(LlamaCapture(path), texts)


def _llama_cpp(path: str, texts: list[str]) -> Loaded:
    import llama_cpp

    from pysteer.extract.llama_capture import LlamaCapture

    with closing(LlamaCapture(path)) as capture:
        tokens = list(chain(*(capture.prompt_tokens(text) for text in texts)))
    llm = llama_cpp.Llama(
        path, n_ctx=_CHUNK, n_batch=_CHUNK, n_ubatch=_CHUNK, n_threads=os.cpu_count(), verbose=False
    )

    def run() -> None:
        for start in range(0, len(tokens), _CHUNK):
            llm.reset()
            llm.eval(tokens[start : start + _CHUNK])

    return run, len(tokens)


def _cvector_generator(program: Path, path: str, texts: list[str]) -> Loaded:
    from pysteer.extract.llama_capture import LlamaCapture

    half = len(texts) // 2
    with closing(LlamaCapture(path)) as capture:
        prompts = [capture.prompt_tokens(text) for text in texts[: 2 * half]]
        written = [
            capture.llm.detokenize(list(tokens), special=True).decode().replace("\n", "\\n")
            for tokens in prompts
        ]
    temporary = tempfile.TemporaryDirectory()  # for as long as `run` lives
    folder = Path(temporary.name)
    options = ["--model", path, "--threads", str(os.cpu_count()), "--method", "mean"]
    for side, lines in (("positive", written[:half]), ("negative", written[half:])):
        (folder / side).write_text("\n".join(lines) + "\n")
        options += [f"--{side}-file", str(folder / side)]

    def run() -> None:
        command = [str(program.resolve()), *options, "--output", f"{temporary.name}/out.gguf"]
        subprocess.run(command, check=True, capture_output=True)

    return run, sum(map(len, prompts))


VARIANTS: Variants = {
    ONE_BY_ONE: _one_by_one,
    TORCH: _torch,
    LLAMA_CPP: _llama_cpp,
    LLAMA: _llama,
}


if __name__ == "__main__":
    typer.run(main)
