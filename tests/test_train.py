"""The loop: the same trajectory however it is split, sharded, packed, cached or interrupted; known first losses;
every user mistake named. Runs `train.py` on a tiny world, with the shapes that real runs pass."""

import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, arguments, distinct, losses, rewrite, run, run_ranks

import train
from hps import reference
from hps.data import listwise, tokens
from hps.model import PolicyModel, load_causal_lm
from hps.packing import Block


@pytest.fixture(scope="module")
def base(tiny_world, tmp_path_factory) -> list[float]:
    """The trajectory that others are compared with: one process, one micro-batch a step, packed, cached."""
    out = tmp_path_factory.mktemp("base")
    values = run(tiny_world, out, tokens_per_micro_batch=100_000)
    assert len(values) == 6 and (out / "policy").exists()
    assert np.std(values[1:]) > 1e-2  # a trajectory that does not move would equal anything
    return values


def test_accumulation_does_not_change_the_trajectory(tiny_world, tmp_path, base):
    """8 prompts in one micro-batch, or in eight of one prompt each."""
    np.testing.assert_allclose(run(tiny_world, tmp_path, tokens_per_micro_batch=20), base, rtol=0, atol=1e-5)


def test_padded_rows_give_the_packed_trajectory(tiny_world, tmp_path, base):
    np.testing.assert_allclose(run(tiny_world, tmp_path, share_prompt="false"), base, rtol=0, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_trajectory(tiny_world, tmp_path, base):
    np.testing.assert_allclose(run(tiny_world, tmp_path, gradient_checkpointing="true"), base, rtol=0, atol=1e-5)


def test_a_live_reference_gives_the_cached_trajectory(tiny_world, tmp_path, base, monkeypatch):
    """Instead of the cache: a second copy of the start model, each response alone through its own head."""
    lm = load_causal_lm(str(tiny_world / "model"), dtype=torch.float32)

    def live(cache: Path, scorer: PolicyModel, blocks: Sequence[Block], **how) -> tuple[np.ndarray, int]:
        rows = []
        for prompt, y in ((block.prompt, y) for block in blocks for y in block.responses):
            ids = torch.from_numpy(np.concatenate([prompt, y])).long()
            with torch.no_grad():
                logps = torch.log_softmax(lm(input_ids=ids[None]).logits[0], -1)
            rows.append(sum(float(logps[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        return np.array(rows, dtype=np.float32), 0

    monkeypatch.setattr(reference, "fill", live)
    np.testing.assert_allclose(run(tiny_world, tmp_path), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ranks", "budget"), [(2, 100_000), (3, 20)])
def test_several_ranks_give_the_trajectory_of_one(tiny_world, tmp_path, base, ranks, budget):
    """Sharded on gloo ranks, which share new caches. Three ranks share 8 prompts, each a micro-batch of its own: in
    every step one of them has nothing left and repeats a block with weight 0."""
    caches = dict(token_cache=tmp_path / "tokens", reference_cache=tmp_path / "cache")
    values = run_ranks(tiny_world, tmp_path / "run", ranks, tokens_per_micro_batch=budget, **caches)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    np.testing.assert_allclose(values, base, rtol=0, atol=1e-5)


def test_lora_on_two_ranks(tiny_world, tmp_path):
    """LoRA: one process, two ranks, and the exported adapter loads in plain peft with the trained weights."""
    lora = dict(lora_rank=4, lora_alpha=8, lr=3e-2)
    one = run(tiny_world, tmp_path / "one", **lora)
    two = run_ranks(tiny_world, tmp_path / "two", 2, **lora)
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
    from peft import AutoPeftModelForCausalLM

    adapters = [AutoPeftModelForCausalLM.from_pretrained(tmp_path / which / "policy") for which in ("one", "two")]
    weights = [{n: p for n, p in a.named_parameters() if "lora_" in n} for a in adapters]
    assert weights[0] and all(p.abs().max() > 0 for p in weights[0].values())
    for name, p in weights[0].items():
        torch.testing.assert_close(p, weights[1][name], rtol=1e-3, atol=1e-5)


def test_an_adapter_on_an_adapter_is_refused(tiny_world, tmp_path):
    """peft would name the first one's base as the base of the second, and the first one would be lost on loading."""
    run(tiny_world, tmp_path / "sft", loss="sft", method=None, beta=None, reference_cache=None, lora_rank=4)
    start = tmp_path / "sft" / "policy"
    with pytest.raises(ValueError, match=r"is itself an adapter.*python -m hps\.evaluate\.export --model .*sft/policy"):
        run(tiny_world, tmp_path / "dpo", model=start, lora_rank=4)
    values = run(tiny_world, tmp_path / "full", model=start, lora_rank=0, method="dpo-bt")  # whole weights are fine
    assert values[0] == pytest.approx(math.log(2), abs=1e-6)


def test_exported_full_weights_score_as_the_policy_did(tiny_world, tmp_path):
    """A second run that starts from the exported policy, with the old model as its reference, begins where the
    first one's last update left off: its step-0 log-probs are not the reference's."""
    run(tiny_world, tmp_path / "a")
    lm = load_causal_lm(str(tmp_path / "a" / "policy"), dtype=torch.float32)
    start = load_causal_lm(str(tiny_world / "model"), dtype=torch.float32)
    moved = max(float((p - q).detach().abs().max()) for p, q in zip(lm.parameters(), start.parameters(), strict=True))
    assert moved > 1e-3
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight  # still tied
    values = run(
        tiny_world, tmp_path / "b", model=tmp_path / "a" / "policy", reference=tiny_world / "model", method="dpo-bt"
    )
    assert abs(values[0] - math.log(2)) > 1e-2


def test_another_reference_is_gone_before_the_first_step(tiny_world, tmp_path, monkeypatch):
    """It has been scored by then, and its memory is as much as the policy's."""
    loaded, alive = [], []
    real, lr_at = train.model.load_causal_lm, train.lr_at

    def load(path, **how):
        lm = real(path, **how)
        loaded.append(weakref.ref(lm))
        return lm

    def count(c, step, steps):
        gc.collect()
        alive.append([lm() is not None for lm in loaded])
        return lr_at(c, step, steps)

    monkeypatch.setattr(train.model, "load_causal_lm", load)
    monkeypatch.setattr(train, "lr_at", count)
    run(tiny_world, tmp_path, reference=tiny_world / "model", method="dpo-bt", stop_after=1)
    assert alive == [[True, False]]


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_is_bit_identical(tiny_world, tmp_path, base, stop):
    """Stopped after some steps and started again with the same command: the remaining losses to the last bit."""
    whole = run(tiny_world, tmp_path / "whole", tokens_per_micro_batch=100_000)
    assert whole == base  # the loop itself is deterministic
    half = run(tiny_world, tmp_path / "half", tokens_per_micro_batch=100_000, stop_after=stop)
    assert half == whole[:stop]
    assert run(tiny_world, tmp_path / "half", tokens_per_micro_batch=100_000) == whole
    for key in ("grad_norm", "lr", "gamma"):
        assert losses(tmp_path / "half", key) == losses(tmp_path / "whole", key)
    weights = [(tmp_path / which / "policy/model.safetensors").read_bytes() for which in ("half", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("options", "kept"), [(dict(save_every=3), 3), (dict(save_minutes=1e-9), 4)])
def test_resume_reads_the_last_checkpoint(tiny_world, tmp_path, base, monkeypatch, options, kept):
    """Killed after checkpoints by steps or by time: later steps are done again, and stand in the log once."""
    real = train.lr_at

    def kill(c, step, steps):
        if step == 4:
            raise KeyboardInterrupt
        return real(c, step, steps)

    options = dict(tokens_per_micro_batch=100_000, **options)
    monkeypatch.setattr(train, "lr_at", kill)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_world, tmp_path, **options)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{kept:08d}"]
    assert len(losses(tmp_path)) == 4
    assert run(tiny_world, tmp_path, **options) == base


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_a_resumed_run_never_scores_the_reference_with_trained_weights(tiny_world, tmp_path, lora_rank):
    """With the cache gone, the model that the run began with fills it again."""
    cache, options = tmp_path / "cache", dict(lora_rank=lora_rank, lr=3e-2 if lora_rank else 3e-3)
    calm = run(tiny_world, tmp_path / "calm", **options)
    run(tiny_world, tmp_path / "run", stop_after=2, reference_cache=cache, **options)
    for shard in cache.rglob("shard-*"):
        shard.unlink()
    assert np.std(calm[2:]) > 1e-3
    np.testing.assert_allclose(
        run(tiny_world, tmp_path / "run", reference_cache=cache, **options), calm, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dpo-bt", {}, math.log(2)),
        ("dpo-hps", {}, math.log(2)),
        ("dpo-uniform", {}, math.log(2)),
        ("ipo-hps", {}, 1 / (4 * 0.5**2)),
        ("nca-bt", {}, 2 * math.log(2)),
        ("dpo-hps", {"hps_samples": 3}, math.log(2)),
        ("dpo-hps", {"hps_form": "full"}, math.log(2)),
        ("sppo-bt", {}, 1 / (2 * 0.5**2)),
        ("infonca-pl", {"pl_responses": 2}, math.log(2)),
        ("sppo-pl", {"pl_form": "official", "pl_responses": 2}, None),
        ("exo-random", {}, -math.log(2) - (math.log(0.999) + math.log(0.001)) / 2),
    ],
)
def test_first_loss_is_known(tiny_world, tmp_path, method, options, expected):
    values = run(tiny_world, tmp_path, method=method, stop_after=1, **options)
    if expected is not None:  # else the run's own check compared it with the closed form of its rewards
        assert values[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["simpo-hps", "slic-bt"])
def test_losses_without_a_reference_neither_fill_nor_read_a_cache(tiny_world, tmp_path, monkeypatch, method):
    """SimPO: softplus(target - beta (mean log p_w - mean log p_l)) of the first pairs, by hand at the start model."""
    monkeypatch.setattr(reference, "open_cache", lambda *args, **kwargs: pytest.fail("no reference is needed"))
    options = dict(beta=None) if method == "slic-bt" else dict(beta=2.0, target_margin=0.3)
    values = run(tiny_world, tmp_path, method=method, reference_cache=None, **options)
    assert all(math.isfinite(x) for x in values) and np.std(values) > 1e-3
    if method == "simpo-hps":  # an untrained model gives every token about log(1/V): the margin is nearly zero
        assert values[0] == pytest.approx(math.log1p(math.exp(0.3)), abs=0.05)


@pytest.mark.parametrize("method", ["rdpo-bt", "lipo-pl", "nca_soft-pl"])
def test_further_methods_train(tiny_world, tmp_path, method):
    """R-DPO's and LiPO's first value is not known beforehand; NCA's with soft labels is and was checked."""
    values = run(tiny_world, tmp_path, method=method, epochs=6)
    assert all(math.isfinite(x) for x in values)
    margins = losses(tmp_path, "rewards/margins")
    assert np.mean(margins[-4:]) > margins[0] + 0.2


def penalised_rewards(world: Path, penalty: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each prompt r_k - penalty L_k and L_k, the scored tokens with the end token."""
    tokenizer = tokens.load_tokenizer(str(world / "model"))
    examples, _ = tokens.tokenize_rows(tokenizer, listwise.read(world / "train.jsonl"), max_length=128)
    lengths = [np.array([len(ids) for ids in e.response_ids]) for e in examples]
    return [(e.rewards - penalty * L, L) for e, L in zip(examples, lengths, strict=True)]


def test_a_length_penalty_reaches_the_pairs_and_the_loss(tiny_world, tmp_path):
    """SPPO's win rates of the best and the worst by r - .2 L: 2 ((s(gap) - 1/2) / (2 beta))^2 where h = 0."""
    options = dict(beta=0.1, pl_responses=2, prompts_per_step=24, length_penalty=0.2)
    values = run(tiny_world, tmp_path, method="sppo_winrate-pl", stop_after=1, **options)
    gaps = [np.ptp(rewards) for rewards, _ in penalised_rewards(tiny_world, 0.2)]
    assert values[0] == pytest.approx(np.mean([50 * (1 / (1 + math.exp(-g)) - 0.5) ** 2 for g in gaps]), rel=1e-4)


def test_under_a_large_length_penalty_the_longest_loses_to_the_shortest(tiny_world, tmp_path, monkeypatch):
    """At 1,000 a token: best and worst of every prompt are one of its shortest and one of its longest responses."""
    plans = []
    real = train.batches.make_plan
    monkeypatch.setattr(train.batches, "make_plan", lambda c, examples: plans.append(real(c, examples)) or plans[-1])
    run(tiny_world, tmp_path, method="dpo-bt", stop_after=1, length_penalty=1e3)
    lengths = [L for _, L in penalised_rewards(tiny_world, 0.0)]
    assert len(plans[0].row) == 2 * 24
    for row, (best, worst) in zip(plans[0].row, plans[0].responses, strict=True):
        assert (lengths[row][best], lengths[row][worst]) == (min(lengths[row]), max(lengths[row]))


def test_human_pairs_train_without_rewards(tiny_world, tmp_path):
    rows = listwise.read(tiny_world / "train.jsonl")
    pairs = [listwise.Row(r.id, r.prompt, r.responses, None, 2, 1, None, "") for r in rows]
    listwise.write(tmp_path / "pairs.jsonl", pairs)
    values = run(tiny_world, tmp_path / "out", method="dpo-human", data=tmp_path / "pairs.jsonl")
    assert values[0] == pytest.approx(math.log(2), abs=1e-4) and np.std(values[1:]) > 1e-2


def test_first_loss_of_plackett_luce_is_the_mean_log_factorial(tiny_world, tmp_path):
    """Every prompt of a run of one step: mean of log n! over the ranks that each has, at most 5."""
    values = run(tiny_world, tmp_path, method="dpo-pl", pl_responses=5, prompts_per_step=24, stop_after=1)
    ns = []
    for row in listwise.read(tiny_world / "train.jsonl"):
        best = int(np.argmax(row.rewards))
        others = {y for y, r in zip(row.responses, row.rewards, strict=True) if r < row.rewards[best]}
        others.discard(row.responses[best])
        ns.append(min(5, 1 + len(others)))
    assert values[0] == pytest.approx(np.mean([math.lgamma(n + 1) for n in ns]), abs=1e-4)


def test_n_factor_raises_the_first_loss_to_log_n(tiny_world, tmp_path):
    """kappa = number of dispreferred responses: log(1 + kappa) at policy = reference."""
    values = run(tiny_world, tmp_path, n_factor="n_minus_one", stop_after=1)
    assert math.log(3) < values[0] < math.log(9)


@pytest.mark.parametrize("exclude", ["true", "false"])
def test_first_loss_with_two_positives(tiny_world, tmp_path, exclude):
    """App. E, kappa = N_j: L = log(1 + N_1) + .5 log(1 + N_2), N_2 the rest below the second, N_1 = N_2 + 1 with y_2
    among the opponents of y_1, else N_2."""
    data = rewrite(tiny_world, tmp_path, distinct)
    options = dict(hps_form="full", positives=2, positive_lambda="1,0.5", exclude_positives=exclude)
    options |= dict(n_factor="n_minus_one", prompts_per_step=24, stop_after=1)
    values = run(tiny_world, tmp_path / "out", data=data, **options)
    rest = np.array([len(json.loads(line)["rewards"]) - 2 for line in data.read_text().splitlines()])
    by_hand = np.log(1 + rest + (exclude == "false")) + 0.5 * np.log(1 + rest)
    assert values[0] == pytest.approx(by_hand.mean(), abs=1e-4)


def test_metrics_of_two_positives_leave_the_second_out_of_the_rejected():
    """h = 1 3 2 -4 with beta .5: chosen .5, rejected (1 - 2) / 2 = -.5, which leaves 3 out; 1 beats one of two."""
    h, valid = torch.tensor([[1.0, 3.0, 2.0, -4.0, 0.0]]), torch.tensor([[True, True, True, True, False]])
    row = train.prompt_metrics(torch.tensor([7.0]), h - 10, h, valid, 0.5, positives=2)
    by_hand = {"loss": 7.0, "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0}
    by_hand |= {"rewards/accuracies": 0.5, "logps/chosen": -9.0, "logps/rejected": -11.0}
    assert dict(zip(train.METRICS, row[0].tolist(), strict=True)) == by_hand


@pytest.mark.parametrize(
    ("weights", "exclude", "without"), [("1,0", "false", None), ("0,1", "false", 0), ("1,0", "true", 1)]
)
def test_each_positive_is_a_run_of_the_full_form(tiny_world, tmp_path, weights, exclude, without):
    """L_1 is HPS in the full form, L_2 the same on data without the best response, and L_1 against what is below both
    the same on data without the second best: whole trajectories, gamma moving."""
    two = dict(positives=2, positive_lambda=weights, exclude_positives=exclude)
    full = dict(hps_form="full", n_factor="n_minus_one", tokens_per_micro_batch=100_000)
    ours = run(tiny_world, tmp_path / "two", data=rewrite(tiny_world, tmp_path, distinct), **two, **full)
    data = rewrite(tiny_world, tmp_path, lambda rows: distinct(rows, without))
    plain = run(tiny_world, tmp_path / "one", data=data, **full)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)
    assert np.std(plain[1:]) > 1e-2
    if without is None:
        assert run(tiny_world, tmp_path / "same", data=data, positives=1, **full) == plain


def test_the_self_check_fails_on_a_wrong_reference(tiny_world, tmp_path, monkeypatch):
    real = reference.fill

    def wrong(*args, **how) -> tuple[np.ndarray, int]:
        logps, computed = real(*args, **how)
        return logps - np.arange(len(logps)) % 3, computed

    monkeypatch.setattr(reference, "fill", wrong)
    with pytest.raises(ValueError, match="with policy = reference dpo-bt must give 0.693147"):
        run(tiny_world, tmp_path, method="dpo-bt")
    assert not (tmp_path / "policy").exists()


def test_training_raises_the_margin_that_it_optimises(tiny_world, tmp_path):
    run(tiny_world, tmp_path, epochs=10, method="dpo-bt")
    margins = losses(tmp_path, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert np.mean(margins[-5:]) > 1.0
    assert np.mean(losses(tmp_path, "rewards/accuracies")[-5:]) > 0.8


def test_bf16_follows_fp32(tiny_world, tmp_path, base):
    for name, options in {"full": {}, "lora": dict(lora_rank=4)}.items():
        low = run(tiny_world, tmp_path / name, dtype="bf16", **options)
        assert low[0] == pytest.approx(math.log(2), abs=2e-2)
        assert all(math.isfinite(x) for x in low)
        if name == "full":
            np.testing.assert_allclose(low, base, atol=0.1)


def test_sft_learns_the_preferred_response(tiny_world, tmp_path):
    """Loss per token from log V at random weights; the file's order kept."""
    options = dict(loss="sft", method=None, beta=None, reference_cache=None, data=tiny_world / "sft.jsonl")
    values = run(tiny_world, tmp_path, epochs=6, shuffle="no", lr=1e-2, **options)
    size = json.loads((tiny_world / "model/config.json").read_text())["vocab_size"]
    assert values[0] == pytest.approx(math.log(size), rel=0.05)
    assert values[-1] < values[0] - 1


# ------------------------------------------------------------------------------------- mistakes and odd data


def counts(out: Path) -> dict[str, int]:
    return json.loads((out / "summary.json").read_text())["counts"]


def test_odd_rows_are_dropped_and_counted(tiny_world, tmp_path):
    """n = 1, all rewards equal, an empty response, an over-long prompt: left out, counted, nothing is NaN."""

    def change(rows):
        rows[0].update(responses=rows[0]["responses"][:1], rewards=[1.0])
        rows[1].update(rewards=[2.0] * len(rows[1]["responses"]))
        rows[2]["responses"][0] = ""
        rows[3]["prompt"][-1]["content"] = " ".join(["the"] * 500)

    values = run(tiny_world, tmp_path / "out", data=rewrite(tiny_world, tmp_path, change))
    found = counts(tmp_path / "out")
    assert found["rows_one_response"] == 1
    assert found["rows_no_dispreferred"] == 1
    assert found["responses_empty"] == 1
    assert found["rows_overlong_prompt"] == 1
    assert found["rows_read"] == 24 and found["rows_kept"] == 23
    assert len(values) == math.ceil(2 * 21 / 8)
    assert all(math.isfinite(x) for x in values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[4].pop("rewards"), r"changed\.jsonl:5: .*data_prep\.py annotate"),
        (lambda rows: rows[4]["rewards"].pop(), r"changed\.jsonl:5: "),
        (lambda rows: rows[4]["rewards"].__setitem__(0, float("nan")), r"changed\.jsonl:5: "),
        (lambda rows: rows[4].update(id=rows[0]["id"]), r"changed\.jsonl:5: "),
        (lambda rows: [r.update(rewards=[1.0] * len(r["rewards"])) for r in rows], "no prompt has a response below"),
    ],
)
def test_bad_data_is_named_with_file_and_line(tiny_world, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_world, tmp_path / "out", data=rewrite(tiny_world, tmp_path, change))


def test_a_broken_line_is_named(tiny_world, tmp_path):
    path = rewrite(tiny_world, tmp_path, lambda rows: None)
    lines = path.read_text().splitlines()
    lines[6] = lines[6][:-9]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"changed\.jsonl:7: "):
        run(tiny_world, tmp_path / "out", data=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(method="dpo-hsp"),
            "method = 'dpo-hsp' does not exist: did you mean dpo-hps.*Losses: dpo,.*Samplers: hps,",
        ),
        (dict(method="dpo-bt", gamma_end=3), "method dpo-bt does not use.*gamma_end"),
        (dict(method="dpo-hps", pl_responses=3), "method dpo-hps does not use.*pl_responses"),
        (dict(method="nca-hps", label_smoothing=0.1), "method nca-hps does not use.*label_smoothing"),
        (dict(loss="sft", beta=None, reference_cache=None), "loss sft does not use.*method"),
        (dict(gamma_schedule="constant", gamma_end=3), "does not use.*gamma_end"),
        (dict(hps_form="full", hps_samples=2), "does not use.*hps_samples"),
        (dict(method="dpo-bt", positives=2), "method dpo-bt does not use.*positives"),
        (dict(positives=2), "positives = 2 are set against all.*add --hps_form full"),
        (dict(positives=0), "positives must be positive"),
        (dict(hps_form="full", exclude_positives="true"), "does not use.*exclude_positives"),
        (dict(hps_form="full", positives=2, positive_lambda="1"), "give 2 comma-separated weights"),
        (dict(hps_form="full", positives=2, positive_lambda="1,x"), "give 2 comma-separated weights"),
        (dict(hps_form="full", positives=2, positive_lambda="0,0"), "not all 0"),
        (dict(hps_form="full", positives=2, positive_lambda="1,-1"), "give 2 comma-separated weights >= 0"),
        (dict(hps_form="full", positives=2, positive_lambda="1,nan"), "give 2 comma-separated weights >= 0"),
        (dict(hps_form="full", positives=2, positive_lambda="inf,1"), "give 2 comma-separated weights >= 0"),
        (dict(method="slic-bt", reference_cache=None), "method slic-bt does not use.*beta"),
        (dict(method="simpo-bt"), "method simpo-bt does not use.*reference_cache"),
        (dict(method="infonca-hps"), "method = 'infonca-hps' does not exist"),
        (dict(method="infonca-pl", pl_form="official"), "method infonca-pl does not use.*pl_form"),
        (dict(method="dpo-bt", reward_norm="zscore"), "method dpo-bt does not use.*reward_norm"),
        (dict(method="dpo-human", length_penalty=0.1), "method dpo-human does not use.*length_penalty"),
        (
            dict(loss="sft", method=None, beta=None, reference_cache=None, length_penalty=0.1),
            "loss sft does not use.*length_penalty",
        ),
        (dict(length_penalty=-0.1), "length_penalty must not be negative"),
        (dict(lora_alpha=4), "does not use.*lora_alpha"),
        (dict(dtype="fp16"), "dtype = 'fp16' does not exist; choose one of fp32, bf16"),
        (dict(beta=0), "beta must be positive"),
        (dict(method="dpo-bt", label_smoothing=0.7), r"label_smoothing must lie in \[0, 0.5\), got 0.7"),
        (dict(candidates=-1), "candidates must not be negative"),
        (dict(betta=0.1), "betta.*--beta"),
        (dict(epochs="two"), "--epochs two: expected an int"),
        (dict(truncate="error", max_length=12), r"train\.jsonl:\d+: "),
        (dict(model="nowhere"), "nowhere"),
    ],
)
def test_a_wrong_option_is_named(tiny_world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_world, tmp_path, **options)


def test_a_folder_with_another_run_is_refused(tiny_world, tmp_path):
    run(tiny_world, tmp_path, stop_after=1)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(lr: 0.003 -> 0.01\)"):
        run(tiny_world, tmp_path, lr=0.01)


def test_a_run_does_not_go_on_with_other_inputs(tiny_world, tmp_path):
    """The same paths, but other content behind them: data edited, start model retrained."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(tiny_world / "model", model)
    shutil.copy(tiny_world / "train.jsonl", data)
    run(tiny_world, tmp_path / "out", model=model, data=data, stop_after=1)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="the data of this run changed since it began"):
        run(tiny_world, tmp_path / "out", model=model, data=data)
    data.write_text("".join(lines))
    lm = load_causal_lm(str(model), dtype=torch.float32)
    lm.model.norm.weight.data += 1e-3
    lm.save_pretrained(model)
    with pytest.raises(ValueError, match="the model of this run changed since it began"):
        run(tiny_world, tmp_path / "out", model=model, data=data)


def test_a_reference_with_another_tokenizer_is_refused(tiny_world, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_world / "model", other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<assistant>", "<user>"))
    with pytest.raises(ValueError, match="has another tokenizer or chat template"):
        run(tiny_world, tmp_path / "out", reference=other)


def test_errors_end_with_status_2_and_no_traceback(tiny_world, tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", *arguments(tiny_world, tmp_path, method="dpo-bt", gamma_end=3)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
