"""The check of the loaded llama.cpp before anything relies on it."""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from pysteer import HookedLlama, _native
from pysteer.llama.versions import TESTED_LLAMA_CPP


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )


def test_untested_version_works_after_one_warning(tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(llama_cpp, "__version__", "9.9.9")
    for _ in range(2):
        HookedLlama(tiny_llama, verbose=False).close()
    (record,) = caplog.records
    assert "llama-cpp-python 9.9.9 is untested" in record.getMessage()
    assert ", ".join(TESTED_LLAMA_CPP) in record.getMessage()


def test_tested_version_works_without_a_warning(tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(llama_cpp, "__version__", TESTED_LLAMA_CPP[0])
    HookedLlama(tiny_llama, verbose=False).close()
    assert not caplog.records


@pytest.mark.skipif(sys.platform != "linux", reason="names a library of the system")
def test_library_without_ggml_raises_with_missing_functions():
    """The library is a part of the C library."""
    result = run(
        "import ctypes, llama_cpp\n"
        "llama_cpp.llama_cpp._lib = ctypes.CDLL('libm.so.6')\n"
        "from pysteer.llama.versions import load_native\n"
        "load_native()"
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("pysteer.errors.HookError")
    assert "lacks" in last
    assert "ggml_backend_tensor_set" in last
    assert "pysteer is tested with" in last


@pytest.mark.skipif(sys.platform != "linux", reason="builds a stand-in with the GNU linker")
def test_other_tensor_layout_raises_with_field(tmp_path):
    """In this stand-in the accessor of the data pointer and the field differ."""
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
        "from pysteer.llama.versions import load_native\n"
        "load_native()"
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("pysteer.errors.HookError")
    assert "not laid out as expected (data)" in last


def test_native_part_is_the_sanitized_build():
    """`make asan` and `make tsan` must not fall back to another build."""
    sanitizer = os.environ.get("PYSTEER_EXPECT_SANITIZER")
    if sanitizer:
        assert sanitizer in _native.__file__
        assert f"__{sanitizer}_init".encode() in Path(_native.__file__).read_bytes()
