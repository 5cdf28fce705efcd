"""What a run visits: its plan, drawn from the options and the data, and the token blocks and rewards of its visits."""

import numpy as np

from hps import plan as planning
from hps.data import store
from hps.options import Config, needs_rewards
from hps.packing import Block
from hps.samplers import sampler_options


def make_plan(c: Config, examples: store.Store) -> planning.Plan:
    """All visits of the run, before its first step."""
    order = dict(epochs=c.epochs, prompts_per_step=c.prompts_per_step, seed=c.seed, shuffle=c.shuffle)
    if c.loss == "sft":
        return planning.plan_demonstrations(preferred(examples), examples.keys, **order)
    sampler = c.method.split("-")[1]
    options = {key: getattr(c, key) for key in sampler_options(sampler)}
    columns = (examples.rewards, examples.identity, examples.keys)
    return planning.plan(*columns, sampler=sampler, human=examples.human, **order, **options)


def preferred(examples: store.Store) -> np.ndarray:
    """The response of each prompt that SFT learns: the human choice, else the highest reward, else the only one."""
    best = examples.human[:, 0].astype(np.int64)
    for rows in planning.chunks(len(best)):
        for i, rewards in zip(rows, examples.rewards[rows[0] : rows[-1] + 1], strict=True):
            if best[i] < 0 and len(rewards) > 1 and np.isnan(rewards[0]):
                where = examples.where(i)
                raise ValueError(f"{where}: several responses, and neither chosen nor rewards say which one to learn")
            best[i] = best[i] if best[i] >= 0 else np.argmax(rewards)
    return best


def visit_block(plan: planning.Plan, examples: store.Store, v: int) -> Block:
    """The prompt and the responses of visit `v`, preferred first."""
    ks = plan.responses[v]
    return examples.block(plan.row[v], ks[ks >= 0])


def touched_blocks(plan: planning.Plan, examples: store.Store) -> tuple[store.Blocks, np.ndarray]:
    """Every response that the plan visits, once, gathered by prompt; and which of them each entry of
    `plan.responses[plan.responses >= 0]` is, (T,) int64."""
    v, k = np.nonzero(plan.responses >= 0)
    width = plan.responses.max() + 1
    responses, at = np.unique(plan.row[v] * width + plan.responses[v, k], return_inverse=True)
    rows, ks = np.divmod(responses, width)
    first = np.flatnonzero(np.diff(rows, prepend=-1, append=-1))  # where a prompt's begin, and the end
    return store.Blocks(len(first) - 1, lambda i: examples.block(rows[first[i]], ks[first[i] : first[i + 1]])), at


def visit_rewards(c: Config, plan: planning.Plan, examples: store.Store) -> np.ndarray:
    """The rewards (V, K) float32 that the loss looks at: of the plan's responses, and 0 where it looks at none."""
    rewards = np.zeros(plan.responses.shape, dtype=np.float32)
    if needs_rewards(c):
        v, k = np.nonzero(plan.responses >= 0)
        rewards[v, k] = examples.rewards_of(plan.row[v], plan.responses[v, k])
    return rewards
