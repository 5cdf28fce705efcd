"""Reward models: packed rewards against transformers' own classifiers; training against the Bradley-Terry formula."""

import math

import helpers
import numpy as np
import pytest
import torch
from helpers import arguments, blocks_of, losses
from torch import nn
from torch.nn.functional import softplus
from transformers import AutoModelForSequenceClassification

import train
from hps.adapters import add_lora
from hps.data import listwise, tokenizers, tokens
from hps.data.rows import Row
from hps.extra.reward_model import RewardModel, load_reward_model
from hps.packing import Block, pack
from hps.prepare.rewards import encode_answered

FP32 = dict(dtype=torch.float32)


def tiny(name: str, labels: int = 1) -> nn.Module:
    config = helpers.tiny(name).config
    config.num_labels, config.pad_token_id = labels, None
    lm = AutoModelForSequenceClassification.from_config(config)
    return helpers.noisy(lm)


def alone(lm: nn.Module, blocks: list[Block]) -> torch.Tensor:
    """Every conversation by itself through transformers' own classifier, mean over its labels: (B, K)."""
    rows = [np.concatenate([block.prompt, y]) for block in blocks for y in block.responses]
    rewards = [lm(input_ids=torch.from_numpy(ids).long()[None]).logits[0].mean() for ids in rows]
    return torch.stack(rewards).view(len(blocks), -1)


def test_rewards_are_fp32_under_bf16_weights():
    """The head sees the bf16 states in fp32, so that rewards do not fall onto bf16's grid."""
    rewards = RewardModel(tiny("llama").bfloat16())(pack(blocks_of(8), pad_id=0))
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float())


def test_a_causal_lm_begins_with_a_head_of_zeros(tmp_path):
    """EOS is its pad: transformers would then take the token before EOS, so the new model has no pad."""
    lm = helpers.tiny("llama")
    lm.config.eos_token_id = lm.config.pad_token_id = 2
    lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no reward model but LlamaForCausalLM: train one"):
        load_reward_model(str(tmp_path), **FP32)
    lm = load_reward_model(str(tmp_path), **FP32, begin=True)
    assert lm.score.weight.shape == (1, 32) and not lm.score.weight.any()
    nn.init.normal_(lm.score.weight)
    blocks = [Block(b.prompt, tuple(np.append(y, 2) for y in b.responses)) for b in blocks_of(2)]
    torch.testing.assert_close(RewardModel(lm)(pack(blocks, pad_id=0)), alone(lm, blocks), rtol=1e-5, atol=1e-6)
    ragged = [blocks[0], Block(blocks[1].prompt, blocks[1].responses[:1])]
    assert not RewardModel(lm)(pack(ragged, pad_id=0))[1, 1:].any()
    coarse = load_reward_model(str(tmp_path), dtype=torch.bfloat16, begin=True)  # bf16 would round its updates away
    assert coarse.score.weight.dtype == torch.float32


def test_what_is_no_reward_model_is_refused(tmp_path):
    tiny("llama", labels=2).save_pretrained(tmp_path / "two")
    load_reward_model(str(tmp_path / "two"), **FP32, objectives="mean")
    lm = helpers.tiny("llama")
    lm.save_pretrained(tmp_path / "lm")
    policy = add_lora(lm, rank=2, alpha=4, targets=["q_proj"], seed=0)
    policy.peft_config["default"].base_model_name_or_path = str(tmp_path / "lm")
    policy.save_pretrained(tmp_path / "policy")
    for path, message in {
        "nowhere/at-all": "cannot load the reward model 'nowhere/at-all'",
        tmp_path / "policy": "is the adapter of a policy, not of a reward model",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_reward_model(str(path), **FP32)


# -- training --


@pytest.fixture(scope="module")
def pairs(tiny_world, tmp_path_factory):
    """The tiny world's training rows as a folder with human pairs: best against worst."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for row in listwise.read(tiny_world / "train.jsonl"):
        best, worst = int(np.argmax(row.rewards)), int(np.argmin(row.rewards))
        rows.append(Row(row.id, row.prompt, row.responses, None, best, worst))
    listwise.write(folder / "train.jsonl", rows)
    (folder / "model").symlink_to(tiny_world / "model")
    return folder


def reward_run(**changes) -> dict:
    return dict(loss="reward", method=None, beta=None, reference_cache=None, lr=1e-2) | changes


def conversations(folder) -> list[Block]:
    """Chosen and rejected of every row as its template writes them, prompt apart."""
    encoder = tokens.Encoder(tokenizers.load_tokenizer(str(folder / "model")))
    rows = listwise.read(folder / "train.jsonl")
    pair = [[row.responses[k] for k in (row.chosen, row.rejected)] for row in rows]
    return [encode_answered(encoder, row.prompt, texts) for row, texts in zip(rows, pair, strict=True)]


@pytest.mark.parametrize("rank", [0, 4])
def test_training_starts_at_log_2_and_separates_the_pairs(pairs, tmp_path, rank):
    options = reward_run(lora_rank=rank, epochs=20, lr=2e-2 if rank else 2e-3)
    train.main(arguments(pairs, tmp_path, **options))
    values = losses(tmp_path)
    assert values[0] == pytest.approx(math.log(2), abs=1e-6)
    assert np.mean(values[-3:]) < 0.3
    assert losses(tmp_path, "rewards/accuracies")[-1] == 1.0
    assert "logps/chosen" not in (tmp_path / "metrics.jsonl").read_text()

    # The exported model, through transformers' or peft's own loading: the pairs stand apart as in training.
    blocks, policy = conversations(pairs), str(tmp_path / "policy")
    if rank:
        from peft import AutoPeftModelForSequenceClassification

        lm = AutoPeftModelForSequenceClassification.from_pretrained(policy, num_labels=1).eval()
        lm.config.pad_token_id = None
    else:
        lm = AutoModelForSequenceClassification.from_pretrained(policy).eval()
    with torch.no_grad():
        theirs = alone(lm, blocks)
        ours = RewardModel(load_reward_model(policy, **FP32))(pack(blocks, pad_id=0))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs[:, 0] > theirs[:, 1]).float().mean() > 0.9


def test_the_loss_is_bradley_terry(pairs, tmp_path):
    """A model with a head already: the first loss is the mean of softplus(r_rejected - r_chosen) over its prompts, with
    rewards from transformers' own classifier."""
    start = tmp_path / "start"
    lm = load_reward_model(str(pairs / "model"), **FP32, begin=True)
    nn.init.normal_(lm.score.weight, generator=torch.Generator().manual_seed(0))
    lm.save_pretrained(start)
    tokenizers.load_tokenizer(str(pairs / "model")).save_pretrained(start)
    train.main(arguments(pairs, tmp_path / "out", **reward_run(model=start, prompts_per_step=24, epochs=1)))
    with torch.no_grad():
        rewards = alone(lm, conversations(pairs))
    expected = float(softplus(rewards[:, 1] - rewards[:, 0]).mean())
    assert abs(expected - math.log(2)) > 1e-2
    assert losses(tmp_path / "out")[0] == pytest.approx(expected, abs=1e-5)
