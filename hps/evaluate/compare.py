"""Any evaluations of eval.py side by side: one table, paired differences, wins on the same prompts, samples to read.

    python -m hps.evaluate.compare BT=runs/bt/eval HPS=runs/hps/eval --baseline BT --out runs/compare

A folder may also hold several evaluations, of runs that differ by their seed: they are averaged by prompt. Writes
RESULTS.md, report.html, results.json and figures/ and, where there are samples, samples.html: all answers to a prompt
beside each other, prompt by prompt. Intervals are over the prompts: they say nothing of other runs or data.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps import config
from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import page
from hps.evaluate.survey import turns
from hps.io import files
from hps.lab.results import Cells, commit, machine, publish, summarise

FORMATS = ("alpaca_eval", "arena_hard")  # files that their judges read


@dataclass
class Options:
    evaluations: tuple[str, ...]  # NAME=FOLDER NAME=FOLDER ...: of eval.py, or of several runs of it
    baseline: str  # the NAME that each of the others is compared with
    out: str  # folder for RESULTS.md, report.html, results.json, figures/ and samples.html
    formats: str = ""  # write the samples for other judges too: alpaca_eval, arena_hard, or both, comma-separated


def find(words: tuple[str, ...], baseline: str) -> Cells:
    """NAME=FOLDER words -> name -> [its evaluations' folders]; ValueError for what cannot be compared."""
    named = [word.partition("=")[::2] for word in words]
    if len({name for name, _ in named}) < max(2, len(named)) or not all(name and folder for name, folder in named):
        raise ValueError(f"{' '.join(words)}: give NAME=FOLDER NAME=FOLDER ..., two or more different names")
    if baseline not in dict(named):
        raise ValueError(f"--baseline {baseline}: choose one of {', '.join(dict(named))}")
    cells = {name: [sorted(path.parent for path in Path(folder).rglob("eval.json"))] for name, folder in named}
    for name, folder in named:
        if not cells[name][0]:
            raise ValueError(f"{name}={folder}: no eval.json there or below; run eval.py --out={folder} first")
    return cells


def check_alike(cells: Cells) -> int:
    """How many prompts all evaluations share; ValueError unless they looked at the same data in the same way."""
    folders = [folder for ((*folders,),) in cells.values() for folder in folders]
    about = {folder: files.read_json(folder / "eval.json")["config"] for folder in folders}
    first = about[folders[0]]
    for folder in folders[1:]:
        for key in ("reference", "scorer", "samples", "temperature", "max_new_tokens", "max_length", "dtype"):
            if about[folder][key] != first[key]:
                one, other = f"{folders[0]}: {key} {first[key]}", f"{folder}: {about[folder][key]}"
                raise ValueError(f"{one}; {other}. Evaluate them the same way, or what differs is not the policy")
    ids = [set().union(*files.read_json(folder / "per_prompt.json").values()) for folder in folders]
    if not (shared := set.intersection(*ids)):
        raise ValueError(f"{', '.join(map(str, folders))}: no prompt that all of them have; evaluate them on one file")
    return len(shared)


def read_samples(cells: Cells) -> dict[str, dict[str, Row]]:
    """name -> id -> prompt and samples, of each name's first evaluation; without those that have none."""
    paths = {name: folders[0][0] / "samples.jsonl" for name, folders in cells.items()}
    return {name: {row.id: row for row in listwise.read(path)} for name, path in paths.items() if path.exists()}


def samples_page(samples: dict[str, dict[str, Row]], baseline: str) -> str:
    """A page with all methods' samples of a prompt beside each other, one prompt at a time."""
    first = next(iter(samples.values()))
    shared = [id for id in first if all(id in rows for rows in samples.values())]
    prompts = [
        {
            "id": id,
            "turns": turns(first[id].prompt),
            "samples": [[rows[id].responses, rows[id].rewards] for rows in samples.values()],
        }
        for id in shared
    ]
    study = {"methods": list(samples), "baseline": list(samples).index(baseline), "prompts": prompts}
    return page.render("samples.html", study=study)


def write_for_judges(samples: dict[str, dict[str, Row]], formats: list[str], out: Path) -> None:
    """Each method's first sample of each prompt, as alpaca_eval and arena-hard-auto v2 read a model's outputs (without
    the counts of the latter's style control). Both know one turn alone, so several are their texts in a row.
    """
    for folder in (out / "alpaca_eval", out / "arena_hard" / "model_answer"):
        if folder.relative_to(out).parts[0] in formats:
            folder.mkdir(parents=True, exist_ok=True)
    for name, rows in samples.items():
        asked = {row.id: "\n\n".join(text for _, text in turns(row.prompt)) for row in rows.values()}
        if "alpaca_eval" in formats:
            records = [
                {"instruction": asked[row.id], "output": row.responses[0], "generator": name} for row in rows.values()
            ]
            files.write_json(out / "alpaca_eval" / f"{name}.json", records)
        if "arena_hard" in formats:
            lines = []
            for row in rows.values():
                spoken = [{"role": "user", "content": asked[row.id]}]
                spoken += [{"role": "assistant", "content": {"answer": row.responses[0]}}]
                lines.append(json.dumps({"uid": row.id, "ans_id": row.id, "model": name, "messages": spoken}))
            files.write_text(out / "arena_hard" / "model_answer" / f"{name}.jsonl", "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    began, words = time.time(), sys.argv[1:] if argv is None else argv
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))  # NAME=FOLDER come before
    words = [*(["--evaluations", *words[:first]] if first else []), *words[first:]]
    c, _ = config.parse(Options, words, prog="python -m hps.evaluate.compare", description=str(__doc__).split("\n")[0])
    formats = [name for name in c.formats.split(",") if name]
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"--formats {', '.join(unknown)}: choose among {', '.join(FORMATS)}")
    cells, out = find(c.evaluations, c.baseline), Path(c.out)
    shared, samples = check_alike(cells), read_samples(cells)
    if formats and not samples:
        raise ValueError("--formats: no evaluation has samples; run eval.py with --samples")
    rows, comparisons = summarise(cells, [(name, c.baseline) for name in cells if name != c.baseline])
    settings = {name: [str(folder) for folder in folders[0]] for name, folders in cells.items()}
    results: dict[str, Any] = {"suite": out.name, "commit": commit(), "machine": machine(), "worlds": 1}
    results |= {"rows": rows, "comparisons": comparisons, "settings": settings | {"prompts shared": shared}}
    publish(results | {"seconds": time.time() - began}, out)
    if len(samples) > 1:
        files.write_text(out / "samples.html", samples_page(samples, c.baseline))
        print(f"{out / 'samples.html'}: the samples of {', '.join(samples)}, prompt by prompt")
    write_for_judges(samples, formats, out)


if __name__ == "__main__":
    config.run_main(main)
