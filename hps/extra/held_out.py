"""What the policy makes of held-out data while it is trained: `eval/...` in metrics.jsonl, and which step was best."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from hps import batches, checkpoint, dist
from hps.extra import kto
from hps.io import files
from hps.methods import form
from hps.model import PolicyModel
from hps.options import Config
from hps.statistics import Statistics


class HeldOut:
    """One visit to each held-out prompt, drawn once, so that all that changes between two steps is the policy.

    Whom it contrasts is decided as in training, gamma's course laid over the file: a margin here is one against the
    opponents of the method's own sampler and does not compare across methods.

    examples: the data as a token store. longest: tokens of the longest prompt with a response.
    """

    def __init__(self, c: Config, tokenizer: PreTrainedTokenizerFast, ranks: dist.Ranks, *, going_on: bool) -> None:
        """Read and plan `c.eval_data`; ValueError as for the training data. going_on: from a checkpoint of this run."""
        self._c = dataclasses.replace(c, data=c.eval_data, epochs=1, shuffle="no")
        self._every, self._epochs = c.eval_every, c.epochs
        self._ranks, self._pad_id = ranks, tokenizer.pad_token_id
        self.examples = batches.open_examples(self._c, tokenizer, ranks)
        self._plan = batches.make_plan(self._c, self.examples)
        self.longest = self.examples.longest
        self._best = Path(c.out) / "best"  # the best policy so far
        if not going_on and ranks.first:  # then it is of a run that began before this one, perhaps another
            shutil.rmtree(self._best, ignore_errors=True)
        kept, advice = checkpoint.latest(self._best) if going_on else None, f"delete {self._best}"
        self._lowest = files.read_record(kept / "state.json", advice, loss=float)["loss"] if kept else math.inf

    def begin(self, policy: PolicyModel, references: Sequence[tuple[Path, PolicyModel]]) -> int:
        """Look up log-probs of the reference (its cache and model, if there is one); how many are new. Collective."""
        self._run = batches.Run(
            self._c, self._plan, self.examples, self._ranks, pad_id=self._pad_id, packs=not policy.padded
        )
        self._z0 = kto.Mismatched(self._run, self._c.max_length) if form(self._c) == "kto" else None
        parts = [self._run, *([self._z0] if self._z0 else [])]
        return sum(part.look_up_reference(*reference) for reference in references for part in parts)

    def due(self, step: int, steps: int) -> bool:
        """Whether to look after `step` of `steps` updates."""
        return step % (self._every or math.ceil(steps / self._epochs)) == 0 or step == steps

    def look(self, policy: PolicyModel, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
        """What `measure` finds after `step` updates; with --keep best the lowest loss's policy is saved. Collective."""
        found = self.measure(policy)
        if self._c.keep == "best" and found["eval/loss"] < self._lowest:
            self._lowest = found["eval/loss"]
            state = {"step": step, "loss": self._lowest}
            checkpoint.save(self._best, policy, optimizer, state, ranks=self._ranks)
        return found

    def go_back(self, policy: PolicyModel, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Give the policy the weights of its lowest held-out loss; the steps before it, and that loss. Collective."""
        path = checkpoint.latest(self._best)
        assert path is not None, "the last step looks, so there is a lowest loss"
        about = checkpoint.load(path, policy, optimizer, ranks=self._ranks)
        return about["step"], about["loss"]

    @torch.no_grad()
    def measure(self, policy: PolicyModel) -> dict[str, float]:
        """Loss and metrics of training, as means over the held-out prompts, by name. Collective."""
        statistics, loss, count = Statistics(self._c, self._ranks.device), batches.objective(self._c), 0
        for step in range(self._plan.steps):
            blocks = self._run.blocks(step)
            count += len(blocks) if self._c.loss != "sft" else sum(len(b.responses[0]) for b in blocks)
            kl = self._z0.kl(policy, step) if self._z0 else 0.0
            for batch in self._run.micro_batches(step, blocks, kl=kl):
                policy_logps = policy(batch.packed)
                statistics.add(loss(policy_logps, batch), policy_logps, batch)
        means, *_ = statistics.read(count, torch.zeros(()), asked=False, late=False)
        if not math.isfinite(means["loss"]):
            raise ValueError(
                f"--eval_data {self._c.data}: the loss on it is {means['loss']}: lower lr, or look at its rows"
            )
        return {f"eval/{key}": value for key, value in means.items()}
