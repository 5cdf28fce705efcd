"""What the policy answers while it is trained: samples.jsonl."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hps import limits
from hps.data import store
from hps.model import PolicyModel
from hps.options import Config

SAMPLE_TOKENS = 128  # of an answer in samples.jsonl, at most


def sample(
    c: Config, policy: PolicyModel, tokenizer: PreTrainedTokenizerFast, examples: store.Store, step: int
) -> float:
    """Append to samples.jsonl what the policy answers after `step` updates; the seconds that it took.

    The most likely answers to the first prompts, so that all that changes between two steps is the policy. No random
    number is drawn, and dropout is off throughout, so that the run is the same as without.
    """
    from hps.prepare import generate

    began = time.perf_counter()
    count = min(c.sample_prompts, len(examples))
    prompts = [(examples.id(i), examples.block(i, []).prompt.tolist()) for i in range(count)]
    room = limits.positions(policy.causal_lm.config) - max(len(ids) for _, ids in prompts)
    how = dict(n=1, max_new_tokens=int(min(SAMPLE_TOKENS, room)), temperature=0.0, seed=0, counts=Counter())
    raw = {id for id, _ in prompts}  # so that all is shown as it was sampled
    mode = policy.lm.training  # on where layers are checkpointed
    policy.lm.eval()
    answers = list(generate.answer(policy.causal_lm, tokenizer, prompts, strings=raw, progress=False, **how))
    policy.lm.train(mode)
    records = []
    for (id, ids), (_, [response], _) in zip(prompts, answers, strict=True):
        records.append({"step": step, "id": id, "prompt": tokenizer.decode(ids), "response": response})
    with (Path(c.out) / "samples.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    shown = " ".join(records[0]["response"].split())[:200]
    tqdm.write(f"after {step} steps, {records[0]['id']}: {shown}", file=sys.stderr)
    return time.perf_counter() - began
