"""Whole files: nothing but a regular file is read or replaced, and no failure costs an older file.

Devices, pipes, full disks and killed processes are real ones.
"""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pysteer import FormatError, SteeringError, SteeringPack, SteeringVector
from pysteer.evaluate import html
from pysteer.evaluate.report import Report
from pysteer.extract.cache import save_arrays
from pysteer.files import check_replaceable, opened, read_bytes, replacing, write_text
from pysteer.inspect.plots import plot_pack
from pysteer.journal import Journal
from pysteer.llama.hooked import HookedLlama
from pysteer.pack.policy import Policy
from pysteer.prompts import Prompt, load_prompts, write_prompts

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX files")

VECTOR = SteeringVector({1: np.ones(8)})
PACK = SteeringPack({"calm": VECTOR})
REPORT = Report.model_construct(
    pysteer="0", model={}, pack={}, settings={}, arms={}, categories=[], overall={}, benign={},
    benign_by_category={}, router=None, isolation=[], curve=[], noise=None, notes=[], prompts=[],
)  # fmt: skip
WRITERS = {
    "pack.gguf": lambda path: PACK.save(path, overwrite=True),
    "vector.gguf": lambda path: VECTOR.save(path, overwrite=True),
    "prompts.jsonl": lambda path: write_prompts([Prompt("x" * 500)] * 200, path),
    "report.json": lambda path: REPORT.save(path, overwrite=True),
    "arrays.npz": lambda path: save_arrays(path, {"a": np.ones(20_000)}),
    "picture.png": lambda path: plot_pack(PACK, path, overwrite=True),
    "text.txt": lambda path: write_text(path, "x" * 100_000),
}
READERS = {
    "x.gguf": SteeringPack.load,
    "v.gguf": SteeringVector.load,
    "p.jsonl": load_prompts,
    "p.csv": load_prompts,
    "policy.yaml": Policy.load,
    "policy.json": Policy.load,
    "report.json": Report.load,
    "journal.jsonl": Journal,
    "model.gguf": HookedLlama,
}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def _alarm():
    """End a test that waits for a pipe."""

    def stop(number, frame):
        raise AssertionError("the test waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def special_files(folder):
    """A pipe, a folder, a loop of links, and as root a device; by name, words of the refusal."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "back")
    (folder / "back").symlink_to(folder / "loop")
    made = {"pipe": "a pipe", "folder": "a folder", "loop": "symbolic links"}
    if os.geteuid() == 0:
        # A device of our own with the numbers of /dev/zero: a mistake costs nothing.
        os.mknod(folder / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        made["device"] = "a device"
    return made


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_reader_refuses_all_but_regular_files(name, tmp_path):
    for kind, words in special_files(tmp_path).items():
        path = tmp_path / f"{kind}-{name}"
        path.symlink_to(tmp_path / kind)
        with pytest.raises(SteeringError, match=words) as caught:
            READERS[name](path)
        assert str(path) in str(caught.value)


def test_file_above_the_limit_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(FormatError, match="larger than 4 bytes"):
        read_bytes(path, 4)


def test_prompt_file_without_end_takes_no_memory(tmp_path):
    path = tmp_path / "p.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FormatError, match=r"p\.jsonl: the file is larger than"):
        load_prompts(path)


@pytest.mark.parametrize("change", [b"other", b"short", b"much longer than it was"])
def test_file_changed_while_it_is_read_is_refused(change, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"older")
    os.utime(path, (1, 1))

    def read():
        with opened(path) as file:
            file.read()
            path.write_bytes(change)

    with pytest.raises(FormatError, match="changed the file"):
        read()


def test_file_replaced_while_it_is_read_is_read_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"older")
    with opened(path) as file:
        write_text(path, "newer")
        assert file.read() == b"older"


OVERWRITES = """
import sys, time
from pathlib import Path
path, kinds = Path(sys.argv[1]), [Path(p).read_bytes() for p in sys.argv[2:4]]
print("ready", flush=True)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    for content in kinds:
        if sys.argv[4] == "shorten":
            path.write_bytes(content)  # cuts the file to nothing first
        else:
            with path.open("r+b") as file:
                half = len(content) // 2
                file.write(content[:half])
                file.flush()
                file.write(content[half:])
"""


@pytest.mark.parametrize("how", ["shorten", "in place"])
def test_pack_overwritten_in_place_is_whole_or_refused(how, tmp_path):
    """The reader, a process too, lives; it sees one of the two packs, and never parts of both."""
    rng = np.random.default_rng(0)
    packs = []
    for name in ("one.gguf", "two.gguf"):
        rows = {layer: rng.normal(size=2048) for layer in range(1, 30)}
        packs.append(SteeringPack({"a": SteeringVector(rows)}))
        packs[-1].save(tmp_path / name)
    path = tmp_path / "p.gguf"
    packs[0].save(path)
    writer = subprocess.Popen(
        [sys.executable, "-c", OVERWRITES, path, tmp_path / "one.gguf", tmp_path / "two.gguf", how],
        stdout=subprocess.PIPE,
    )
    try:
        writer.stdout.readline()
        found = {"one": 0, "two": 0, "refused": 0}
        while writer.poll() is None:
            try:
                pack = SteeringPack.load(path)
            except FormatError as error:
                found["refused"] += str(error).startswith(f"{path}: ")
            else:
                found["one" if pack == packs[0] else "two"] += 1
                assert pack in packs
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert sum(found.values()) > 20, found
    assert found["refused"], found
    assert SteeringPack.load(path) in packs


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_writer_refuses_all_but_regular_files_and_leaves_them(name, tmp_path):
    for kind, words in special_files(tmp_path).items():
        path = tmp_path / f"{kind}-{name}"
        path.symlink_to(tmp_path / kind)
        before = (tmp_path / kind).lstat()
        with pytest.raises(SteeringError, match=words) as caught:
            WRITERS[name](path)
        assert str(path) in str(caught.value)
        after = (tmp_path / kind).lstat()
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
        assert path.is_symlink()
    assert not [found for found in names(tmp_path) if "part" in found]


@pytest.mark.parametrize("name", WRITERS)
def test_writer_follows_a_link_and_keeps_it(name, tmp_path):
    (tmp_path / "real").mkdir()
    path = tmp_path / name
    path.symlink_to(tmp_path / "real" / name)
    for _ in range(2):
        WRITERS[name](path)
        assert path.is_symlink()
        assert names(tmp_path / "real") == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_the_older_file_whole(name, tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / name
    path.write_bytes(b"precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(SteeringError, match="cannot write") as caught:
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"precious"
    assert names(tmp_path) == [name]
    WRITERS[name](path)
    assert path.read_bytes() != b"precious"


def test_disk_without_room_leaves_the_older_file_whole(tmp_path):
    """On a file system of 64 KiB, which only root can make."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount")
    try:
        for name, write in WRITERS.items():
            path = disk / name
            path.write_bytes(b"precious")
            with pytest.raises(OSError, match="No space left"):
                (disk / "filler").write_bytes(bytes(2**17))
            with pytest.raises(SteeringError, match="cannot write"):
                write(path)
            assert path.read_bytes() == b"precious"
            assert names(disk) == sorted(["filler", name])
            path.unlink()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_unfinished_content_is_as_private_as_the_older_file(mode, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as file:
        file.write(b"secret")
        assert stat.S_IMODE(Path(file.name).stat().st_mode) == mode | 0o600


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_new_content_keeps_the_permissions_of_the_older_file(mode, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"older")
    path.chmod(mode)
    write_text(path, "newer")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "newer"


STALLS = """
import sys, time
from pathlib import Path
from pysteer.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def stalled(tmp_path):
    """A process in the middle of writing x."""
    process = subprocess.Popen(
        [sys.executable, "-c", STALLS, tmp_path / "x"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_part_of_a_killed_process_is_removed_by_the_next_writer(stalled, tmp_path):
    assert len(names(tmp_path)) == 1
    stalled.kill()
    stalled.wait()
    assert len(names(tmp_path)) == 1
    write_text(tmp_path / "y", "another file")
    assert len(names(tmp_path)) == 2
    write_text(tmp_path / "x", "whole")
    assert names(tmp_path) == ["x", "y"]


def test_part_of_a_living_process_stays(stalled, tmp_path):
    (part,) = names(tmp_path)
    for _ in range(3):
        write_text(tmp_path / "x", "whole")
    assert names(tmp_path) == sorted([part, "x"])


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    program = """
import sys
from pathlib import Path
from pysteer.files import write_text
for _ in range(200):
    write_text(Path(sys.argv[1]), sys.argv[2] * 10_000)
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / "x", letter])
        for letter in "abc"
    ]
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "x").exists():
            text = (tmp_path / "x").read_text()
            assert len(text) == 10_000
            assert len(set(text)) == 1
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["x"]


def test_text_that_is_not_unicode_is_refused(tmp_path):
    with pytest.raises(SteeringError, match="cannot write"):
        write_text(tmp_path / "x", "\ud800")
    assert names(tmp_path) == []


# ---- files of others -----------------------------------------------------------------------------


OURS = {
    "p.gguf": PACK.save,
    "v.gguf": VECTOR.save,
    "r.json": REPORT.save,
    "a.png": lambda path, **options: plot_pack(PACK, path, **options),
    "a.svg": lambda path, **options: plot_pack(PACK, path, **options),
    "a.pdf": lambda path, **options: plot_pack(PACK, path, **options),
    "r.html": lambda path, **options: html.save(REPORT, path, **options),
}


@pytest.fixture
def rendered(monkeypatch):
    """Lets an empty report be rendered, which the template cannot do."""
    real = (Path(html.__file__).parent / "report.html.j2").read_text()
    monkeypatch.setattr(html, "render", lambda report: real)


@pytest.mark.parametrize("name", OURS)
def test_file_of_others_is_replaced_only_when_told_to(name, tmp_path, rendered):
    path = tmp_path / name
    path.write_bytes(b"precious" * 1000)
    with pytest.raises(SteeringError, match=r"did not write .* --force .*overwrite=True"):
        OURS[name](path)
    assert path.read_bytes() == b"precious" * 1000
    assert names(tmp_path) == [name]
    OURS[name](path, overwrite=True)
    assert b"precious" not in path.read_bytes()


@pytest.mark.parametrize("name", OURS)
def test_own_file_and_empty_file_are_replaced(name, tmp_path, rendered):
    path = tmp_path / name
    path.write_bytes(b"")
    OURS[name](path)
    first = path.read_bytes()
    assert first
    OURS[name](path)
    assert path.read_bytes()


def test_model_is_not_replaced(tiny_llama, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_llama.read_bytes())
    for save in (PACK.save, VECTOR.save):
        with pytest.raises(SteeringError, match="did not write"):
            save(model)
    assert model.read_bytes() == tiny_llama.read_bytes()


def test_control_vector_of_another_program_is_not_replaced(tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_tensor("direction.1", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert SteeringVector.load(path) == VECTOR
    with pytest.raises(SteeringError, match="did not write"):
        VECTOR.save(path)
    VECTOR.save(path, overwrite=True)
    VECTOR.save(path)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x", "x.gguf.bak", ".gguf"])
def test_other_ending_is_refused_with_the_ending_to_use(name, tmp_path):
    for save in (PACK.save, VECTOR.save):
        with pytest.raises(SteeringError, match=r"ends in \.gguf"):
            save(tmp_path / name)
    assert names(tmp_path) == []
    PACK.save(tmp_path / "X.GGUF")
    assert names(tmp_path) == ["X.GGUF"]


def test_check_before_the_work_changes_nothing(tmp_path):
    path = tmp_path / "x"
    check_replaceable(path, lambda _: False)
    path.write_bytes(b"mine")
    with pytest.raises(SteeringError, match="did not write"):
        check_replaceable(path, lambda _: False)
    check_replaceable(path, None)
    assert path.read_bytes() == b"mine"
    with pytest.raises(SteeringError), replacing(path, lambda _: False):
        raise AssertionError
