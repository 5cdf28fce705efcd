"""A full and a read-only disk under everything that is written: what was there stays, the message says what to do, and
the same command goes on once there is room. The disk is a tmpfs that the test mounts, which needs root.
"""

import contextlib
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from helpers import arguments, flags

import data_prep
import eval as evaluation
import train
from hps import reference, sharding
from hps.data import listwise
from hps.io import files

ROOM = 64 * 2**20


class Disk:
    """A disk of ROOM bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"

    def fill(self, *_, **__) -> None:
        """Leave no room, not in the page that a file's end lies in either: what is there is grown to its page."""
        for size in (2**20, 512):
            with contextlib.suppress(OSError), open(self.filler, "ab", buffering=0) as file:
                while True:
                    file.write(bytes(size))

    def empty(self) -> None:
        self.filler.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        argv = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
        subprocess.run(argv, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a small disk: {getattr(error, 'stderr', error)}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def calm(tiny_world, tmp_path_factory):
    """calm(options): the log and the weights of a run that nothing disturbs, with caches of its own."""

    @functools.cache
    def run(**options):
        out = tmp_path_factory.mktemp("calm")
        train.main(arguments(tiny_world, out / "run", reference_cache=out / "cache", **options))
        return harness.outcome(out / "run")

    return run


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "policy"])
def test_a_full_disk_under_a_run(tiny_world, tmp_path, disk, monkeypatch, calm, what):
    """From step 4 of 24 on: under a checkpoint, the log (a line of which it cuts), or the export."""
    out = disk.folder / "run"
    argv = arguments(tiny_world, out, reference_cache=tmp_path / "cache", prompts_per_step=2)
    train.main([*argv, "--stop_after=2"])
    if what == "policy":
        harness.before(sharding, "export", disk.fill, monkeypatch, call=0)
    else:
        harness.before(train, "lr_at", disk.fill, monkeypatch, call=2)
    with pytest.raises(ValueError, match=f"{disk.folder}.*free space") as caught:
        train.main([*argv, f"--save_every={3 if what == 'checkpoint' else 0}"])
    assert "the same command goes on" in str(caught.value) or what == "policy"
    monkeypatch.undo()
    assert harness.checkpoint_of(out) == {"checkpoint": 3, "metrics": 2, "policy": 24}[what]
    assert what != "metrics" or not (out / "metrics.jsonl").read_bytes().endswith(b"\n")  # the case that was meant
    assert not (out / "policy").exists()
    disk.empty()
    train.main(argv)
    assert harness.outcome(out) == calm(prompts_per_step=2)


@pytest.mark.parametrize("what", ["out", "reference_cache", "token_cache"])
def test_a_read_only_disk_under_a_run(tiny_world, tmp_path, disk, calm, what):
    """That has a checkpoint there: it is refused before any work, and goes on once it may write."""
    options = {"out": tmp_path / "run", "token_cache": tmp_path / "tokens", "reference_cache": tmp_path / "cache"}
    options[what] = disk.folder / "there"
    argv = arguments(tiny_world, **options)
    if what == "out":
        train.main([*argv, "--stop_after=2"])
    disk.remount("ro")
    with pytest.raises(ValueError, match=f"{disk.folder}.*(make it writable|Read-only)"):
        train.main(argv)
    disk.remount("rw")
    train.main(argv)
    assert harness.outcome(options["out"]) == calm()


@pytest.mark.parametrize("which", ["reference_cache", "shard", "token_cache"])
def test_a_full_disk_under_a_cache(tiny_world, tmp_path, disk, monkeypatch, calm, which):
    """From the start, or (shard) when the first shard of the reference cache is about to be written."""
    there = disk.folder / "c"
    options = {"token_cache": tmp_path / "tokens", "reference_cache": tmp_path / "cache"}
    options["reference_cache" if which == "shard" else which] = there
    argv = arguments(tiny_world, tmp_path / "run", **options)
    there.mkdir()
    if which == "shard":
        harness.before(reference, "_write_shard", disk.fill, monkeypatch, call=0)
    else:
        disk.fill()
    with pytest.raises(ValueError, match="free space") as caught:
        train.main(argv)
    assert str(there) in str(caught.value)
    left = [path.name for path in there.rglob("*") if path.is_file() and (path.stat().st_size or which == "shard")]
    assert left == []
    monkeypatch.undo()
    disk.empty()
    train.main(argv)
    assert harness.outcome(tmp_path / "run") == calm()


def test_results_and_data_survive_a_failed_command(tiny_world, tmp_path, disk):
    """The output that stood there before is what stands there after it, full disk or read-only one."""
    model, data = tiny_world / "model", tiny_world / "test.jsonl"
    drawn, scored = dict(input=data, output=disk.folder / "a.jsonl"), dict(input=data, output=disk.folder / "b.jsonl")
    evaluated = dict(model=model, reference=model, data=data, out=disk.folder, samples=0, max_length=128)
    evaluated |= dict(reference_cache=tmp_path / "cache")
    commands = {
        "annotate": lambda: data_prep.main(["annotate", *flags(scorer="world-est", **scored)]),
        "generate": lambda: data_prep.main(["generate", *flags(model=model, n=2, max_new_tokens=24, **drawn)]),
        "eval": lambda: evaluation.main(flags(**evaluated)),
    }
    ways = [(disk.fill, disk.empty), (lambda: disk.remount("ro"), lambda: disk.remount("rw"))]
    for name, command in commands.items():
        command()
        product = {"annotate": scored["output"], "generate": drawn["output"]}.get(name, disk.folder / "eval.json")
        manifest = Path(f"{product}.manifest.json")
        whole = product.read_bytes()
        for break_it, mend in ways:
            if manifest.exists():  # of another model, or there would be nothing to do
                files.write_record(manifest, files.read_record(manifest, "", output=dict) | {"models": {"other": "x"}})
            break_it()
            with pytest.raises(ValueError, match=f"{disk.folder}.*(free space|make it writable|No space|Read-only)"):
                command()
            assert product.read_bytes() == whole, name
            mend()
            command()
            assert product.read_bytes() == whole, f"{name} after it was mended"
        assert not list(disk.folder.glob("*.tmp"))
    assert len(listwise.read(drawn["output"])) == len(listwise.read(scored["output"])) == 8
