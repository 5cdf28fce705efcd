"""A blind study with people, after the paper's Table 3: which of two answers is better, and how often each method wins.

    python -m hps.evaluate.survey export    --methods SFT=a/samples.jsonl DPO-HPS=b/samples.jsonl --out study
    python -m hps.evaluate.survey aggregate --key study/key.json --ratings study/ratings --out study

survey.html goes to the raters; key.json, which says what wrote each answer, stays. docs/EVALUATION.md tells the rest.
"""

import itertools
import json
import random
import reprlib
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from hps import config
from hps.data.rows import Prompt, check_keys, decode_json, opened
from hps.evaluate import md, metrics, page, verdicts
from hps.io import files
from hps.prepare import commands

SIGNS = {"a": 1, "tie": 0, "b": -1}  # what a vote says of the answer shown as A


@dataclass
class Export:
    """Write the raters' page and the key to it."""

    methods: tuple[str, ...]  # NAME=FILE NAME=FILE ...: two or more samples.jsonl of eval.py, over the same prompts
    out: str  # folder for survey.html, which goes to the raters, and key.json, which does not
    items: int = 30  # prompts to rate, drawn from those that all methods answered; each pair of methods once on each
    seed: int = 0  # of the prompts, of each method's answer to them, of the sides and of the order


@dataclass
class Aggregate:
    """Write survey.json and survey.md, and print the latter."""

    key: str  # key.json of the export
    ratings: str  # folder with the raters' files: every *.json in it
    out: str  # folder for survey.json and survey.md


def export(c: Export) -> None:
    samples = verdicts.read_samples(c.methods, Path(c.out) / "key.json")
    first = next(iter(samples.values()))
    shared = sorted(id for id in first if all(id in rows and rows[id].responses for rows in samples.values()))
    if not 1 <= c.items <= len(shared):
        raise ValueError(f"--items {c.items}: {len(shared)} prompts have responses of all methods; ask for no more")
    rng = random.Random(c.seed)
    pairs = []
    for id in rng.sample(shared, c.items):
        drawn = {name: rng.choice(rows[id].responses) for name, rows in samples.items()}
        pairs += [(id, drawn, *rng.sample(pair, 2)) for pair in itertools.combinations(drawn, 2)]  # the sides by chance
    rng.shuffle(pairs)
    shown = [{"turns": turns(first[id].prompt), "a": drawn[a], "b": drawn[b]} for id, drawn, a, b in pairs]
    study: dict[str, Any] = {"criteria": verdicts.CRITERIA, "pairs": shown}
    study["study"] = sha256(json.dumps(study).encode()).hexdigest()[:16]  # of what is shown, so of no method's name
    named = [{"prompt": id, "a": a, "b": b} for id, _, a, b in pairs]
    out = Path(c.out)
    before = files.read_record(out / "key.json", "delete it", study=str) if (out / "key.json").exists() else study
    if (old := before["study"]) != study["study"]:
        raise ValueError(
            f"{out} holds the key of another study, {old}, without which its votes say nothing: choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "survey.html", page.render("survey.html", study=study))
    files.write_record(out / "key.json", {"study": study["study"], "methods": list(samples), "pairs": named})
    of = f"{c.items} of {len(shared)} shared prompts, {len(pairs)} pairs of answers"
    print(f"{out}: survey.html for the raters, key.json to keep: {of}", file=sys.stderr)


def turns(prompt: Prompt) -> list[tuple[str, str]]:
    """(who speaks, text) of each turn."""
    return [("Prompt", prompt)] if isinstance(prompt, str) else [(t["role"].title(), t["content"]) for t in prompt]


def read_ratings(folder: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of a folder in the order of their names, one per rater: {"study", "rater", "votes": [vote or None]}.

    Raises:
        ValueError: names the file that the page of this key cannot have written.
    """
    keys, seen, found = ("study", "rater", "votes"), {}, []
    for path in sorted(folder.glob("*.json")):
        with opened(path) as file:
            given: Any = decode_json(file.read(), str(path))
        if not isinstance(given, dict):
            raise ValueError(f"{path}: no file of votes: need an object with {', '.join(keys)}")
        check_keys(given, keys, required=keys, where=str(path))
        study, rater, votes = (given[name] for name in keys)
        if not isinstance(rater, str):
            raise ValueError(f"{path}: the rater must be a string, not {reprlib.repr(rater)}")
        if study != key["study"]:
            raise ValueError(f"{path}: votes of study {reprlib.repr(study)}, and the key is of {key['study']!r}")
        whole = isinstance(votes, list) and len(votes) == len(key["pairs"])
        if not whole or any(vote not in ("a", "b", "tie", None) for vote in votes):
            need = f"need {len(key['pairs'])} votes, each a, b, tie or null"
            raise ValueError(f"{path}: {need}, not {reprlib.repr(votes)}")
        if other := seen.get(rater):
            raise ValueError(f"{path}: rater {reprlib.repr(rater)} has also sent {other}; keep one of the two")
        seen[rater] = path
        found.append(given)
    if not found:
        raise ValueError(f"{folder}: no .json file there; put the raters' files into it")
    return found


def results_of(key: dict[str, Any], given: list[dict[str, Any]]) -> dict[str, Any]:
    """What survey.json holds: for each pair of methods how often a won, tied and lost, and its lead in per cent of the
    votes with its interval over prompts, on each of which the raters are averaged."""
    signs = {pair: defaultdict(list) for pair in itertools.combinations(key["methods"], 2)}  # pair -> prompt -> votes
    for n, pair in enumerate(key["pairs"]):
        a, b = sorted((pair["a"], pair["b"]), key=key["methods"].index)
        side = 1 if a == pair["a"] else -1
        signs[a, b][pair["prompt"]] += [side * SIGNS[file["votes"][n]] for file in given if file["votes"][n]]
    comparisons = []
    for (a, b), by_prompt in signs.items():
        count = Counter(sign for votes in by_prompt.values() for sign in votes)
        leads = [100 * float(np.mean(votes)) for votes in by_prompt.values() if votes]
        lead = metrics.world_interval(leads) if leads else None
        comparisons.append({"a": a, "b": b, "win": count[1], "tie": count[0], "lose": count[-1], "lead": lead})
    cast = sum(vote is not None for file in given for vote in file["votes"])
    counts = {"raters": len(given), "pairs": len(key["pairs"]), "votes": cast}
    counts["missing"] = len(given) * len(key["pairs"]) - cast
    return {"study": key["study"], "counts": counts, "comparisons": comparisons}


def markdown(results: dict[str, Any]) -> str:
    """The page survey.md."""
    counts = ", ".join(f"{n} {name}" for name, n in results["counts"].items())
    rows = [
        [md.cell(x["a"]), md.cell(x["b"]), *(str(x[key]) for key in ("win", "tie", "lose")), md.interval(x["lead"], 1)]
        for x in results["comparisons"]
    ]
    note = "Lead: a's wins less b's in per cent of the votes, with a 95 % interval over prompts by Student's t."
    table = md.table(["a", "b", "a wins", "tie", "b wins", "lead %"], rows, keys=2)
    return f"# Votes of people\n\nStudy `{results['study']}`: {counts}.\n\n{table}\n\n{note}\n"


def aggregate(c: Aggregate) -> None:
    key = files.read_record(Path(c.key), "give the key.json of the export", study=str, methods=list, pairs=list)
    results = results_of(key, read_ratings(Path(c.ratings), key))
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "survey.json", results)
    files.write_text(out / "survey.md", markdown(results))
    print(markdown(results), end="")


def main(argv: list[str] | None = None) -> None:
    known = {"export": Export, "aggregate": Aggregate}
    name, c, _ = commands.read(known, argv, prog="python -m hps.evaluate.survey", page=str(__doc__))
    {"export": export, "aggregate": aggregate}[name](c)


if __name__ == "__main__":
    config.run_main(main)
