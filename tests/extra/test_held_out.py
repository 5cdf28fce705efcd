"""Evaluation while training: its numbers are those of other runs on the same data, and it changes nothing else."""

import json
import shutil

import numpy as np
import pytest
from helpers import SFT, jsonl, losses, run, run_ranks

from hps.io import files

KEYS = ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies")
TRAINING = ("loss", "grad_norm", "rewards/margins")


def held_out(world, **changes) -> dict:
    return dict(eval_data=world / "test.jsonl", eval_every=2) | changes


def seen(out) -> list[tuple[int, float, float, float]]:
    """Step and values of each look."""
    records = jsonl(out / "metrics.jsonl")
    return [(r["step"], *(r[key] for key in KEYS)) for r in records if "eval/loss" in r]


@pytest.mark.parametrize("method", ["dpo-hps", "kto-bt"])
def test_the_last_look_is_what_another_run_sees(tiny_world, tmp_path, method):
    """A run that starts from the exported policy, with the old reference, on the held-out prompts in the file's order:
    two steps, gamma's course over them, by too little to change anything."""
    how = dict(method=method, prompts_per_step=6)
    run(tiny_world, tmp_path / "a", **how, **held_out(tiny_world))
    steps, *values = zip(*seen(tmp_path / "a"), strict=True)
    assert steps == (1, 3, 5, 7) and np.std(values[0]) > 1e-3
    start = dict(model=tmp_path / "a/policy", reference=tiny_world / "model", data=tiny_world / "test.jsonl")
    run(tiny_world, tmp_path / "b", epochs=1, shuffle="no", lr=1e-12, **how, **start)
    expected = [np.average(losses(tmp_path / "b", key.removeprefix("eval/")), weights=(6, 2)) for key in KEYS]
    assert [v[-1] for v in values] == pytest.approx(expected, abs=2e-5)


def test_looks_change_nothing_and_resume_and_ranks_agree(tiny_world, tmp_path):
    """Training is that of a run without looks; a run that was stopped between two of them, and two ranks of which one
    is idle at times, see the same."""
    how = dict(prompts_per_step=5, tokens_per_micro_batch=100)
    plain = run(tiny_world, tmp_path / "plain", **how)
    looks = held_out(tiny_world, eval_every=3, **how)
    assert run(tiny_world, tmp_path / "whole", **looks) == plain
    assert losses(tmp_path / "whole", "grad_norm") == losses(tmp_path / "plain", "grad_norm")
    run(tiny_world, tmp_path / "half", stop_after=4, **looks)
    run(tiny_world, tmp_path / "half", **looks)
    assert [x[0] for x in seen(tmp_path / "whole")] == [2, 5, 8, 9]
    assert seen(tmp_path / "half") == seen(tmp_path / "whole")
    assert run_ranks(tiny_world, tmp_path / "two", 2, **looks) == pytest.approx(plain, abs=1e-5)
    assert np.array(seen(tmp_path / "two")) == pytest.approx(np.array(seen(tmp_path / "whole")), rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_policy_of_the_lowest_held_out_loss_is_kept(tiny_world, tmp_path, ranks):
    """SFT on few rows learns them by heart. Stopped after the best step and beyond, the run keeps that step's weights:
    another run that starts from them has its loss first."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join((tiny_world / "sft.jsonl").read_text().splitlines(keepends=True)[:4]))
    test = tmp_path / "test.jsonl"
    test.write_text("".join((tiny_world / "sft.jsonl").read_text().splitlines(keepends=True)[8:16]))
    options = SFT | dict(data=data, eval_data=test, eval_every=1, keep="best", epochs=8, prompts_per_step=2, lr=3e-2)
    foreign = dict(
        lr=1e-3, epochs=1, keep="best", eval_data=test, eval_every=1
    )  # leaves a best policy and no checkpoint
    run(tiny_world, tmp_path / "foreign", **SFT | foreign | dict(data=data, prompts_per_step=2))
    shutil.copytree(tmp_path / "foreign/best", tmp_path / "run/best")
    about = tmp_path / "run/best"
    for state in about.rglob("state.json"):
        files.write_record(state, files.read_record(state, "") | {"loss": 0.0})
    for stop in (8, 0):
        train = run if ranks == 1 else lambda world, out, **how: run_ranks(world, out, ranks, **how)
        train(tiny_world, tmp_path / "run", stop_after=stop, **options)
    values = losses(tmp_path / "run", "eval/loss")
    assert 0 < np.argmin(values) < 7 and values[-1] > min(values) + 0.05
    start = SFT | dict(model=tmp_path / "run/policy", data=test, epochs=1, shuffle="no", stop_after=1)
    assert run(tiny_world, tmp_path / "again", **start)[0] == pytest.approx(min(values), abs=2e-5)
    kept = int(np.argmin(values)) + 1
    assert json.loads((tmp_path / "run/summary.json").read_text())["kept_step"] == kept
    assert f"lowest held-out loss: step | {kept} |" in (tmp_path / "run/policy/README.md").read_text()
