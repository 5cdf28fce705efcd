"""The README's fork-and-edit example, run as it stands."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from hps.losses import LOSSES, Loss, loss_at_reference, plackett_luce_loss, stage_loss


def test_the_example_of_adding_a_loss_works():
    before = dict(LOSSES)
    names = {"torch": torch, "F": F, "math": math, "pytest": pytest, "Loss": Loss, "LOSSES": LOSSES}
    names["stage_loss"] = stage_loss
    try:
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
            exec(block, names)
        names["test_hinge2"]()
        zero = torch.zeros(1, 4)
        log_q = torch.full((1, 3), -math.log(3))
        value = stage_loss("hinge2", zero, log_q, beta=0.1, kappa=3.0).item()
        assert value == pytest.approx(loss_at_reference("hinge2", beta=0.1, kappa=3.0))
        assert plackett_luce_loss("hinge2", zero, beta=0.1).item() == pytest.approx(
            sum((1 + math.log(u)) ** 2 for u in (1, 2, 3))
        )
    finally:
        LOSSES.clear()
        LOSSES.update(before)
