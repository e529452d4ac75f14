"""Options and checks of commands that learn from a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pysteer.cli import console
from pysteer.cli.loading import require
from pysteer.cli.options import ChatFormat, GpuLayers, Rpc, Threads, hardware
from pysteer.errors import SteeringError
from pysteer.settings import check, setting

if TYPE_CHECKING:
    from pysteer.extract.capture import Capture

ENGINES = ("auto", "torch", "llama")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CaptureOptions:
    """The model of an extraction, and the engine that runs it."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="GGUF file, model folder, or hub id; by default SmolLM2.",
        ),
    ] = None
    engine: str = setting(
        "auto", "Engine that runs the model; auto is llama for GGUF files.", choices=ENGINES
    )
    dtype: str | None = setting(
        None, "torch: data type; by default the processor's fastest.", choices=DTYPES
    )
    device_map: Annotated[
        str | None,
        typer.Option(metavar="MAP", help="torch: device map of transformers, such as auto."),
    ] = None
    context: int = setting(2048, "llama: context size in tokens.", 16, 1 << 22)
    threads: Threads = None
    gpu_layers: GpuLayers = 0
    rpc: Rpc = None
    chat_format: ChatFormat = None

    def __post_init__(self) -> None:
        check(self)


def choose_engine(options: CaptureOptions, source: str, methods: Sequence[str]) -> str:
    """Return the engine for a model, "torch" or "llama".

    Args:
        options: of the command.
        source: path or hub id of the model.
        methods: names of extraction methods; unknown names are ignored.

    Raises:
        SteeringError: the engine does not fit the model, the methods or the other options.
    """
    from pysteer.extract.methods import METHODS

    torch_methods = [m for m in methods if m in METHODS and METHODS[m].needs.gradients]
    gguf = source.endswith(".gguf")
    for_torch = options.dtype is not None or options.device_map is not None
    engine = options.engine
    if engine == "auto":
        engine = "llama" if gguf and not torch_methods and not for_torch else "torch"
    if options.chat_format is not None and engine == "torch":
        raise SteeringError(
            "--chat-format is for --engine llama; transformers takes the tokenizer's chat template"
        )
    if engine == "llama":
        if not gguf:
            raise SteeringError(f"{source} is not a GGUF file; use --engine torch")
        if for_torch:
            raise SteeringError("--dtype and --device-map need --engine torch")
        if torch_methods:
            raise SteeringError(f"the method {torch_methods[0]} needs --engine torch")
    return engine


def let_waiting_threads_sleep() -> None:
    """Set the wait policy of OpenMP; call before torch and llama.cpp are imported.

    Both read the policy once. Otherwise threads spin while they wait, in the way of the threads
    that they wait for.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def choose_threads(threads: int | None) -> int:
    """Return the number of threads of a command that learns.

    By default as many as other programs leave free, which is printed if fewer than are usable.
    """
    if threads is not None:
        return threads
    from pysteer.extract.threads import free_cores, usable_cores

    free, usable = free_cores(), usable_cores()
    if free < usable:
        console.err.print(
            f"other programs leave {free} of {usable} cores: using {free} "
            f"thread{'s' * (free > 1)} (--threads sets another number)",
            soft_wrap=True,
        )
    return free


def quiet_bars() -> None:
    """Hide tqdm's bars unless standard error is a terminal; call before tqdm is imported."""
    if not console.err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")


def open_capture(options: CaptureOptions, source: str, engine: str) -> Capture:
    """Open a model for extraction.

    Raises:
        SteeringError: the model cannot be loaded, or a package is missing.
    """
    if engine == "llama":
        from pysteer.extract.llama_capture import LlamaCapture

        return LlamaCapture(
            source,
            n_ctx=options.context,
            chat_format=options.chat_format,
            **hardware(options.threads, options.gpu_layers, options.rpc),
        )
    for module in ("torch", "transformers"):
        require(module, "extract")
    quiet_bars()
    import torch
    import transformers

    if not console.err.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    return TorchCapture(TorchModel(source, dtype=dtype, device_map=options.device_map))


def parse_layers(text: str) -> list[range] | None:
    """Return the layers of --layers; None for "all".

    Raises:
        SteeringError: a text in another form.
    """
    from pysteer.pack.vector import MAX_LAYER

    if text == "all":
        return None
    parts: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        written = first.isdecimal() and (last.isdecimal() or not dash) and len(text) < 1000
        if not written or int(first) > int(last or first):
            raise SteeringError(f"--layers {text}: write 12,15,18 or 5-25 or all")
        if int(last or first) > MAX_LAYER:
            raise SteeringError(f"--layers {text}: layers above {MAX_LAYER} do not exist")
        parts.append(range(int(first), int(last or first) + 1))
    return parts


def layers_of(parts: Sequence[range] | None, site: str, capture: Capture) -> tuple[int, ...]:
    """Return layers in ascending order; for None, all layers of the model."""
    if parts is None:
        return tuple(capture.sites.get(site, ()))
    return tuple(sorted({layer for part in parts for layer in part}))


def check_output(output: Path, inputs: Iterable[Path | None], *, force: bool) -> None:
    """Raise SteeringError if a pack cannot be written to a path, or would replace an input."""
    from pysteer.formats.gguf import check_target

    if not output.parent.is_dir():
        raise SteeringError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise SteeringError(f"--output {output}: the path is a folder; name a file")
    if not os.access(output.parent, os.W_OK):
        raise SteeringError(f"--output {output}: no permission to write to {output.parent}")
    if output.exists() and any(p is not None and p.exists() and output.samefile(p) for p in inputs):
        raise SteeringError(f"--output {output}: the pack would replace an input of the command")
    check_target(output, overwrite=force)
