"""What a step of training is given: the plan's visits as micro-batches, all that a loss looks at, and the loss.

The plan says which prompt meets which responses; the store has their tokens and rewards, the reference cache their
log-probs. Here the three are put together, the same way however many ranks there are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hps import dist, losses, reference
from hps import plan as planning
from hps.data import store
from hps.methods import form, parts, positive_stages
from hps.model import PolicyModel
from hps.options import Config
from hps.packing import Block, Packed, micro_batches, pack, to_device
from hps.samplers import sampler_options


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank: B prompts with up to K responses each, column 0 preferred, all on the rank's device.

    packed: the tokens, with `valid` (B, K) bool and `num_tokens` (B, K) int64 scored tokens. ref_logps: (B, K) float32
    summed log-probs under the reference, nats, 0 where the loss needs none. log_q: (B, K-1) float32 log-weights of the
    opponents in the loss: q's own in the full form, else how often each was drawn (0 for a single draw). kappa: (B,)
    float32, N of Eq. 8. rewards: (B, K) float32 external rewards, 0 where the loss looks at none. kl: KTO's estimate of
    the KL divergence in this step, nats. weight: 1, or 0 for the repeated block of an idle rank.
    """

    packed: Packed
    ref_logps: Tensor
    log_q: Tensor
    kappa: Tensor
    rewards: Tensor
    kl: float
    weight: float


def objective(c: Config) -> Callable[[Tensor, Batch], Tensor]:
    """The per-prompt loss of a run, `loss(policy_logps, batch) -> (B,)`, from summed log-probs (B, K) in nats.

    Of a reward model `policy_logps` are its rewards: -log sigmoid(r(chosen) - r(rejected)) (Eq. 15) is DPO on the human
    pair with rewards in the place of log-ratios (see `as_preference`).
    """
    if c.loss == "sft":
        return lambda policy_logps, batch: -policy_logps[:, 0]
    loss, sampler = parts(c)
    options = {key: getattr(c, key) for key in loss.options}

    def per_prompt(policy_logps: Tensor, batch: Batch) -> Tensor:
        h = logratios_of(policy_logps, batch)
        given = {"valid": batch.packed.valid, **options}
        if loss.form != "stage":  # beside the paper's five
            from hps.extra.losses import kto_loss, listwise_loss

            return (
                kto_loss(h, batch.kl, **given) if loss.form == "kto" else listwise_loss(loss, h, batch.rewards, **given)
            )
        given["num_tokens"] = batch.packed.num_tokens
        if sampler == "pl":
            return losses.plackett_luce_loss(loss, h, **given)
        if c.positives > 1:
            return losses.multi_positive_loss(loss, h, batch.log_q, **positive_stages(c), **given)
        return losses.stage_loss(loss, h, batch.log_q, kappa=batch.kappa, **given)

    return per_prompt


def logratios_of(policy_logps: Tensor, batch: Batch) -> Tensor:
    """h = log pi_theta(y|x) - log pi_ref(y|x), (B, K) float32 nats, 0 where a ragged row has no response."""
    return torch.where(batch.packed.valid, policy_logps - batch.ref_logps, 0.0)


class Run:
    """All visits of a run and what belongs to them, in host memory; V visits, K responses at most.

    ref_logps: (V, K) float32 nats, once they were looked up. rewards: (V, K) float32, 0 where the loss looks at none.
    packs: whether the model takes packed rows (hps.limits).
    """

    def __init__(
        self,
        c: Config,
        plan: planning.Plan,
        examples: store.Store,
        ranks: dist.Ranks,
        *,
        pad_id: int,
        packs: bool = True,
    ):
        self.plan, self.examples, self.ranks = plan, examples, ranks
        self._budget = c.tokens_per_micro_batch
        self._layout = dict(pad_id=pad_id, share_prompt=c.share_prompt and packs)
        self.ref_logps = np.zeros(plan.responses.shape, dtype=np.float32)
        self.rewards = np.zeros_like(self.ref_logps)
        if form(c) == "list":
            at = np.nonzero(plan.responses >= 0)  # -1 pads the rows of the plan
            self.rewards[at] = examples.rewards_of(plan.row[at[0]], plan.responses[at])

    def blocks(self, step: int) -> list[Block]:
        """The prompt and the responses of each visit of a step, preferred first; those of all ranks, in order."""
        visits = self.plan.step(step)
        return [
            self.examples.block(self.plan.row[v], self.plan.responses[v][self.plan.responses[v] >= 0]) for v in visits
        ]

    def micro_batches(self, step: int, blocks: list[Block], *, kl: float = 0.0) -> Iterator[Batch]:
        """This rank's share of a step, of which `blocks` are all. Every rank gets the same number of micro-batches, or
        collectives would hang. kl: as in `Batch`."""
        visits = self.plan.step(step)
        for members in self.shares(blocks):
            # A rank with nothing left repeats the step's first block with weight 0: collectives must stay in step.
            here = members or [0]
            at = [visits[i] for i in here]
            packed = self.pack([blocks[i] for i in here])
            K = packed.valid.shape[1]  # the widest prompt of this micro-batch; the plan's columns go on beyond it
            yield Batch(
                packed=packed,
                ref_logps=self._column(self.ref_logps[at][:, :K]),
                log_q=self._column(self.plan.log_q[at][:, : K - 1]),
                kappa=self._column(self.plan.kappa[at]),
                rewards=self._column(self.rewards[at][:, :K]),
                kl=kl,
                weight=1.0 if members else 0.0,
            )

    def look_up_reference(self, cache: Path, scorer: PolicyModel) -> int:
        """Fill `ref_logps` from the reference cache; how many log-probs `scorer` had to compute for it. Collective."""
        touched, at = touched_blocks(self.plan, self.examples)  # once each: epochs and views meet them again
        found, computed = self.score(cache, scorer, touched)
        self.ref_logps[self.plan.responses >= 0] = found[at]
        return computed

    def score(self, cache: Path, scorer: PolicyModel, blocks: Sequence[Block]) -> tuple[np.ndarray, int]:
        """Log-probs (T,) float32 nats of all responses of `blocks`, and how many had to be computed. Collective."""
        return reference.fill(cache, scorer, blocks, ranks=self.ranks, budget=self._budget, **self._layout)

    def shares(self, blocks: Sequence[Block]) -> list[list[int]]:
        """Which of the blocks this rank computes, by micro-batch; empty ones where it is idle."""
        how = dict(budget=self._budget, share_prompt=self._layout["share_prompt"])
        return micro_batches(blocks, world_size=self.ranks.world_size, **how)[self.ranks.rank]

    def pack(self, blocks: list[Block]) -> Packed:
        """Blocks as one micro-batch on the rank's device."""
        return pack(blocks, **self._layout).to(self.ranks.device)

    def _column(self, values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), self.ranks.device)


def open_examples(c: Config, tokenizer: Any, ranks: dist.Ranks) -> store.Store:
    """The token store of `c.data`, of pairs in TRL's format as of list-wise rows. Collective."""
    from hps.data import rows

    need_rewards = c.loss != "sft" and (parts(c)[1] != "human" or form(c) == "list")
    data, counts = c.data, {}
    if rows.holds_pairs(data):
        from hps.prepare import importers

        imported = dist.from_first(lambda: importers.import_pairs(c.data, c.token_cache, need_rewards), ranks)
        data, counts = imported.values()
    how = {key: getattr(c, key) for key in ("max_length", "truncate", "candidates", "length_penalty")}
    how |= {"closing": c.loss == "reward", "need_rewards": need_rewards, "ranks": ranks}
    found = store.open_store(c.token_cache, data, tokenizer, **how)
    found.counts = counts | found.counts
    return found


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
    best = examples.human[:, 0].astype(np.int64)  # -1 where a row has no human choice
    for rows in planning.chunks(len(best)):
        for i, rewards in zip(rows, examples.rewards[rows[0] : rows[-1] + 1], strict=True):
            if best[i] < 0 and len(rewards) > 1 and np.isnan(rewards[0]):
                where = examples.where(i)
                raise ValueError(f"{where}: several responses, and neither chosen nor rewards say which one to learn")
            best[i] = best[i] if best[i] >= 0 else np.argmax(rewards)
    return best


def touched_blocks(plan: planning.Plan, examples: store.Store) -> tuple[store.Lazy, np.ndarray]:
    """Every response that the plan visits, once, gathered by prompt; and which of them each entry of
    `plan.responses[plan.responses >= 0]` is, (T,) int64."""
    v, k = np.nonzero(plan.responses >= 0)
    width = plan.responses.max() + 1  # makes (prompt, response) one number, which sorts by prompt
    responses, at = np.unique(plan.row[v] * width + plan.responses[v, k], return_inverse=True)
    rows, ks = np.divmod(responses, width)
    first = np.flatnonzero(np.diff(rows, prepend=-1, append=-1))  # where each prompt's responses begin, and the end

    def read(a: int, b: int) -> list[Block]:
        return [examples.block(rows[first[i]], ks[first[i] : first[i + 1]]) for i in range(a, b)]

    return store.Lazy(len(first) - 1, read), at
