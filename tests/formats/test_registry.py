"""Dialects are told apart by their first bytes; a file of no dialect is refused unread."""

import numpy as np
import pytest

from pysteer import FormatError, SteeringPack
from pysteer.formats import registry
from pysteer.formats.gguf import CategoryContent, PackContent


def test_file_of_unknown_dialect_is_refused_once_by_name(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\0neither")
    with pytest.raises(FormatError) as error:
        registry.read_pack(path)
    assert str(error.value).startswith(f"{path}: not a GGUF")  # and other dialects, if any


def test_fault_of_a_gguf_file_names_the_path_once(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF\x09\0\0\0")
    with pytest.raises(FormatError) as error:
        registry.read_pack(path)
    assert str(error.value) == f"{path}: GGUF version 9 is not supported; versions 2 and 3 are"


def test_new_dialect_loads_beside_gguf(tmp_path, monkeypatch):
    def read_pack(path):
        direction = np.array(path.read_text().split()[1:], np.float32)
        return PackContent({"a": CategoryContent("residual", {3: direction})}, None, {}, {})

    dialect = registry._Dialect("text", b"direction", read_pack)
    monkeypatch.setattr(registry, "_DIALECTS", (*registry._DIALECTS, dialect))
    (tmp_path / "a.txt").write_text("direction 1 2")
    pack = SteeringPack.load(tmp_path / "a.txt")
    assert pack["a"].direction(3).tolist() == [1.0, 2.0]
    pack.save(tmp_path / "a.gguf")
    assert SteeringPack.load(tmp_path / "a.gguf") == pack
    (tmp_path / "b").write_bytes(b"\0neither")
    with pytest.raises(FormatError, match=r"not a GGUF or .*text file"):
        SteeringPack.load(tmp_path / "b")
