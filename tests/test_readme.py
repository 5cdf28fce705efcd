"""The pages' examples of changing the method, run as they stand."""

import importlib
import re
import runpy

import pytest
from helpers import ROOT

from hps import methods, options
from hps.evaluate.metrics import METRICS
from hps.losses import LOSSES
from hps.prepare.formats import FORMATS
from hps.samplers import SAMPLERS, Sampler

EXAMPLES = {
    "README.md": {"test_hinge2", "test_window"},
    "docs/FORKING.md": {"test_cosine", "test_by_policy", "test_votes"},
}


@pytest.fixture
def forked(monkeypatch, tmp_path) -> None:
    """Each block where its page says that it goes, with what that file has, and nothing else edited; its tests run."""
    for table, names in (
        (LOSSES, ["hinge2"]),
        (SAMPLERS, ["window", "cosine"]),
        (METRICS, ["questions"]),
        (FORMATS, ["votes"]),
    ):
        for name in names:
            monkeypatch.setitem(table, name, None)  # put back at the end
    for page, tests in EXAMPLES.items():
        text, seen = (ROOT / page).read_text(), set()
        for where, block in re.findall(r"In\s`((?:hps|tests)/\S+\.py)`.*?```python\n(.*?)```", text, re.DOTALL):
            ours = where.startswith("hps")
            module = importlib.import_module(where[:-3].replace("/", ".")) if ours else None
            names = dict(vars(module)) if module else runpy.run_path(str(ROOT / where))
            there = {*names}
            exec(block, names)
            for name in names.keys() - there if module else ():
                monkeypatch.setattr(module, name, names[name], raising=False)
            for test in sorted(names.keys() & tests):
                names[test](*([tmp_path] if test == "test_votes" else []))
                seen.add(test)
        assert seen == tests, page


def test_the_examples_of_the_pages_work(forked):
    """A loss and a sampler go together, and a sampler's arguments are options, of which the run uses no others."""
    c = options.Config("m", "d", "o", method="hinge2-window")
    methods.check(c, dict.fromkeys(("method", "beta", "hps_samples", "n_factor"), "flag"))
    with pytest.raises(ValueError, match="does not use gamma_end"):
        methods.check(c, {"gamma_end": "flag"})
    c = options.Config("m", "d", "o", method="dpo-cosine")
    methods.check(c, dict.fromkeys(("gamma_end", "reward_norm"), "flag"))
    window = SAMPLERS["window"].log_q
    SAMPLERS["window"] = Sampler(log_q=lambda v, *, width=0.15: window(v))
    with pytest.raises(ValueError, match="without a field of options.Config, with help text: {'width'}"):
        methods.check(c, {})
