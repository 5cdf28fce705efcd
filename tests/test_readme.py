"""The README's examples of adding a loss and a sampler, run as they stand."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from hps import options
from hps.losses import LOSSES, Loss, stage_loss
from hps.plan import plan
from hps.samplers import SAMPLERS, Sampler


def test_the_examples_of_a_loss_and_a_sampler_work(monkeypatch):
    names = {"torch": torch, "F": F, "np": np, "pytest": pytest, "Loss": Loss, "LOSSES": LOSSES, "Sampler": Sampler}
    names |= {"SAMPLERS": SAMPLERS, "stage_loss": stage_loss, "plan": plan}
    for table in (LOSSES, SAMPLERS):  # put back at the end
        for name in ("hinge2", "window"):
            monkeypatch.setitem(table, name, None)
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(block, names)
    del LOSSES["window"], SAMPLERS["hinge2"]
    names["test_hinge2"]()
    names["test_window"]()

    c = options.Config("m", "d", "o", method="hinge2-window")
    options.check(c, frozenset({"method", "beta", "hps_samples", "n_factor"}))
    with pytest.raises(ValueError, match="does not use gamma_end"):
        options.check(c, frozenset({"gamma_end"}))
    SAMPLERS["window"] = Sampler(log_q=lambda v, *, width=0.15: names["window"](v))
    with pytest.raises(ValueError, match="without a field of options.Config, with help text: {'width'}"):
        options.check(c, frozenset())
