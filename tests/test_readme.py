"""The README's examples of adding a loss and a sampler, run as they stand."""

import importlib
import re
import runpy

import pytest
from helpers import ROOT

from hps import options
from hps.losses import LOSSES
from hps.samplers import SAMPLERS, Sampler


def test_the_examples_of_a_loss_and_a_sampler_work(monkeypatch):
    """Each block works where the README says that it goes, with what that file has, and nothing else is edited."""
    for table in (LOSSES, SAMPLERS):  # put back at the end
        for name in ("hinge2", "window"):
            monkeypatch.setitem(table, name, None)
    text, seen = (ROOT / "README.md").read_text(), set()
    for where, block in re.findall(r"In `((?:hps|tests)/\w+\.py)`.*?```python\n(.*?)```", text, re.DOTALL):
        if where.startswith("hps"):
            names = dict(vars(importlib.import_module(where[:-3].replace("/", "."))))
        else:
            names = runpy.run_path(str(ROOT / where))
        exec(block, names)
        seen |= names.keys() & {"test_hinge2", "test_window"}
        for test in names.keys() & {"test_hinge2", "test_window"}:
            names[test]()
    assert seen == {"test_hinge2", "test_window"}
    window = SAMPLERS["window"].log_q
    del LOSSES["window"], SAMPLERS["hinge2"]
    c = options.Config("m", __file__, "o", method="hinge2-window")
    options.check(c, dict.fromkeys(("method", "beta", "hps_samples", "n_factor"), "flag"))
    with pytest.raises(ValueError, match="does not use gamma_end"):
        options.check(c, {"gamma_end": "flag"})
    SAMPLERS["window"] = Sampler(log_q=lambda v, *, width=0.15: window(v))
    with pytest.raises(ValueError, match="without a field of options.Config, with help text: {'width'}"):
        options.check(c, {})
