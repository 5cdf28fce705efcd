"""What `annotate` lets through."""

import math

import numpy as np
import pytest

from hps.prepare.rewards import annotate

ROWS = [("r1", "hi", ["a", "bb"]), ("r2", [{"role": "user", "content": "hello"}], ["ccc"])]


def test_annotate_keeps_order_and_passes_prompts_through():
    seen = []

    def score(prompt, responses):
        seen.append(prompt)
        return np.array([len(response) for response in responses], np.float32)

    assert list(annotate(ROWS, score, progress=False)) == [("r1", [1.0, 2.0]), ("r2", [3.0])]
    assert seen == [row[1] for row in ROWS]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, math.nan], "'r1': the reward of response 1 is nan"),
        ([-math.inf, 0.0], "'r1': the reward of response 0 is -inf"),
        ([1.0], "'r1': the scorer gave 1 rewards for 2 responses"),
    ],
)
def test_annotate_names_the_row_of_a_bad_reward(scores, message):
    with pytest.raises(ValueError, match=message):
        list(annotate(ROWS, lambda prompt, responses: scores, progress=False))
