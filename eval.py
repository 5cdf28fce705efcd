"""Evaluate a policy against its reference: margins, KL, samples, reward, BLEU, win rate -> eval.json and one table row.

    python eval.py --model runs/hps/policy --reference M --data test.jsonl --out runs/hps/eval
    torchrun --nproc_per_node 2 eval.py ...           prompts shared out over ranks, none twice

Margins need candidates with rewards or a human pair; reward, harm and win rate need --samples and a --scorer.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from hps import config
from hps.io import files
from hps.options import CHOICES


@dataclass
class Config:
    # -- what is evaluated --
    model: str  # the policy: a local folder (weights or adapter) or a hub name
    reference: str  # the model that log-ratios are taken against, usually the SFT model
    data: str  # list-wise JSON Lines of held-out prompts, with candidates and rewards, or human pairs
    out: str  # folder for eval.json, per_prompt.json and samples.jsonl
    name: str = ""  # method's name in the table row; empty takes the folder of the run, or of the model
    limit: int = 0  # evaluate the first so many prompts; 0 means all
    # -- samples --
    samples: int = 8  # fresh responses per prompt, at the temperature below; 0 for none
    temperature: float = 0.9  # of the samples
    max_new_tokens: int = 256  # a sample ends there at the latest
    seed: int = 0  # of the samples
    max_rows: int = 512  # samples decoded at once: fewer take less memory
    scorer: str = "none"  # of the samples: none, world-true[:SEED], or a reward model's folder, file or hub name
    scorer_dtype: str = "fp32"  # of a reward model's weights, fp32 or bf16; rewards are fp32 either way
    objectives: str = "one"  # of a reward model's head: one, or of several mean, score (ArmoRM's gate) or one's name
    baseline: str = ""  # out folder of another evaluation (the SFT model's), for the win rate
    # -- compute --
    dtype: str = "fp32"  # fp32 or bf16
    max_length: int = 2048  # tokens of prompt and response together; longer candidates are dropped and counted
    template_options: str = ""  # NAME=VALUE,... of the chat template: enable_thinking=false, date=2026-01-31
    tokens_per_micro_batch: int = 4096  # packed tokens of one forward
    reference_cache: str = "runs/reference_cache"  # folder of reference log-probs, shared with training
    timeout: float = 10.0  # minutes that ranks wait for each other; for each other's shares of the prompts longer


FREE = {"out", "name", "max_rows", "tokens_per_micro_batch", "reference_cache", "timeout"}  # decide no result
OF_REWARD_MODEL = {"scorer_dtype", "objectives"}


def read_options(argv: Sequence[str] | None = None) -> tuple[Config, dict[str, str]]:
    """The options of a command line, and where each was set; ValueError for what cannot be, without torch."""
    c, given = config.parse(Config, argv, prog="eval.py", description=str(__doc__).split("\n")[0])
    of_samples = {"temperature", "max_new_tokens", "seed", "max_rows", "scorer", "baseline", *OF_REWARD_MODEL}
    config.check_used(given, set(vars(c)) - (set() if c.samples else of_samples), what="--samples 0")
    config.check_choices(c, dtype=CHOICES["dtype"], scorer_dtype=CHOICES["dtype"])
    positive = ("max_new_tokens", "max_length", "max_rows", "tokens_per_micro_batch")
    for name, least in (dict(limit=0, samples=0) | dict.fromkeys(positive, 1)).items():
        if getattr(c, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(c, name)}")
    if not Path(c.data).is_file():
        raise ValueError(f"--data {c.data}: there is no file of this name")
    if c.baseline and not (Path(c.baseline) / "samples.jsonl").exists():
        raise ValueError(f"--baseline {c.baseline}: no samples.jsonl there; evaluate that model first")
    if c.baseline and c.scorer == "none":
        raise ValueError("--baseline compares rewards of samples: it needs a --scorer")
    taken = [Path(c.data).resolve(), Path(c.baseline, "samples.jsonl").resolve()]
    if Path(c.out, "samples.jsonl").resolve() in taken:
        raise ValueError(f"--out {c.out} would overwrite --data or --baseline: choose another folder")
    if (Path(c.out) / "eval.json").exists():
        before, now = files.read_json(Path(c.out) / "eval.json").get("config", {}), vars(c)
        other = [key for key in now if key not in FREE and before.get(key) != now[key]]
        if told := "; ".join(f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in other):
            raise ValueError(f"{c.out} holds an evaluation with other settings ({told}): choose another --out")
    return c, given


if __name__ == "__main__":  # a typo is told before the seconds that torch takes to load
    config.run_main(read_options)

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from hps import checkpoint, dist, limits, model, pretrained, reference
from hps.data import listwise, store, tokenizers
from hps.data.rows import Row, stream
from hps.evaluate import metrics, per_prompt, report, scoring
from hps.lab import scorers
from hps.prepare import rewards


def main(argv: Sequence[str] | None = None) -> None:
    c, given = read_options(argv)
    out = Path(c.out)
    if c.scorer == "none" or scorers.is_world(c.scorer):
        config.check_used(given, set(vars(c)) - OF_REWARD_MODEL, what=f"--scorer {c.scorer}")
    for package in ("scipy.stats", *(("nltk.translate.bleu_score", "sacrebleu") if c.samples else ())):
        metrics.extra(package)  # now rather than after hours
    with (
        dist.session(timeout=timedelta(minutes=c.timeout)) as ranks,
        checkpoint.held(c, ranks, what="eval.py", caches=["reference_cache"]),
    ):
        try:
            evaluate(c, ranks)
        finally:
            if ranks.first:
                shutil.rmtree(out / "tokens", ignore_errors=True)  # a network disk may keep what is still open


def evaluate(c: Config, ranks: dist.Ranks) -> None:
    """Every rank evaluates its share of the prompts and writes it; the first one puts the shares together."""
    out = Path(c.out)
    drawn: Counter[str] = Counter()
    how: dict[str, Any] = dict(device=ranks.device, counts=drawn)
    if not scorers.is_world(c.scorer):
        how |= dict(dtype=c.scorer_dtype, objectives=c.objectives, tokens_per_micro_batch=c.tokens_per_micro_batch)
    score = None if c.scorer == "none" else scorers.load(c.scorer, **how)
    world = scorers.world_of(c.scorer)
    rows = listwise.Rows(c.data)[: c.limit or None]
    for _ in rewards.read_prompts(rows, world.task) if world else ():
        pass  # it refuses what no world has asked
    tokenizer = tokenizers.load_common(c.model, c.reference, c.template_options)
    how = dict(max_length=c.max_length, limit=c.limit, ranks=ranks)
    examples = store.open_store(out / "tokens", c.data, tokenizer, **how)
    human: np.ndarray = (examples.human >= 0).all(1)  # a person's pair of which both responses fit
    ranked = np.fromiter((r.min() < r.max() for r in examples.rewards), bool)  # NaN is not below NaN
    compared, sizes = np.flatnonzero(human | ranked), examples.sizes
    counts = examples.counts | {"rows_nothing_to_compare": len(examples) - len(compared)}
    if not len(compared):
        raise ValueError(f"{c.data}: no row has rewards that differ, or a human pair (chosen, rejected), that fits")

    dtype = pretrained.compute_dtype(c.dtype)
    lms = (pretrained.load_causal_lm(path, dtype=dtype, tokenizer=tokenizer) for path in (c.model, c.reference))
    policy, ref = (model.PolicyModel(lm).to(ranks.device) for lm in lms)
    limits.check(policy, longest=examples.longest)
    limits.check(ref, longest=examples.longest)

    # The same cache as in training: the log-probs of a test set are computed once for all methods and seeds.
    packing = dict(budget=c.tokens_per_micro_batch, pad_id=tokenizer.pad_token_id)
    weights = dist.from_first(partial(pretrained.fingerprint, ref.lm), ranks)
    identity = dict(weights=weights, tokenizer=tokenizers.fingerprint(tokenizer), dtype=c.dtype)
    cache = reference.open_cache(c.reference_cache, **identity)

    def blocks(of: np.ndarray, chosen: Callable[[int], Sequence[int]]) -> store.Lazy:
        return store.Lazy(len(of), lambda a, b: [examples.block(i, chosen(i)) for i in of[a:b]])

    def all_of(i: int) -> Sequence[int]:
        return range(sizes[i])

    def pair(i: int) -> list[int]:
        """What single-pair metrics look at: the human pair, else the best candidate and the runner-up."""
        return examples.human[i].tolist() if human[i] else metrics.order(examples.rewards[i])[:2].tolist()

    ref_logps, _ = reference.fill(cache, ref, blocks(compared, all_of), ranks=ranks, **packing)
    ends = np.cumsum(sizes[compared])[ranks.rank :: ranks.world_size]

    # What is kept of a prompt is a number per metric, NaN where it has none.
    mine = compared[ranks.rank :: ranks.world_size]
    columns: dict[str, np.ndarray] = {}

    def keep(n: int, found: dict[str, float]) -> None:
        for name, value in found.items():
            if not np.isfinite(value):
                raise ValueError(f"{examples.where(mine[n])}: {name} is {value}: check the models' weights and dtype")
            columns.setdefault(name, np.full(len(mine), np.nan))[n] = value

    mine_of_rows = rows[examples.lines[mine] - 1]
    shown = "policy log-probs" * ranks.first
    scored = scoring.score(policy, blocks(mine, all_of), device=ranks.device, progress=shown, **packing)
    winners = blocks(mine, lambda i: pair(i)[:1])
    kls = scoring.exact_kl(policy, ref, winners, device=ranks.device, budget=c.tokens_per_micro_batch)
    for n, (i, row, policy_logps, kl) in enumerate(zip(mine, mine_of_rows, scored, kls, strict=True)):
        h, ks = policy_logps - ref_logps[ends[n] - len(policy_logps) : ends[n]], pair(i)
        texts = [row.responses[examples.kept[i][k]] for k in ks]
        lengths = {"chars": list(map(len, texts)), "tokens": list(map(len, examples.block(i, ks).responses))}
        of_pair = per_prompt.pair_metrics(h[ks], lengths, human=bool(human[i]), human_pairs=bool(human.any()))
        keep(n, of_pair | {"kl_exact": kl})
        if ranked[i]:
            keep(n, metrics.margins(h, examples.rewards[i]))
    if c.samples and len(mine):
        prompts = store.Lazy(
            len(mine), lambda a, b: [(examples.id(i), examples.block(i, ()).prompt.tolist()) for i in mine[a:b]]
        )
        how = {key: getattr(c, key) for key in ("max_new_tokens", "temperature", "seed", "max_rows")}
        how |= dict(n=c.samples, counts=drawn, progress=ranks.first)

        def rewarded() -> Iterator[Row]:
            for n, (row, samples) in enumerate(zip(mine_of_rows, stream(unscored), strict=True)):
                if samples.responses:
                    earned = None if score is None else tuple(score(row.prompt, list(samples.responses)))
                    if earned and None in earned:  # as if there were no scorer, or the mean would be over others
                        drawn["prompts_unscored"] += 1
                        earned = None
                    samples = replace(samples, rewards=earned)
                    keep(n, per_prompt.sample_metrics(samples, row, world))
                yield samples

        unscored = out / f"part-{ranks.rank}.unscored.jsonl"
        # Unfinished ones included: rambling is a failure, not a missing value.
        answers = per_prompt.sampled(policy, ref, tokenizer, mine_of_rows, prompts, keep, packing=packing, **how)
        listwise.write(unscored, (replace(row, source=c.model) for row in answers))
        del policy, ref  # the scorer goes to the device with its first texts: three models may find no room
        listwise.write(out / f"part-{ranks.rank}.jsonl", rewarded())
    with files.replacing(out / f"part-{ranks.rank}.safetensors") as path:
        save_file(columns, path)
    every = dist.gather(drawn, ranks, days=True)  # one share of samples may take hours longer than another
    if ranks.first:
        for found in every if c.samples else ():
            counts |= {f"samples_{key}": counts.get(f"samples_{key}", 0) + n for key, n in found.items()}
        ids = store.Lazy(len(compared), lambda a, b: [examples.id(i) for i in compared[a:b]])
        merge(c, out, ids, counts, ranks.world_size)


def merge(c: Config, out: Path, ids: Sequence[str], counts: dict[str, int], world_size: int) -> None:
    """Put the ranks' shares together: per_prompt.json, samples.jsonl, eval.json and the table row on stdout."""
    columns = {name: np.full(len(ids), np.nan) for name in metrics.METRICS}
    for rank in range(world_size):
        for name, values in load_file(out / f"part-{rank}.safetensors").items():
            columns[name][rank::world_size] = values
    samples = out / "samples.jsonl"
    if c.samples:
        shares = [stream(out / f"part-{rank}.jsonl") for rank in range(world_size)]
        listwise.write(samples, (next(shares[n % world_size]) for n in range(len(ids))))
    if c.baseline:
        against, places = listwise.Rows(Path(c.baseline) / "samples.jsonl"), listwise.Places()
        scored = [places.add(row.id, n) is None and bool(row.rewards) for n, row in enumerate(against)]
        if not any(scored):
            raise ValueError(f"{c.baseline}: its samples have no rewards; evaluate it with the same --scorer")
        for n, row in enumerate(stream(samples)):
            place = places.get(row.id)
            other = row if place is None else against[place]
            if place is None or len(other.responses or row.responses) != len(row.responses):
                raise ValueError(f"{c.baseline}: other samples of {row.id!r}; evaluate it the same way")
            if row.rewards and other.rewards:
                for name, value in metrics.win_tie_lose(row.rewards, other.rewards).items():
                    columns[name][n] = value
    columns = {name: column for name, column in columns.items() if not np.isnan(column).all()}
    # Over the prompts: what more prompts would say of this model, and nothing of other runs or data.
    means = {name: metrics.world_interval(x[~np.isnan(x)]) for name, x in columns.items()}
    with files.replacing(out / "per_prompt.json") as path, path.open("w", encoding="utf-8") as file:
        for name, column in columns.items():  # metric -> id -> value; of one metric at a time, for the memory's sake
            values = {id: x for id, x in zip(ids, column.tolist(), strict=True) if x == x}
            file.write(("," if file.tell() else "{") + json.dumps({name: values}, indent=1)[1:-2])
        file.write("\n}\n")
    result = {
        "method": c.name or (Path(c.model).parent if Path(c.model).name == "policy" else Path(c.model)).name,
        "intervals": "over prompts",
        "metrics": {name: found | {"prompts": int(np.isfinite(columns[name]).sum())} for name, found in means.items()},
        "counts": counts,
        "config": vars(c),
    }
    files.write_json(out / "eval.json", result)
    for part in (part for rank in range(world_size) for part in out.glob(f"part-{rank}.*")):
        part.unlink()
    print(report.table({"worlds": 1, "rows": [{"method": result["method"], "runs": 1, "metrics": means}]}))
    lost = ", ".join(f"{key} {n}" for key, n in counts.items() if n)
    tqdm.write(f"{out / 'eval.json'}: {len(ids)} prompts ({lost})", file=sys.stderr)


if __name__ == "__main__":
    config.run_main(main)
