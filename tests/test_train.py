"""The loop: the same trajectory however it is split, sharded, packed, cached or interrupted; known first losses;
every user mistake named. Runs `train.py` on a tiny world, with the shapes that real runs pass."""

import json
import math
import re
import shutil
import signal
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SFT, arguments, distinct, flags, jsonl, losses, plain_logp, rewrite, run, run_ranks, tokenize_rows
from peft import AutoPeftModelForCausalLM

import data_prep
import train
from hps import batches, pretrained, reference
from hps.batches import Batch, objective
from hps.data import listwise, tokenizers
from hps.options import Config
from hps.pretrained import load_causal_lm
from hps.statistics import Divergence, Statistics, check_first_loss

LORA = dict(lora_rank=4, lora_alpha=8, lr=3e-2)
ONE = dict(tokens_per_micro_batch=100_000)  # one micro-batch per step


def close(values, expected, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(values, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def base(tiny_world, tmp_path_factory) -> list[float]:
    """The trajectory that others are compared with: one process, one micro-batch per step, packed, cached."""
    out = tmp_path_factory.mktemp("base")
    values = run(tiny_world, out, **ONE)
    assert len(values) == 6 and (out / "policy").exists()
    assert np.std(values[1:]) > 1e-2  # a trajectory that does not move would equal anything
    return values


# ------------------------------------------------------------------------------------- one trajectory, many ways


@pytest.mark.parametrize(
    "how", [dict(tokens_per_micro_batch=20), dict(share_prompt="false"), dict(gradient_checkpointing="true")]
)
def test_the_trajectory_does_not_depend_on_how(tiny_world, tmp_path, base, how):
    """8 prompts in one micro-batch or in eight of one prompt each; padded rows; activations computed again."""
    close(run(tiny_world, tmp_path, **how), base)


def test_a_live_reference_gives_the_cached_trajectory(tiny_world, tmp_path, base, monkeypatch):
    """Instead of the cache: a second copy of the start model, each response alone through its own head."""
    lm = load_causal_lm(str(tiny_world / "model"), dtype=torch.float32).requires_grad_(False)

    def live(cache, scorer, blocks, **how) -> tuple[np.ndarray, int]:
        return np.array([float(plain_logp(lm, b.prompt, y)) for b in blocks for y in b.responses], np.float32), 0

    monkeypatch.setattr(reference, "fill", live)
    close(run(tiny_world, tmp_path), base)


def test_several_ranks_give_the_trajectory_of_one(tiny_world, tmp_path, base):
    """Sharded on three gloo ranks, which share new caches and 8 prompts, each a micro-batch of its own: in every step
    one rank has nothing left and repeats a block with weight 0."""
    caches = dict(token_cache=tmp_path / "tokens", reference_cache=tmp_path / "cache")
    values = run_ranks(tiny_world, tmp_path / "run", 3, tokens_per_micro_batch=20, **caches)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    close(values, base)


@pytest.mark.parametrize("more", [dict(lora_kind="dora", lora_targets="all-linear", lr=3e-3), dict(lora_kind="rslora")])
def test_lora_on_two_ranks_exports_the_trained_adapter(tiny_world, tmp_path, more):
    """As one process does; both load in plain peft, of the kind and on the layers that were asked for."""
    one = run(tiny_world, tmp_path / "one", **LORA | more)
    close(run_ranks(tiny_world, tmp_path / "two", 2, **LORA | more), one)
    adapters = [AutoPeftModelForCausalLM.from_pretrained(tmp_path / which / "policy") for which in ("one", "two")]
    weights = [{n: p for n, p in a.named_parameters() if "lora_" in n} for a in adapters]
    assert weights[0] and all(p.abs().max() > 0 for p in weights[0].values())
    kind = more.get("lora_kind", "lora")
    layers = [module for module in adapters[0].modules() if hasattr(module, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {8 / 4 if kind != "rslora" else 8 / math.sqrt(4)}
    assert len(layers) == 3 * (7 if kind == "dora" else 2)  # of three blocks: all linear ones, or q_proj and v_proj
    assert any("magnitude" in name for name in weights[0]) == (kind == "dora")
    for name, p in weights[0].items():
        torch.testing.assert_close(p, weights[1][name], rtol=1e-3, atol=1e-5)


def test_bf16_follows_fp32(tiny_world, tmp_path, base):
    close(run(tiny_world, tmp_path / "full", dtype="bf16"), base, atol=0.1)
    low = run(tiny_world, tmp_path / "lora", dtype="bf16", **LORA | dict(lr=3e-3))
    assert low[0] == pytest.approx(math.log(2), abs=2e-2) and np.isfinite(low).all()


def test_the_learning_rate_warms_up_and_ends_where_told():
    """By hand: up in four equal steps, then half a cosine from lr to lr_end * lr."""
    c = Config("m", "d", "o", lr=2.0, warmup_steps=4, lr_end=0.1)
    close([train.lr_at(c, step, 24) for step in (0, 3, 4, 14, 24)], [0.5, 2.0, 2.0, 2.0 * 0.55, 0.2], atol=1e-12)


def test_a_warmup_longer_than_the_run_is_refused(tiny_world, tmp_path):
    """Before the model is loaded; one of just the run's 6 steps ends at its lr."""
    with pytest.raises(ValueError, match="warmup_steps = 7, but the run has 6 steps"):
        run(tiny_world, tmp_path / "long", warmup_steps=7)
    assert not (tmp_path / "long/run.json").exists()
    run(tiny_world, tmp_path / "just", warmup_steps=6)
    assert losses(tmp_path / "just", "lr")[-1] == pytest.approx(3e-3)


# --------------------------------------------------------------------------------------------------- going on


def test_a_resumed_run_is_bit_identical(tiny_world, tmp_path, base):
    """Stopped after some steps and started again with the same command: the remaining losses to the last bit."""
    whole = run(tiny_world, tmp_path / "whole", **ONE)
    assert whole == base  # the loop itself is deterministic
    assert run(tiny_world, tmp_path / "half", stop_after=4, **ONE) == whole[:4]
    (state,) = (tmp_path / "half/checkpoints").glob("*/state.json")
    assert json.loads(state.read_text())["first"] == [
        losses(tmp_path / "half", key)[0] for key in ("loss", "grad_norm")
    ]
    assert run(tiny_world, tmp_path / "half", **ONE) == whole
    for key in ("grad_norm", "lr", "gamma"):
        assert losses(tmp_path / "half", key) == losses(tmp_path / "whole", key)
    weights = [(tmp_path / which / "policy/model.safetensors").read_bytes() for which in ("half", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("how", [LORA, {}], ids=["lora", "full"])
def test_a_resumed_run_never_scores_the_reference_with_trained_weights(tiny_world, tmp_path, how):
    """With the cache gone, the model that the run began with fills it again: the base, or loaded once more."""
    cache = tmp_path / "cache"
    calm = run(tiny_world, tmp_path / "calm", **how)
    run(tiny_world, tmp_path / "run", stop_after=2, reference_cache=cache, **how)
    for shard in cache.rglob("shard-*"):
        shard.unlink()
    assert np.std(calm[2:]) > 1e-3
    close(run(tiny_world, tmp_path / "run", reference_cache=cache, **how), calm)


def test_a_run_does_not_go_on_with_other_inputs(tiny_world, tmp_path):
    """The same paths with other content behind them: data edited, start model retrained."""
    model, data, out = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out"
    shutil.copytree(tiny_world / "model", model)
    shutil.copy(tiny_world / "train.jsonl", data)
    run(tiny_world, out, model=model, data=data, stop_after=1)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="the data of this run changed since it began"):
        run(tiny_world, out, model=model, data=data)
    data.write_text("".join(lines))
    lm = load_causal_lm(str(model), dtype=torch.float32)
    lm.model.norm.weight.data += 1e-3
    lm.save_pretrained(model)
    with pytest.raises(ValueError, match="the model of this run changed since it began"):
        run(tiny_world, out, model=model, data=data)
    shutil.copytree(tiny_world / "model", model, dirs_exist_ok=True)
    run(tiny_world, out, model=model, data=tmp_path / "model/../data.jsonl")  # by another of its names


# -------------------------------------------------------------------------------------- models and references


def test_an_adapter_on_an_adapter_is_refused(tiny_world, tmp_path):
    """peft would name the first one's base as the base of the second, and the first one would be lost on loading."""
    run(tiny_world, tmp_path / "sft", **SFT | dict(lora_rank=4))
    start = tmp_path / "sft" / "policy"
    with pytest.raises(ValueError, match=r"is itself an adapter.*python -m hps\.evaluate\.export --model .*sft/policy"):
        run(tiny_world, tmp_path / "dpo", model=start, lora_rank=4)
    values = run(tiny_world, tmp_path / "full", model=start, lora_rank=0, method="dpo-bt")  # whole weights are fine
    assert values[0] == pytest.approx(math.log(2), abs=1e-6)


def test_another_reference_is_gone_before_the_first_step(tiny_world, tmp_path, monkeypatch):
    """It has been scored by then, and its memory is as much as the policy's."""
    loaded, alive = [], []
    real, lr_at = pretrained.load_causal_lm, train.lr_at

    def load(path, **how):
        lm = real(path, **how)
        loaded.append(weakref.ref(lm))
        return lm

    def count(c, step, steps):
        alive.append([lm() is not None for lm in loaded])
        return lr_at(c, step, steps)

    monkeypatch.setattr(pretrained, "load_causal_lm", load)
    monkeypatch.setattr(train, "lr_at", count)
    run(tiny_world, tmp_path, reference=tiny_world / "model", method="dpo-bt", stop_after=1)
    assert alive == [[True, False]]


def test_the_self_check_fails_on_a_wrong_reference(tiny_world, tmp_path, monkeypatch):
    real = reference.fill

    def wrong(*args, **how) -> tuple[np.ndarray, int]:
        logps, computed = real(*args, **how)
        return logps - np.arange(len(logps)) % 3, computed

    monkeypatch.setattr(reference, "fill", wrong)
    with pytest.raises(ValueError, match="with policy = reference dpo-bt must give 0.693147"):
        run(tiny_world, tmp_path, method="dpo-bt")
    assert not (tmp_path / "policy").exists()


def test_ctrl_c_stops_with_a_checkpoint(tiny_world, tmp_path, base, monkeypatch):
    """After the step at work, with status 75, and the same command goes on; the second one ends the run at once."""
    before, lr_at = signal.getsignal(signal.SIGINT), train.lr_at

    def interrupted(c, step, steps, times: int) -> float:
        for _ in range(times if step == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        return lr_at(c, step, steps)

    monkeypatch.setattr(train, "lr_at", partial(interrupted, times=1))
    with pytest.raises(SystemExit, match="75"):
        run(tiny_world, tmp_path, **ONE)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(train, "lr_at", partial(interrupted, times=2))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_world, tmp_path / "twice", **ONE)
    monkeypatch.undo()
    assert run(tiny_world, tmp_path, **ONE) == base


# ------------------------------------------------------------------------------------------------- the methods


def test_first_loss_is_known(tiny_world, tmp_path):
    """A run of one step over all prompts, of n responses each. PL: log n! of at most 5 ranks; kappa = N: log(1 + N).
    App. E: L = log(1 + N_1) + 0.5 log(1 + N_2), N_2 the rest below the second, N_1 = N_2 + 1 with y_2 among the
    opponents of y_1, else N_2."""
    data = rewrite(tiny_world, tmp_path, distinct)
    n = np.array([len(row["rewards"]) for row in jsonl(data)])
    two = dict(hps_form="full", positives=2, positive_lambda="1,0.5", n_factor="n_minus_one")
    cases = [
        (dict(hps_samples=3), math.log(2)),
        (dict(hps_form="full"), math.log(2)),
        (dict(method="ipo-uniform"), 1 / (4 * 0.5**2)),
        (dict(method="exo-random"), -math.log(2) - (math.log(0.999) + math.log(0.001)) / 2),
        (dict(method="infonca-pl", pl_responses=2), math.log(2)),
        (dict(method="sppo-pl", pl_form="official", pl_responses=2), None),  # known to the run's own check
        (dict(method="dpo-pl", pl_responses=5), [math.lgamma(min(k, 5) + 1) for k in n]),
        (dict(n_factor="n_minus_one"), np.log(n)),
        (two, np.log(n) + 0.5 * np.log(n - 1)),
        (two | dict(exclude_positives="true"), np.log(n - 1) + 0.5 * np.log(n - 1)),
    ]
    for i, (options, expected) in enumerate(cases):
        values = run(tiny_world, tmp_path / f"{i}", data=data, prompts_per_step=24, stop_after=1, **options)
        assert expected is None or values[0] == pytest.approx(np.mean(expected), abs=1e-4), options


@pytest.mark.parametrize(
    "method", ["dpo-hps", "exo-pl", "nca-pl", "ipo-bt", "sppo-uniform", "simpo-bt", "lipo-pl", "kto-bt"]
)
def test_a_step_waits_for_the_device_once(method):
    """Losses and statistics on the meta device, from which nothing can be read; the one read is `Statistics.read`."""
    with torch.device("meta"):
        valid, x = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
        packed = SimpleNamespace(valid=valid, num_tokens=torch.ones(2, 3, dtype=torch.int64))
        batch = Batch(packed, x, torch.zeros(2, 2), torch.ones(2), x, kl=0.5, weight=1.0)
        policy_logps = torch.zeros(2, 3, requires_grad=True)
    c = Config("m", "d", "o", method=method, pl_form="official" if method == "nca-pl" else "stagewise")
    per_prompt, statistics = objective(c)(policy_logps, batch), Statistics(c, torch.device("meta"))
    per_prompt.sum().backward()
    statistics.add(per_prompt, policy_logps, batch)
    statistics.add_expected(objective(c)(batch.ref_logps, batch), batch)


def test_metrics_of_two_positives_leave_the_second_out_of_the_rejected():
    """h = 1 3 2 -4 with beta .5: chosen .5, rejected (1 - 2) / 2 = -.5, which leaves 3 out; 1 beats one of two."""
    h, valid = torch.tensor([[1.0, 3.0, 2.0, -4.0, 0.0]]), torch.tensor([[True, True, True, True, False]])
    packed = SimpleNamespace(valid=valid, num_tokens=torch.tensor([[1, 9, 4, 4, 0]]))
    batch = SimpleNamespace(packed=packed, ref_logps=torch.full_like(h, -10.0), weight=1.0)
    statistics = Statistics(Config("m", "d", "o", beta=0.5, positives=2), torch.device("cpu"))
    statistics.add(torch.tensor([7.0]), h - 10, batch)
    assert statistics.read(1, torch.tensor(2.0), asked=False, late=True) == ({
        "loss": 7.0, "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0,
        "rewards/accuracies": 0.5, "logps/chosen": -9.0, "logps/rejected": -11.0,
    }, 2.0, False, True)  # fmt: skip
    assert statistics.largest.tolist() == [4.0, 2.0]  # nats; and by the root of that response's tokens


def test_a_diverging_run_is_told_once():
    """200 steps: 11 of 20 losses 5 % above the first one, or a norm beyond a thousand times the first."""
    calm, still, lost, torn = (Divergence(200) for _ in range(4))
    assert not any(calm.look(loss, 1.0 + i) for i, loss in enumerate([0.8] + [0.9, 0.7] * 100))  # ten of twenty
    assert not any(still.look(loss, 1.0) for loss in [0.6931] + [0.6939] * 100)  # rounding
    told = [bool(lost.look(loss, 1.0)) for loss in [0.7] * 30 + [0.8] * 30]
    assert told.index(True) == 40 and sum(told) == 1
    resumed = Divergence(200, lost.first)
    assert not any(resumed.look(0.69, 1.0) for _ in range(40)) and lost.first == [0.7, 1.0]
    told = [bool(torn.look(0.7, norm)) for norm in (0.5, 499.0, 501.0, 9999.0)]
    assert told == [False, False, True, False]


def test_a_dry_run_says_what_the_run_would_take(tiny_world, tmp_path, capsys):
    """Of 6 steps 4 are made, with the reference log-probs of these alone, and nothing is left behind."""
    run_of = partial(arguments, tiny_world, tmp_path / "out", reference_cache=tmp_path / "cache")
    train.main(run_of(dry_run="true", sample_every=1, save_every=1, eval_data=tiny_world / "test.jsonl"))
    assert not [*tmp_path.glob("out*")]
    told = capsys.readouterr().err
    found = re.search(r"6 steps of (\S+) s each: (\S+) minutes\nbefore them (\d+) reference log-probs", told)
    assert found and float(found[2]) == pytest.approx(6 * float(found[1]) / 60, abs=0.06)
    train.main(run_of())
    whole = re.search(r"reference log-probs: (\d+) computed", capsys.readouterr().err)
    scored = re.search(r"reference log-probs: (\d+) computed", told)
    assert whole and scored and int(whole[1]) + int(scored[1]) == int(found[3]) and int(whole[1]) > 0
    weights = sum(p.numel() for p in load_causal_lm(str(tiny_world / "model"), dtype=torch.float32).parameters())
    assert f"{12 * weights / 2**20:,.1f} MiB per checkpoint" in told
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-6)
    train.main(run_of(dry_run="true", method="kto-bt", lr=1.0))  # other settings than those of the run there
    kto = re.search(r"before them (\d+) reference log-probs", capsys.readouterr().err)
    assert kto and int(kto[1]) > 2 * 24  # a mismatched response per visit beside the pairs
    with pytest.raises(ValueError, match="--eval_data nowhere: there is no file of this name"):
        train.main(run_of(dry_run="true", eval_data="nowhere"))


def test_a_config_file_serves_several_methods(tiny_world, tmp_path, capsys):
    """What the method does not use of it is passed over and told, and is at its default; as flags it is an error."""
    path = tmp_path / "hps.toml"
    path.write_text('positives = 2\nhps_form = "full"\npositive_lambda = "1,0.5"\ngamma_end = 3\nbeta = 0.5\n')
    argv = arguments(tiny_world, tmp_path / "a", method="dpo-bt", beta=None, config=path)
    train.main(argv)
    assert "no use for positives, hps_form, gamma_end, positive_lambda of the --config file" in capsys.readouterr().err
    assert losses(tmp_path / "a") == run(tiny_world, tmp_path / "b", method="dpo-bt")


def test_differences_that_cancel_in_the_first_loss_are_seen():
    """log 2 on the mean, and a response 4 nats off; what rounding leaves of 400 tokens passes, and of some twenty in
    bf16, as seen on a real model (SmolLM2-135M-Instruct, 64 answers)."""
    c = Config("m", "d", "o", method="dpo-bt")
    for dtype, rounding in (("fp32", [0.01, 5e-4]), ("bf16", [0.905, 0.21])):
        c = replace(c, dtype=dtype)
        assert f"largest |log-ratio| {rounding[0]:.2g}" in check_first_loss(c, math.log(2), math.log(2), rounding)
        with pytest.raises(ValueError, match="step 0: a response's log-ratio is 4 nats where policy = ref"):
            check_first_loss(c, math.log(2), math.log(2), [4.0, 2.0])
    # SPPO squares log-ratios: what 16 answers of the same model gave in bf16.
    assert "loss 52.768582, expected 50" in check_first_loss(replace(c, method="sppo-bt"), 52.768582, 50.0, [1.9, 0.13])


def penalised_rewards(world: Path, penalty: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each prompt r_k - penalty L_k and L_k, the scored tokens with the end token."""
    tokenizer = tokenizers.load_tokenizer(str(world / "model"))
    examples, _ = tokenize_rows(tokenizer, listwise.read(world / "train.jsonl"), max_length=128)
    lengths = [np.array([len(ids) for ids in e.response_ids]) for e in examples]
    return [(e.rewards - penalty * L, L) for e, L in zip(examples, lengths, strict=True)]


def test_a_length_penalty_reaches_the_pairs_and_the_loss(tiny_world, tmp_path, monkeypatch):
    """SPPO's win rates of the best and the worst by r - .2 L: 2 ((s(gap) - 1/2) / (2 beta))^2 where h = 0. At 1,000
    per token best and worst of every prompt are one of its shortest and one of its longest responses."""
    options = dict(beta=0.1, pl_responses=2, prompts_per_step=24, length_penalty=0.2, stop_after=1)
    values = run(tiny_world, tmp_path / "a", method="sppo_winrate-pl", **options)
    gaps = [np.ptp(rewards) for rewards, _ in penalised_rewards(tiny_world, 0.2)]
    assert values[0] == pytest.approx(np.mean([50 * (1 / (1 + math.exp(-g)) - 0.5) ** 2 for g in gaps]), rel=1e-4)
    plans, real = [], batches.make_plan
    monkeypatch.setattr(batches, "make_plan", lambda c, examples: plans.append(real(c, examples)) or plans[-1])
    run(tiny_world, tmp_path / "b", method="dpo-bt", stop_after=1, length_penalty=1e3)
    lengths = [L for _, L in penalised_rewards(tiny_world, 0.0)]
    assert len(plans[0].row) == 2 * 24
    for row, (best, worst) in zip(plans[0].row, plans[0].responses, strict=True):
        assert (lengths[row][best], lengths[row][worst]) == (min(lengths[row]), max(lengths[row]))


def test_pairs_of_other_trainers_train_in_one_step(tiny_world, tmp_path, capsys):
    """Of messages, a table of strings and a JSON list, from which nothing is imported first: what an import gives. A
    row that cannot be used is told, and the second run of a file reads what the first has made."""
    arrow = pytest.importorskip("pyarrow", reason="parquet needs datasets, which is optional")
    from pyarrow import parquet

    rows = [(row.prompt[-1]["content"], *row.responses[:2]) for row in listwise.read(tiny_world / "train.jsonl")]
    talks = [[[dict(role=who, content=text)] for who, text in zip(("user", *2 * ["assistant"]), row)] for row in rows]
    messages = [dict(zip(("prompt", "chosen", "rejected"), talk)) for talk in talks]
    (tmp_path / "messages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in messages))
    strings = [dict(prompt=p, chosen=f" {a}", rejected=f" {b}") for p, a, b in [*rows, ("same", "x", "x")]]
    parquet.write_table(arrow.Table.from_pylist(strings), tmp_path / "table.parquet")
    (tmp_path / "list.json").write_text(json.dumps(messages, indent=1))
    how = dict(method="dpo-human", token_cache=tmp_path / "tokens", reference_cache=tmp_path / "cache")
    for path in (tmp_path / "messages.jsonl", tmp_path / "list.json", tmp_path / "table.parquet"):
        found = run(tiny_world, tmp_path / path.stem, data=path, **how)
        told = capsys.readouterr().err
        assert str(path) in told and ("rows_equal_responses 1" in told) == (path.stem == "table")
        outside = re.search(rf"^{path}: .*prompts_outside_template 24", told, re.MULTILINE)
        assert bool(outside) == (path.stem == "table")
        imported = tmp_path / f"imported/{path.stem}.jsonl"
        data_prep.main(["import", *flags(source="trl", input=path, output=imported)])
        assert found == run(tiny_world, tmp_path / f"again-{path.stem}", data=imported, **how)
        assert np.std(found[1:]) > 1e-2
    records = jsonl(tiny_world / "train.jsonl")  # list-wise rows in a table, which keep their ids
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "lists.parquet")
    assert run(tiny_world, tmp_path / "lists", data=tmp_path / "lists.parquet") == run(tiny_world, tmp_path / "rows")
    run(tiny_world, tmp_path / "second", data=tmp_path / "table.parquet", **how)
    counts = json.loads((tmp_path / "second/summary.json").read_text())["counts"]
    assert (counts["records_read"], counts["rows_equal_responses"], counts["rows_read"]) == (25, 1, 24)


def test_sft_learns_the_preferred_response(tiny_world, tmp_path):
    """Loss per token from log V at random weights; the file's order kept."""
    options = SFT | dict(data=tiny_world / "sft.jsonl", epochs=6, shuffle="no", lr=1e-2)
    values = run(tiny_world, tmp_path, **options)
    size = json.loads((tiny_world / "model/config.json").read_text())["vocab_size"]
    assert values[0] == pytest.approx(math.log(size), rel=0.05)
    assert values[-1] < values[0] - 1


# ------------------------------------------------------------------------------------- mistakes and odd data


def test_odd_rows_are_dropped_and_counted(tiny_world, tmp_path):
    """n = 1, all rewards equal, an empty response, an over-long prompt: left out, counted, nothing is NaN."""

    def change(rows):
        rows[0].update(responses=rows[0]["responses"][:1], rewards=[1.0])
        rows[1].update(rewards=[2.0] * len(rows[1]["responses"]))
        rows[2]["responses"][0] = ""
        rows[3]["prompt"][-1]["content"] = " ".join(["the"] * 500)

    values = run(tiny_world, tmp_path / "out", data=rewrite(tiny_world, tmp_path, change))
    found = json.loads((tmp_path / "out/summary.json").read_text())["counts"]
    dropped = ("rows_one_response", "rows_no_dispreferred", "responses_empty", "rows_overlong_prompt")
    assert [found[key] for key in dropped] == [1, 1, 1, 1]
    assert (found["rows_read"], found["rows_kept"]) == (24, 23)
    assert len(values) == math.ceil(2 * 21 / 8) and np.isfinite(values).all()


TWO = dict(hps_form="full", positives=2)
WRONG = [  # beside those of docs/MISTAKES.md, which tests/test_mistakes.py types
    (dict(method="dpo"), "method = 'dpo' does not exist: did you mean dpo-hps"),
    (dict(truncate="error", max_length=12), r"train\.jsonl:\d+: "),
    *((TWO | dict(positive_lambda=x), "give 2 comma-separated w") for x in ("1", "1,x", "1,-1", "1,nan", "inf,1")),
    (TWO | dict(positive_lambda="0,0"), "not all 0"),
    (dict(method="dpo-bt", label_smoothing=0.7), r"label_smoothing must lie in \[0, 0.5\), got 0.7"),
    (dict(beta=0), "beta must be positive"),
    (dict(positives=0), "positives must be positive"),
    (dict(candidates=-1), "candidates must not be negative"),
]
NOT_USED = [  # each set to what a method ignores: the last option is named
    dict(method="dpo-hps", pl_responses=3),
    dict(method="nca-hps", label_smoothing=0.1),
    dict(gamma_schedule="constant", gamma_end=3),
    dict(hps_form="full", hps_samples=2),
    dict(method="dpo-bt", positives=2),
    dict(hps_form="full", exclude_positives="true"),
    dict(reference_cache=None, method="slic-bt", beta=0.5),
    dict(method="simpo-bt", reference_cache="x"),
    dict(method="infonca-pl", pl_form="official"),
    dict(method="dpo-human", length_penalty=0.1),
    SFT | dict(length_penalty=0.1),
    dict(method="kto-hps", hps_form="full"),
    dict(method="kto-hps", n_factor="n_minus_one"),
    dict(method="kto-pl", pl_form="official"),
    dict(method="dpo-bt", desirable_weight=2.0),
    SFT | dict(loss="reward", sample_every=1),
]
ALONE = dict(sample_prompts=2, lora_alpha=4, eval_every=3)
WRONG += [
    ({key: value}, f"--{key} means nothing without .*--(sample_every|lora_rank|eval_data)")
    for key, value in ALONE.items()
]
WRONG.append((dict(lora_rank=4, export_dtype="bf16"), "--export_dtype means nothing without --lora_rank 0"))


@pytest.mark.parametrize(
    ("options", "message"), [*WRONG, *((options, f"does not use.*{list(options)[-1]}") for options in NOT_USED)]
)
def test_a_wrong_option_is_named(tiny_world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_world, tmp_path, **options)
