"""`--gpu-layers` and `--rpc` reach llama.cpp from each command that runs a model."""

import pytest
from commands import check_mistake
from prompting import rows, write

from pysteer import SteeringError, SteeringPack, SteeringVector
from pysteer.llama.hooked import HookedLlama


@pytest.fixture
def commands(tmp_path, tiny_llama):
    """Arguments of each command that runs a model."""
    pack = tmp_path / "pack.gguf"
    SteeringPack({"x": SteeringVector({1: [1.0] * 64})}).save(pack)
    unsafe = write(tmp_path / "unsafe.jsonl", rows("harm", "x", 20))
    safe = write(tmp_path / "safe.jsonl", rows("calm", "x", 20))
    benign = write(tmp_path / "benign.jsonl", rows("hello", "x", 40))
    model = ["-m", tiny_llama, "--threads", 1]
    learn = ["--unsafe", unsafe, "--safe", safe, "--benign", benign, "-o", tmp_path / "new.gguf"]
    measure = ["-s", pack, "--prompts", unsafe, "--steer", "own", "-o", tmp_path / "report"]
    return {
        "demo": ["--threads", 1],
        "generate": [*model, "-p", "hello"],
        "chat": model,
        "evaluate": [*model, *measure],
        "extract": [*model, *learn],
        "calibrate": [*model, *learn, "--methods", "mean"],
        "doctor": model,
    }


@pytest.fixture
def offloaded(monkeypatch):
    """The number of blocks that the first model was created to offload; the command ends there."""
    found = []
    create = HookedLlama.__init__

    def created(self, *args, **kwargs):
        create(self, *args, **kwargs)
        found.append(self.model_params.n_gpu_layers)
        raise SteeringError("enough")

    monkeypatch.setattr(HookedLlama, "__init__", created)
    return found


COMMANDS = ("demo", "generate", "chat", "evaluate", "extract", "calibrate", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_gpu_layers_reach_llama_cpp(command, commands, cli, offloaded):
    for given, expected in (([], 0), (["--gpu-layers", 3], 3), (["--gpu-layers", -1], 0x7FFFFFFF)):
        offloaded.clear()
        code, _, err = cli(command, *commands[command], *given)
        assert (code, offloaded) == (2, [expected]), err


def test_gpu_layers_reach_the_model_of_a_guard_judge(commands, cli, offloaded, tiny_llama):
    judge = ["--judge", f"guard:{tiny_llama}", "--gpu-layers", 2]
    for command in ("evaluate", "calibrate"):
        offloaded.clear()
        code, _, err = cli(command, *commands[command], *judge)
        assert (code, offloaded) == (2, [2]), err


@pytest.mark.parametrize("command", COMMANDS)
def test_servers_reach_the_model(command, commands, cli):
    """The model refuses what is no address of a server."""
    answer = cli(command, *commands[command], "--rpc", "localhost:1", "--rpc", "somewhere")
    check_mistake(answer, "expected HOST:PORT, found 'somewhere'")


def test_servers_reach_the_model_of_a_guard_judge(commands, cli, tiny_llama):
    judge = ["--judge", f"guard:{tiny_llama}", "--rpc", "somewhere"]
    for command in ("evaluate", "calibrate"):
        check_mistake(cli(command, *commands[command], *judge), "found 'somewhere'")


def test_servers_for_torch_name_its_option(commands, cli):
    answer = cli("extract", *commands["extract"], "--engine", "torch", "--rpc", "localhost:1")
    check_mistake(answer, "--rpc is for --engine llama", "--device-map")


def test_gpu_layers_below_all_are_refused(cli):
    check_mistake(cli("generate", "-p", "hello", "--gpu-layers", "-2"), "--gpu-layers")


def test_gpu_layers_for_torch_names_its_option(commands, cli):
    answer = cli("extract", *commands["extract"], "--engine", "torch", "--gpu-layers", 1)
    check_mistake(answer, "--device-map")
