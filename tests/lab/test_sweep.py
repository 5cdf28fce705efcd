"""Stages: in order, once, told when they fail, and in workers that end with the sweep."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from tqdm import tqdm

from hps.lab import sweep


def test_workers_end_with_a_killed_sweep(tmp_path):
    """SIGKILL of the parent while a worker is busy: the worker is gone within seconds."""
    driver = tmp_path / "driver.py"
    lines = ["import os, sys, time", "from hps.lab import sweep", "if __name__ == '__main__':"]
    lines += ["    pool = sweep.workers(1)", "    print(pool.submit(os.getpid).result(), flush=True)"]
    lines += ["    pool.submit(time.sleep, 600)", "    time.sleep(600)"]
    driver.write_text("\n".join(lines))
    parent = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    worker = int(parent.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def test_a_stage_may_be_a_module(tmp_path):
    """Its options are read from its own source, whatever runs it: __main__ must be the module for that time."""
    before = sys.argv, sys.modules["__main__"]
    sweep.run_command(["-m", "hps.evaluate.export", "--help"], str(tmp_path / "log"))
    assert "--eval_json" in (tmp_path / "log").read_text()
    assert (sys.argv, sys.modules["__main__"]) == before


def test_finished_stages_are_kept_in_order_and_failures_are_told(tmp_path, monkeypatch):
    """A stage runs after what it needs, longest chain first, and only where it must; a failure has its last words."""
    script, log = tmp_path / "script.py", tmp_path / "order"
    lines = ["import sys", "open(sys.argv[1], 'a').write('x')", "open(sys.argv[2], 'a').write(sys.argv[1][-1])"]
    lines += ["if len(sys.argv) > 3: sys.exit('no ' + sys.argv[3])"]
    script.write_text("\n".join(lines))

    def stage(name: str, weight: float, *needs: str, more: tuple[str, ...] = ()) -> sweep.Stage:
        argv = [str(script), str(tmp_path / name), str(log), *more]
        return sweep.Stage(tmp_path / name, argv, weight, tuple(tmp_path / need for need in needs))

    def seconds(argv, log):  # a stage takes ten
        run_command(argv, log)
        return 10.0

    run_command = sweep.run_command
    monkeypatch.setattr(sweep, "run_command", seconds)
    four = [stage("a", 1), stage("b", 3), stage("c", 5, "a"), stage("d", 1, "b", "c")]
    with ThreadPoolExecutor(1) as pool, tqdm(total=10, disable=False) as bar:
        assert sweep.run_stages(pool, 1, four, tmp_path, bar) == 0
        assert log.read_text() == "acbd"  # a before b: c waits for it
        assert bar.n == 10
        (tmp_path / "c").unlink()
        assert sweep.run_stages(pool, 1, four, tmp_path, bar) == 3
        assert log.read_text() == "acbdc" and (tmp_path / "d").read_text() == "x"
        assert sweep.course(four, 3, tmp_path) == {"stages": 4, "stages_kept": 3, "stage_seconds": 40}
        with pytest.raises(RuntimeError, match="script.py.*ended with status no luck"):
            sweep.run_stages(pool, 1, [stage("e", 1, more=("luck",)), stage("f", 1, "e")], tmp_path, bar)
    assert not (tmp_path / "f").exists()
    assert (tmp_path / "commands.log").read_text().count("python ") == 6
