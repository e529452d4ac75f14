"""Trials of steering on this machine with a given model."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from pysteer import _native
from pysteer.distribution import installed_version
from pysteer.errors import SteeringError
from pysteer.llama.control_vector import set_native_control_vector
from pysteer.llama.devices import PlacedLlama, describe_devices
from pysteer.llama.hooked import HookedLlama
from pysteer.llama.versions import load_native, untested_note
from pysteer.pack.pack import BaseModel, SteeringPack
from pysteer.pack.vector import SteeringVector
from pysteer.progress import SILENT, Progress
from pysteer.runtime.device_checks import (
    RELATIVE_STRENGTH,
    Cost,
    Device,
    DeviceChecks,
    Way,
    devices_of,
)
from pysteer.runtime.plan import Injection
from pysteer.runtime.steered import SteeredLlama

_N_PROMPT = 48
_N_UBATCH = 32  # smaller than the prompt, so that one evaluation is several graphs
_N_DECODE = 4
_N_TIMED = 24


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: the statement that was checked.
        ok: the statement holds.
        value: largest absolute difference in logits, where logits were compared.
        detail: further text for people.
    """

    name: str
    ok: bool
    value: float | None
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """Results of `diagnose`.

    Attributes:
        versions: name to version of the programs that take part.
        notes: a line about a llama-cpp-python that was never tested, if it is one.
        hardware: a line about each device of this machine.
        model: identity of the model.
        sites: site to layers.
        devices: the memories that hold the layers.
        checks: the checks.
        ways: the way and the result of each operator at each site of each device.
        costs: time of a token by device and steering.
    """

    versions: dict[str, str]
    notes: list[str]
    hardware: list[str]
    model: BaseModel
    sites: dict[str, tuple[int, ...]]
    devices: list[Device]
    checks: list[Check]
    ways: list[Way]
    costs: list[Cost]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(check.ok for check in self.checks) and all(way.ok for way in self.ways)


def versions() -> dict[str, str]:
    """Return the versions of the programs that take part.

    Raises:
        HookError: the loaded llama.cpp cannot be hooked.
    """
    load_native()
    return {
        "pysteer": installed_version(),
        "llama-cpp-python": llama_cpp.__version__,
        "ggml": _native.ggml_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def diagnose(
    model_path: str,
    *,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    rpc_servers: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Diagnosis:
    """Steer a model with a known vector, natively and by pysteer, and compare the logits.

    The vector is pseudo-random with a fixed seed, at the residual of every layer from 1 on, its
    norm a fifth of the model's own residual norm at that layer. The comparison covers all logits of
    a prompt of several micro-batches and of some single-token decodes after the prompt. Then each
    operator acts alone on activations of each site, in each memory that holds layers, and the
    result is compared with the operator's formula.

    Args:
        model_path: a GGUF model.
        n_threads: threads to use; None lets llama.cpp decide.
        n_gpu_layers: blocks to offload; 0: none, or all of them to `rpc_servers`.
        rpc_servers: "HOST:PORT" of servers that hold layers; see `HookedLlama`.
        progress: gets a stage for each step.

    Raises:
        HookError: the model or the llama.cpp cannot be hooked at all.
        SteeringError: the model cannot be loaded.
    """
    found = versions()
    checks: list[Check] = []
    arguments: dict[str, Any] = {
        "n_ctx": 256,
        "n_ubatch": _N_UBATCH,
        "logits_all": True,
        "verbose": False,
        "n_threads": n_threads,
        "n_threads_batch": n_threads,
        "rpc_servers": tuple(rpc_servers),
    }
    if n_gpu_layers:
        arguments["n_gpu_layers"] = n_gpu_layers
    with _stage(progress, "sites"), closing(HookedLlama(model_path, **arguments)) as hooked:
        model, sites = hooked.base_model, hooked.sites
        devices = devices_of(hooked)
        tokens = _tokens(model.n_vocab)
        norm = 1.0  # any size shows the same where the activations cannot be read
        with _failing(checks, "pysteer reads the residual"):
            norm = _residual_norm(hooked, tokens)
    residual = tuple(layer for layer in sites["residual"] if layer >= 1)
    if residual:
        vector = _known_vector(residual, model.n_embd, norm)
        _compare(model_path, arguments, vector, tokens, model.n_layer, progress, checks)
    for site, layer in (("residual", 0), ("attention", max(sites["attention"], default=0))):
        if layer in sites[site]:
            with _stage(progress, f"steering of {site}, layer {layer}"):
                _effect(model_path, arguments, site, layer, model, norm, tokens, checks)
    trials = DeviceChecks(devices, model.n_embd, norm)
    ways, costs = trials.run(model_path, arguments, tokens[:_N_PROMPT], progress)
    return Diagnosis(
        found,
        list(filter(None, [untested_note()])),
        describe_devices(),
        model,
        sites,
        devices,
        checks,
        ways,
        costs,
    )


@contextmanager
def _failing(checks: list[Check], name: str) -> Iterator[None]:
    """Turn an error of the `with` block into a check, so that the diagnosis goes on."""
    try:
        yield
    except SteeringError as error:
        checks.append(Check(name, False, None, str(error)))


@contextmanager
def _stage(progress: Progress, name: str) -> Iterator[None]:
    advance = progress.start(name, 1)
    yield
    advance(1)


def _compare(
    model_path: str,
    arguments: dict[str, Any],
    vector: SteeringVector,
    tokens: list[int],
    n_layer: int,
    progress: Progress,
    checks: list[Check],
) -> None:
    with (
        _stage(progress, "llama.cpp, with and without its control vector"),
        closing(PlacedLlama(model_path, **arguments)) as plain,
    ):
        unsteered, plain_speed = _logits(plain, tokens)
        set_native_control_vector(plain, _rows(vector, n_layer))
        native, native_speed = _logits(plain, tokens)
    effect = _largest_difference(native, unsteered)
    checks.append(
        Check(
            "llama.cpp's control vector changes the logits",
            effect > 0,
            effect,
            f"{plain_speed:.0f} tokens/s without, {native_speed:.0f} with",
        )
    )
    pack = SteeringPack({"known": vector})
    injections: tuple[Injection, ...] = ("resident", "hooked")
    for injection in injections:
        with (
            _stage(progress, f"pysteer, {injection}"),
            closing(SteeredLlama(model_path, pack=pack, injection=injection, **arguments)) as llm,
        ):
            if injection == "resident":
                off, speed = _logits(llm, tokens)
                difference = _largest_difference(off, unsteered)
                checks.append(
                    Check(
                        "pysteer without steering equals llama.cpp",
                        difference == 0,
                        difference,
                        f"{speed:.0f} tokens/s",
                    )
                )
            name = f"pysteer {injection} equals llama.cpp's control vector"
            with _failing(checks, name):
                with llm.steering({"known": 1.0}):
                    steered, speed = _logits(llm, tokens)
                difference = _largest_difference(steered, native)
                checks.append(Check(name, difference == 0, difference, f"{speed:.0f} tokens/s"))


def _effect(
    model_path: str,
    arguments: dict[str, Any],
    site: str,
    layer: int,
    model: BaseModel,
    norm: float,
    tokens: list[int],
    checks: list[Check],
) -> None:
    """Check that steering beyond llama.cpp's control vector acts, and ends when switched off."""
    vector = SteeringVector(dict(_known_vector((layer,), model.n_embd, norm).items()), site=site)
    name = f"pysteer steers {site}, layer {layer}, and stops"
    pack = SteeringPack({"known": vector})
    with (
        _failing(checks, name),
        closing(SteeredLlama(model_path, pack=pack, **arguments)) as llm,
    ):
        before, _ = _logits(llm, tokens)
        with llm.steering({"known": 1.0}):
            steered, _ = _logits(llm, tokens)
        after, _ = _logits(llm, tokens)
        effect = _largest_difference(steered, before)
        left = _largest_difference(after, before)
        text = f"{left:g} left after switching off"
        checks.append(Check(name, effect > 0 and left == 0, effect, text))


def _rows(vector: SteeringVector, n_layer: int) -> npt.NDArray[np.float32]:
    rows = np.zeros((n_layer - 1, vector.n_embd), np.float32)
    for layer, direction in vector.items():
        rows[layer - 1] = direction
    return rows


def _tokens(n_vocab: int) -> list[int]:
    spread = np.random.default_rng(0).integers(0, n_vocab, _N_PROMPT + _N_DECODE)
    return [int(token) for token in spread]


def _residual_norm(llm: HookedLlama, tokens: list[int]) -> float:
    layer = max(llm.sites["residual"], default=0)
    if not llm.sites["residual"]:
        return 1.0
    rows = llm.capture(tokens, layers=[layer // 2], pool="all")["residual"][layer // 2]
    return float(np.median(np.linalg.norm(rows, axis=1)))


def _known_vector(layers: tuple[int, ...], n_embd: int, norm: float) -> SteeringVector:
    rng = np.random.default_rng(1)
    directions = {}
    for layer in layers:
        direction = rng.standard_normal(n_embd)
        scale = RELATIVE_STRENGTH * norm / np.linalg.norm(direction) / np.sqrt(len(layers))
        directions[layer] = (scale * direction).astype(np.float32)
    return SteeringVector(directions)


def _logits(llm: llama_cpp.Llama, tokens: list[int]) -> tuple[npt.NDArray[np.float32], float]:
    """Return logits of a prompt and of single-token decodes after it, and the decodes' tokens/s."""
    llm.reset()
    llm.eval(tokens[:_N_PROMPT])
    for token in tokens[_N_PROMPT:]:
        llm.eval([token])
    logits = llm.scores[: len(tokens)].copy()
    seconds = []
    for token in tokens[:_N_TIMED]:
        start = time.perf_counter()
        llm.eval([token])
        seconds.append(time.perf_counter() - start)
    return logits, 1.0 / statistics.median(seconds)


def _largest_difference(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())
