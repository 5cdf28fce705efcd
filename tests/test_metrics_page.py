"""docs/METRICS.md explains every number that a run writes, and no other."""

import re

from helpers import ROOT, jsonl, run

from hps.evaluate.metrics import METRICS


def keys_of_section(title: str) -> set[str]:
    section = (ROOT / "docs/METRICS.md").read_text().split(f"## {title}")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, flags=re.M)
    return {key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)}


def test_every_key_of_log_and_tables_is_explained(tiny_world, tmp_path):
    """A run's own lines, DPO's and KTO's, which adds one."""
    written = set()
    for method in ("dpo-hps", "kto-bt"):
        run(tiny_world, tmp_path / method, method=method, stop_after=1)
        written |= set(jsonl(tmp_path / method / "metrics.jsonl")[0])
    assert keys_of_section("metrics.jsonl") == written
    assert keys_of_section("eval.json") == set(METRICS)
