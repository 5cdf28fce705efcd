"""Evaluate a policy against its reference: margins, KL, samples, reward, BLEU, win rate -> eval.json and one table row.

    python eval.py --model runs/hps/policy --reference M --data test.jsonl --out runs/hps/eval
    torchrun --nproc_per_node 2 eval.py ...           prompts shared out over ranks, none twice

Margins need candidates with rewards or a human pair; reward, harm and win rate need --samples and a --scorer.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hps import checkpoint, config, dist, limits, logps, model, reference
from hps.data import listwise, tokens
from hps.data.rows import Row
from hps.evaluate import metrics, report, scoring
from hps.io import files
from hps.lab import scorers
from hps.lab.world import World
from hps.packing import Block, micro_batches, pack
from hps.prepare import generate, rewards


@dataclass
class Config:
    # -- what is evaluated --
    model: str  # the policy: a local folder (weights or adapter) or a hub name
    reference: str  # the model that log-ratios are taken against, usually the SFT model
    data: str  # list-wise JSON Lines of held-out prompts, with candidates and rewards, or human pairs
    out: str  # folder for eval.json, per_prompt.json and samples.jsonl
    name: str = ""  # method's name in the table row; empty takes the policy's folder
    limit: int = 0  # evaluate the first so many prompts; 0 means all
    # -- samples --
    samples: int = 8  # fresh responses per prompt, at the temperature below; 0 for none
    temperature: float = 0.9  # of the samples
    max_new_tokens: int = 256  # a sample ends there at the latest
    seed: int = 0  # of the samples
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


def main(argv: list[str] | None = None) -> None:
    c, set_keys = config.parse(Config, argv, prog="eval.py", description=str(__doc__).split("\n")[0])
    of_reward_model = {"scorer_dtype", "objectives"}
    of_samples = {"temperature", "max_new_tokens", "seed", "scorer", "baseline", *of_reward_model}
    config.check_used(set_keys, set(vars(c)) - (set() if c.samples else of_samples), what="--samples 0")
    if c.scorer == "none" or scorers.is_world(c.scorer):
        config.check_used(set_keys, set(vars(c)) - of_reward_model, what=f"--scorer {c.scorer}")
    config.check_choices(c, dtype=model.DTYPES, scorer_dtype=model.DTYPES)
    out = Path(c.out)
    if c.baseline and not (Path(c.baseline) / "samples.jsonl").exists():
        raise ValueError(f"--baseline {c.baseline}: no samples.jsonl there; evaluate that model first")
    if c.baseline and c.scorer == "none":
        raise ValueError("--baseline compares rewards of samples: it needs a --scorer")
    if (out / "samples.jsonl").resolve() in (Path(c.data).resolve(), Path(c.baseline, "samples.jsonl").resolve()):
        raise ValueError(f"--out {out} would overwrite --data or --baseline: choose another folder")
    for package in ("scipy.stats", *(("nltk.translate.bleu_score", "sacrebleu") if c.samples else ())):
        metrics.extra(package)  # now rather than after hours
    with (
        dist.session(timeout=timedelta(minutes=c.timeout)) as ranks,
        checkpoint.held(c, ranks, what="eval.py", caches=["reference_cache"]),
    ):
        evaluate(c, ranks)


def evaluate(c: Config, ranks: dist.Ranks) -> None:
    """Every rank evaluates its share of the prompts and writes it; the first one puts the shares together."""
    out = Path(c.out)
    drawn: Counter[str] = Counter()
    how = dict(dtype=c.scorer_dtype, objectives=c.objectives, tokens_per_micro_batch=c.tokens_per_micro_batch)
    how = dict(device=ranks.device, counts=drawn) | ({} if scorers.is_world(c.scorer) else how)
    score = None if c.scorer == "none" else scorers.load(c.scorer, **how)
    world = scorers.world_of(c.scorer)
    rows = listwise.read(c.data)[: c.limit or None]
    if world:
        rewards.check_prompts(rows, world.task)
    by_id = {row.id: row for row in rows}
    tokenizer = tokens.load_common(c.model, c.reference, c.template_options)
    fitting, counts = tokens.tokenize_rows(tokenizer, rows, max_length=c.max_length, progress=ranks.first)
    examples = [e for e in fitting if human_pair(e) or rewards_differ(e)]
    counts["rows_nothing_to_compare"] = len(fitting) - len(examples)
    if not examples:
        raise ValueError(f"{c.data}: no row has rewards that differ, or a human pair (chosen, rejected), that fits")

    dtype = model.compute_dtype(c.dtype)
    lms = (model.load_causal_lm(path, dtype=dtype, tokenizer=tokenizer) for path in (c.model, c.reference))
    policy, ref = (model.PolicyModel(lm).to(ranks.device) for lm in lms)
    longest = max(map(tokens.longest, examples))
    limits.check(policy, longest=longest)
    limits.check(ref, longest=longest)

    # The same cache as in training: the log-probs of a test set are computed once for all methods and seeds.
    packing = dict(budget=c.tokens_per_micro_batch, pad_id=tokenizer.pad_token_id)
    weights = dist.from_first(partial(model.fingerprint, ref.lm), ranks)
    identity = dict(weights=weights, tokenizer=tokens.fingerprint(tokenizer), dtype=c.dtype)
    cache = reference.open_cache(c.reference_cache, **identity)
    blocks = [Block(e.prompt_ids, e.response_ids) for e in examples]
    ref_logps, _ = reference.fill(cache, ref, blocks, ranks=ranks, **packing)
    ref_logps = np.split(ref_logps, np.cumsum([len(block.responses) for block in blocks])[:-1])  # (K,) per prompt

    mine = range(ranks.rank, len(examples), ranks.world_size)
    shown = "policy log-probs" * ranks.first
    scored = scoring.score(policy, [blocks[i] for i in mine], device=ranks.device, progress=shown, **packing)
    winners = [Block(blocks[i].prompt, (blocks[i].responses[pair(examples[i])[0]],)) for i in mine]
    kls = exact_kl(policy, ref, winners, ranks.device, c.tokens_per_micro_batch)
    human = any(map(human_pair, examples))
    values: dict[str, dict[str, float]] = {}
    for i, policy_logps, kl in zip(mine, scored, kls, strict=True):
        texts = [by_id[examples[i].id].responses[k] for k in examples[i].kept]
        found = candidate_metrics(examples[i], policy_logps - ref_logps[i], texts, human_pairs=human)
        values[examples[i].id] = found | {"kl_exact": kl}
    del ref  # the scorer goes to the device with the first sample, where three models may find no room
    if c.samples:
        prompts = [(examples[i].id, examples[i].prompt_ids.tolist()) for i in mine]
        how = dict(n=c.samples, max_new_tokens=c.max_new_tokens, temperature=c.temperature, seed=c.seed)
        sampled = []
        # Unfinished ones included: rambling is a failure, not a missing value.
        shown = dict(counts=drawn, progress=ranks.first)
        strings = {row.id for row in rows if isinstance(row.prompt, str)}
        for id, texts in generate.answer(policy.lm, tokenizer, prompts, strings=strings, **shown, **how):
            earned = None if score is None or not texts else tuple(score(by_id[id].prompt, texts))
            if earned and None in earned:  # as if there were no scorer, or the mean would be over others
                drawn["prompts_unscored"] += 1
                earned = None
            sampled.append(Row(id, by_id[id].prompt, tuple(texts), earned, None, None, c.model, c.data))
            values[id] |= sample_metrics(sampled[-1], by_id[id], world) if texts else {}
        counts |= {f"samples_{key}": n for key, n in drawn.items()}
        if sampled:
            listwise.write(out / f"part-{ranks.rank}.jsonl", sampled)
    files.write_json(out / f"part-{ranks.rank}.json", {"values": values, "counts": counts})
    dist.gather("done", ranks, days=True)  # one share of samples may take hours longer than another
    if ranks.first:
        merge(c, out, [e.id for e in examples], ranks.world_size)


def human_pair(example: tokens.Example) -> tuple[int, int] | None:
    """The pair that a person chose from, where both of its responses fit."""
    both = example.chosen is not None and example.rejected is not None
    return (example.chosen, example.rejected) if both else None


def rewards_differ(example: tokens.Example) -> bool:
    """Whether the candidates can be ranked (metrics.order)."""
    return example.rewards is not None and example.rewards.min() < example.rewards.max()


def pair(example: tokens.Example) -> tuple[int, int]:
    """The pair that single-pair metrics look at: the human one, else the best candidate and the runner-up."""
    best, runner_up = human_pair(example) or metrics.order(example.rewards)[:2].tolist()
    return best, runner_up


def candidate_metrics(
    example: tokens.Example, h: np.ndarray, texts: list[str], *, human_pairs: bool
) -> dict[str, float]:
    """Margins of one prompt from log-ratios h (k,) in nats, without beta; the length-corrected one of its pair.

    Of data with `human_pairs`, a prompt that lost its own (an empty response, say) has no single-pair margin: the
    runner-up in its place would be another measure under the same name.
    """
    found = metrics.margins(h, example.rewards) if rewards_differ(example) else {}
    w, o = pair(example)
    rm = float(h[w] - h[o])
    if human_pair(example):
        found["rm_dpo"] = rm
    if human_pair(example) or not human_pairs:
        for unit, items in (("chars", texts), ("tokens", example.response_ids)):
            found[f"rm_rdpo_{unit}"] = rm - 0.01 * (len(items[w]) - len(items[o]))  # Tables 2 and 5; alpha is theirs
    return found | {"kl_seq": float(h[w])}


def exact_kl(
    policy: model.PolicyModel, ref: model.PolicyModel, winners: list[Block], device: torch.device, budget: int
) -> list[float]:
    """For each winner the sum over its positions of the exact next-token KL(policy || reference), nats."""
    found = np.empty(len(winners))
    for members in micro_batches([len(w) for w in winners], budget=budget, world_size=1)[0]:
        shared = not (policy.padded or ref.padded)
        packed = pack([winners[i] for i in members], pad_id=0, share_prompt=shared).to(device)
        with torch.no_grad():
            pairs = [(one.hidden(packed), None if one.padded else one.head) for one in (policy, ref)]
            kl = scoring.token_kl(*pairs[0], *pairs[1])
        found[members] = logps.sequence_logps(kl, packed.num_tokens)[:, 0].cpu()
    return found.tolist()


def sample_metrics(samples: Row, row: Row, world: World | None) -> dict[str, float]:
    """Reward, length, BLEU of one prompt's samples; harm and junk where the world can tell."""
    found = {"length": float(np.mean([len(y.split()) for y in samples.responses]))}
    hypothesis = samples.responses[0]
    if samples.rewards is not None:
        found["true_reward"] = float(np.mean(samples.rewards))
        found["best_of_k_reward"] = float(np.max(samples.rewards))
        hypothesis = samples.responses[int(np.argmax(samples.rewards))]
    # The data's own preferred answer; a world's pair is of random candidates, and its best one stands for that.
    own = row.chosen is not None and (world is None or row.rewards is None)
    target = row.responses[row.chosen if own else int(np.argmax(row.rewards))]
    found["bleu_char"] = metrics.bleu_char(hypothesis, target)
    found["bleu_word"] = metrics.bleu_word(hypothesis, target)
    if world is not None:
        found["junk"] = 100 * float(np.mean([world.junk_fraction(y) for y in samples.responses]))
        if world.is_risky(row.prompt):  # harm is counted on risky prompts
            found["harm"] = 100 * float(np.mean([world.is_harmful(row.prompt, y) for y in samples.responses]))
    return found


def merge(c: Config, out: Path, ids: list[str], world_size: int) -> None:
    """Put the ranks' shares together: per_prompt.json, samples.jsonl, eval.json and the table row on stdout."""
    parts = [files.read_json(out / f"part-{rank}.json") for rank in range(world_size)]
    values = {id: found for part in parts for id, found in part["values"].items()}
    counts = parts[0]["counts"]
    for part in parts[1:]:  # what was tokenised is the same on all ranks, what was sampled is shared out
        counts |= {key: counts[key] + n for key, n in part["counts"].items() if key.startswith("samples_")}
    if c.samples:
        sharers = range(min(world_size, len(ids)))  # the ranks that had a prompt
        drawn = {row.id: row for rank in sharers for row in listwise.read(out / f"part-{rank}.jsonl")}
        listwise.write(out / "samples.jsonl", [drawn[id] for id in ids])
    if c.baseline:
        against = {row.id: row for row in listwise.read(Path(c.baseline) / "samples.jsonl")}
        if not any(row.rewards for row in against.values()):
            raise ValueError(f"{c.baseline}: its samples have no rewards; evaluate it with the same --scorer")
        for id, row in drawn.items():
            if id not in against or len(against[id].responses or row.responses) != len(row.responses):
                raise ValueError(f"{c.baseline}: other samples of {id!r}; evaluate it the same way")
            if row.rewards and against[id].rewards:
                values[id] |= metrics.win_tie_lose(row.rewards, against[id].rewards)
    table = {name: {id: values[id][name] for id in ids if name in values[id]} for name in metrics.METRICS}
    table = {name: column for name, column in table.items() if column}
    # Over the prompts: what more prompts would say of this model, and nothing of other runs or data.
    means = {name: metrics.item(metrics.world_interval(list(column.values()))) for name, column in table.items()}
    files.write_json(out / "per_prompt.json", table)
    result = {
        "method": c.name or Path(c.model).parent.name,
        "intervals": "over prompts",
        "metrics": {name: found | {"prompts": len(table[name])} for name, found in means.items()},
        "counts": counts,
        "config": vars(c),
    }
    files.write_json(out / "eval.json", result)
    for rank in range(world_size):
        (out / f"part-{rank}.json").unlink()
        (out / f"part-{rank}.jsonl").unlink(missing_ok=True)
    print(report.table({"worlds": 1, "rows": [{"method": result["method"], "runs": 1, "metrics": means}]}))
    lost = ", ".join(f"{key} {n}" for key, n in counts.items() if n)
    tqdm.write(f"{out / 'eval.json'}: {len(ids)} prompts ({lost})", file=sys.stderr)


if __name__ == "__main__":
    config.run_main(main)
