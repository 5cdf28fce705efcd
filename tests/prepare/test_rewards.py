"""What `annotate` lets through."""

import math

import numpy as np
import pytest

from hps.data.rows import Row
from hps.prepare.rewards import annotate

ROWS = [Row("r1", "hi", ("a", "bb"), where="f:1"), Row("r2", ({"role": "user", "content": "hello"},), ("ccc",))]


def test_annotate_keeps_order_and_passes_prompts_through():
    seen = []

    def score(prompt, responses):
        seen.append(prompt)
        return np.array([len(response) for response in responses], np.float32)

    assert list(annotate(ROWS, score)) == [("r1", [1.0, 2.0]), ("r2", [3.0])]
    assert seen == ["hi", [{"role": "user", "content": "hello"}]]


def test_a_reward_that_is_not_finite_is_none():
    for scores in ([1.0, math.nan], [1.0, -math.inf]):
        assert list(annotate(ROWS[:1], lambda prompt, responses, scores=scores: scores)) == [("r1", [1.0, None])]
    with pytest.raises(AssertionError, match="f:1: the scorer gave 1 rewards"):
        list(annotate(ROWS, lambda prompt, responses: [1.0]))
