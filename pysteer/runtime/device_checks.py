"""Trials of each memory that holds layers: ways, results and cost of operators at its sites."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pysteer.errors import SteeringError
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.operators import Operator
from pysteer.pack.pack import SteeringPack
from pysteer.pack.vector import SITES, SteeringVector
from pysteer.progress import Progress
from pysteer.runtime.native import native_operator
from pysteer.runtime.steered import SteeredLlama

RELATIVE_STRENGTH: Final = 0.2
"""Strength of a trial, in residual norms: enough to move the logits, too little to overflow."""

_OPERATORS: Final = {
    "add": Operator(),
    "add, keep_norm": Operator(keep_norm=True),
    "ablate": Operator("ablate"),
    "ablate, one_sided": Operator("ablate", one_sided=True),
    "clamp": Operator("clamp", low=0.1, high=0.1),
    "rotate": Operator("rotate", angle=0.5),
    "rotate, target": Operator("rotate", angle=0.5, target=True),
    "low_rank": Operator("low_rank"),
}
_TOLERANCE = 1e-5  # relative to the largest value
_TIMED = ("add", "ablate")
_N_TIMED = 16  # tokens


@dataclass(frozen=True)
class Device:
    """A memory that holds outputs of layers.

    Attributes:
        name: ggml's name of the memory.
        on_host: pysteer can change values in place.
        layers: site to layers, ascending.
    """

    name: str
    on_host: bool
    layers: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Way:
    """The way of an operator at a site on a device, and its result.

    Attributes:
        device: name of the memory.
        site: the site.
        layer: the layer of the trial.
        operator: the operator and its options.
        way: "control vector", "in place" or "copies".
        reason: why that way.
        ok: the result equals the formula.
        error: largest difference to the formula, relative to the largest value; None: no result.
    """

    device: str
    site: str
    layer: int
    operator: str
    way: str
    reason: str
    ok: bool
    error: float | None


@dataclass(frozen=True)
class Cost:
    """Time of a token while the residual of all layers of a device is steered.

    Attributes:
        device: name of the memory.
        steering: the operator; "none": unsteered.
        milliseconds: median time of a token.
        ratio: to the unsteered model's, measured in turns.
    """

    device: str
    steering: str
    milliseconds: float
    ratio: float


def devices_of(llm: HookedLlama) -> list[Device]:
    """Return the memories that hold a model's sites, in the order of the layers."""
    found: dict[str, Device] = {}
    for node in sorted(llm.context.site_nodes, key=lambda node: node.layer):
        name = without_address(node.backend)
        device = found.setdefault(name, Device(name, node.on_host, dict.fromkeys(SITES, ())))
        device.layers[node.site.name] += (node.layer,)
    return list(found.values())


def without_address(name: str) -> str:
    """Return the name of a memory without the address of its server.

    Examples:
        >>> without_address("RPC0[192.168.7.3:50052]")
        'RPC0[:50052]'
    """
    return re.sub(r"\[.*:", "[:", name)


class DeviceChecks:
    """Operators at the sites of devices, tried on one model.

    Args:
        devices: of the model.
        n_embd: width of the model.
        norm: typical norm of the residual.
    """

    def __init__(self, devices: Sequence[Device], n_embd: int, norm: float) -> None:
        self._devices = devices
        self._size = RELATIVE_STRENGTH * norm
        self._rng = np.random.default_rng(2)
        self._n_embd = n_embd
        self._vectors: dict[str, SteeringVector] = {}
        self._trials: list[tuple[Device, str, int, str]] = []
        for device in devices:
            for site, layers in device.layers.items():
                for layer in sorted({*layers[:1], *layers[len(layers) // 2 :][:1]}):
                    for operator in _OPERATORS:
                        self._trials.append((device, site, layer, operator))
                        self._add(f"{site} {layer} {operator}", operator, site, [layer])
            residual = [layer for layer in device.layers["residual"] if layer > 0]
            for operator in _TIMED if residual else ():
                self._add(f"{device.name} {operator}", operator, "residual", residual)

    def _add(self, category: str, operator: str, site: str, layers: Sequence[int]) -> None:
        """Add a category whose directions are small beside the residual."""
        made = _OPERATORS[operator]
        rows = self._rng.standard_normal((len(layers), made.rows_per_layer or 2, self._n_embd))
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
        if made.kind == "add":
            rows *= self._size / np.sqrt(len(layers))
        directions = dict(zip(layers, rows if rows.shape[1] > 1 else rows[:, 0], strict=True))
        self._vectors[category] = SteeringVector(directions, site=site, operator=made)

    def run(
        self, model_path: str, arguments: Mapping[str, Any], tokens: list[int], progress: Progress
    ) -> tuple[list[Way], list[Cost]]:
        """Return the ways of all operators, and the cost of a token.

        Args:
            model_path: the GGUF model.
            arguments: of the model.
            tokens: a prompt.
            progress: gets a stage.
        """
        if not self._vectors:
            return [], []
        advance = progress.start("operators on devices", len(self._trials) + len(self._devices))
        ways, costs = [], []
        pack = SteeringPack(self._vectors)
        with closing(SteeredLlama(model_path, pack=pack, **arguments)) as llm:
            for trial in self._trials:
                ways.append(self._try(llm, *trial, tokens))
                advance(1)
            for device in self._devices:
                if all(way.ok for way in ways if way.device == device.name):
                    costs += _costs(llm, device, tokens)
                advance(1)
        return ways, costs

    def _try(
        self, llm: SteeredLlama, device: Device, site: str, layer: int, name: str, tokens: list[int]
    ) -> Way:
        category = f"{site} {layer} {name}"
        found: dict[bool, npt.NDArray[np.float32]] = {}
        try:
            for steered in (False, True):
                with llm.steering({category: 1.0} if steered else None):
                    rows = llm.capture(tokens, sites=[site], layers=[layer], pool="all")
                found[steered] = rows[site][layer]
        except SteeringError as failure:
            return Way(device.name, site, layer, name, "", str(failure), False, None)
        expected = native_operator(_OPERATORS[name]).apply(
            self._vectors[category].prepared[0], 1.0, found[False]
        )
        error = float(np.abs(found[True] - expected).max() / np.abs(expected).max())
        way, reason = _way(llm, device, site, layer, name)
        acted = not np.array_equal(found[True], found[False])
        ok = error <= _TOLERANCE and acted is not np.array_equal(expected, found[False])
        return Way(device.name, site, layer, name, way, reason, ok, error)


def _way(
    llm: SteeredLlama, device: Device, site: str, layer: int, operator: str
) -> tuple[str, str]:
    """Return the way of the latest decode, and the reason."""
    if llm.context.was_resident:
        return "control vector", "the graph stays whole"
    if llm.context.cuts == 0:
        return "row table", "the graph stays whole"
    if site != "residual" or layer == 0:
        cause = "llama.cpp adds control vectors to the residual of layers >= 1 alone"
    elif operator != "add":
        cause = "the operator is no addition"
    else:
        cause = "the device cannot add by rows"
    return ("in place" if device.on_host else "copies"), cause


def _costs(llm: SteeredLlama, device: Device, tokens: list[int]) -> list[Cost]:
    """Measure single tokens, unsteered and with all layers of a device steered, in turns."""
    assert llm.pack is not None
    names = [name for name in _TIMED if f"{device.name} {name}" in llm.pack.categories]
    variants: dict[str, dict[str, float] | None] = {"none": None}
    variants |= {name: {f"{device.name} {name}": 1.0} for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    llm.reset()
    llm.eval(tokens)
    for token in tokens[: _N_TIMED + 1]:
        for name, steering in variants.items():
            with llm.steering(steering):
                start = time.perf_counter()
                llm.eval([token])
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return [
        Cost(device.name, name, 1e3 * median, median / medians["none"])
        for name, median in medians.items()
    ]
