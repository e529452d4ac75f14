"""Compare directions extracted by llama.cpp and by torch, at each quantisation.

Extracts `mean` directions with torch from the de-quantised file, and with llama.cpp from the file
and from F16, Q8_0 and Q4_K_M versions of its weights, written to a temporary folder. Prints the
lowest and the median cosine between the two over the chosen layers.

usage: python tools/compare_engines.py [--unsafe U.jsonl] [--safe S.jsonl] [--layers 5-25]
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from quantized import FTYPES, quantize

from pysteer import SteeringPack, shipped
from pysteer.extract.capture import Capture
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.settings import ExtractSettings
from pysteer.extract.torch_capture import TorchCapture
from pysteer.extract.torch_model import TorchModel
from pysteer.inspect.compare import compare
from pysteer.prompts import load_prompts


def main(
    model: Annotated[Path | None, typer.Argument(help="A GGUF model; SmolLM2 by default.")] = None,
    unsafe: Annotated[Path | None, typer.Option(help="JSONL; by default the demo's.")] = None,
    safe: Annotated[Path | None, typer.Option(help="JSONL; by default the demo's.")] = None,
    layers: Annotated[str, typer.Option(help="First and last, as in 5-25.")] = "5-25",
) -> None:
    """Print one row for each version of the weights."""
    path = model or shipped.default_model()
    shown = shipped.demo_prompts()
    data = Data(
        load_prompts(unsafe) if unsafe else shown[0], load_prompts(safe) if safe else shown[1]
    )
    first, last = map(int, layers.split("-"))
    settings = ExtractSettings(layers=tuple(range(first, last + 1)), router=False, scale=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(capture: Capture, kept: str) -> SteeringPack:
            return extract(capture, data, settings, cache=folder / kept)

        reference = run(TorchCapture(TorchModel(str(path))), "torch")
        print(f"{path.name}: {len(data.unsafe)} unsafe and {len(data.safe)} safe prompts\n")
        print(f"| weights | cosine, lowest of layers {layers} | median |\n|---|---|---|")
        for ftype in (path.stem.rpartition(".")[2], *FTYPES):
            version = path
            if ftype in FTYPES:
                version = quantize(path, folder / f"{ftype}.gguf", ftype)
            with closing(LlamaCapture(version)) as capture:
                found = run(capture, ftype)
            cosines = [
                layer.cosine
                for category in compare(reference, found).categories.values()
                for layer in category.layers.values()
                if layer.cosine is not None
            ]
            print(
                f"| {ftype} | {min(cosines):.4f} | {statistics.median(cosines):.4f} |", flush=True
            )


if __name__ == "__main__":
    typer.run(main)
