"""What all benchmarks share: contestants that take turns, medians and ratios, processes of their own, texts of known
lengths, a table and JSON.

A benchmark prints a table for people, the machine, and one JSON line last for programs.
"""

import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # train.py is a script, no package; so what follows is not at the top (E402)

from hps.data import listwise, tokenizers, tokens  # noqa: E402
from hps.evaluate import md  # noqa: E402
from hps.evaluate.compare import commit, machine  # noqa: E402

Runs = dict[str, list[dict[str, float]]]  # contestant -> what it found in each round


def take_turns(names: Iterable[str], rounds: int, run: Callable[[str, int], Any]) -> dict[str, list[Any]]:
    """What `run` gives for each contestant in each round: a busy moment falls on all."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for r in range(rounds):
        for name, of_rounds in found.items():
            of_rounds.append(run(name, r))
    return found


def medians(found: Runs) -> dict[str, dict[str, float]]:
    """Of each number of each contestant, over rounds."""
    return {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}


def ratio(found: Runs, a: str, b: str, key: str) -> float:
    """Median over rounds of a's number over b's of the same round."""
    return statistics.median(x[key] / y[key] for x, y in zip(found[a], found[b], strict=True))


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a new process: a peak of memory is a process's, and so are threads and patches."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function gives on each of one or more ranks of this machine, as torchrun starts them, of one thread."""
    how = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="benchmark", max_restarts=0)
    found = elastic_launch(LaunchConfig(1, 1, ranks, **how), _one_thread)(function, *arguments)
    return [found[rank] for rank in range(ranks)]


def _one_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)


def memory(key: str) -> float:
    """MiB that this process holds (VmRSS; RssAnon: of its own, no page of a file), or its high-water mark (VmHWM);
    unlike ru_maxrss it knows nothing of the process that started it (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def flags(**options: Any) -> list[str]:
    """A command line of one of our scripts."""
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]


def train(**options: Any) -> dict[str, Any]:
    """Run train.py in this process, as a user runs it; its summary."""
    import train as script

    script.main(flags(**options))
    return json.loads((Path(options["out"]) / "summary.json").read_text())


def write_texts(path: Path, model: str, *, rows: int, responses: int, prompt: int, response: int) -> None:
    """A list-wise file of random words that are one token each; `prompt` and `response` tokens, end token included."""
    tokenizer = tokenizers.load_tokenizer(model)
    encoder, draw = tokens.Encoder(tokenizer), np.random.default_rng(0)
    known = (token.lstrip("\u0120\u2581") for token in sorted(tokenizer.get_vocab()))
    some = (w for w in known if w.isascii() and w.isalpha() and w.islower() and len(w) > 1)
    single = (w for w in some if len(next(encoder.responses([f"{w} {w}"]))) == 3)  # one token wherever it stands
    words = list(itertools.islice(single, 64))

    def text(n: int) -> str:
        return " ".join(draw.choice(words, n).tolist())

    records = (
        {"id": str(i), "prompt": text(prompt), "rewards": draw.normal(size=responses).tolist(),
         "responses": [text(response - 1) for _ in range(responses)]}
        for i in range(rows)
    )  # fmt: skip
    listwise.write_lines(path, records)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Texts and numbers in Markdown; of a number three figures, or no fraction."""

    def show(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return md.table(header, [[show(value) for value in row] for row in rows])


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    print(f"\n{title}\n", table(header, rows), sep="\n")


def finish(found: dict[str, Any]) -> None:
    """The machine, and the JSON line."""
    print(f"\n{machine()}, torch {torch.__version__}, commit {commit()}")
    print(json.dumps(found), flush=True)
