"""A full and a read-only disk under everything that is written: what was there stays, the message says what to do, and
the same command goes on once there is room. The disk is a tmpfs that the test mounts, which needs root.
"""

import contextlib
import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from helpers import arguments

import data_prep
import eval as evaluation
import train
from hps import checkpoint, reference
from hps.data import listwise

ROOM = 64 * 2**20


class Disk:
    """A disk of ROOM bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"

    def fill(self) -> None:
        """Leave no room, not in the page that a file's end lies in either: what is there is grown to its page."""
        with contextlib.suppress(OSError), open(self.filler, "ab", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        with contextlib.suppress(OSError), open(self.filler, "ab", buffering=0) as file:
            while True:
                file.write(bytes(512))

    def empty(self) -> None:
        self.filler.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(options, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"needs the right to mount a small disk: {error}")
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def at_step(monkeypatch, step: int, do) -> None:
    """Call `do` when the loop begins a step, once."""
    real, calls = train.lr_at, itertools.count()

    def lr_at(c, now, steps):
        if now == step and next(calls) == 0:
            do()
        return real(c, now, steps)

    monkeypatch.setattr(train, "lr_at", lr_at)


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "policy"])
def test_training(tiny_world, tmp_path, disk, monkeypatch, what):
    """The disk is full from step 4 of 24 on: under a checkpoint, the log (a line of which it cuts), or the export."""
    options = dict(prompts_per_step=2, reference_cache=tmp_path / "cache")
    train.main(arguments(tiny_world, tmp_path / "calm", **options))
    out = disk.folder / "run"
    train.main(arguments(tiny_world, out, stop_after=2, **options))
    if what == "policy":
        monkeypatch.setattr(checkpoint, "export", after(disk.fill, checkpoint.export))
    else:
        at_step(monkeypatch, 4, disk.fill)
    with pytest.raises(ValueError, match=f"{disk.folder}.*free space") as caught:
        train.main(arguments(tiny_world, out, save_every=3 if what == "checkpoint" else 0, **options))
    assert "the same command goes on" in str(caught.value) or what == "policy"
    monkeypatch.undo()
    left = checkpoint.latest(out / "checkpoints")
    assert left is not None and left.name == f"step-{3 if what == 'checkpoint' else 2:08d}"
    assert what != "metrics" or not (out / "metrics.jsonl").read_bytes().endswith(b"\n")  # the case that was meant
    assert not (out / "policy").exists()
    disk.empty()
    train.main(arguments(tiny_world, out, **options))
    assert harness.records(out / "metrics.jsonl") == harness.records(tmp_path / "calm/metrics.jsonl")
    weights = "policy/model.safetensors"
    assert harness.digest(out / weights) == harness.digest(tmp_path / "calm" / weights)


def after(do, function):
    def wrapped(*args, **more):
        do()
        return function(*args, **more)

    return wrapped


@pytest.mark.parametrize("what", ["out", "reference_cache", "token_cache"])
def test_a_read_only_disk(tiny_world, tmp_path, disk, what):
    """Under a run that has a checkpoint there: it is refused before any work, and goes on once it may write."""
    options = {"out": tmp_path / "run", "token_cache": tmp_path / "tokens", "reference_cache": tmp_path / "cache"}
    options[what] = disk.folder / "there"
    out = options.pop("out")
    if what == "out":
        train.main(arguments(tiny_world, out, stop_after=2, **options))
    disk.remount("ro")
    with pytest.raises(ValueError, match=f"{disk.folder}.*(make it writable|Read-only)"):
        train.main(arguments(tiny_world, out, **options))
    disk.remount("rw")
    train.main(arguments(tiny_world, out, **options))
    train.main(arguments(tiny_world, tmp_path / "calm", reference_cache=tmp_path / "calm-cache"))
    assert harness.records(out / "metrics.jsonl") == harness.records(tmp_path / "calm/metrics.jsonl")


@pytest.mark.parametrize("which", ["reference_cache", "shard", "token_cache"])
def test_caches(tiny_world, tmp_path, disk, monkeypatch, which):
    """Full from the start, or (shard) when the first shard of the reference cache is about to be written."""
    options = {"token_cache": tmp_path / "tokens", "reference_cache": tmp_path / "cache"}
    options["reference_cache" if which == "shard" else which] = disk.folder / "c"
    (disk.folder / "c").mkdir()
    if which == "shard":
        monkeypatch.setattr(reference, "_write_shard", after(disk.fill, reference._write_shard))
    else:
        disk.fill()
    with pytest.raises(ValueError, match="free space") as caught:
        train.main(arguments(tiny_world, tmp_path / "run", **options))
    assert str(disk.folder / "c") in str(caught.value)
    left = [p.name for p in (disk.folder / "c").rglob("*") if p.is_file() and (p.stat().st_size or which == "shard")]
    assert left == (["reference.json"] if which == "shard" else [])
    monkeypatch.undo()
    disk.empty()
    train.main(arguments(tiny_world, tmp_path / "run", **options))
    train.main(arguments(tiny_world, tmp_path / "calm", reference_cache=tmp_path / "calm-cache"))
    assert harness.records(tmp_path / "run/metrics.jsonl") == harness.records(tmp_path / "calm/metrics.jsonl")


def test_results_and_data(tiny_world, tmp_path, disk):
    """The output that stood there before is what stands there after a command that failed."""
    data, model = tiny_world / "test.jsonl", tiny_world / "model"
    out = disk.folder / "out.jsonl"
    commands = {
        "annotate": lambda: data_prep.main(["annotate", "--scorer=world-est", f"--input={data}", f"--output={out}"]),
        "generate": lambda: data_prep.main(
            ["generate", f"--model={model}", f"--input={data}", f"--output={out}", "--n=2", "--max_new_tokens=24"]
        ),
        "eval": lambda: evaluation.main(
            [f"--model={model}", f"--reference={model}", f"--data={data}", f"--out={disk.folder}", "--samples=0",
             f"--reference_cache={tmp_path / 'cache'}", "--max_length=128"]
        ),
    }  # fmt: skip
    result = {"eval": disk.folder / "eval.json"}
    for name, command in commands.items():
        command()
        product = result.get(name, out)
        whole = product.read_bytes()
        for break_it, mend in (
            (disk.fill, disk.empty),
            (lambda: disk.remount("ro"), lambda: disk.remount("rw")),
        ):
            break_it()
            with pytest.raises(ValueError, match=str(disk.folder)) as caught:
                command()
            words = ("free space", "make it writable", "No space", "Read-only")
            assert any(word in str(caught.value) for word in words)
            assert product.read_bytes() == whole, name
            mend()
            command()
            assert product.read_bytes() == whole, f"{name} after it was mended"
        assert not list(disk.folder.glob("*.tmp"))
    assert len(listwise.read(out)) == 8
