"""Stages: in order, once, made anew for other commands or files, told when they fail, in workers of one sweep."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT
from tqdm import tqdm

from hps.lab import sweep

SCRIPT = """
import sys, pathlib
options = dict(word[2:].split("=") for word in sys.argv[1:])
out = pathlib.Path(options["out"])
if options.get("fail"): sys.exit("no " + options["fail"])
if "file" in options: out.write_text("x")
else: out.mkdir(exist_ok=True); (out / "product").write_text(" ".join(sorted(p.name for p in out.iterdir())))
open(options["order"], "a").write(out.name)
"""


@pytest.fixture
def sweeping(tmp_path, monkeypatch):
    """stage(name, weight, *needs, **options); run(stages): how many were kept, and what ran; the times left as told."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "order").touch()
    told, run_command = [], sweep.run_command
    monkeypatch.setattr(sweep, "run_command", lambda argv, log: run_command(argv, log) * 0 + 10.0)

    def stage(name, weight=1.0, *needs, **options):
        words = sweep.flags({"out": out / name, "order": tmp_path / "order"} | options)
        needed = tuple(out / need / "product" for need in needs)
        return sweep.Stage(out / name / "product", [str(tmp_path / "script.py"), *words], weight, needed)

    def run(*stages, jobs=1):
        with ThreadPoolExecutor(jobs) as pool, tqdm(total=sum(s.weight for s in stages), disable=False) as bar:
            told.clear()
            bar.set_postfix_str = lambda text, refresh: told.append(text)
            kept = sweep.run_stages(pool, jobs, list(stages), out, bar)
            assert bar.n == sum(stage.weight for stage in stages)
        order = (tmp_path / "order").read_text()
        (tmp_path / "order").write_text("")
        return kept, order

    return stage, run, told


def test_stages_run_once_after_what_they_need(sweeping, tmp_path):
    """The longest chain first; a failure has its last words, and ends the rest."""
    stage, run, told = sweeping
    out = tmp_path / "out"
    four = [stage("a", 1), stage("b", 3), stage("c", 5, "a"), stage("d", 1, "b", "c")]
    assert run(*four) == (0, "acbd")  # a before b: c waits for it
    # All took 10 seconds: beside a tenth of the weights 11 / 2 per unit after the first, then 21 / 7 and 31 / 10.
    assert told == ["00:10 left", "00:49 left", "00:12 left", "00:03 left"]
    # A chain takes as long with two workers as with one, and its first stage runs longer than a second.
    script = (tmp_path / "script.py").read_text()
    (tmp_path / "script.py").write_text(f"import time; time.sleep(1.5)\n{script}")
    run(stage("g", 30), stage("h", 30, "g"), jobs=2)
    assert told[:2] == ["01:00 left", "00:59 left"]
    (tmp_path / "script.py").write_text(script)
    (out / "c/product").unlink()
    assert run(*four) == (3, "c")
    assert sweep.stage_seconds(four, out) == 40
    with pytest.raises(RuntimeError, match="script.py.*ended with status no luck"):
        run(stage("e", 1, fail="luck"), stage("f", 1, "e"))
    assert not (out / "f").exists()
    assert (out / "commands.log").read_text().count("python ") == 8


def test_other_commands_and_files_are_made_anew(sweeping, tmp_path, capsys):
    """A small run first and the full one afterwards: the change reaches all that is made from it, and nothing else."""
    stage, run, _ = sweeping
    config = tmp_path / "config.toml"
    config.write_text("lr = 1")

    def three(size):
        return stage("a", size=size), stage("b", 1, "a"), stage("c", config=config)

    assert [run(*three(10)) for _ in range(2)] == [(0, "abc"), (3, "")]
    assert "made anew" not in capsys.readouterr().out
    assert run(*three(100)) == (1, "ab")
    assert "2 of 3 products made anew" in capsys.readouterr().out
    assert (tmp_path / "out/a/product").read_text() == ""  # begun in an empty folder
    assert (tmp_path / "out/a.old/product").exists()
    config.write_text("lr = 2")
    assert run(*three(100)) == (2, "c")
    a, b, _ = three(10)
    assert run(a) == (0, "a") and run(a, b) == (1, "b")  # b was made from another a, which is there no longer
    assert run(*three(100)) == (1, "ab")
    (tmp_path / "out/c.key").unlink()  # nobody knows what made it
    assert run(*three(100)) == (2, "c")


def test_its_own_command_takes_up_what_was_killed(sweeping, tmp_path):
    """An output without its product stays for the same command, with what is in it, and goes for another."""
    stage, run, _ = sweeping
    run(stage("a", size=1))
    half = tmp_path / "out/a"
    (half / "product").rename(half / "checkpoint")
    assert run(stage("a", size=1)) == (0, "a")
    assert (half / "product").read_text() == "checkpoint"
    (half / "product").unlink()
    (tmp_path / "out/a.journal-0").touch()
    assert run(stage("a", size=2)) == (0, "a")
    assert (half / "product").read_text() == "" and not (tmp_path / "out/a.journal-0").exists()


def test_workers_end_with_a_killed_sweep():
    """SIGKILL of the parent while a worker is busy: the worker is gone within seconds."""
    code = "import os, time; from hps.lab import sweep; pool = sweep.workers(1);"
    code += "print(pool.submit(os.getpid).result(), flush=True); pool.submit(time.sleep, 600); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    worker = Path(f"/proc/{int(parent.stdout.readline())}")
    assert worker.exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not worker.exists()
