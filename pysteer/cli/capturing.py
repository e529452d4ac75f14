"""What commands that learn from a model have in common: how it is run, which layers, where to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pysteer.cli import console
from pysteer.cli.loading import require
from pysteer.errors import SteeringError
from pysteer.pack.vector import MAX_LAYER

if TYPE_CHECKING:
    from pysteer.extract.capture import Capture


def chosen_engine(
    source: str, engine: str, methods: Sequence[str], dtype: str | None, device_map: str | None
) -> str:
    """The engine to use, "torch" or "llama".

    Raises:
        SteeringError: the engine does not exist, or does not go with the other options.
    """
    from pysteer.extract.methods import METHODS

    torch_methods = [m for m in methods if m in METHODS and METHODS[m].needs.gradients]
    gguf = source.endswith(".gguf")
    for_torch = dtype is not None or device_map is not None
    if engine not in ("auto", "torch", "llama"):
        raise SteeringError(f"--engine {engine}: use torch, llama or auto")
    if engine == "auto":
        return "llama" if gguf and not torch_methods and not for_torch else "torch"
    if engine == "llama":
        if not gguf:
            raise SteeringError(f"{source} is no GGUF file; --engine llama runs those only")
        if for_torch:
            raise SteeringError("--dtype and --device-map need --engine torch")
        if torch_methods:
            raise SteeringError(f"--method {torch_methods[0]} needs --engine torch")
    return engine


def quiet_bars() -> None:
    """Keep tqdm's bars from what is no terminal; to be called before anything imports tqdm."""
    if not console.err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")


def open_capture(
    source: str,
    engine: str,
    dtype: str | None,
    device_map: str | None,
    context: int,
    threads: int | None,
) -> Capture:
    """The model, run by the engine asked for.

    Raises:
        SteeringError: it cannot be loaded, or there is no such dtype.
    """
    if engine == "llama":
        from pysteer.extract.llama_capture import LlamaCapture

        return LlamaCapture(source, n_ctx=context, **({"n_threads": threads} if threads else {}))
    for module in ("torch", "transformers"):
        require(module, "extract")
    quiet_bars()
    import torch
    import transformers

    if not console.err.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise SteeringError(f"--dtype {dtype}: use one of {', '.join(dtypes)}")
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = dtypes[dtype] if dtype is not None else None
    return TorchCapture(TorchModel(source, dtype=chosen, device_map=device_map))


def parse_layers(text: str) -> list[range]:
    """What --layers says; "all" is as many as there can be.

    Raises:
        SteeringError: it is written otherwise.
    """
    if text == "all":
        return [range(MAX_LAYER + 1)]
    parts: list[range] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        written = first.isdecimal() and (last.isdecimal() or not dash) and len(text) < 1000
        if not written or int(first) > int(last or first):
            raise SteeringError(f"--layers {text}: write them as 12,15,18 or 5-25, or all")
        if int(last or first) > MAX_LAYER:
            raise SteeringError(f"--layers {text}: no model has as many")
        parts.append(range(int(first), int(last or first) + 1))
    return parts


def layers_there(parts: list[range] | None, site: str, capture: Capture) -> tuple[int, ...] | None:
    """The layers named; of all, those that the model has."""
    if parts is None:
        return None
    if parts == [range(MAX_LAYER + 1)]:
        return tuple(capture.sites.get(site, ()))
    return tuple(sorted({layer for part in parts for layer in part}))


def check_output(output: Path, inputs: Iterable[Path | None]) -> None:
    """Raise SteeringError if the pack cannot be written there, or would replace what it is from."""
    if not output.parent.is_dir():
        raise SteeringError(f"there is no folder {output.parent} to write {output.name} to")
    if output.is_dir():
        raise SteeringError(f"{output} is a folder; --output names a file")
    if not os.access(output.parent, os.W_OK):
        raise SteeringError(f"the folder {output.parent} cannot be written to")
    if output.exists() and any(p is not None and p.exists() and output.samefile(p) for p in inputs):
        raise SteeringError(f"--output {output} would replace what the pack is made from")
