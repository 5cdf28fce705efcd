"""docs/METRICS.md explains every number that a run writes, and no other."""

import json
import re
from pathlib import Path

import train
from hps.evaluate.metrics import METRICS

TEXT = (Path(__file__).resolve().parents[1] / "docs/METRICS.md").read_text()


def keys_of_section(title: str) -> set[str]:
    section = TEXT.split(f"## {title}")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, flags=re.M)
    return {key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)}


def test_every_metric_of_the_tables_is_explained():
    assert keys_of_section("eval.json") == set(METRICS)


def test_every_key_of_the_log_is_explained(tiny_world, tmp_path):
    """A run's own lines, DPO's and KTO's, which adds one."""
    written = set()
    for method in ("dpo-hps", "kto-bt"):
        out = tmp_path / method
        options = dict(model=tiny_world / "model", data=tiny_world / "train.jsonl", out=out, method=method, epochs=1)
        options |= dict(lora_rank=0, prompts_per_step=8, max_length=128, reference_cache=tiny_world / "cache")
        options |= dict(token_cache=tiny_world / "tokens")
        train.main([f"--{key}={value}" for key, value in options.items()])
        written |= set(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    assert keys_of_section("metrics.jsonl") == written
