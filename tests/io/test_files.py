"""Files appear whole or not at all, records and sums tell when they were corrupted, and a lock says who holds it."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from hps.io import files


def put_folder(path: Path, content: str, *, over: bool = True) -> None:
    with files.replacing(path, over=over) as partial:
        partial.mkdir()
        (partial / content).touch()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "run"
    for content, over, left in (("one", True, "one"), ("two", True, "two"), ("three", False, "two")):
        put_folder(path, content, over=over)
        assert names(path) == [left] and names(tmp_path) == ["run"]
    with pytest.raises(KeyError), files.replacing(path) as partial:
        partial.mkdir()
        raise KeyError
    assert names(path) == ["two"] and names(tmp_path) == ["run"]
    rename = os.replace
    for refused in (1, 2):  # the old one out of the way, the new one into its place
        calls = []

        def fails(old, new, calls=calls, refused=refused):
            calls.append(new)
            if len(calls) == refused:
                raise OSError(errno.EIO, "x")
            rename(old, new)

        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(ValueError, match="cannot be written"):
            put_folder(path, "four")
        assert names(path) == ["two"] and names(tmp_path) == ["run"]


def test_a_kill_at_any_point_leaves_the_old_or_new(tmp_path):
    """Killed before each of the calls that change the disk; the next start finds a whole folder under the name."""

    def replace_killed_before(call: int) -> int:
        """The exit status of a process that replaces the folder and is gone before that call: 0 if it has fewer."""
        pid = os.fork()
        if pid == 0:
            calls = []

            def counted(real):
                def function(*args, **more):
                    calls.append(real)
                    if len(calls) == call:
                        os._exit(9)
                    return real(*args, **more)

                return function

            for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "mkdir")):
                setattr(module, name, counted(getattr(module, name)))
            put_folder(tmp_path / "run", "new")
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    found = []
    for call in range(1, 99):
        put_folder(tmp_path / "run", "old")
        status = replace_killed_before(call)
        files.remove_stale_temporaries(tmp_path)
        assert names(tmp_path) == ["run"]
        found += names(tmp_path / "run")
        if status == 0:
            break
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"} and found.count("new") > 1


def test_what_gets_its_name_is_on_the_disk_before(tmp_path, monkeypatch):
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
    files.write_text(tmp_path / "file", "x")
    put_folder(tmp_path / "folder", "part")
    inode = {name: (tmp_path / name).stat().st_ino for name in (".", "file", "folder", "folder/part")}
    assert seen == [inode["file"], "named", inode["."], inode["folder/part"], inode["folder"], "named", inode["."]]


def test_what_a_disk_refuses_is_said_with_what_to_do(tmp_path):
    full = "Error while serializing: I/O error: No space left on device (os error 28)"
    for error, words in (
        (OSError(errno.ENOSPC, "x"), ["free space", "is untouched"]),
        (OSError(errno.EROFS, "x"), ["make it writable"]),
        (OSError(errno.EIO, "x"), ["cannot be written", "is untouched"]),
        (RuntimeError(full), ["free space"]),
        (RuntimeError("Traceback ... OSError: [Errno 28] No space left on device"), ["free space"]),
    ):
        with pytest.raises(ValueError) as caught, files.explain_disk_errors(tmp_path / "x"):
            raise error
        assert all(word in str(caught.value) for word in [*words, str(tmp_path / "x")])
    for error in (KeyError("x"), FileNotFoundError(errno.ENOENT, "x"), ValueError("row 28")):
        with pytest.raises(type(error)) as caught, files.explain_disk_errors(tmp_path / "x"):
            raise error
        assert caught.value is error


def test_a_record_holds_what_this_version_writes(tmp_path):
    """That every change of one is found: tests/faults/test_corruption.py."""
    path, record = tmp_path / "r.json", {"step": 3, "names": ["a", "b"], "lr": 1e-5, "deep": {"x": None}}
    files.write_record(path, record)
    assert files.read_record(path, "do this", step=int, names=list) == record
    with pytest.raises(ValueError, match=r"r\.json: does not hold steps and lr as this version writes it; do this"):
        files.read_record(path, "do this", steps=int, lr=int, step=int)


def test_a_corrupt_file_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    sums = {name: files.sha256(tmp_path / name) for name in "ab"}
    assert files.first_corrupt_file(tmp_path, sums) == ""
    (tmp_path / "b").write_text("c")
    assert "b is not what was written" in files.first_corrupt_file(tmp_path, sums)
    (tmp_path / "a").unlink()
    assert files.first_corrupt_file(tmp_path, sums) == "a is missing"


def test_stale_temporaries_go_and_other_files_stay(tmp_path):
    for name in ("a-json.5.tmp", "a.1.tmp", "a.json", "a.json.4.tmp", "b.2.tmp", "mine.tmp"):
        (tmp_path / name).touch()
    for name in ("a.3.tmp", "a.3.old", "c", "c.7.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    files.remove_stale_temporaries(tmp_path, "a")  # the temporary of a.json may be another output's, at work now
    others = ["a-json.5.tmp", "a.json", "b.2.tmp", "c", "c.7.old", "mine.tmp"]
    assert names(tmp_path) == sorted(["a", *others, "a.json.4.tmp"]) and names(tmp_path / "a") == ["x"]
    files.remove_stale_temporaries(tmp_path, "a.json")
    assert names(tmp_path) == ["a", *others]
    files.remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == ["a", "a.json", "c", "mine.tmp"]
