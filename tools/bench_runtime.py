"""Measure the cost of the runtime: ratios of medians, all variants interleaved in one run.

Every step decodes the same batch at the same positions under all variants, in an order that changes
from step to step. The position of a context in memory makes a difference of a few percent, so two
contexts of each kind take turns.

- sixteen sequences, one token each: unsteered, with sixteen different steerings, with a router that
  finds nothing, with every layer ablated; and, without pysteer, one request after another with
  llama.cpp's control vector changed for each;
- one sequence: a token, and a prompt;
- the engine: tokens per second of eight requests against a bare loop over llama_decode with
  llama.cpp's samplers.

usage: python tools/bench_runtime.py [MODEL.gguf] [--rounds 6] [--prompt 512] [--json]
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import numpy as np
import typer

from pysteer import Engine, HookedLlama, SteeringPack, SteeringVector, shipped
from pysteer.extract.routers.reads import default_reads
from pysteer.llama.batch import LAST_ROW, DecodeBatch
from pysteer.llama.control_vector import set_native_control_vector
from pysteer.llama.devices import PlacedLlama
from pysteer.pack.operators import Operator
from pysteer.pack.policy import Policy
from pysteer.pack.router import Gate, Router
from pysteer.runtime.plan import CompiledPlan, PlanCompiler

SEQUENCES = 16
ENGINE_SEQUENCES = 8

PLAIN = "llama.cpp, unsteered"
OFF = "pysteer, unsteered"
FORCED = "a different steering for each sequence"
ROUTED = "router on, nothing fires"
ABLATED = "all layers with ablate"
SWAPPED = "llama.cpp, control vector changed per request"


class PlainLlama(PlacedLlama):
    """llama.cpp without pysteer, with a context of several sequences."""

    @property
    def context_params(self) -> llama_cpp.llama_context_params:
        """The parameters the context was created with."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: llama_cpp.llama_context_params) -> None:
        params.n_seq_max = SEQUENCES
        params.kv_unified = True
        self._context_params = params


def main(
    model: Annotated[Path | None, typer.Argument()] = None,
    rounds: int = 6,
    decode: int = 12,
    prompt: int = 512,
    threads: int = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure batches of steered sequences, routing, ablation, and the engine."""
    path = str(model or shipped.default_model())
    arguments = {
        "n_ctx": prompt + SEQUENCES * (8 + decode * rounds) + 64,
        "n_batch": prompt,
        "n_ubatch": 512,
        "n_threads": threads,
        "n_threads_batch": threads,
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
        bench = Bench(sets, prompt=prompt)
        batched, single, whole = bench.measure(rounds, decode)
    engine = measure_engine(path, threads, rounds)
    report = {
        "model": Path(path).name,
        "machine": f"{platform.machine()}, {threads} threads",
        "rounds": rounds,
        "sixteen_sequences": ratios(batched),
        "one_token": ratios(single),
        "prompt": ratios(whole),
        "sixteen_sequences_ms": 1e3 * statistics.median(batched[PLAIN]),
        "one_token_ms": 1e3 * statistics.median(single[PLAIN]),
        "prompt_ms": 1e3 * statistics.median(whole[PLAIN]),
        "engine": engine,
    }
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, prompt)


class Bench:
    """Two sets of a plain and a hooked context, and the plans for the hooked contexts."""

    def __init__(self, sets: Sequence[tuple[PlainLlama, HookedLlama]], *, prompt: int) -> None:
        self.sets = sets
        hooked = sets[0][1]
        self.n_layer, n_embd = hooked.n_layer, hooked.n_embd()
        self.reads = default_reads(self.n_layer)
        rng = np.random.default_rng(0)
        layers = range(1, self.n_layer)

        def vector() -> SteeringVector:
            return SteeringVector({i: 0.01 * rng.standard_normal(n_embd) for i in layers})

        categories = {f"c{k}": vector() for k in range(SEQUENCES)}
        categories["ablated"] = SteeringVector(
            {i: rng.standard_normal(n_embd) for i in range(self.n_layer)},
            operator=Operator("ablate"),
        )
        self.rows = categories["c0"].matrix
        pack = SteeringPack(categories, router=_closed_router(list(categories), hooked))
        compiler = PlanCompiler(pack, Policy(gate="margin"), n_layer=self.n_layer, n_embd=n_embd)
        forced = [compiler.compile({f"c{k}": 1.0}) for k in range(SEQUENCES)]
        self.plans: dict[str, list[CompiledPlan] | None] = {
            OFF: None,
            FORCED: forced,
            ROUTED: [compiler.compile("auto")] * SEQUENCES,
            ABLATED: [compiler.compile({"ablated": 1.0})] * SEQUENCES,
        }
        self.tokens = rng.integers(3, hooked.n_vocab(), (SEQUENCES, 4096)).astype(np.intc)
        self.prompt = rng.integers(3, hooked.n_vocab(), prompt).astype(np.intc)
        self.batch = DecodeBatch(max(prompt, SEQUENCES))
        self._started: dict[str, list[Any]] = {}

    def measure(self, rounds: int, decode: int) -> list[dict[str, list[float]]]:
        """Return the seconds of each decode by variant: sixteen sequences, one token, a prompt."""
        names = [PLAIN, *self.plans]
        times: list[dict[str, list[float]]] = [{n: [] for n in names} for _ in range(3)]
        times[0][SWAPPED] = []
        self._ask_gates(self.sets[0][1])
        shuffle = random.Random(0).shuffle
        position = 0
        for number in range(-len(self.sets), rounds):  # the first round of each set warms up
            plain, hooked = self.sets[number % len(self.sets)]
            for llm in (plain, hooked):
                llm._ctx.kv_cache_clear()
            for position in range(decode):
                for kind, variants in enumerate([[*names, SWAPPED], names]):
                    shuffle(variants)
                    n = SEQUENCES if kind == 0 else 1
                    for name in variants:
                        seconds = self._timed(name, plain, hooked, position, n)
                        if number >= 0:
                            times[kind][name].append(seconds)
                        self._forget(plain if name in (PLAIN, SWAPPED) else hooked, position)
                for llm in (plain, hooked):
                    self._fill(position)
                    self.batch.decode(llm.ctx)
            variants = list(names)
            shuffle(variants)
            for name in variants:
                for llm in (plain, hooked):
                    llm._ctx.kv_cache_clear()
                seconds = self._timed_prompt(name, plain, hooked)
                if number >= 0:
                    times[2][name].append(seconds)
        return times

    def _fill(self, position: int, n: int = SEQUENCES) -> None:
        self.batch.clear()
        for slot in range(n):
            self.batch.add(slot, position, self.tokens[slot, position : position + 1], LAST_ROW)

    def _forget(self, llm: llama_cpp.Llama, position: int) -> None:
        for slot in range(SEQUENCES):
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), slot, position, -1)

    def _start(self, name: str, n_prompt: int) -> list[Any]:
        """Return new sequences of a variant, `SEQUENCES` in number."""
        plans = self.plans[name]
        if plans is None:
            return [None] * SEQUENCES
        spans = [(0 if read.pooling == "user" else n_prompt - 1, n_prompt) for read in self.reads]
        return [plan.start(n_prompt, spans, 4096) for plan in plans]

    def _ask_gates(self, hooked: HookedLlama) -> None:
        """Start sequences of each variant and read their prompts of one token."""
        for name in self.plans:
            self._started[name] = self._start(name, 1)
            for slot, sequence in enumerate(self._started[name]):
                hooked.context.set_sequence(slot, sequence)
            self._fill(0)
            with hooked.context.decoding([(slot, 0, 1, LAST_ROW) for slot in range(SEQUENCES)]):
                self.batch.decode(hooked.ctx)
            hooked._ctx.kv_cache_clear()

    def _timed(
        self, name: str, plain: PlainLlama, hooked: HookedLlama, position: int, n: int
    ) -> float:
        if name == SWAPPED:
            return self._timed_swapping(plain, position)
        self._fill(position, n)
        if name == PLAIN:
            return _seconds(lambda: self.batch.decode(plain.ctx))
        # Tokens of a response: the gate has decided before, and stayed shut.
        for slot, sequence in enumerate(self._started[name]):
            hooked.context.set_sequence(slot, sequence if slot < n else None)
        runs = [(slot, position + 8, 1, LAST_ROW) for slot in range(n)]

        def steered() -> None:
            with hooked.context.decoding(runs):
                self.batch.decode(hooked.ctx)

        return _seconds(steered)

    def _timed_swapping(self, plain: PlainLlama, position: int) -> float:
        rows = [self.rows * np.float32(1 + k / 100) for k in range(SEQUENCES)]

        def swapped() -> None:
            for slot in range(SEQUENCES):
                set_native_control_vector(plain, rows[slot])
                self.batch.clear()
                token = self.tokens[slot, position : position + 1]
                self.batch.add(slot, position, token, LAST_ROW)
                self.batch.decode(plain.ctx)

        seconds = _seconds(swapped)
        set_native_control_vector(plain, np.zeros_like(self.rows))
        self._fill(position)  # here the scheduler reserves memory again, not in the next variant
        self._forget(plain, position)
        self.batch.decode(plain.ctx)
        return seconds

    def _timed_prompt(self, name: str, plain: PlainLlama, hooked: HookedLlama) -> float:
        self.batch.clear()
        self.batch.add(0, 0, self.prompt, LAST_ROW)
        if name == PLAIN:
            return _seconds(lambda: self.batch.decode(plain.ctx))
        n = len(self.prompt)
        for slot, sequence in enumerate(self._start(name, n)):
            hooked.context.set_sequence(slot, sequence if slot == 0 else None)

        def steered() -> None:
            with hooked.context.decoding([(0, 0, n, LAST_ROW)]):
                self.batch.decode(hooked.ctx)

        return _seconds(steered)


def _closed_router(categories: list[str], hooked: HookedLlama) -> Router:
    """Return a router of the usual size that takes every prompt for harmless."""
    rng = np.random.default_rng(1)
    reads = default_reads(hooked.n_layer)
    k, n = len(categories), len(reads) * hooked.n_embd()
    return Router(
        site="residual",
        reads=reads,
        categories=categories,
        margin_weight=np.vstack([np.zeros(n), rng.standard_normal((k, n))]),
        margin_bias=np.array([1.0, *np.zeros(k)]),
        allowances=np.zeros(k),
        gates={"margin": Gate(np.zeros(k), np.ones(k, bool), *[np.zeros(k)] * 3)},
        confusion=np.eye(k + 1, dtype=np.int64),
        threshold_rule="fpr=0.005",
        train_counts=np.ones(k + 1, np.int64),
    )


def measure_engine(path: str, threads: int, rounds: int) -> dict[str, float]:
    """Return the tokens per second of eight requests in the engine and in a bare loop, in turns."""
    prompt, n_tokens = list(range(100, 132)), 32
    arguments = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    context = {"n_ctx": 2048, **arguments}
    found: dict[str, list[float]] = {"engine": [], "bare loop": []}
    with (
        Engine(path, max_sequences=ENGINE_SEQUENCES, **context) as engine,
        closing(PlainLlama(path, **context)) as plain,
    ):
        for number in range(-1, rounds):
            # A new beginning in each round, so that no prompt comes from the cache.
            tokens = [(number + 50 + 7 * k, *prompt) for k in range(ENGINE_SEQUENCES)]
            seconds = {
                "engine": _seconds(lambda t=tokens: _with_engine(engine, t, n_tokens)),
                "bare loop": _seconds(lambda t=tokens: _with_loop(plain, t, n_tokens)),
            }
            if number >= 0:
                for name, value in seconds.items():
                    found[name].append(ENGINE_SEQUENCES * n_tokens / value)
    rates = {name: statistics.median(values) for name, values in found.items()}
    return {
        "engine_tokens_per_second": rates["engine"],
        "bare_loop_tokens_per_second": rates["bare loop"],
        "ratio": rates["engine"] / rates["bare loop"],
    }


_SAMPLING = {"temperature": 0.0, "repeat_penalty": 1.1}


def _with_engine(engine: Engine, prompts: Sequence[Sequence[int]], n_tokens: int) -> None:
    handles = [
        engine.submit(prompt=list(p), steering=None, max_tokens=n_tokens, **_SAMPLING)
        for p in prompts
    ]
    for handle in handles:
        usage = handle.result()["usage"]
        if usage["completion_tokens"] < n_tokens:
            raise RuntimeError(
                f"rates do not compare: a request ended after {usage['completion_tokens']} tokens, "
                f"not {n_tokens}"
            )


def _with_loop(plain: PlainLlama, prompts: Sequence[Sequence[int]], n_tokens: int) -> None:
    """Decode with plain llama.cpp, with one sampler for each sequence."""
    plain._ctx.kv_cache_clear()
    samplers = [plain._init_sampler(temp=0.0, repeat_penalty=1.1) for _ in prompts]
    batch = DecodeBatch(512)
    rows = [batch.add(slot, 0, np.array(p, np.intc), LAST_ROW) for slot, p in enumerate(prompts)]
    batch.decode(plain.ctx)
    for step in range(n_tokens):
        drawn = [
            llama_cpp.llama_sampler_sample(sampler.sampler, plain.ctx, row)
            for sampler, row in zip(samplers, rows, strict=True)
        ]
        batch.clear()
        rows = [
            batch.add(slot, len(prompts[slot]) + step, np.array([token], np.intc), LAST_ROW)
            for slot, token in enumerate(drawn)
        ]
        if step + 1 < n_tokens:
            batch.decode(plain.ctx)
    for sampler in samplers:
        sampler.close()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians relative to llama.cpp's, by variant."""
    base = statistics.median(times[PLAIN])
    return {name: statistics.median(values) / base for name, values in times.items()}


def table(report: dict[str, Any], prompt: int) -> str:
    """Return the ratios of a report as text, in the form of docs/performance.md."""
    lines = [
        f"{report['model']}; {report['machine']}; medians of {report['rounds']} rounds\n",
        f"| | 16 sequences | one token | {prompt}-token prompt |\n|---|---|---|---|",
    ]
    for name, ratio in report["sixteen_sequences"].items():
        cells = [ratio, report["one_token"].get(name), report["prompt"].get(name)]
        shown = " | ".join("" if c is None else f"{c:.3f}" for c in cells)
        lines.append(f"| {name} | {shown} |")
    lines.append(
        f"\n1.000 is {report['sixteen_sequences_ms']:.1f} ms for 16 sequences, "
        f"{report['one_token_ms']:.2f} ms a token, {report['prompt_ms']:.0f} ms a prompt"
    )
    return "\n".join(lines)


def _print(report: dict[str, Any], prompt: int) -> None:
    print(table(report, prompt))
    engine = report["engine"]
    print(
        f"engine, {ENGINE_SEQUENCES} requests: {engine['engine_tokens_per_second']:.1f} tokens/s, "
        f"{engine['ratio']:.3f} of a bare loop's {engine['bare_loop_tokens_per_second']:.1f}"
    )


if __name__ == "__main__":
    typer.run(main)
