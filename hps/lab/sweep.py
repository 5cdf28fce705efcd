"""Stages of a sweep: the repository's own commands, each run once, as many at a time as there are cores.

A stage whose product is there is not run again, so that a sweep that was stopped goes on where it was, and sweeps in
one folder share what they have in common. OUT/commands.log holds the commands as a user would type them, OUT/logs/ what
they say, OUT/seconds.jsonl how long each took.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

BAR = "{l_bar}{bar}| {elapsed}<{remaining}"
ROOT = Path(__file__).resolve().parents[2]


def run_command(argv: list[str], log: str) -> float:
    """Run a script of the repository (or a module, `-m NAME`) in this worker, its output into a file; seconds taken.

    It runs as `python SCRIPT ...` would, only that the libraries are already loaded.
    """
    began = time.perf_counter()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        before, sys.argv = sys.argv, argv[argv[0] == "-m" :]
        try:
            if argv[0] == "-m":
                runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as e:
            if e.code:
                raise RuntimeError(f"{shlex.join(argv)} ended with status {e.code}: {tail(log)}") from None
        finally:
            sys.argv = before
    return time.perf_counter() - began


def tail(log: str) -> str:
    """The last line of a log file."""
    lines = Path(log).read_text().replace("\r", "\n").strip().splitlines()
    return lines[-1] if lines else "no output"


def workers(jobs: int) -> ProcessPoolExecutor:
    """Worker processes that end with this one, even if it is killed: an orphan would go on writing beside a restart."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_follow, initargs=(os.getpid(),))


def _follow(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class Stage:
    """A command that writes `product` from products of earlier stages; `weight` is about its seconds."""

    product: Path
    argv: list[str]
    weight: float
    needs: tuple[Path, ...] = ()


def run_stages(pool: Executor, jobs: int, stages: list[Stage], out: Path, bar: tqdm) -> int:
    """Run all stages whose product is not there, `jobs` at once; how many were there already.

    Of those that can run, the one that others wait for longest goes first: a slow one left to the end would leave a
    core idle. The first failure ends the rest.
    """
    todo = {stage.product: stage for stage in stages}
    path: dict[Path, float] = {}  # seconds from a stage's start to the end of the longest chain behind it
    for stage in reversed(stages):  # a stage stands after those it needs
        path[stage.product] = path.get(stage.product, 0.0) + stage.weight
        for need in stage.needs:
            path[need] = max(path.get(need, 0.0), path[stage.product])
    done = {product for product in todo if product.exists()}
    bar.update(sum(todo.pop(product).weight for product in done))
    kept, running = len(done), {}
    while todo or running:
        ready = [stage for stage in todo.values() if done.issuperset(stage.needs)]
        ready.sort(key=lambda stage: -path[stage.product])
        for stage in ready[: jobs - len(running)]:
            with (out / "commands.log").open("a") as log:
                log.write(f"python {shlex.join(stage.argv)}\n")
            name = "-".join(stage.product.relative_to(out).parts)
            running[pool.submit(run_command, stage.argv, str(out / "logs" / f"{name}.log"))] = todo.pop(stage.product)
        assert running, f"nothing makes what these need: {[str(s.product) for s in todo.values()]}"
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            seconds = future.result()
            stage = running.pop(future)
            with (out / "seconds.jsonl").open("a") as log:
                log.write(json.dumps({"product": str(stage.product.relative_to(out)), "seconds": seconds}) + "\n")
            done.add(stage.product)
            bar.update(stage.weight)
    return kept


def run_in_workers(stages: list[Stage], jobs: int, out: Path, name: str) -> int:
    """`run_stages` with a bar, in `jobs` processes or one a core; ValueError where a stage fails."""
    jobs = jobs or os.cpu_count() or 1
    total = round(sum(stage.weight for stage in stages))
    with workers(jobs) as pool, tqdm(total=total, desc=name, bar_format=BAR) as bar:
        try:
            return run_stages(pool, jobs, stages, out, bar)
        except RuntimeError as e:
            pool.shutdown(wait=False, cancel_futures=True)
            raise ValueError(f"a stage failed; its output is in {out / 'logs'}: {e}") from e


def course(stages: list[Stage], kept: int, out: Path) -> dict[str, int]:
    """How a suite's stages went, for its settings: their number, those that an earlier start had done, and the seconds
    that all of them took, whenever they ran: a suite that was killed or shares stages tells its whole cost."""
    lines = (out / "seconds.jsonl").read_text().splitlines() if (out / "seconds.jsonl").exists() else []
    took = {record["product"]: record["seconds"] for record in map(json.loads, lines)}
    seconds = sum(took.get(str(stage.product.relative_to(out)), 0.0) for stage in stages)
    return {"stages": len(stages), "stages_kept": kept, "stage_seconds": round(seconds)}


def flags(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [f"--{key}={value}" for key, value in options.items()]


def commit() -> str:
    """Short hash of the checked-out commit, `-dirty` where files differ from it; `unknown` outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def ask(*words: str) -> str:
        return subprocess.run([git, "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return (ask("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if ask("status", "--porcelain") else "")


def machine() -> str:
    """CPU model and number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores, CPU only"
