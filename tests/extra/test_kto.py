"""KTO in the loop: z0 and the loss of a step against plain forwards, and the same however a step is split."""

import numpy as np
import pytest
import torch
from helpers import ALONE, SFT, distinct, losses, plain_logp, rewrite, run, run_ranks, tokenize_rows

from hps import batches
from hps.batches import make_plan
from hps.data import listwise, store, tokenizers
from hps.extra.kto import Mismatched
from hps.options import Config
from hps.pretrained import load_causal_lm


@pytest.fixture(scope="module")
def taught(tiny_world, tmp_path_factory):
    """The start model after some likelihood training: of another model, so that no log-ratio is 0."""
    out = tmp_path_factory.mktemp("taught")
    run(tiny_world, out, **SFT, data=tiny_world / "sft.jsonl")
    return out / "policy"


@pytest.mark.parametrize(("swapped", "budget"), [(False, 1), (True, 100_000)])
def test_z0_and_loss_of_a_step_by_plain_forwards(tiny_world, tmp_path, taught, swapped, budget):
    """z0 = max(0, mean_i h(x_i, best of x_{i+1})), cyclically; the loss is the mean of w_D s(beta (z0 - h_best)) +
    w_U s(beta (h_worst - z0)). Policy and reference swapped turn z0's mean negative, and it counts as 0."""
    models = [taught, tiny_world / "model"]
    policy, ref = (load_causal_lm(str(path), dtype=torch.float32) for path in (models[::-1] if swapped else models))
    data = rewrite(tiny_world, tmp_path, distinct)
    tokenizer = tokenizers.load_tokenizer(str(tiny_world / "model"))
    examples, _ = tokenize_rows(tokenizer, listwise.read(data)[:8], max_length=128)
    order = [np.argsort(e.rewards) for e in examples]
    pairs = [(e.prompt_ids, e.response_ids[o[-1]], e.response_ids[o[0]]) for e, o in zip(examples, order, strict=True)]

    def h(prompt, response):
        return (plain_logp(policy, prompt, response) - plain_logp(ref, prompt, response)).item()

    mean = np.mean([h(pairs[i][0], pairs[(i + 1) % 8][1]) for i in range(8)])
    assert abs(mean) > 0.5 and (mean < 0) == swapped
    z0 = max(0.0, mean)

    def s(x):
        return 1 / (1 + np.exp(-x))

    terms = [1.3 * s(0.05 * (z0 - h(x, w))) + 0.6 * s(0.05 * (h(x, y) - z0)) for x, w, y in pairs]
    options = dict(beta=0.05, desirable_weight=1.3, undesirable_weight=0.6, shuffle="no", stop_after=1)
    options |= dict(data=data, model=models[swapped], reference=models[1 - swapped], tokens_per_micro_batch=budget)
    values = run(tiny_world, tmp_path / "out", method="kto-bt", **options)
    assert losses(tmp_path / "out", "kl")[0] == pytest.approx(z0, abs=1e-3)
    assert values[0] == pytest.approx(np.mean(terms), abs=1e-4)


def test_mismatched_pairs_are_cut_at_max_length(tiny_world):
    """Each is the visit's prompt and the start of the next one's best response, as much of it as max_length leaves."""
    data, tokenizer = tiny_world / "train.jsonl", tokenizers.load_tokenizer(str(tiny_world / "model"))
    examples, _ = tokenize_rows(tokenizer, listwise.read(data), max_length=128)
    longest = max(map(len, (e.prompt_ids for e in examples)))
    c = Config("m", "d", "o", method="kto-bt", prompts_per_step=24, epochs=1, max_length=longest + 5)
    stored = store.open_store(tiny_world / "tokens", data, tokenizer, max_length=128)
    plan = make_plan(c, stored)
    run_of_it = batches.Run(c, plan, stored, ALONE, pad_id=0)
    blocks, cut = Mismatched(run_of_it, c.max_length).blocks, 0
    for v, block in enumerate(blocks):
        w = (v + 1) % 24
        whole = examples[plan.row[w]].response_ids[plan.responses[w, 0]]
        prompt = examples[plan.row[v]].prompt_ids
        assert block.prompt.tolist() == prompt.tolist()
        assert block.responses[0].tolist() == whole.tolist()[: c.max_length - len(prompt)]
        cut += len(block.responses[0]) < len(whole)
    assert 0 < cut and len(blocks) == 24


KTO = dict(method="kto-hps", epochs=3)


@pytest.fixture(scope="module")
def base(tiny_world, tmp_path_factory) -> tuple[list[float], list[float]]:
    """Losses and z0 of 9 steps: one process, one micro-batch a step."""
    out = tmp_path_factory.mktemp("kto")
    values, kl = run(tiny_world, out, tokens_per_micro_batch=100_000, **KTO), losses(out, "kl")
    assert np.std(values[1:]) > 1e-2 and max(kl) > 0.5
    return values, kl


def test_several_ranks_give_the_trajectory_of_one(tiny_world, tmp_path, base):
    """The cache is full, so that the first pass is z0's; 8 prompts on three ranks leave one of them a dummy."""
    values = run_ranks(tiny_world, tmp_path, 3, tokens_per_micro_batch=20, **KTO)
    np.testing.assert_allclose(values, base[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path, "kl"), base[1], rtol=0, atol=1e-3)
