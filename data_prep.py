"""Prepare list-wise preference data: worlds, imports, candidates, rewards, a check before training.

    python data_prep.py world    --out data/world                                   a self-made world, offline
    python data_prep.py import   --source hh-rlhf --input FILE --output FILE.jsonl  a foreign format
    python data_prep.py export   --format trl --input FILE --output FILE.jsonl      pairs for other trainers
    python data_prep.py generate --model M --input IN --output OUT --n 8            candidate responses
    python data_prep.py annotate --scorer R --input IN --output OUT                 rewards by a reward model
    python data_prep.py doctor   --model M --input IN                               what to know before training

`python data_prep.py COMMAND --help` lists the options of one. `torchrun --nproc_per_node 2 -- data_prep.py generate`
shares the prompts out over processes; a killed `generate` goes on when it is started again, with torchrun or without.
So does `annotate` with a reward model.
"""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hps import config, dist, model, samplers
from hps.data import listwise, tokens
from hps.io import files, hub
from hps.lab import scorers, world
from hps.prepare import doctor, generate, importers, journal, rewards


@dataclass
class World:
    out: str  # folder for model/ (untrained), sft.jsonl, train.jsonl, valid.jsonl, test.jsonl
    seed: int = 0  # of the world's facts, its splits and the untrained weights
    domain: str = "safe"  # safe (single turn, half of it risky), help (multi-turn, facts) or both
    train: int = 400  # prompts to train preferences on
    valid: int = 100  # prompts to choose settings on
    test: int = 300  # prompts to report on
    demonstrations: int = 48000  # answers for supervised fine-tuning, the first half of good quality


@dataclass
class Import:
    source: str  # hh-rlhf, pku-saferlhf, ultrafeedback, nectar, trl or authors
    input: str  # file in that format: .jsonl or .json (.gz, .xz), .parquet, or hf://datasets/OWNER/NAME@REVISION/FILE
    output: str  # list-wise JSON Lines to write, and OUTPUT.manifest.json beside it
    order: str = ""  # pku-saferlhf: helpful or safe; ultrafeedback: overall or fine-grained
    limit: int = 0  # rows to keep at most; 0 means all
    skip: int = 0  # usable rows to leave out first, so that splits are disjoint


@dataclass
class Export:
    format: str  # trl (conversational; standard for string prompts) or hh-rlhf
    input: str  # list-wise JSON Lines
    output: str  # JSON Lines in that format, and OUTPUT.manifest.json beside it
    pair: str = "human"  # human (chosen, rejected) or rewards (highest against lowest)


@dataclass
class Generate:
    model: str  # model that answers: a local folder or a hub name
    input: str  # list-wise JSON Lines with prompts
    output: str  # the same with candidates behind the responses that were there
    n: int = 8  # distinct candidates a prompt
    temperature: float = 0.9  # of sampling
    max_new_tokens: int = 256  # a response that has not ended there is dropped and counted
    max_prompt_length: int = 1024  # longer prompts are dropped and counted, tokens
    limit: int = 0  # so many prompts, the first that are short enough; 0: all
    seed: int = 0  # of sampling; a prompt's candidates depend on it and on the prompt's id only
    dtype: str = "fp32"  # fp32 or bf16
    max_rows: int = 512  # sequences decoded at once (a small model gains from more), or handed to vLLM at once
    engine: str = "hf"  # hf (this code, on any transformers model) or vllm (if it is installed)


@dataclass
class Annotate:
    scorer: str  # world-est[:SEED[:NOISE]], world-true[:SEED], human (1, 0), or a reward model: folder or hub name
    input: str  # list-wise JSON Lines
    output: str  # the same with rewards
    pairs: bool = False  # give rows without a human pair one: two random responses, the one of higher reward chosen
    dtype: str = "fp32"  # of a reward model's weights, fp32 or bf16; rewards are fp32 either way
    objectives: str = "one"  # of a reward model's head: one, or mean of several
    remote_revision: str = ""  # run the code that a reward model brings, as of this commit; empty: never
    tokens_per_micro_batch: int = 4096  # packed tokens of a reward model's forward


@dataclass
class Doctor:
    input: str  # list-wise JSON Lines
    model: str  # its tokenizer counts the tokens
    max_length: int = 2048  # tokens of prompt and response together
    truncate: str = "drop"  # beyond max_length: drop (and count) the response, error, or keep_end of the prompt
    json: bool = False  # print JSON for machines instead of a page


def report(counts: dict[str, int], output: str) -> None:
    print(f"{output}: " + ", ".join(f"{key} {n}" for key, n in counts.items()), file=sys.stderr)


def make_world(c: World) -> None:
    about = world.write(Path(c.out), **{k: v for k, v in vars(c).items() if k != "out"})
    report({k: v for k, v in about.items() if isinstance(v, int)}, c.out)


def import_rows(c: Import) -> None:
    local, name = hub.fetch(c.input)
    rows, counts, reasons, left_out = importers.import_file(
        c.source, local, order=c.order, limit=c.limit or None, skip=c.skip
    )
    listwise.write(c.output, rows)
    if name:
        print(f"read from {name}", file=sys.stderr)
    if left_out:
        print(f"{c.input}: columns left out: {', '.join(left_out)}", file=sys.stderr)
    options = dataclasses.replace(c, input=local)
    tell(options, "import", counts, reasons, name=name, columns_left_out=left_out)


def export_rows(c: Export) -> None:
    records, counts, reasons, _ = importers.export_rows(c.format, listwise.read(c.input), pair=c.pair)
    listwise.write_lines(c.output, records)
    tell(c, "export", counts, reasons)


def tell(c: Any, command: str, counts: dict[str, int], reasons: list[str], *, name: str = "", **more: Any) -> None:
    """Print what was left out and why, and write it to the manifest; name: the input's on the hub."""
    for reason in reasons:
        print(reason, file=sys.stderr)
    options = {key: value for key, value in vars(c).items() if key not in ("input", "output")}
    facts = {"command": command, "options": options, "counts": counts, **more, "first_reasons": reasons}
    importers.write_manifest(c.input, c.output, facts, name=name)
    report(counts, c.output)


def generate_candidates(c: Generate) -> None:
    config.check_choices(c, dtype=model.DTYPES, engine=("hf", "vllm"))
    in_shares(c, generate_share)


def in_shares(c: Any, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(c, *arguments, ranks)` on every rank, while no other process works on the same output, and remove its
    journals when that is written."""
    with dist.session(timeout=timedelta(days=30)) as ranks:  # a rank may be done days before another
        Path(c.output).parent.mkdir(parents=True, exist_ok=True)
        advice = "wait until it ends, or choose another --output"
        lock = files.lock(Path(f"{c.output}.lock"), what=work.__name__, advice=advice) if ranks.first else nullcontext()
        with lock:
            if ranks.first:
                files.remove_stale_temporaries(Path(c.output).parent, Path(c.output).name)
            work(c, *arguments, ranks)
            for path in journal.files(c.output) if ranks.first else ():
                path.unlink()


# What the journals hold of each prompt, beside its id.
SAMPLED = {"responses": (list, str), "counts": (dict, int)}
SCORED = {"rewards": (list, float), "counts": (dict, int)}
# Options that change none of it: a run that was killed may go on with others.
FREE = {"output", "max_rows", "pairs", "tokens_per_micro_batch"}
Work = Callable[[list[listwise.Row], journal.Journal], None]


def journalled(
    c: Any, rows: list[listwise.Row], ranks: dist.Ranks, work: Work, holds: dict[str, Any]
) -> dict[str, dict]:
    """Have `work` note every world_size-th of the rows that no journal has; the first rank gets all records, by id."""
    settings = {key: value for key, value in vars(c).items() if key not in FREE}
    settings |= {key: digest(settings[key]) for key in ("model", "scorer", "input") if key in settings}
    done = journal.read(c.output, settings, **holds)
    dist.barrier()  # none may write before all have read
    mine = [row for row in rows if row.id not in done][ranks.rank :: ranks.world_size]
    if mine:
        work(mine, journal.Journal(c.output, ranks.rank, settings))
    dist.barrier()
    return journal.read(c.output, settings, **holds) if ranks.first else {}


def generate_share(c: Generate, ranks: dist.Ranks) -> None:
    """Generate for this rank's share of the prompts; the first rank then writes the output."""
    if c.engine == "vllm" and ranks.sharded:
        raise ValueError("--engine vllm spreads over GPUs by itself: start it without torchrun")
    if c.limit < 0:
        raise ValueError(f"limit must not be negative, got {c.limit}")
    rows = listwise.read(c.input)
    tokenizer = tokens.load_tokenizer(c.model)
    prompts = {row.id: prompt_ids(tokenizer, row) for row in rows}
    rows = [row for row in rows if len(prompts[row.id]) <= c.max_prompt_length]
    counts = Counter(prompts=len(prompts), prompts_overlong=len(prompts) - len(rows))
    if c.limit:
        counts["prompts_beyond_limit"] = len(rows[c.limit :])
        rows = rows[: c.limit]
    if not rows:
        raise ValueError(f"{c.input}: no prompt fits into max_prompt_length = {c.max_prompt_length}")

    def work(mine: list[listwise.Row], notes: journal.Journal) -> None:
        draw(c, [(row.id, prompts[row.id]) for row in mine], tokenizer, notes, ranks)

    done = journalled(c, rows, ranks, work, SAMPLED)
    if ranks.first:
        written = []
        for row in rows:
            counts.update(done[row.id]["counts"])
            texts = done[row.id]["responses"]
            written.append(dataclasses.replace(row, responses=(*row.responses, *texts), rewards=None))
        listwise.write(c.output, written)
        tell(c, "generate", counts, [])


def prompt_ids(tokenizer, row: listwise.Row) -> list[int]:
    """Token ids of a row's prompt; what is refused is refused with its file and line."""
    try:
        return tokens.encode_prompt(tokenizer, row.prompt)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def draw(
    c: Generate, prompts: list[tuple[str, list[int]]], tokenizer, done: journal.Journal, ranks: dist.Ranks
) -> None:
    """Generate for some prompts (id, token ids) and note each in the journal as soon as it has its responses."""
    if c.engine == "vllm":
        longest = max(len(ids) for _, ids in prompts)
        lm = generate.load_vllm(c.model, dtype=c.dtype, max_length=longest + c.max_new_tokens)
    else:
        lm = model.load_causal_lm(c.model, dtype=model.compute_dtype(c.dtype)).to(ranks.device)
    counts: Counter[str] = Counter()
    for id, samples in generate.generate(
        lm,
        prompts,
        n=c.n,
        counts=counts,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=c.max_new_tokens,
        temperature=c.temperature,
        seed=c.seed,
        max_rows=c.max_rows,
        progress=ranks.first,
    ):
        texts = [generate.text_of(tokenizer, one) for one in samples]
        done.write({"id": id, "responses": texts, "counts": counts})
        counts.clear()


def digest(path: str) -> str:
    """A hash of what a file, or each of a folder's files, holds; what is no path (a hub name) stands for itself."""
    if not Path(path).exists():
        return path
    inside = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
    sums = "".join(files.sha256(file) for file in inside if file.is_file())
    return hashlib.sha256(bytes.fromhex(sums)).hexdigest()


OF_REWARD_MODELS = ("dtype", "objectives", "remote_revision", "tokens_per_micro_batch")


def annotate_rows(c: Annotate) -> None:
    """Give every response a reward; by a reward model, a killed run goes on, and torchrun shares the prompts out."""
    rows = listwise.read(c.input)
    ours = c.scorer == "human" or c.scorer.split(":")[0] in ("world-true", "world-est")
    if ours:
        unused = [key for key in OF_REWARD_MODELS if getattr(c, key) != getattr(Annotate, key)]
        if unused:
            raise ValueError(f"scorer {c.scorer} does not use {', '.join(unused)}: remove that")
    if c.scorer == "human":
        write_rewards(c, rows, [human_rewards(row) for row in rows], Counter())
    elif ours:
        score = scorers.load(c.scorer)
        if known := scorers.world_of(c.scorer):
            rewards.check_prompts(rows, known.task)
        asked = ((row.id, row.prompt, list(row.responses)) for row in rows)
        write_rewards(c, rows, [r for _, r in rewards.annotate(asked, score)], Counter())
    else:
        config.check_choices(c, dtype=model.DTYPES, objectives=("one", "mean"))
        in_shares(c, annotate_share, rows)


def annotate_share(c: Annotate, rows: list[listwise.Row], ranks: dist.Ranks) -> None:
    """Score this rank's share of the rows; the first rank then writes the output."""

    def work(mine: list[listwise.Row], notes: journal.Journal) -> None:
        counts: Counter[str] = Counter()
        how = {key: getattr(c, key) for key in ("dtype", "objectives", "remote_revision")}
        score = scorers.load_reward_model(
            c.scorer, budget=c.tokens_per_micro_batch, device=ranks.device, counts=counts, **how
        )
        for id, found in tqdm(score(mine), total=len(mine), desc="annotate", unit="prompt", disable=not ranks.first):
            notes.write({"id": id, "rewards": found, "counts": counts})
            counts.clear()

    done = journalled(c, rows, ranks, work, SCORED)
    if ranks.first:
        counts = sum((Counter(record["counts"]) for record in done.values()), Counter())
        write_rewards(c, rows, [done[row.id]["rewards"] for row in rows], counts)


def write_rewards(c: Annotate, rows: list[listwise.Row], found: list[list[float]], more: Counter[str]) -> None:
    """Write the rows with their rewards, and pairs where they are asked for."""
    rows = [dataclasses.replace(row, rewards=tuple(r)) for row, r in zip(rows, found, strict=True)]
    counts = {"rows": len(rows), "responses": sum(len(row.responses) for row in rows), **more}
    if c.pairs:
        alone = [row.chosen is None for row in rows]
        rows = [random_pair(row) if lacks else row for row, lacks in zip(rows, alone, strict=True)]
        counts["pairs_made"] = sum(lacks and row.chosen is not None for row, lacks in zip(rows, alone, strict=True))
        counts["pairs_equal_rewards"] = sum(row.chosen is None for row in rows)
    listwise.write(c.output, rows)
    tell(c, "annotate", counts, [])


def random_pair(row: listwise.Row) -> listwise.Row:
    """The row with a pair as a data set would have it: two random responses, labelled by their rewards."""
    rewards = np.array(row.rewards)
    order = np.argsort(samplers.counter_uniform(0, tokens.row_key(row.id), np.arange(len(rewards))))
    apart = order[rewards[order] != rewards[order[0]]]
    if not len(apart):
        return row  # all rewards are equal, so none is preferred; the caller counts it
    worse, better = sorted((int(order[0]), int(apart[0])), key=lambda k: rewards[k])
    return dataclasses.replace(row, chosen=better, rejected=worse)


def human_rewards(row: listwise.Row) -> list[float]:
    """1 for the human choice and 0 for its partner, on rows of just those two."""
    if row.chosen is None or len(row.responses) != 2:
        raise ValueError(f"{row.where}: scorer human needs a row of two responses with `chosen`")
    return [float(k == row.chosen) for k in range(2)]


def diagnose(c: Doctor) -> None:
    rows = listwise.read(c.input)
    tokenizer = tokens.load_tokenizer(c.model)
    examples, counts = tokens.tokenize_rows(tokenizer, rows, max_length=c.max_length, truncate=c.truncate)
    found = doctor.diagnose(rows, examples, counts, tokenizer=tokenizer)
    print(json.dumps(found, indent=1) if c.json else doctor.format_report(found))
    if found["errors"]:
        sys.exit(1)


COMMANDS = {
    "world": (World, make_world),
    "import": (Import, import_rows),
    "export": (Export, export_rows),
    "generate": (Generate, generate_candidates),
    "annotate": (Annotate, annotate_rows),
    "doctor": (Doctor, diagnose),
}


def main(argv: list[str] | None = None) -> None:
    try:
        config.run_command(COMMANDS, argv, prog="data_prep.py", page=str(__doc__))
    except OSError as error:  # a folder that takes no files, a full disk
        where = error.filename2 or error.filename or "the output"
        raise ValueError(f"cannot read or write {where}: {error.strerror or error}") from error


if __name__ == "__main__":
    config.run_main(main)
