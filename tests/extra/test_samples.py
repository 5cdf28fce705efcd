"""Samples while training: transformers' own greedy answers, and a run that is the same as without them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SFT, arguments, encode_prompt, jsonl, losses, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from hps import config, dist
from hps.data import listwise, tokenizers
from hps.extra import samples as samples_module
from hps.options import Config

TOKENS = 24  # of an answer, at most


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(samples_module, "SAMPLE_TOKENS", TOKENS)


def greedy(path: Path, prompt: list[int]) -> str:
    """transformers' own most likely answer."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    how = dict(max_new_tokens=TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    found = lm.generate(torch.tensor([prompt]), **how)[0, len(prompt) :]
    return tokenizer.decode(found, skip_special_tokens=True).strip()


def test_they_are_the_greedy_answers_of_the_policy_at_each_step(tiny_world, tmp_path, capsys):
    """The start model's at step 0 and the exported policy's at the last, to the same prompts throughout."""
    data = tiny_world / "sft.jsonl"
    options = SFT | dict(data=data, epochs=2, lr=1e-2, shuffle="no", sample_every=2, sample_prompts=3)
    run(tiny_world, tmp_path, **options)
    found = jsonl(tmp_path / "samples.jsonl")
    first = listwise.read(data)[:3]
    assert [(s["step"], s["id"]) for s in found] == [(t, row.id) for t in (0, 2, 4, 6, 8) for row in first]
    tokenizer = tokenizers.load_tokenizer(str(tiny_world / "model"))
    prompts = [encode_prompt(tokenizer, row.prompt) for row in first]
    assert [s["prompt"] for s in found] == [tokenizer.decode(ids) for ids in prompts] * 5
    start = [greedy(tiny_world / "model", ids) for ids in prompts]
    end = [greedy(tmp_path / "policy", ids) for ids in prompts]
    assert start != end
    assert [s["response"] for s in found[:3]] == start and [s["response"] for s in found[-3:]] == end
    shown = capsys.readouterr().err
    assert f"after 8 steps, {first[0].id}: {' '.join(end[0].split())[:200]}" in shown
    assert first[1].id not in shown


@pytest.mark.parametrize("options", [dict(lora_rank=4, lr=3e-2, gradient_checkpointing="true"), SFT])
def test_a_run_is_the_same_with_and_without_them(tiny_world, tmp_path, monkeypatch, options):
    """Losses, gradients and weights to the last bit; no generator is touched."""
    options = options | ({"data": tiny_world / "sft.jsonl"} if options is SFT else {})
    real, calls = samples_module.sample, []

    def watched(c, policy, *rest):
        modes = [m.training for m in policy.modules()]
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        seconds = real(c, policy, *rest)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (repr(np.random.get_state()), random.getstate()) == before[1:]
        assert [m.training for m in policy.modules()] == modes
        calls.append(rest[-1])
        return seconds

    monkeypatch.setattr(samples_module, "sample", watched)
    plain = run(tiny_world, tmp_path / "plain", **options)
    assert not calls and not (tmp_path / "plain/samples.jsonl").exists()
    assert run(tiny_world, tmp_path / "with", sample_every=1, **options) == plain
    assert calls == list(range(len(plain) + 1))
    assert losses(tmp_path / "with", "grad_norm") == losses(tmp_path / "plain", "grad_norm")
    [name] = [path.name for path in (tmp_path / "plain/policy").glob("*.safetensors")]
    weights = [(tmp_path / which / "policy" / name).read_bytes() for which in ("plain", "with")]
    assert weights[0] == weights[1]


def test_under_torchrun_they_are_refused(tiny_world, tmp_path):
    """Before anything is read or written: one rank would wait in the sharded model for the others."""
    c, _ = config.parse(Config, arguments(tiny_world, tmp_path / "out", sample_every=2), prog="", description="")
    sharded = dist.Ranks(rank=0, world_size=2, device=torch.device("cpu"), sharded=True)
    with pytest.raises(ValueError, match="--sample_every needs the whole model in one process"):
        train.train(c, sharded)
    assert not (tmp_path / "out").exists()
