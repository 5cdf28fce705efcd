"""What a run would take, from a few steps of it: the lines of `train.py --dry_run`."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import nn

from hps.options import Config
from hps.plan import Plan

STEPS = 4  # that are made; the first one warms up and is not timed


def apart(c: Config) -> Config:
    """The options of a run in a folder of its own, which keeps nothing there."""
    off = dict(sample_every=0, log_to="", eval_data="", keep="last", save_minutes=0.0, save_every=0, stop_after=0)
    return dataclasses.replace(c, out=f"{c.out}.dry_run", **off)


def report(
    plan: Plan,
    trained: Sequence[nn.Parameter],
    *,
    step_seconds: float,
    scored: int,
    scoring_seconds: float,
    mismatched: bool,
) -> str:
    """Time and disk of the whole run.

    Args:
        plan: that of all its steps. trained: parameters that are trained, or this rank's shards of them.
        step_seconds: of one step. scored: reference log-probs computed for `STEPS` steps, in `scoring_seconds`.
        mismatched: each visit asks for one more, KTO's.
    """
    visit, column = np.nonzero(plan.responses >= 0)
    responses = plan.row[visit] * (plan.responses.max() + 1) + plan.responses[visit, column]
    lines = [f"{plan.steps:,} steps of {step_seconds:.3g} s each: {plan.steps * step_seconds / 60:,.1f} minutes"]
    if scored:
        touched = len(np.unique(responses)) + mismatched * len(plan.row)
        minutes = touched * scoring_seconds / scored / 60
        lines += [f"before them {touched:,} reference log-probs, where none is in the cache: {minutes:,.1f} minutes"]
    checkpoint = 12 * sum(p.numel() for p in trained) / 2**20  # weights and two moments, fp32
    lines += [f"{checkpoint:,.1f} MiB per checkpoint and rank, and twice that while the next one is written"]
    told = "dry run: only the caches were written. Without samples and looks at held-out data the run would take"
    return "\n".join([told, *lines])
