"""A human study like the paper's Table 3: a page on which people rate responses blind, and the table of their ratings.

    python -m hps.evaluate.survey export    --methods SFT=a/samples.jsonl DPO-HPS=b/samples.jsonl --out study
    python -m hps.evaluate.survey aggregate --key study/key.json --ratings study/ratings --out study

survey.html goes to the raters; key.json, which says what wrote each response, stays. docs/EVALUATION.md tells the rest.
"""

import json
import random
import reprlib
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from hps import config
from hps.data.rows import Prompt, check_keys, decode_json, opened
from hps.evaluate import md, metrics, page, verdicts
from hps.evaluate.verdicts import CRITERIA, SCALES
from hps.io import files


@dataclass
class Export:
    methods: tuple[str, ...]  # NAME=FILE NAME=FILE ...: two or more samples.jsonl of eval.py, over the same prompts
    out: str  # folder for survey.html, which goes to the raters, and key.json, which does not
    items: int = 30  # prompts to rate, drawn from those that all methods answered
    seed: int = 0  # of the prompts, of each method's response to them, and of the numbers they get


@dataclass
class Aggregate:
    key: str  # key.json of the export
    ratings: str  # folder with the raters' files: every *.json in it
    out: str  # folder for survey.json and survey.md


# ---- the page ------------------------------------------------------------------------------------


def export(c: Export) -> None:
    """Write the raters' page and the key to it."""
    samples = verdicts.read_samples(c.methods, Path(c.out) / "key.json")
    first = next(iter(samples.values()))
    shared = sorted(id for id in first if all(id in rows and rows[id].responses for rows in samples.values()))
    if not 1 <= c.items <= len(shared):
        raise ValueError(f"--items {c.items}: {len(shared)} prompts have responses of all methods; ask for no more")
    rng = random.Random(c.seed)
    chosen = rng.sample(shared, c.items)
    picks = [(id, name, rng.randrange(len(samples[name][id].responses))) for id in chosen for name in samples]
    rng.shuffle(picks)  # so that a number says nothing about the method
    items = {f"r{n:0{len(str(len(picks)))}}": pick for n, pick in enumerate(picks, 1)}
    shown = [
        {"id": item, "prompt": f"p{chosen.index(id) + 1}", "text": samples[name][id].responses[k]}
        for item, (id, name, k) in items.items()
    ]
    prompts = {f"p{n}": turns(first[id].prompt) for n, id in enumerate(chosen, 1)}
    study: dict[str, Any] = {"criteria": CRITERIA, "prompts": prompts, "items": shown}
    study["study"] = sha256(json.dumps(study).encode()).hexdigest()[:16]  # of what is shown, so of no method's name
    named = {item: dict(zip(("prompt", "method", "response"), pick, strict=True)) for item, pick in items.items()}
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "survey.html", page.render("survey.html", study=study))
    files.write_record(out / "key.json", {"study": study["study"], "methods": list(samples), "items": named})
    of = f"{c.items} of {len(shared)} shared prompts, {len(items)} responses"
    print(f"{out}: survey.html for the raters, key.json to keep: {of}", file=sys.stderr)


def turns(prompt: Prompt) -> list[tuple[str, str]]:
    """(who speaks, text) of each turn."""
    return [("Prompt", prompt)] if isinstance(prompt, str) else [(t["role"].title(), t["content"]) for t in prompt]


# ---- the raters' files ---------------------------------------------------------------------------


def need(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)


def read_ratings(folder: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of a folder in the order of their names, one per rater.

    Raises:
        ValueError: names file and item of what the page of this key cannot have written.
    """
    paths = sorted(folder.glob("*.json"))
    need(bool(paths), f"{folder}: no .json file there; put the raters' files into it")
    if others := sorted({path.name for path in folder.iterdir()} - {path.name for path in paths}):
        print(f"{folder}: not read, since not .json: {', '.join(others)}", file=sys.stderr)
    by_rater: dict[str, Path] = {}
    found, kinds = [], dict(study=str, rater=str, complete=bool, ratings=dict)
    what = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
    for path in paths:
        with opened(path) as file:
            given: Any = decode_json(file.read(), str(path))
        need(isinstance(given, dict), f"{path}: need an object with {what}")
        check_keys(given, tuple(kinds), required=tuple(kinds), where=str(path))
        need(all(type(given[name]) is kind for name, kind in kinds.items()), f"{path}: need {what}")
        study, ratings = reprlib.repr(given["study"]), given["ratings"]
        need(given["study"] == key["study"], f"{path}: ratings of study {study}, and the key is of {key['study']!r}")
        need(bool(ratings), f"{path}: holds no rating; remove the file")
        for item, values in ratings.items():
            need(item in key["items"], f"{path}: item {item!r} is not of this study")
            good = isinstance(values, dict) and values and values.keys() <= CRITERIA.keys()
            need(bool(good), f"{path}: item {item!r}: need numbers for some of {', '.join(CRITERIA)}")
            for name, value in values.items():
                good = type(value) in (int, float) and 1 <= value <= 5 and round(value, 2) == value
                about = f"{path}: item {item!r}: {name} = {reprlib.repr(value)}"
                need(good, f"{about}; need 1.00 to 5.00, two decimals at most")
        short = [item for item in key["items"] if ratings.get(item, {}).keys() != CRITERIA.keys()]
        whole = not (given["complete"] and short)
        need(whole, f"{path}: item {(short or [''])[0]!r}: a value is missing in a file that says it is complete")
        other = by_rater.setdefault(given["rater"], path)
        need(other == path, f"{path}: rater {given['rater']!r} has also sent {other}; keep one of the two")
        found.append(given)
    return found


# ---- the table -----------------------------------------------------------------------------------


def krippendorff_alpha(values: metrics.Floats) -> float | None:
    """Krippendorff's alpha for interval data: 1 in perfect agreement, 0 where raters agree as by chance.

    alpha = 1 - D_o / D_e with squared differences: D_o = sum_u m_u s_u^2 / n over units with m_u >= 2 values and sample
    variance s_u^2, D_e = s^2 of all n = sum_u m_u of them together. That is Krippendorff's formula ("Computing
    Krippendorff's Alpha-Reliability", 2011), since pairs i != j of m values have a mean squared difference of 2 s^2.

    Args:
        values: (raters, units), NaN where a rater left a unit out. None where no unit has two, or all are equal.
    """
    counts = (~np.isnan(values)).sum(0)
    paired, counts = values[:, counts > 1], counts[counts > 1]
    present = paired[~np.isnan(paired)]
    if not present.size or np.ptp(present) == 0:
        return None
    observed = (counts * np.nanvar(paired, axis=0, ddof=1)).sum() / counts.sum()
    return float(1 - observed / present.var(ddof=1))


def results_of(key: dict[str, Any], given: list[dict[str, Any]]) -> dict[str, Any]:
    """What survey.json holds: means, paired differences, agreement and counts of checked files."""
    prompts = sorted({item["prompt"] for item in key["items"].values()})
    scores = {name: np.full((len(given), len(prompts), len(CRITERIA)), np.nan) for name in key["methods"]}
    for rater, file in enumerate(given):
        for item, values in file["ratings"].items():
            at = key["items"][item]
            row = scores[at["method"]][rater, prompts.index(at["prompt"])]
            row[:] = [values.get(name, np.nan) for name in CRITERIA]
    units = np.concatenate(list(scores.values()), 1)  # (raters, units, criteria)
    units = np.concatenate([units, units.mean(2, keepdims=True)], 2)  # and their average, NaN unless all are there
    complete = sum(file["complete"] for file in given)
    whole, started = int((~np.isnan(units[..., -1])).sum()), int((~np.isnan(units)).any(2).sum())
    return {
        "study": key["study"],
        "counts": {
            "raters": len(given),
            "complete": complete,
            "partial": len(given) - complete,
            "prompts": len(prompts),
            "responses": len(key["items"]),
            "ratings": whole,
            "ratings_in_part": started - whole,
            "ratings_missing": len(given) * len(key["items"]) - started,
        },
        **verdicts.summarise(scores, unit="ratings"),
        "agreement": {name: krippendorff_alpha(units[..., k]) for k, name in enumerate(SCALES)},
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables of survey.md."""
    agreement = [[name, "-" if alpha is None else f"{alpha:z.2f}"] for name, alpha in results["agreement"].items()]
    counts = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in results["counts"].items())
    parts = [f"# Human ratings\n\nStudy `{results['study']}`: {counts}. Ratings from 1.00 to 5.00."]
    parts += [
        verdicts.markdown(results),
        "## Agreement between raters",
        md.table(["criterion", "Krippendorff's alpha"], agreement),
    ]
    return "\n\n".join(parts) + "\n"


def aggregate(c: Aggregate) -> None:
    """Write survey.json and survey.md, and print the latter."""
    key = files.read_record(Path(c.key), "give the key.json of the export", study=str, methods=list, items=dict)
    results = results_of(key, read_ratings(Path(c.ratings), key))
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "survey.json", results)
    files.write_text(out / "survey.md", markdown(results))
    print(markdown(results), end="")


COMMANDS = {"export": (Export, export), "aggregate": (Aggregate, aggregate)}


def main(argv: list[str] | None = None) -> None:
    config.run_command(COMMANDS, argv, prog="python -m hps.evaluate.survey", page=str(__doc__))


if __name__ == "__main__":
    config.run_main(main)
