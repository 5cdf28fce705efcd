"""Prepare list-wise preference data: worlds, imports, candidates, rewards, a check before training.

    python data_prep.py world    --out data/world                                   a self-made world, offline
    python data_prep.py import   --source hh-rlhf --input FILE --output FILE.jsonl  a foreign format
    python data_prep.py export   --input FILE --output FILE.jsonl                   pairs for other trainers
    python data_prep.py generate --model M --input IN --output OUT --n 8            candidate responses
    python data_prep.py annotate --scorer R --input IN --output OUT                 rewards by a reward model
    python data_prep.py doctor   --model M --input IN                               what to know before training

`python data_prep.py COMMAND --help` lists the options of one. `torchrun --nproc_per_node 2 -- data_prep.py generate`
shares the prompts out over processes; a killed `generate` or `annotate` goes on when it is started again, with
torchrun or without. A finished command does nothing when it is started again, and none writes over what another command
or other options have made.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hps import config
from hps.prepare import commands
from hps.prepare.options import OPTIONS, Annotate, Doctor, Export, Generate, Import, World


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
