"""Lists with rewards -> train, validation and test by prompts, each held-out prompt with a pair for RM_DPO.

    python recipes/split_lists.py LISTS OUT TRAIN VALID TEST [ANSWERS [SPREAD]]

Writes OUT/train.jsonl, OUT/valid.jsonl and OUT/test.jsonl of so many prompts, in an order by a hash of the prompt's id.
A held-out prompt's pair is its best answer against a random one of lower reward. ANSWERS keeps the first so many
answers of a prompt (0: all). A prompt whose rewards differ by SPREAD at most (0: not at all) ranks nothing and is left
out.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from hps import config
from hps.data import listwise
from hps.data.rows import Row, only, row_key
from hps.samplers import counter_uniform


def with_pair(row: Row) -> Row:
    """The best response against a random one below it."""
    rewards = np.array(row.rewards)
    below = np.flatnonzero(rewards < rewards.max())
    drawn = counter_uniform(0, row_key(row.id), below)
    return replace(row, chosen=int(rewards.argmax()), rejected=int(below[drawn.argmin()]))


def main() -> None:
    lists, out, *numbers = sys.argv[1:]
    sizes, (answers, spread) = [int(n) for n in numbers[:3]], [float(n) for n in [*numbers[3:], 0, 0][:2]]
    rows = [only(row, list(range(len(row.responses)))[: int(answers) or None]) for row in listwise.read(lists)]
    rows = [row for row in rows if row.rewards and max(row.rewards) - min(row.rewards) > spread]
    if sum(sizes) > len(rows):
        raise ValueError(f"{lists} has {len(rows)} prompts whose answers can be ranked, and {sum(sizes)} are asked for")
    rows.sort(key=lambda row: float(counter_uniform(1, row_key(row.id), np.zeros(1, int))[0]))
    begin = 0
    for name, size in zip(("train", "valid", "test"), sizes, strict=True):
        some = rows[begin : begin + size]
        listwise.write(Path(out) / f"{name}.jsonl", some if name == "train" else [with_pair(row) for row in some])
        begin += size


if __name__ == "__main__":
    config.run_main(main)
