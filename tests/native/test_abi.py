"""The llama.cpp that is loaded is checked before anything relies on it."""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from pysteer import HookedLlama, HookError, _native


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )


def test_an_untested_version_is_refused_unless_asked_for(tiny_llama, monkeypatch):
    monkeypatch.setattr(llama_cpp, "__version__", "9.9.9")
    with pytest.raises(HookError, match=r"9\.9\.9 is untested.*0\.3\.36.*UNTESTED_LLAMA_CPP=1"):
        HookedLlama(tiny_llama, verbose=False)
    monkeypatch.setenv("PYSTEER_UNTESTED_LLAMA_CPP", "1")
    HookedLlama(tiny_llama, verbose=False).close()


@pytest.mark.skipif(sys.platform != "linux", reason="names a library of the system")
def test_missing_functions_are_named():
    """A library that is no llama.cpp: the C library itself."""
    result = run(
        "import ctypes, llama_cpp\n"
        "llama_cpp.llama_cpp._lib = ctypes.CDLL('libm.so.6')\n"
        "from pysteer.llama.hooked import load_native\n"
        "load_native()"
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("pysteer.errors.HookError")
    assert "lacks" in last
    assert "ggml_backend_tensor_set" in last
    assert "works with llama-cpp-python" in last


@pytest.mark.skipif(sys.platform != "linux", reason="builds a stand-in with the GNU linker")
def test_another_layout_of_tensors_is_refused(tmp_path):
    """A llama.cpp that keeps the data pointer elsewhere: its accessor says one thing, the field
    that is read directly another."""
    library = Path(llama_cpp.llama_cpp._lib._name)
    (tmp_path / "other.c").write_text(
        "void * ggml_get_data(const void * tensor) { return (char *) tensor + 1; }"
    )
    command = "cc -shared -fPIC other.c -o other.so -Wl,--no-as-needed"
    folder = str(library.parent)
    subprocess.run(
        [*command.split(), f"-L{folder}", "-lllama", f"-Wl,-rpath,{folder}"],
        cwd=tmp_path,
        check=True,
    )
    result = run(
        "import ctypes, llama_cpp\n"
        f"llama_cpp.llama_cpp._lib = ctypes.CDLL({str(tmp_path / 'other.so')!r})\n"
        "from pysteer.llama.hooked import load_native\n"
        "load_native()"
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("pysteer.errors.HookError")
    assert "not laid out as expected (data)" in last


def test_the_native_part_is_the_one_under_test():
    """Under `make asan` and `make tsan` the suite must not fall back to another build."""
    sanitizer = os.environ.get("PYSTEER_EXPECT_SANITIZER")
    if sanitizer:
        assert sanitizer in _native.__file__
        assert f"__{sanitizer}_init".encode() in Path(_native.__file__).read_bytes()
