"""Stages of a sweep: the repository's own commands, each run once, as many at a time as there are cores.

A product is kept where it was made by the same command, from the same files: OUTPUT.key holds a hash of both, so that a
sweep that was stopped goes on where it was, and sweeps in one folder share what they have in common and nothing else.
OUT/commands.log holds the commands as a user would type them, OUT/logs/ what they say, OUT/seconds.jsonl how long each
took.
"""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hps.io import files
from hps.prepare import journal


@dataclass
class Stage:
    """A script of the repository that writes `product` from products of earlier stages; `weight`: about its seconds."""

    product: Path
    argv: list[str]
    weight: float
    needs: tuple[Path, ...] = ()

    @property
    def output(self) -> Path:
        """The file or folder of all that the command writes."""
        return next(Path(word.split("=", 1)[1]) for word in self.argv if word.startswith(("--out=", "--output=")))

    @property
    def record(self) -> Path:
        """Holds the key that the output was begun with."""
        return self.output.with_name(f"{self.output.name}.key")


def keys_of(stages: list[Stage], out: Path) -> dict[Path, str]:
    """product -> hash of its command, of the files outside `out` that this names, and of the keys of what it needs."""
    keys: dict[Path, str] = {}
    for stage in stages:  # each after those it needs
        named = [Path(word.partition("=")[2]) for word in stage.argv]
        read = [files.sha256(path) for path in named if path.is_file() and not path.is_relative_to(out)]
        words = [word.replace(str(out), "OUT") for word in stage.argv]
        content = json.dumps([words, read, [keys[need] for need in stage.needs]])
        keys[stage.product] = hashlib.sha256(content.encode()).hexdigest()
    return keys


def finished(stages: list[Stage], keys: dict[Path, str]) -> set[Path]:
    """The products that are kept. What another command made, or made from other files, is renamed to NAME.old: it would
    be taken up or refused."""
    done: set[Path] = set()
    others: dict[Path, Stage] = {}
    for stage in stages:
        known = stage.record.read_text() if stage.record.exists() else ""
        if known == keys[stage.product] and others.keys().isdisjoint(stage.needs):
            done |= {stage.product} if stage.product.exists() else set()
        elif stage.output.exists() or journal.journals(stage.output):
            others[stage.product] = stage
    for stage in others.values():
        for path in journal.journals(stage.output):
            path.unlink()
        if stage.output.exists():  # and has not gone with a folder around it
            old = stage.output.with_name(f"{stage.output.name}.old")
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            stage.output.rename(old)
    if others:
        some = f"{len(others)} of {len(stages)} products made anew; {next(iter(others))}, say,"
        tqdm.write(f"{some} is of other commands, settings or files (its old form: NAME.old)")
    return done


def run_command(argv: list[str], log: str) -> float:
    """Run a script of the repository as `python SCRIPT ...` would, in this worker, which has loaded the libraries
    already, its output into a file; seconds taken."""
    began = time.perf_counter()
    gc.collect()
    gc.freeze()  # the libraries' objects, which every collection of a run would look through
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        before, sys.argv = sys.argv, argv
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as e:
            if e.code:
                said = ["no output", *Path(log).read_text().replace("\r", "\n").strip().splitlines()]
                raise RuntimeError(f"{shlex.join(argv)} ended with status {e.code}: {said[-1]}") from None
        finally:
            sys.argv = before
    return time.perf_counter() - began


def workers(jobs: int) -> ProcessPoolExecutor:
    """Worker processes that end with this one, even if it is killed: an orphan would go on writing beside a restart."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    def watch() -> None:
        multiprocessing.parent_process().join()  # pyright: ignore[reportOptionalMemberAccess]  # a worker has one
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_stages(pool: Executor, jobs: int, stages: list[Stage], out: Path, bar: tqdm) -> int:
    """Run all stages that are not finished, `jobs` at once; how many were.

    Of those that can run, the one that others wait for longest goes first: a slow one left to the end would leave a
    core idle. The first failure ends the rest.
    """
    todo, keys = {stage.product: stage for stage in stages}, keys_of(stages, out)
    path: dict[Path, float] = {}  # seconds from a stage's start to the end of the longest chain behind it
    for stage in reversed(stages):
        path[stage.product] = path.get(stage.product, 0.0) + stage.weight
        for need in stage.needs:
            path[need] = max(path.get(need, 0.0), path[stage.product])
    done = finished(stages, keys)
    bar.update(sum(todo.pop(product).weight for product in done))
    kept, running, took, made = len(done), {}, 0.0, 0.0
    begun: dict[Path, float] = {}
    while todo or running:
        ready = [stage for stage in todo.values() if done.issuperset(stage.needs)]
        ready.sort(key=lambda stage: -path[stage.product])
        for stage in ready[: jobs - len(running)]:
            with (out / "commands.log").open("a") as log:
                log.write(f"python {shlex.join(stage.argv)}\n")
            stage.record.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(stage.record, keys[stage.product])
            name = "-".join(stage.product.relative_to(out).parts)
            running[pool.submit(run_command, stage.argv, str(out / "logs" / f"{name}.log"))] = todo.pop(stage.product)
            begun[stage.product] = time.perf_counter()
        assert running, f"nothing makes what these need: {[str(s.product) for s in todo.values()]}"
        # What all have left, shared out, or the longest chain that has begun, by what the stages of this start took, of
        # which the first few say little: tqdm's own guess would follow the last one's size.
        few = bar.total / 10
        rate = (took + few) / (made + few)
        ran = {x.product: min(time.perf_counter() - begun[x.product], rate * x.weight) for x in running.values()}
        left = (rate * (bar.total - bar.n) - sum(ran.values())) / jobs
        left = max(left, *(rate * path[product] - seconds for product, seconds in ran.items()))
        bar.set_postfix_str(f"{tqdm.format_interval(round(left))} left", refresh=sys.stderr.isatty())
        for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
            seconds = future.result()
            stage = running.pop(future)
            with (out / "seconds.jsonl").open("a") as log:
                log.write(json.dumps({"product": str(stage.product.relative_to(out)), "seconds": seconds}) + "\n")
            done.add(stage.product)
            took, made = took + seconds, made + stage.weight
            bar.update(stage.weight)
    return kept


def run_in_workers(stages: list[Stage], jobs: int, out: Path, name: str) -> None:
    """`run_stages` with a bar, in `jobs` processes, or one per core; ValueError where a stage fails."""
    # One more than all, or the rounding of their sum would end beyond it.
    jobs, total = jobs or os.cpu_count() or 1, 1 + sum(stage.weight for stage in stages)
    shown = "{l_bar}{bar}| {elapsed}{postfix}"
    with workers(jobs) as pool, tqdm(total=total, desc=name, bar_format=shown) as bar:
        try:
            run_stages(pool, jobs, stages, out, bar)
        except RuntimeError as e:
            pool.shutdown(wait=False, cancel_futures=True)
            raise ValueError(f"a stage failed; its output is in {out / 'logs'}: {e}") from e


def stage_seconds(stages: list[Stage], out: Path) -> int:
    """What a suite's stages took, whenever they ran: one that was killed or shares stages tells its whole cost."""
    lines = (out / "seconds.jsonl").read_text().splitlines()
    took = {record["product"]: record["seconds"] for record in map(json.loads, lines)}
    return round(sum(took.get(str(stage.product.relative_to(out)), 0.0) for stage in stages))


def flags(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [f"--{key}={value}" for key, value in options.items()]
