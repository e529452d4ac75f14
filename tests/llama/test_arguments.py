"""Arguments of models that `llama_cpp.Llama` would ignore without a word."""

import re
from contextlib import closing

import llama_cpp
import pytest

from pysteer import Engine, HookedLlama, SteeredLlama, SteeringError

QUIET = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.mark.parametrize("kind", [HookedLlama, SteeredLlama, Engine])
@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("n_gpu_layer", "n_gpu_layers"),
        ("rpc_server", "rpc_servers"),
        ("max_seqences", "max_sequences"),
    ],
)
def test_mistyped_argument_raises_with_the_nearest_known_one(kind, given, known, tiny_llama):
    message = f"neither {kind.__name__} nor llama_cpp.Llama {llama_cpp.__version__} has an argument"
    with pytest.raises(SteeringError, match=f"{re.escape(message)} '{given}'.*'{known}'"):
        kind(tiny_llama, **QUIET, **{given: 1})


@pytest.mark.parametrize(("kind", "given"), [(SteeredLlama, "polcy"), (Engine, "max_queu")])
def test_mistyped_argument_of_pysteer_raises_with_the_nearest_known_one(kind, given, tiny_llama):
    with pytest.raises(SteeringError, match=f"argument '{given}'; did you mean '{given[:3]}"):
        kind(tiny_llama, **QUIET, **{given: None})


def test_argument_that_resembles_none_raises_without_a_guess(tiny_llama):
    with pytest.raises(SteeringError, match=r"argument 'xyzzy'$"):
        SteeredLlama(tiny_llama, **QUIET, xyzzy=1)


def test_engine_takes_the_servers_that_hooked_models_take(tiny_llama):
    with pytest.raises(SteeringError, match="expected HOST:PORT, found 'nowhere'"):
        Engine(tiny_llama, **QUIET, rpc_servers=["nowhere"])


def test_arguments_of_a_subclass_are_known(tiny_llama):
    class Named(SteeredLlama):
        def __init__(self, path, *, name="", **llama_arguments):
            super().__init__(path, **llama_arguments)
            self.name = name

    with closing(Named(tiny_llama, name="mine", **QUIET)) as llm:
        assert llm.name == "mine"
    with pytest.raises(SteeringError, match=r"neither Named nor .* 'nam'; did you mean 'name'"):
        Named(tiny_llama, nam="mine", **QUIET)


def test_llama_cpp_ignores_unknown_arguments_itself(tiny_llama):
    """Otherwise pysteer need not look."""
    llama_cpp.Llama(str(tiny_llama), **QUIET, xyzzy=1).close()
