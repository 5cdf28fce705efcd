"""A base in 4 bits and moments in 8 against the same numbers put in by hand; what cannot work with them is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import arguments, run
from peft import PeftModel
from safetensors.torch import load_file, save_file

import train
from hps import dist
from hps.extra import quantised
from hps.model import PolicyModel
from hps.options import Config
from hps.pretrained import load_causal_lm

LORA = dict(lora_rank=4, lora_alpha=8, lr=3e-2)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is optional: pip install -e '.[bnb]'")


def rounded(bnb, world: Path, folder: Path) -> Path:
    """The world's model with each decoder weight as NF4 keeps it, in a folder."""
    shutil.copytree(world / "model", folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj" in name]:
        packed, state = bnb.functional.quantize_4bit(weights[name], quant_type="nf4", compress_statistics=True)
        weights[name] = bnb.functional.dequantize_4bit(packed, state)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("how", [{}, dict(lora_kind="dora", lora_targets="all-linear", gradient_checkpointing="true")])
def test_the_losses_are_those_of_the_rounded_weights(bnb, tiny_world, tmp_path, how):
    """Step by step, through the adapter's gradients; the whole weights give others, and no cache of log-probs mixes up
    the two. The adapter names the model in full precision as its base."""
    how = LORA | how
    model = rounded(bnb, tiny_world, tmp_path / "rounded")
    small = run(tiny_world, tmp_path / "small", load_in_4bit="true", **how)
    expected = run(tiny_world, tmp_path / "expected", model=model, **how)
    np.testing.assert_allclose(small, expected, atol=2e-5)
    whole = run(tiny_world, tmp_path / "whole", **how)
    assert np.std(small) > 1e-2 and np.abs(np.subtract(small, whole)).max() > 1e-3
    about = json.loads((tmp_path / "small/policy/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str((tiny_world / "model").resolve())
    adapters = [load_file(tmp_path / name / "policy/adapter_model.safetensors") for name in ("small", "expected")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.allclose(adapters[0][key], adapters[1][key], atol=1e-4) for key in adapters[0])
    base = load_causal_lm(str(tiny_world / "model"), dtype=torch.float32)
    assert PeftModel.from_pretrained(base, tmp_path / "small/policy")


def test_what_is_kept_in_4_bits(bnb, tiny_world):
    """Half a byte per weight, and a scale for 64 of them; embeddings and head as they were."""
    lm = load_causal_lm(str(tiny_world / "model"), dtype=torch.bfloat16)
    linear = {name: p.numel() for name, p in lm.named_parameters() if "_proj" in name}
    quantised.to_4bit(lm, torch.device("cpu"), torch.bfloat16)
    found = dict(lm.named_parameters())
    assert all(found[name].dtype == torch.uint8 and found[name].numel() == n / 2 for name, n in linear.items())
    assert {p.dtype for name, p in found.items() if name not in linear} == {torch.bfloat16}
    assert not found[next(iter(linear))].requires_grad and PolicyModel(lm).head.dtype == torch.bfloat16


def test_moments_in_8_bits(bnb, tiny_world, tmp_path):
    """Near those in 32, and not the same; a run that is stopped goes on as if it had not been."""
    whole = run(tiny_world, tmp_path / "whole")
    small = run(tiny_world, tmp_path / "small", optim="adamw_8bit")
    assert small[0] == whole[0] and 1e-6 < np.abs(np.subtract(small, whole)).max() < 2e-3 < 1e-2 * np.ptp(whole)
    run(tiny_world, tmp_path / "again", optim="adamw_8bit", stop_after=3)
    state = tmp_path / "again/checkpoints/step-00000003/rank-00000-00000.safetensors"
    kept = {name: t.dtype for path in state.parent.glob("*.safetensors") for name, t in load_file(path).items()}
    assert kept["optimizer.lm.model.layers.0.mlp.up_proj.weight.state1"] == torch.uint8
    assert run(tiny_world, tmp_path / "again", optim="adamw_8bit") == small


def test_what_cannot_work_is_refused(tiny_world, tmp_path, monkeypatch):
    """On several ranks, without an adapter, without the package, on a model without linear layers."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--load_in_4bit means nothing without a --lora_rank above 0"):
        run(tiny_world, out, load_in_4bit="true")
    ranks = dist.Ranks(rank=0, world_size=2, device=torch.device("cpu"), sharded=True)
    for option, value in (("load_in_4bit", True), ("optim", "adamw_8bit")):
        c = Config(str(tiny_world / "model"), str(tiny_world / "train.jsonl"), str(out), **{option: value})
        with pytest.raises(ValueError, match=f"--{option} needs the whole model in one process: leave it out under"):
            train.train(c, ranks)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for more, named in (
        (LORA | dict(load_in_4bit="true"), "load_in_4bit"),
        (dict(optim="adamw_8bit"), "optim adamw_8b"),
    ):
        with pytest.raises(ValueError, match=rf"--{named}.* needs bitsandbytes .*: pip install -e '.\[bnb\]'"):
            train.main(arguments(tiny_world, tmp_path / named[:5], **more))
