"""Decoding against full forward passes, exact distributions, transformers' own generate, and other batches."""

import copy
import math
from collections import deque

import numpy as np
import pytest
import torch
from helpers import SMALL, flat, plain_logp
from scipy import stats
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, Qwen2Config

from hps.prepare import decode

EOS = 2
SPECIAL = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=13, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **SPECIAL),
}
PROMPTS = [[1, 5, 6], [1, 9, 3, 3, 4, 5, 5, 5, 6, 7, 8, 12, 12], [1], [4, 4, 4, 0], [1, 7]]  # no two equally long


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()


def draw(model, prompts, n, *, seeds=None, max_new_tokens=12, temperature=0.9, max_rows=512):
    """The samples of each prompt; prompt i has random stream i unless `seeds` says otherwise."""
    counts = [n] * len(prompts) if isinstance(n, int) else n
    seeds = seeds or range(len(prompts))
    requests = [decode.Request(p, seed, due) for p, seed, due in zip(prompts, seeds, counts, strict=True)]
    settings = dict(eos_token_id=EOS, max_new_tokens=max_new_tokens, temperature=temperature, max_rows=max_rows)
    ended = list(decode.decode(model, deque(requests), **settings))
    assert sorted(map(id, ended)) == sorted(map(id, requests))  # each is given back once
    return [request.samples for request in requests]


def calls_of(model, run):
    """(rows, columns) of every call of the model's forward: prefills, steps (one column) and checks."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((tuple(args[0].shape), "position_ids" in kwargs)), with_kwargs=True
    )
    try:
        return run(), shapes
    finally:
        hook.remove()


# --- what is computed --------------------------------------------------------------------------------------


def test_logp_is_the_full_forward_pass_sum_at_temperature_1(model):
    for temperature, max_rows in ((0.9, 512), (2.0, 24)):
        groups = draw(model, PROMPTS, 20, temperature=temperature, max_rows=max_rows)
        assert {one.finished for group in groups for one in group} == {True, False}  # both kinds are compared
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for one in group:
                assert one.logp == pytest.approx(plain_logp(model, prompt, one.token_ids).item(), abs=1e-5)
                tokens = one.token_ids.tolist()
                assert one.token_ids.dtype == np.int32 and EOS not in tokens[:-1]
                assert one.finished == (tokens[-1] == EOS) and (one.finished or len(tokens) == 12)


def test_two_tokens_follow_the_exact_joint_distribution(llama):
    """Of two prompts of unequal length in one batch, against the products of full forward passes in float64."""
    prompts, n = PROMPTS[:2], 3000
    for prompt, group in zip(prompts, draw(llama, prompts, n, max_new_tokens=2, temperature=0.8), strict=True):
        with torch.no_grad():
            first = (llama(torch.tensor([prompt])).logits[0, -1].double() / 0.8).softmax(-1)
            ids = torch.tensor([[*prompt, token] for token in range(13)])
            second = (llama(ids).logits[:, -1].double() / 0.8).softmax(-1)
        exact = first[:, None] * second
        exact[EOS] = 0
        exact[EOS, EOS] = first[EOS]  # stands for "ended at once"
        seen = np.zeros((13, 13))
        for one in group:
            seen[one.token_ids[0], one.token_ids[-1]] += 1
        exact, seen = exact.numpy().ravel() * n, seen.ravel()
        rare = exact < 5
        assert seen[exact == 0].sum() == 0 and rare.sum() < 150
        pooled = (np.append(seen[~rare], seen[rare].sum()), np.append(exact[~rare], exact[rare].sum()))
        assert stats.chisquare(*pooled).pvalue > 0.01


def test_bfloat16_decodes_like_its_own_full_forward(llama):
    """One token's log-prob is computed in fp32, and so is exact; those of many differ by the rounding of bf16."""
    config = copy.deepcopy(CONFIGS["llama"])  # or later models of it were bf16 too
    half = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    half.load_state_dict(llama.state_dict())
    for prompts, tokens, tolerance in ((PROMPTS[:1], 1, 1e-5), (PROMPTS, 12, 0.2)):
        for prompt, group in zip(prompts, draw(half, prompts, 6, max_new_tokens=tokens), strict=True):
            for one in group:
                assert one.logp == pytest.approx(plain_logp(half, prompt, one.token_ids).item(), abs=tolerance)


# --- who shares the batch ----------------------------------------------------------------------------------


def test_a_prompt_draws_as_if_alone(model):
    """In one batch, in small ones that are refilled, in another order: the same tokens, log-probs up to rounding."""
    counts = [3, 17, 6, 40, 9]
    alone = [draw(model, [p], n, seeds=[i])[0] for i, (p, n) in enumerate(zip(PROMPTS, counts, strict=True))]
    backwards = draw(model, PROMPTS[::-1], counts[::-1], seeds=[4, 3, 2, 1, 0])[::-1]
    others = [draw(model, PROMPTS, counts, max_rows=rows) for rows in (512, 20, 7, 1)]
    for groups in [backwards, *others]:
        assert flat(groups) == flat(alone)
        for group, other in zip(groups, alone, strict=True):
            assert [one.logp for one in group] == pytest.approx([one.logp for one in other], abs=1e-5)


def test_rows_that_ended_leave_and_others_take_their_places(llama):
    prompts = [PROMPTS[i % 5] for i in range(30)]
    draw(llama, PROMPTS[:1], 1)  # the few tokens that show whether this model can be decoded here
    groups, calls = calls_of(llama, lambda: draw(llama, prompts, 8, max_rows=32))
    steps = [rows for (rows, _), is_step in calls if is_step]
    drawn_in_steps = sum(len(one.token_ids) - 1 for group in groups for one in group)  # the first comes of the prefill
    assert max(steps) == 32
    assert drawn_in_steps < sum(steps) < 1.25 * drawn_in_steps  # few rows go on after their end
    assert np.mean(steps[: len(steps) // 2]) > 27  # full while prompts are waiting
    assert steps[-1] < 16  # and then they shrink
    prefilled = [rows for (rows, _), is_step in calls if not is_step]
    assert sum(prefilled) == 30  # each prompt once


def test_prompts_of_like_lengths_are_prefilled_together(llama, monkeypatch):
    draw(llama, PROMPTS[:1], 1)  # as above
    monkeypatch.setattr(decode, "PADDED_TOKENS", 70)
    prompts = [[1, *[5] * k] for k in (30, 2, 34, 3, 31, 30)]
    _, calls = calls_of(llama, lambda: draw(llama, prompts, 1))
    assert [shape for shape, is_step in calls if not is_step][:3] == [(2, 4), (2, 31), (2, 35)]


def test_attention_reads_each_prompt_once_whatever_its_rows(llama, monkeypatch):
    """The keys that are kept: one copy of a prompt, and of a row only what is its own."""
    seen = []
    step = decode._Rows.step

    def spy(rows):
        seen.append([(p.shape, o.shape) for p, o in zip(rows.prompt_cache, rows.own_cache, strict=True)])
        step(rows)

    monkeypatch.setattr(decode._Rows, "step", spy)
    draw(llama, PROMPTS[:2], 10)
    assert seen[0] == [((2, 2, 13, 8), (20, 2, 12, 8))] * 4  # two layers' keys and values


# --- models that packed attention cannot decode ------------------------------------------------------------


def test_a_model_that_is_decoded_wrongly_falls_back(llama, monkeypatch, caplog):
    """To transformers' generate, with the same random numbers and so the same samples, which end at the same tokens;
    its own config of generation, which could forbid tokens, has no say."""
    lm = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    lm.load_state_dict(llama.state_dict())
    for one in (llama, lm):
        monkeypatch.setattr(one.generation_config, "eos_token_id", [EOS, 9])
    expected = draw(llama, PROMPTS, 6)
    lm.generation_config.suppress_tokens = [5, 6, 7]
    attend = decode._Rows.attend
    monkeypatch.setattr(decode._Rows, "attend", lambda self, q, k, v, scaling: attend(self, q, k, v, 1.5 * scaling))
    ours = draw(lm, PROMPTS, 6, max_rows=4)
    assert "LlamaForCausalLM is sampled by transformers' generate, slower: its log-probs differ" in caplog.text
    assert flat(ours) == flat(expected)
    for group, other in zip(ours, expected, strict=True):
        assert [one.logp for one in group] == pytest.approx([one.logp for one in other], abs=1e-4)
    caplog.clear()
    del lm.ways_to_decode  # and is seen though every sample ends at its first token
    lm.generation_config.eos_token_id = list(range(13))
    draw(lm, PROMPTS, 2)
    assert "slower: its log-probs differ" in caplog.text


def test_a_model_that_looks_ahead_is_not_sampled_from():
    config = BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be sampled from: its log-probs differ"):
        draw(AutoModelForCausalLM.from_config(config).eval(), PROMPTS, 6)


def test_impossible_tokens_are_not_drawn_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.1, -math.inf]).expand(2, -1)
    tokens, _ = decode.draw_tokens(logits, torch.tensor([0.0, 1 - 2**-24]), temperature=1.0)
    assert tokens.tolist() == [1, 3]


def test_broken_weights_are_named(llama):
    broken = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        draw(broken, [[1, 5]], 2)


def test_a_sample_ends_at_each_end_token_of_the_model(llama, monkeypatch):
    """The same streams, cut behind the first token that the generation config names beside EOS."""
    ids = [list(one.token_ids) for one in draw(llama, PROMPTS[:1], 16)[0]]
    other = int(next(y[1] for y in ids if len(y) > 3))
    monkeypatch.setattr(llama.generation_config, "eos_token_id", [EOS, other])
    cut = [y[: y.index(other) + 1] if other in y else y for y in ids]
    assert cut != ids
    expected = [([int(i) for i in y], int(y[-1]) in (EOS, other)) for y in cut]
    assert flat(draw(llama, PROMPTS[:1], 16))[0] == expected
