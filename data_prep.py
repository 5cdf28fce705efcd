"""Prepare list-wise preference data: worlds, imports, candidates, rewards, a check before training.

    python data_prep.py world    --out data/world                                   a self-made world, offline
    python data_prep.py import   --source hh-rlhf --input FILE --output FILE.jsonl  a foreign format
    python data_prep.py export   --input FILE --output FILE.jsonl                   pairs for other trainers
    python data_prep.py generate --model M --input IN --output OUT --n 8            candidate responses
    python data_prep.py annotate --scorer R --input IN --output OUT                 rewards by a reward model
    python data_prep.py doctor   --model M --input IN                               what to know before training

`python data_prep.py COMMAND --help` lists the options of one. `torchrun --nproc_per_node 2 -- data_prep.py generate`
shares the prompts out over processes; a killed `generate` or `annotate` goes on when it is started again, with
torchrun or without. A finished command does nothing when it is started again, and none writes over what no command of
ours has made.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps import config
from hps.prepare import commands


@dataclass
class World:
    """Write a self-made world: an untrained model, demonstrations for SFT, prompts for training, choice and report."""

    out: str  # folder for model/ (untrained), sft.jsonl, train.jsonl, valid.jsonl, test.jsonl
    seed: int = 0  # of the world's facts, its splits and the untrained weights
    domain: str = "safe"  # safe (single turn, half of it risky), help (multi-turn, facts) or both
    train: int = 400  # prompts to train preferences on
    valid: int = 100  # prompts to choose settings on
    test: int = 300  # prompts to report on
    demonstrations: int = 48000  # answers for supervised fine-tuning, the first half of good quality


@dataclass
class Import:
    """Turn a foreign file of preferences into list-wise rows, and count what is left out."""

    source: str  # listwise, hh-rlhf, pku-saferlhf, ultrafeedback, nectar, alpaca-eval, trl, simpo or authors
    input: tuple[str, ...]  # files: .jsonl, .json (.gz, .xz), .parquet, .csv, hf://...; data sets: OWNER/NAME@REVISION
    output: str  # list-wise JSON Lines to write, and OUTPUT.manifest.json beside it
    order: str = ""  # pku-saferlhf: helpful or safe; ultrafeedback: overall or fine-grained
    columns: tuple[str, ...] = ()  # NAME=COLUMN: where the file has it; user= and system= make a prompt of turns
    subset: str = ""  # of a data set by its hub name; alpaca-eval: the judge
    split: str = ""  # of a data set by its hub name, if it has several
    limit: int = 0  # rows to keep at most; 0 means all
    skip: int = 0  # usable rows to leave out first, so that splits are disjoint
    chat: bool = False  # make a user's turn of a prompt that is a string, for a model with a chat template


@dataclass
class Export:
    """Write the pairs of list-wise rows in TRL's format, which other trainers read, and count what is left out."""

    input: str  # list-wise JSON Lines
    output: str  # JSON Lines in TRL's format (standard for string prompts), and OUTPUT.manifest.json beside it
    pair: str = "human"  # human (chosen, rejected) or rewards (highest against lowest)


@dataclass
class Generate:
    """Add n distinct candidates of a model to the responses of each prompt; a killed run goes on, torchrun shares."""

    model: str  # model that answers: a local folder or a hub name
    input: str  # list-wise JSON Lines with prompts
    output: str  # the same with candidates behind the responses that were there
    n: int = 8  # distinct candidates per prompt
    temperature: float = 0.9  # of sampling
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability; 1: from all
    max_new_tokens: int = 256  # a response that has not ended there is dropped and counted
    max_prompt_length: int = 1024  # longer prompts are dropped and counted, tokens
    limit: int = 0  # so many prompts, the first that are short enough; 0: all
    seed: int = 0  # of sampling; a prompt's candidates depend on it and on the prompt's id only
    dtype: str = "fp32"  # fp32 or bf16
    max_rows: int = 512  # sequences decoded at once (a small model gains from more); vLLM gets 64 times so many
    template_options: str = ""  # NAME=VALUE,... of the chat template: enable_thinking=false, date=2026-01-31
    engine: str = "hf"  # hf (this code, on any transformers model) or vllm (if it is installed)
    tensor_parallel: int = 1  # vllm: GPUs over which the model is spread
    timeout: float = 10.0  # minutes that ranks wait for each other; for each other's shares of the prompts longer


@dataclass
class Annotate:
    """Give every response a reward; a killed run goes on, and torchrun shares the prompts out."""

    scorer: str  # world-est[:SEED], world-true[:SEED], or a reward model: folder or hub name
    input: str  # list-wise JSON Lines
    output: str  # the same with rewards
    pairs: bool = False  # give rows without a human pair one: two random responses, the one of higher reward chosen
    dtype: str = "fp32"  # of a reward model's weights, fp32 or bf16; rewards are fp32 either way
    objectives: str = "one"  # of a reward model's head: one, or of several mean, score (ArmoRM's gate) or one's name
    template_options: str = ""  # NAME=VALUE,... of a reward model's chat template: enable_thinking=false
    tokens_per_micro_batch: int = 4096  # packed tokens of a reward model's forward
    timeout: float = 10.0  # minutes that ranks wait for each other; for each other's shares of the prompts longer


@dataclass
class Doctor:
    """Measure what training would see of a file, and say what to change; status 1 where it cannot be trained on.

    --config is the training's own: its limits are taken from there, and its q is shown."""

    input: str  # list-wise JSON Lines
    model: str  # its tokenizer counts the tokens
    max_length: int = 2048  # tokens of prompt and response together
    truncate: str = "drop"  # beyond max_length: drop (and count) the response, error, or keep_end of the prompt
    test: str = ""  # list-wise JSON Lines whose prompts should not be among these
    template_options: str = ""  # NAME=VALUE,... of the chat template: enable_thinking=false, date=2026-01-31
    json: bool = False  # print JSON for machines instead of a page


OPTIONS = {
    "world": World, "import": Import, "export": Export, "generate": Generate, "annotate": Annotate, "doctor": Doctor
}  # fmt: skip


def read_options(argv: Sequence[str] | None = None) -> tuple[str, Any, Sequence[str]]:
    """The command of a command line, its options, and the words that they were read from."""
    return commands.read(OPTIONS, argv, prog="data_prep.py", page=str(__doc__), foreign={"doctor"})


if __name__ == "__main__":  # --help is shown, and a typo told, before the seconds that torch takes to load
    config.run_main(read_options)

import numpy as np
from tqdm import tqdm

from hps import dist, methods, model, pretrained
from hps.data import listwise, store, tokenizers, tokens
from hps.data.rows import Row, only, stream
from hps.io import files
from hps.lab import scorers, world
from hps.options import read as read_training
from hps.prepare import doctor, formats, generate, importers, journal, manifests, rewards


def make_world(c: World) -> None:
    out, options = Path(c.out), vars(c) | {"sft": c.demonstrations}
    if (out / "world.json").is_file():
        advice = "delete the folder, or choose another --out"
        before = files.read_record(out / "world.json", advice, files=dict)
        if other := files.first_corrupt_file(out, before["files"]):
            raise ValueError(f"{out}: holds a world that has been changed ({other}): {advice}")
        if other := [key for key in before if key != "files" and before[key] != options.get(key)]:
            raise ValueError(f"{out}: holds a world of another {', '.join(other)}: {advice}")
        print(f"{out}: is finished; delete it to make it again", file=sys.stderr)
        return
    about = world.write(out, **{key: value for key, value in vars(c).items() if key != "out"})
    manifests.print_counts(c.out, {key: n for key, n in about.items() if isinstance(n, int)})


def import_rows(c: Import) -> None:
    config.check_choices(c, source=formats.FORMATS)
    inputs = [importers.located(name) for name in c.input]
    if manifests.is_finished(c, "import", inputs):
        return
    options = ("order", "columns", "subset", "split", "skip", "chat")
    how: dict[str, Any] = {key: getattr(c, key) for key in options}
    found = importers.import_file(c.source, *(path for path, _ in inputs), limit=c.limit or None, **how)
    listwise.write(c.output, found.rows)
    if left_out := sorted(found.columns_left_out):
        print(f"{c.output}: columns left out: {', '.join(left_out)}", file=sys.stderr)
    manifests.finish(c, "import", found.counts, found.reasons, inputs=inputs, columns_left_out=left_out)


def export_rows(c: Export) -> None:
    if manifests.is_finished(c, "export"):
        return
    config.check_choices(c, pair=("human", "rewards"))
    found = importers.export_rows(stream(c.input), pair=c.pair)
    listwise.write_lines(c.output, found.rows)
    manifests.finish(c, "export", found.counts, found.reasons)


def generate_candidates(c: Generate) -> None:
    if manifests.is_finished(c, "generate"):
        return
    config.check_choices(c, dtype=model.DTYPES, engine=("hf", "vllm"))
    if c.limit < 0:
        raise ValueError(f"limit must not be negative, got {c.limit}")
    if c.tensor_parallel < 1 or (c.tensor_parallel > 1 and c.engine != "vllm"):
        raise ValueError(
            "--tensor_parallel is of --engine vllm, and at least 1; torchrun spreads --engine hf over GPUs"
        )
    rows = listwise.Rows(c.input)
    tokenizer = tokenizers.load_tokenizer(c.model, c.template_options)
    encoder = tokens.Encoder(tokenizer)
    lengths = np.fromiter(map(len, rewards.read_prompts(rows, encoder.prompt)), np.int64)
    fitting = np.flatnonzero(lengths <= c.max_prompt_length)
    counts = Counter(prompts=len(rows), prompts_overlong=len(rows) - len(fitting))
    if c.limit:
        counts["prompts_beyond_limit"] = len(fitting[c.limit :])
        fitting = fitting[: c.limit]
    if not len(fitting):
        raise ValueError(f"{c.input}: no prompt fits into max_prompt_length = {c.max_prompt_length}")
    rows = rows[fitting]
    counts.update(note for row in rows for note in encoder.template.notes(row.prompt))

    def work(mine: Sequence[Row], counts: Counter[str], ranks: dist.Ranks) -> journal.Found:
        asked = store.Lazy(len(mine), lambda a, b: [(row.id, encoder.prompt(row.prompt)) for row in mine[a:b]])
        if c.engine == "vllm":
            if ranks.sharded:
                raise ValueError("--engine vllm is one process: start it without torchrun, with --tensor_parallel GPUS")
            longest = int(lengths[fitting].max())
            how = dict(max_length=longest + c.max_new_tokens, tensor_parallel=c.tensor_parallel)
            lm = generate.load_vllm(c.model, dtype=c.dtype, **how)
        else:
            dtype = pretrained.compute_dtype(c.dtype)
            lm = pretrained.load_causal_lm(c.model, dtype=dtype, tokenizer=tokenizer).to(ranks.device)
        how = {key: getattr(c, key) for key in ("n", "max_new_tokens", "temperature", "top_p", "seed", "max_rows")}
        how |= dict(counts=counts, eos_token_id=tokenizer.eos_token_id, progress=ranks.first)
        for row, (id, samples) in zip(mine, generate.generate(lm, asked, **how), strict=True):
            yield id, generate.texts_of(encoder, row.prompt, samples, counts)

    def write(found: Iterator[tuple[Row, list[str]]], more: Counter[str]) -> None:
        drawn = (dataclasses.replace(row, responses=(*row.responses, *texts), rewards=None) for row, texts in found)
        listwise.write(c.output, drawn)
        manifests.finish(c, "generate", {**counts, **more}, [])
        if (lost := more["unfinished"]) > more["samples"] / 4:
            share = f"{lost:,} of {more['samples']:,} samples did not end within {c.max_new_tokens} tokens"
            advice = "raise --max_new_tokens, or take a model that ends its answers (SFT teaches it)"
            print(f"{c.output}: {share} and are left out: {advice}", file=sys.stderr)

    journal.in_shares(c, rows, work, write)


def annotate_rows(c: Annotate) -> None:
    if manifests.is_finished(c, "annotate"):
        return
    rows = listwise.Rows(c.input)
    of_world = scorers.load(c.scorer) if scorers.is_world(c.scorer) else None
    of_reward_models = ("dtype", "objectives", "template_options", "tokens_per_micro_batch")
    if of_world and (unused := [key for key in of_reward_models if getattr(c, key) != getattr(Annotate, key)]):
        raise ValueError(f"scorer {c.scorer} does not use {', '.join(unused)}: remove that")
    config.check_choices(c, dtype=model.DTYPES)
    if known := scorers.world_of(c.scorer):
        for _ in rewards.read_prompts(rows, known.task):
            pass

    def work(mine: Sequence[Row], counts: Counter[str], ranks: dist.Ranks) -> journal.Found:
        if of_world:
            found = rewards.annotate(mine, of_world)
        else:
            how = {key: getattr(c, key) for key in of_reward_models}
            found = scorers.load_reward_model(c.scorer, device=ranks.device, counts=counts, **how)(mine)
        yield from tqdm(found, total=len(mine), desc="annotate", unit="prompt", disable=not ranks.first)

    def write(found: Iterator[tuple[Row, rewards.Rewards]], counts: Counter[str]) -> None:
        lost: dict[str, list[int]] = {}
        listwise.write(c.output, rewards.scored_rows(found, counts, lost, pairs=c.pairs))
        reasons = [f"{id}: without a reward, left out: responses {places}" for id, places in lost.items()]
        manifests.finish(c, "annotate", counts, reasons[: importers.MAX_REASONS], responses_left_out=lost)
        if compared := counts["human_pairs"]:  # held-out accuracy, where the scorer has not seen these
            right = (counts["human_pairs_agree"] + counts["human_pairs_tied"] / 2) / compared
            print(f"{c.output}: the rewards agree with people on {right:.1%} of {compared:,} pairs", file=sys.stderr)

    journal.in_shares(c, rows, work, write)


def diagnose(c: Doctor, words: Sequence[str]) -> None:
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] == "--config"), len(words))
    file = words[at : at + 1 + ("=" not in "".join(words[at : at + 1]))]
    run, _ = methods.check(*read_training([*file, f"--model={c.model}", f"--data={c.input}", "--out=."]))
    tokenizer = tokenizers.load_tokenizer(c.model, c.template_options)
    counts: dict[str, int] = {}
    rows = (only(row, range(len(row.responses))[: run.candidates or None]) for row in stream(c.input))
    kept = doctor.kept_rows(tokenizer, rows, counts, max_length=c.max_length, truncate=c.truncate)
    counts["samples_encoded_otherwise"] = generate.encoded_otherwise(c.input)
    found = doctor.diagnose(kept, counts, tokenizer=tokenizer, test=stream(c.test) if c.test else (), run=run)
    print(json.dumps(found, indent=1) if c.json else doctor.format_report(found))
    if found["errors"]:
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    name, c, words = read_options(argv)
    run = {
        "world": make_world,
        "import": import_rows,
        "export": export_rows,
        "generate": generate_candidates,
        "annotate": annotate_rows,
        "doctor": lambda c: diagnose(c, words),
    }
    try:
        run[name](c)
    except OSError as error:  # a folder that takes no files, a full disk
        where = error.filename2 or error.filename or "the output"
        raise ValueError(f"cannot read or write {where}: {error.strerror or error}") from error


if __name__ == "__main__":
    config.run_main(main)
