"""Make a trained policy or reward model ready to be given away: adapter merged, safetensors, tokenizer, model card.

    python -m hps.evaluate.export --model runs/hps/policy --out DIR --eval_json runs/hps/eval/eval.json

The folder loads with plain transformers: nothing of this repository is needed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hps import config, dist, model, pretrained, sharding
from hps.data import tokenizers
from hps.evaluate import md
from hps.evaluate.metrics import METRICS
from hps.extra import reward_model
from hps.io import card, files


@dataclass
class Options:
    model: str  # the folder `policy` of a finished run, with run.json and summary.json beside it
    out: str  # folder to write, which must not exist yet
    dtype: str = "fp32"  # of the weights written, fp32 or bf16; an adapter is merged in fp32 either way
    eval_json: str = ""  # eval.json of this model, for the card's table of results; empty for none


def main(argv: list[str] | None = None) -> None:
    c, _ = config.parse(Options, argv, prog="python -m hps.evaluate.export", description=str(__doc__).split("\n")[0])
    config.check_choices(c, dtype=model.DTYPES)
    out = Path(c.out)
    if out.exists():
        raise ValueError(f"--out {out} exists already: choose a new folder, or remove that one first")
    beside = Path(c.model).resolve().parent
    try:
        run, summary = (files.read_json(beside / name) for name in ("run.json", "summary.json"))
    except ValueError as error:
        raise ValueError(f"--model {c.model} is no policy of a finished run: {error}") from error
    evaluation: Any = files.read_json(Path(c.eval_json)) if c.eval_json else None
    try:
        about = evaluation["config"]["model"] if c.eval_json else c.model
        same = Path(about).resolve() == Path(c.model).resolve()
        reward = run["config"]["loss"] == "reward"
        kind = "reward model" if reward else "model"
        readme = card.card(run, summary, kind=kind, results=results(evaluation)) if same else ""
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError, RecursionError) as error:
        wrote = f"{beside / 'run.json'}, summary.json" + (f" and {c.eval_json} are" if c.eval_json else " are")
        raise ValueError(f"{wrote} not what train.py and eval.py of this version write ({error!r:.200})") from error
    if not same:
        raise ValueError(f"--eval_json {c.eval_json} is about {about}: run eval.py on {c.model}")

    load = reward_model.load_reward_model if reward else pretrained.load_causal_lm
    tokenizer = tokenizers.load_tokenizer(c.model)
    lost = rounding(load(c.model, dtype=torch.float32)) if c.dtype == "bf16" else ""
    lm = load(c.model, dtype=torch.float32, tokenizer=tokenizer, merged=True).to(model.DTYPES[c.dtype])
    alone = dist.Ranks(rank=0, world_size=1, device=torch.device("cpu"), sharded=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    sharding.export(lm, tokenizer, out, ranks=alone, card=readme)
    print(f"{out}: {sum(p.numel() for p in lm.parameters()):,} parameters in {c.dtype}{lost}", file=sys.stderr)


def rounding(lm: torch.nn.Module) -> str:
    """What merging an adapter into bf16 weights loses of it, in words; empty for a model without one."""
    adapted = unchanged = 0
    change = lost = 0.0
    for layer in lm.modules():
        if hasattr(layer, "get_delta_weight"):
            base, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
            merged = (base + delta).bfloat16()
            adapted += delta.numel()
            unchanged += int((merged == base.bfloat16()).sum())
            change += float(delta.double().square().sum())
            lost += float((merged.double() - base.double() - delta.double()).square().sum())
    if not adapted:
        return ""
    return (
        f"; rounded to bf16, {unchanged / adapted:.0%} of the {adapted:,} adapted weights are the base's again, and "
        f"the rounding is {(lost / change) ** 0.5 if change else 0:.2g} times as large as the adapter's change: "
        "evaluate this folder, or give the adapter away beside its base"
    )


def results(evaluation: dict[str, Any] | None) -> str:
    """The card's section on what eval.json says of the model, in Markdown; empty without one."""
    if evaluation is None:
        return ""
    about, rows = evaluation["config"], []
    for name, m in evaluation["metrics"].items():
        mean = md.interval(m, METRICS[name].digits)
        rows.append((METRICS[name].title, mean, m["prompts"], METRICS[name].meaning))
    data, reference = (card.escape(card.name_of(about[key])) for key in ("data", "reference"))
    intervals = "[low, high] is the 95 % interval over prompts."
    header = ("metric", "mean", "prompts", "what it is")
    return f"## Evaluation\n\nOn {data}, against {reference}; {intervals}\n\n{card.table(header, rows)}"


if __name__ == "__main__":
    config.run_main(main)
