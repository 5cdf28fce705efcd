"""KTO's z0: how much likelier than the reference the policy finds responses that belong to other prompts."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hps import dist
from hps import plan as planning
from hps.data import store
from hps.model import PolicyModel
from hps.options import Config
from hps.packing import Block, micro_batches, pack


def mismatched(plan: planning.Plan) -> np.ndarray:
    """For every visit the visit (V,) int64 whose preferred response its prompt is put to, for KTO's z0.

    It is the next one in the step, cyclically, as in KTO's own code; one of the same prompt is passed over. A step
    without another prompt (a last step of one visit) takes the nearest visit of the steps before it, so that its z0
    rests on few pairs, but on real ones.

    Raises:
        ValueError: the first step has one prompt only.
    """
    partners = np.empty(len(plan.row), dtype=np.int64)
    for step in map(plan.step, range(plan.steps)):
        for i, v in enumerate(step):
            others = itertools.chain(step[i + 1 :], step[:i], reversed(range(step.start)))
            partner = next((w for w in others if plan.row[w] != plan.row[v]), None)
            if partner is None:
                raise ValueError("KTO puts prompts to each other's responses, and the first step has only one prompt")
            partners[v] = partner
    return partners


def mismatched_blocks(c: Config, plan: planning.Plan, examples: store.Store) -> store.Blocks:
    """Of every visit its prompt with the preferred response of another (KTO's z0), cut at max_length."""
    partners = mismatched(plan)

    def make(v: int) -> Block:
        w = partners[v]
        (response,) = examples.block(plan.row[w], plan.responses[w, :1]).responses
        prompt = examples.block(plan.row[v], []).prompt
        return Block(prompt, (response[: c.max_length - len(prompt)],))

    return store.Blocks(len(partners), make)


def mismatched_kl(
    policy: PolicyModel,
    blocks: Sequence[Block],
    ref_logps: np.ndarray,
    visits: range,
    c: Config,
    ranks: dist.Ranks,
    packing: dict[str, Any],
) -> float:
    """KTO's z0 of a step, nats: the mean log-ratio of its mismatched pairs over all ranks; a negative one counts as 0.

    It has no gradient. A few pairs estimate a KL divergence, which is never negative.
    """
    total = torch.zeros(1, dtype=torch.float64)
    lengths = [len(blocks[v]) for v in visits]
    for members in micro_batches(lengths, budget=c.tokens_per_micro_batch, world_size=ranks.world_size)[ranks.rank]:
        at = [visits[i] for i in members or [0]]  # an idle rank keeps in step with the others, as in the loop
        with torch.no_grad():
            logps = policy(pack([blocks[v] for v in at], **packing).to(ranks.device))[:, 0].double().cpu()
        if members:
            total += (logps - torch.from_numpy(ref_logps[at])).sum()
    dist.reshard(policy)
    return max(0.0, float(dist.all_sum(total.to(ranks.device))) / len(visits))
