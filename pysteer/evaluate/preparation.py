"""Preparation that evaluation and calibration share: folders, arguments, identities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pysteer.errors import SteeringError
from pysteer.extract.capture import file_identity

_THREADS = ("n_threads", "n_threads_batch")


def make_folder(folder: Path) -> None:
    """Make a folder for answers.

    Raises:
        SteeringError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteeringError(f"{folder}: {error.strerror}; name another folder") from None


def answer_identity(
    model: Path, parallel: int, context: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all inputs of answers besides prompts, steering and vectors, as JSON data.

    Args:
        model: a GGUF file.
        parallel: prompts answered at once.
        context: context size shared by these prompts, tokens.
        arguments: other arguments of `llama_cpp.Llama`. Numbers of threads are left out: they
            change no more than a rounding, and a busier machine has others.

    Raises:
        SteeringError: the file cannot be read.
    """
    try:
        model_identity = file_identity(model)
    except OSError as error:
        raise SteeringError(f"{model}: {error.strerror}; name a GGUF file") from None
    return {
        "model": model_identity,
        "parallel": parallel,
        "context": context,
        "arguments": {
            name: repr(value) for name, value in sorted(arguments.items()) if name not in _THREADS
        },
    }
