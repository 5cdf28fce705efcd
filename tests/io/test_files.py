"""Files appear whole or not at all, records and sums tell when they were harmed, and a lock says who holds it."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from hps.io import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "before"
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as partial:
        partial.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "run"
    for content, over, left in (("one", True, "one"), ("two", True, "two"), ("three", False, "two")):
        with files.replacing(path, over=over) as partial:
            partial.mkdir()
            (partial / content).touch()
        assert [p.name for p in path.iterdir()] == [left]
    assert list(tmp_path.iterdir()) == [path]


def test_what_gets_its_name_is_on_the_disk_and_then_its_name_is(tmp_path, monkeypatch):
    """A machine that stops may forget all that was not flushed. None can be stopped here: what is asked for is seen."""
    seen, fsync, rename = [], os.fsync, os.replace

    def flushed(descriptor):
        seen.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def named(old, new):
        seen.append("named")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    with files.replacing(tmp_path / "file") as partial:
        partial.write_text("x")
    with files.replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "part").write_text("x")
    inode = {name: (tmp_path / name).stat().st_ino for name in (".", "file", "folder", "folder/part")}
    assert seen == [inode["file"], "named", inode["."], inode["folder/part"], inode["folder"], "named", inode["."]]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), ["free space", "is untouched"]),
        (OSError(errno.EROFS, "x"), ["make it writable"]),
        (OSError(errno.EIO, "x"), ["cannot be written", "is untouched"]),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), ["free space"]),
        (RuntimeError("Traceback ... OSError: [Errno 28] No space left on device"), ["free space"]),
    ],
)
def test_what_a_disk_refuses_is_said_with_what_to_do(tmp_path, error, words):
    with pytest.raises(ValueError) as caught, files.explain_disk_errors(tmp_path / "x"):
        raise error
    assert all(word in str(caught.value) for word in [*words, str(tmp_path / "x")])


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "x"), ValueError("row 28")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, files.explain_disk_errors(tmp_path / "x"):
        raise error
    assert caught.value is error


def test_a_record_comes_back_and_every_change_of_it_is_found(tmp_path):
    path, record = tmp_path / "r.json", {"step": 3, "names": ["a", "b"], "lr": 1e-5, "deep": {"x": None}}
    files.write_record(path, record)
    whole = path.read_bytes()
    assert files.read_record(path, "do this") == record
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert files.read_record(path, "do this") == record  # white space only
        except ValueError as error:
            assert str(path) in str(error) and "do this" in str(error)
    for content in (b"", b"[]", b"3", whole[:-9], b"[" * 10**5, b'{"step": 3}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.json"):
            files.read_record(path, "do this")
    path.write_bytes(b"[" * 10**5)
    with pytest.raises(ValueError, match=r"r\.json: cannot be read"):
        files.read_json(path)


def test_a_harmed_file_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    sums = {name: files.sha256(tmp_path / name) for name in "ab"}
    assert files.first_corrupt_file(tmp_path, sums) == ""
    (tmp_path / "b").write_text("c")
    assert "b is not what was written" in files.first_corrupt_file(tmp_path, sums)
    (tmp_path / "a").unlink()
    assert files.first_corrupt_file(tmp_path, sums) == "a is missing"


def test_what_killed_processes_left_is_swept(tmp_path):
    for name in ("a-json.5.tmp", "a.1.tmp", "a.json", "a.json.4.tmp", "b.2.tmp", "mine.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "a.3.tmp").mkdir()
    (tmp_path / "a.3.tmp" / "x").touch()
    files.remove_stale_temporaries(tmp_path, "a")  # the temporary of a.json may be another output's, at work now
    others = ["a-json.5.tmp", "a.json", "b.2.tmp", "mine.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "a.json.4.tmp"])
    files.remove_stale_temporaries(tmp_path, "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == others
    files.remove_stale_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "mine.tmp"]


def test_a_file_without_buffer_is_appended_to_whole(tmp_path, monkeypatch):
    """The system may take a part of what it is given; then the rest follows."""

    class Short:
        name, taken = str(tmp_path / "log"), b""

        def write(self, data: bytes) -> int:
            self.taken += data[:3]
            return min(3, len(data))

    file = Short()
    files.append(file, b"0123456789")  # pyright: ignore[reportArgumentType]
    assert file.taken == b"0123456789"


def hold(path: Path, ready) -> None:
    with files.lock(path, what="a test", advice="wait"):
        ready.set()
        time.sleep(60)


def test_a_lock_says_who_holds_it_and_goes_with_its_holder(tmp_path):
    path, context = tmp_path / "lock", multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(path, ready))
    holder.start()
    try:
        assert ready.wait(20)
        with pytest.raises(ValueError) as caught, files.lock(path, what="another", advice="wait, or do that"):
            pass
        assert all(word in str(caught.value) for word in ("a test", f"process {holder.pid}", "wait, or do that"))
    finally:
        holder.kill()  # which leaves the file and not the lock
        holder.join()
    assert path.exists()
    with files.lock(path, what="the next", advice=""):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert not path.exists()


def test_a_lock_whose_file_was_deleted_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between opening and locking, the last holder may delete the file: the lock would then be of nothing."""
    path, real, times = tmp_path / "lock", files.fcntl.flock, []

    def deleted(file, how):
        times.append(1)
        if len(times) == 1:
            path.unlink()
        return real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", deleted)
    with files.lock(path, what="one", advice=""):
        assert len(times) == 2 and path.exists()
        with pytest.raises(ValueError, match="one by process"), files.lock(path, what="two", advice=""):
            pass
