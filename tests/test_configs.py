"""Every file in configs/ is a valid configuration, and the presets say what they are said to say."""

import pytest
from helpers import ROOT

from hps import options
from hps.methods import check


def load(path, *more: str) -> options.Config:
    argv = ["--config", str(path), "--model", "m", "--data", "d", "--out", "o", *more]
    c, passed_over = check(*options.read(argv))
    assert not passed_over
    return c


@pytest.mark.filterwarnings("ignore:lr 5e-07")
def test_every_configuration_is_valid():
    for path in (ROOT / "configs").glob("*.toml"):
        load(path)


def test_the_paper_preset_warns_of_its_learning_rate():
    with pytest.warns(UserWarning, match="moves a LoRA adapter by almost nothing"):
        c = load(ROOT / "configs/paper.toml")
    assert (c.beta, c.lr, c.lora_rank, c.lora_alpha, c.epochs, c.prompts_per_step) == (0.1, 5e-7, 8, 16, 2, 64)


def test_the_preset_of_the_released_code():
    c = load(ROOT / "configs/authors-code.toml")
    assert (c.beta, c.label_smoothing, c.lora_rank, c.gamma_schedule) == (0.25, 0.1, 0, "mixture")
