"""The folder whose evaluation is best: the highest mean of a metric among those within a budget of KL.

    python recipes/best.py METRIC KL FOLDER...

Reads FOLDER/valid/eval.json. A margin in nats grows with the learning rate as long as the policy moves, so settings are
compared among those whose exact KL from the reference is at most KL nats; where none is, the one that moved least is
printed.
"""

import json
import sys
from pathlib import Path

from hps import config


def best(metric: str, kl: float, folders: list[str]) -> str:
    """The folder, whose name says its settings."""
    found = {}
    for folder in folders:
        means = json.loads((Path(folder) / "valid/eval.json").read_text())["metrics"]
        found[folder] = (means["kl_exact"]["mean"], means[metric]["mean"])
    within = {folder: margin for folder, (moved, margin) in found.items() if moved <= kl}
    return max(within, key=within.__getitem__) if within else min(found, key=found.__getitem__)


def main() -> None:
    print(best(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))


if __name__ == "__main__":
    config.run_main(main)
