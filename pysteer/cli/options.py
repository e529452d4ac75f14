"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from pysteer.cli.streams import unicode_text
from pysteer.errors import SteeringError
from pysteer.evaluate.judges import JUDGE_SPECS
from pysteer.settings import setting
from pysteer.shipped import default_model

OFF: Final = "off"
"""The argument of --steer that steers nothing."""

_SHOWN_MODELS = 5
_SEVERAL = re.compile(r"=\s*(?:auto|[-+.\d][-+.\de]*)\s*,")

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Model = Annotated[
    Path | None,
    typer.Option("--model", "-m", metavar="FILE", help="GGUF model; by default SmolLM2."),
]
Packs = Annotated[
    list[Path] | None,
    typer.Option(
        "--pack",
        "-s",
        metavar="FILE",
        help="Pack, or llama.cpp control vector; by default the pack of the default model. "
        "Repeatable.",
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        "--policy", metavar="FILE", help="Policy (YAML); takes precedence over the pack's policy."
    ),
]
Steer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CATEGORY=STRENGTH",
        help="Steer by a category. CATEGORY=auto lets the router decide; auto alone does so for "
        "every category, and off alone steers nothing. Repeatable. Without it the policy decides, "
        "by default as auto does.",
    ),
]
ChatFormat = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Chat format of llama-cpp-python, such as chatml; by default the model's template.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", metavar="N", min=1, help="CPU threads.")
]
Rpc = Annotated[
    list[str] | None,
    typer.Option(
        "--rpc",
        metavar="HOST:PORT",
        help="Server of llama.cpp's RPC backend that holds layers (docs/devices.md). Repeatable.",
    ),
]
GpuLayers = Annotated[
    int,
    typer.Option("--gpu-layers", metavar="N", min=-1, help="Blocks to offload; -1 is all."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="Longest answer, tokens.")
]
UnsafePrompts = Annotated[
    Path, typer.Option(metavar="FILE", help="Prompts to steer away from (JSONL or CSV).")
]
SafeAnswers = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Safe answers, for the methods contrast and learned."),
]
PackOutput = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Pack to write (GGUF).")
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace files that pysteer did not write, too.")
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="[auto|torch|llama]", help="Engine for directions; auto is llama for GGUF files."
    ),
]
Judge = Annotated[
    str,
    typer.Option(
        metavar="JUDGE",
        help=f"Decides whether an answer is safe: {', '.join(JUDGE_SPECS)}.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        help="12,15,18 or 5-25 or all; by default three around the middle.",
    ),
]


def hardware(threads: int | None, gpu_layers: int, rpc: Sequence[str] | None) -> dict[str, Any]:
    """Return the arguments of a model for options of these names, without those left out."""
    given = {"n_threads": threads, "n_gpu_layers": gpu_layers, "rpc_servers": rpc}
    return {name: value for name, value in given.items() if value}


@dataclass(frozen=True)
class Llama:
    """llama.cpp's arguments, besides those in a command's settings."""

    threads: Threads = None
    gpu_layers: GpuLayers = 0
    rpc: Rpc = None
    chat_format: ChatFormat = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a model, without those left out."""
        given = hardware(self.threads, self.gpu_layers, self.rpc)
        return given if self.chat_format is None else {**given, "chat_format": self.chat_format}


@dataclass(frozen=True)
class Running:
    """The model of a command, and how llama.cpp runs it."""

    model: Model = None
    context: int = setting(4096, "Context size in tokens.", 16, 1 << 22)
    threads: Threads = None
    gpu_layers: GpuLayers = 0
    rpc: Rpc = None
    chat_format: ChatFormat = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a model."""
        return {
            "n_ctx": self.context,
            **hardware(self.threads, self.gpu_layers, self.rpc),
            "chat_format": self.chat_format,
        }


def model_path(model: Path | None) -> str:
    """Return the path of a model, by default of the default model.

    Raises:
        SteeringError: there is no such file.
    """
    if model is None:
        return str(default_model())
    if model.is_dir():
        found = ", ".join(sorted(str(file) for file in model.glob("*.gguf"))[:_SHOWN_MODELS])
        way_out = f"name a file in it: {found}" if found else "there is no GGUF model in it"
        raise SteeringError(f"--model {model}: the path is a folder; {way_out}")
    if not model.exists():
        raise SteeringError(f"{model}: no such file; --model takes a GGUF model")
    return str(model)


def model_source(model: str | None) -> str:
    """Return the path or hub id of a model, by default the path of the default model.

    Raises:
        SteeringError: there is no such GGUF file.
    """
    if model is None:
        return str(default_model())
    return model_path(Path(model)) if model.endswith(".gguf") else model


def parse_steering(pairs: Sequence[str]) -> dict[str, float | str] | str | None:
    """Return the steering of CATEGORY=STRENGTH and CATEGORY=auto arguments, or of auto or off.

    Raises:
        SteeringError: an argument in another form, or a category named twice.
    """
    if list(pairs) == ["auto"]:
        return "auto"
    if list(pairs) == [OFF]:
        return None
    steering: dict[str, float | str] = {}
    for pair in pairs:
        try:
            category, equals, strength = unicode_text(pair).rpartition("=")
            if not equals or not category:
                raise ValueError
            value = strength if strength == "auto" else float(strength)
        except ValueError:  # also of text that is not Unicode
            raise SteeringError(
                f"--steer {pair}: write CATEGORY=STRENGTH or CATEGORY=auto, as in "
                "--steer malware=1.0, or auto alone, or off alone"
            ) from None
        if _SEVERAL.search(category):
            raise SteeringError(
                f"--steer {pair}: give --steer once for each category, as in "
                "--steer malware=1.0 --steer fraud=auto"
            )
        if category in steering:
            raise SteeringError(f"--steer names {category!r} twice")
        steering[category] = value
    return steering
