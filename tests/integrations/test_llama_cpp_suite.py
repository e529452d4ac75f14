"""llama-cpp-python's own tests pass with SteeredLlama in place of llama_cpp.Llama."""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import llama_cpp
import pytest

pytest.importorskip("huggingface_hub")  # their tests import both
pytest.importorskip("scipy")

HERE = Path(__file__).parent
VERSION = llama_cpp.__version__
NEEDED = ("tests/", "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")

# Replacements for the models that their tests fetch from a hub, by file name. A test that expects
# the words of its own model fails, with the same message for both classes.
TEXT = ("Qwen3.5-0.8B-Q8_0.gguf", "stories15M-q4_0.gguf")
EMBEDDING = "bge-small-en-v1.5-q4_k_m.gguf"
RECURRENT = "mamba-130m-hf.Q2_K.gguf"

AT_LEAST = 11  # of their tests create a model and pass


@dataclass(frozen=True)
class Outcome:
    """End of one test: the number of models created, and the failure, or None if it passed."""

    models: int
    failure: str | None


@pytest.fixture(scope="module")
def suite(request):
    """Folder with the tests of the installed version, from its source distribution."""
    archive = f"llama_cpp_python-{VERSION}.tar.gz"
    folder = request.config.cache.mkdir("llama-cpp-python")
    if not (folder / archive).exists():
        # pip puts the file there when it is whole and has the checksum that the registry names.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        command += ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(f"cannot fetch the source of llama-cpp-python {VERSION}: {reason}")
    sources = folder / archive.removesuffix(".tar.gz")
    with tarfile.open(folder / archive) as tar:
        # Without the package itself, which would hide the installed one.
        wanted = [m for m in tar if m.name.partition("/")[2].startswith(NEEDED)]
        tar.extractall(folder, members=wanted, filter="data")
    assert (sources / "tests/test_llama.py").exists()
    return sources


@pytest.fixture(scope="module")
def outcomes(suite, default_model, tiny_model, pack, opened, tmp_path_factory):
    """A function from a class, and a flag for steering, to the outcome of each test."""
    tiny, recurrent = tiny_model("llama"), tiny_model("mamba")
    models = {**dict.fromkeys(TEXT, default_model), EMBEDDING: tiny, RECURRENT: recurrent}
    small = opened.pack((1, 2), 64, 1.0)
    folder = tmp_path_factory.mktemp("packs")
    packs = {}
    for path, made in ((default_model, pack), (tiny, small), (recurrent, small)):
        packs[str(path)] = str(folder / path.name)
        made.save(packs[str(path)])

    @cache
    def run(name: str, steered: bool = False) -> dict[str, Outcome]:
        report = tmp_path_factory.mktemp(name) / "report.xml"
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "STAND_IN_MODELS": json.dumps({key: str(path) for key, path in models.items()}),
            "STAND_IN_CLASS": name,
            "STAND_IN_PACKS": json.dumps(packs if steered else {}),
        }
        command = [sys.executable, "-m", "pytest", "-p", "stand_in", "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, "--rootdir", suite, "--junitxml", report]
        command += ["-v", "--tb=no", "--show-capture=no", "tests"]
        done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)
        print(done.stdout)
        assert report.exists(), done.stdout + done.stderr
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{c.get('classname')}.{c.get('name')}": _outcome(c) for c in cases}

    return run


def _outcome(case: ElementTree.Element) -> Outcome:
    models = sum(int(p.get("value", 0)) for p in case.iter("property"))
    for tag in ("failure", "error", "skipped"):
        found = case.find(tag)
        if found is not None:
            return Outcome(models, f"{tag}: {found.get('message')}")
    return Outcome(models, None)


def passed_with_a_model(ended: dict[str, Outcome]) -> set[str]:
    return {name for name, outcome in ended.items() if outcome.models and not outcome.failure}


@pytest.mark.slow
def test_every_test_ends_with_steered_llama_as_with_llama(outcomes):
    """A test that fails because of the other model fails with the same message."""
    plain, unsteered = outcomes("Llama"), outcomes("SteeredLlama")
    different = {name: (plain[name], unsteered.get(name)) for name in plain}
    different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
    assert not different
    assert len(passed_with_a_model(unsteered)) >= AT_LEAST


@pytest.mark.slow
def test_steered_llama_passes_the_tests_that_llama_passes(outcomes):
    """The text is another, but a cached prompt continues as a fresh one does, for example."""
    plain, steered = outcomes("Llama"), outcomes("SteeredLlama", steered=True)
    assert passed_with_a_model(steered) == passed_with_a_model(plain)
    assert any(plain[name].failure != steered[name].failure for name in plain)
