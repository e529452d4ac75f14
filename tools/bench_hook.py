"""Measure the cost of steering: ratios of medians against an unsteered llama_cpp.Llama.

Every round measures all variants once, in an order that changes from round to round, so that other
load on the machine meets all variants alike. The steered variants add a direction at every layer
that llama.cpp's control vector reaches. One SteeredLlama serves all steered variants, so that they
differ in their injection only. The position of a context in memory makes a difference of a few
percent, so two sets of contexts take turns.

usage: python tools/bench_hook.py MODEL.gguf [--rounds 10] [--decode 24] [--prompt 512] [--json]
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

import llama_cpp
import numpy as np
import typer

from pysteer import SteeredLlama, SteeringPack, SteeringVector
from pysteer.llama.control_vector import set_native_control_vector
from pysteer.runtime.plan import PlanCompiler
from pysteer.runtime.requests import ActiveSteering

BASELINE = "llama_cpp.Llama, unsteered"
NATIVE = "llama_cpp.Llama, its control vector"
OFF = "SteeredLlama, unsteered"
RESIDENT = "SteeredLlama, resident, all layers"
HOOKED = "SteeredLlama, hooked, all layers"


Model = TypeVar("Model", bound=llama_cpp.Llama)
Variants: TypeAlias = dict[str, tuple[llama_cpp.Llama, object]]


def main(
    model: Path,
    rounds: int = 10,
    decode: int = 24,
    prompt: int = 512,
    threads: int = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure decoding, prompt processing, and the change of steering between two tokens."""
    arguments = {
        "n_ctx": prompt + 8 * decode + 64,
        "n_threads": threads,
        "n_threads_batch": threads,
        "verbose": False,
    }
    with ExitStack() as stack:

        def opened(llm: Model) -> Model:
            return stack.enter_context(closing(llm))

        plain = [opened(llama_cpp.Llama(str(model), **arguments))]
        native = [opened(llama_cpp.Llama(str(model), **arguments))]
        n_layer = llama_cpp.llama_model_n_layer(plain[0].model)
        n_embd, n_vocab = plain[0].n_embd(), plain[0].n_vocab()
        rng = np.random.default_rng(0)
        vector = SteeringVector({i: 0.01 * rng.standard_normal(n_embd) for i in range(1, n_layer)})
        pack = SteeringPack({"c": vector, "d": -vector})
        steered = [opened(SteeredLlama(str(model), pack=pack, **arguments)) for _ in range(2)]
        native.append(opened(llama_cpp.Llama(str(model), **arguments)))
        plain.append(opened(llama_cpp.Llama(str(model), **arguments)))
        for llm in native:
            set_native_control_vector(llm, vector.matrix)
        plans = {
            mode: PlanCompiler(pack, None, n_layer=n_layer, n_embd=n_embd, injection=mode).compile(
                {"c": 1.0}
            )
            for mode in ("resident", "hooked")
        }
        sets: list[Variants] = [
            {
                BASELINE: (plain[i], None),
                NATIVE: (native[i], None),
                OFF: (steered[i], None),
                RESIDENT: (steered[i], plans["resident"]),
                HOOKED: (steered[i], plans["hooked"]),
            }
            for i in range(2)
        ]
        tokens = [int(t) for t in rng.integers(3, n_vocab, prompt)]
        times = _measure(sets, tokens, decode, rounds)
        switches = _measure_switches(steered[0], native[0], vector.matrix, tokens[:decode])
    report = {
        "model": model.name,
        "machine": f"{platform.machine()}, {threads} threads",
        "rounds": rounds,
        "decode_ratio": _ratios(times["decode"]),
        "prompt_ratio": _ratios(times["prompt"]),
        "decode_ms": {name: 1e3 * statistics.median(t) for name, t in times["decode"].items()},
        "prompt_ms": {name: 1e3 * statistics.median(t) for name, t in times["prompt"].items()},
        "switch_ms": switches,
    }
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, prompt)


def _measure(
    sets: list[Variants],
    tokens: list[int],
    decode: int,
    rounds: int,
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each single decode and of each prompt; each set warms up once."""
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in sets[0]} for kind in ("decode", "prompt")
    }
    order = list(sets[0])
    shuffle = random.Random(0).shuffle
    for number in range(-len(sets), rounds):
        variants = sets[number % len(sets)]
        shuffle(order)
        found = {name: _timed(lambda v=variants[name]: _prompt(v, tokens)) for name in order}
        for name, seconds in found.items():
            if number >= 0:
                times["prompt"][name].append(seconds)
        for token in tokens[:decode]:  # interleaved token by token
            shuffle(order)
            for name in order:
                seconds = _timed(lambda v=variants[name], t=token: _eval(v, [t]))
                if number >= 0:
                    times["decode"][name].append(seconds)
    return times


def _prompt(variant: tuple[llama_cpp.Llama, object], tokens: list[int]) -> None:
    variant[0].reset()
    _eval(variant, tokens)


def _eval(variant: tuple[llama_cpp.Llama, object], tokens: list[int]) -> None:
    llm, plan = variant
    if plan is None:
        llm.eval(tokens)
    else:
        with llm._requests.entered(ActiveSteering(plan)):  # `steering` would choose the injection
            llm.eval(tokens)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _measure_switches(
    steered: SteeredLlama, native: llama_cpp.Llama, rows: np.ndarray, tokens: list[int]
) -> dict[str, float]:
    """Return the median milliseconds to change the directions of all layers between two tokens.

    For pysteer: from a mapping of strengths to the written tensors. For llama.cpp: the call, and
    the delay of the next decode, whose scheduler reserves memory again.
    """
    seconds: dict[str, list[float]] = {
        kind: [] for kind in ("known", "new", "call", "after", "usual")
    }
    steered.reset()
    native.reset()
    one_row = np.array([[0, 0, 1, 1]], np.int32)  # the tensors are written as a decode begins
    for number, token in enumerate(tokens * 4):
        category = ("c", "d")[number % 2]
        for kind, strength in (("known", 1.0), ("new", 1.0 + (number + 1) / 1000)):
            start = time.perf_counter()
            with steered.steering({category: strength}):
                active = steered._requests.current()
                steered._cache.install(steered._cache.continued(active, [token]))
                steered.context._hook.begin_decode(one_row)
                steered.context._hook.abandon_decode()
                seconds[kind].append(time.perf_counter() - start)
                steered.eval([token])
        seconds["call"].append(_timed(lambda: set_native_control_vector(native, rows)))
        seconds["after"].append(_timed(lambda t=token: native.eval([t])))
        seconds["usual"].append(_timed(lambda t=token: native.eval([t])))
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "pysteer, to one of the last 16 steerings": median["known"],
        "pysteer, to a new steering": median["new"],
        "llama.cpp, call": median["call"],
        "llama.cpp, next decode longer by": median["after"] - median["usual"],
    }


def _ratios(times: dict[str, list[float]]) -> dict[str, float]:
    base = statistics.median(times[BASELINE])
    return {name: statistics.median(values) / base for name, values in times.items()}


def _print(report: dict[str, object], prompt: int) -> None:
    print(f"{report['model']}; {report['machine']}; medians of {report['rounds']} rounds\n")
    print(f"| | decode | {prompt}-token prompt |\n|---|---|---|")
    decode, whole = report["decode_ratio"], report["prompt_ratio"]
    for name in decode:
        print(f"| {name} | {decode[name]:.3f} | {whole[name]:.3f} |")
    base = report["decode_ms"][BASELINE], report["prompt_ms"][BASELINE]
    print(f"\n1.000 is {base[0]:.2f} ms a token, {base[1]:.0f} ms a prompt")
    for name, value in report["switch_ms"].items():
        print(f"changing the steering between two tokens, {name}: {value:.4f} ms")


if __name__ == "__main__":
    typer.run(main)
