"""What `annotate` lets through."""

import math

import numpy as np
import pytest

from hps.data.listwise import Row
from hps.prepare.rewards import annotate

ROWS = [Row("r1", "hi", ("a", "bb"), where="f:1"), Row("r2", ({"role": "user", "content": "hello"},), ("ccc",))]


def test_annotate_keeps_order_and_passes_prompts_through():
    seen = []

    def score(prompt, responses):
        seen.append(prompt)
        return np.array([len(response) for response in responses], np.float32)

    assert list(annotate(ROWS, score)) == [("r1", [1.0, 2.0]), ("r2", [3.0])]
    assert seen == ["hi", [{"role": "user", "content": "hello"}]]


def test_annotate_names_the_row_of_a_bad_reward():
    for scores, message in (
        ([1.0, math.nan], r"f:1: the rewards are \[1.0, nan\], not all of them finite: mend the scorer"),
        ([-math.inf, 0.0], r"f:1: the rewards are \[-inf, 0.0\], not all"),
        ([1.0], "f:1: the scorer gave 1 rewards for 2 responses"),
    ):
        with pytest.raises(ValueError, match=message):
            list(annotate(ROWS, lambda prompt, responses, scores=scores: scores))
