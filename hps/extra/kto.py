"""KTO's z0: how much likelier than the reference the policy finds responses that belong to other prompts."""

import itertools
from pathlib import Path

import numpy as np
import torch

from hps import dist
from hps import plan as planning
from hps.batches import Run
from hps.data.store import Lazy
from hps.model import PolicyModel
from hps.packing import Block


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


class Mismatched:
    """Of every visit its prompt with the preferred response of another one, cut at max_length tokens.

    blocks: V of them. ref_logps: (V,) float32 nats, theirs under the reference, once they were looked up.
    """

    def __init__(self, run: Run, max_length: int) -> None:
        partners = mismatched(run.plan)

        def make(v: int) -> Block:
            prompt = run.examples.block(run.plan.row[v], []).prompt
            w = partners[v]
            (response,) = run.examples.block(run.plan.row[w], run.plan.responses[w, :1]).responses
            return Block(prompt, (response[: max_length - len(prompt)],))

        self._run = run
        self.blocks = Lazy(len(partners), lambda a, b: [make(v) for v in range(a, b)])
        self.ref_logps = np.zeros(len(partners), dtype=np.float32)

    def look_up_reference(self, cache: Path, scorer: PolicyModel) -> int:
        """Fill `ref_logps` from the reference cache; how many log-probs had to be computed for it. Collective."""
        self.ref_logps, computed = self._run.score(cache, scorer, self.blocks)
        return computed

    def kl(self, policy: PolicyModel, step: int) -> float:
        """z0 of a step, nats: the mean log-ratio of its pairs over all ranks; a negative one counts as 0. Collective.

        It has no gradient. A few pairs estimate a KL divergence, which is never negative.
        """
        visits = self._run.plan.step(step)
        total = torch.zeros(1, dtype=torch.float64)
        for members in self._run.shares([self.blocks[v] for v in visits]):
            at = [visits[i] for i in members or [0]]  # an idle rank keeps in step with the others, as in the loop
            with torch.no_grad():
                logps = policy(self._run.pack([self.blocks[v] for v in at]))[:, 0].double().cpu()
            if members:
                total += (logps - torch.from_numpy(self.ref_logps[at])).sum()
        return max(0.0, float(dist.all_sum(total.to(self._run.ranks.device))) / len(visits))
