"""Files of foreign preference data (hps/prepare/formats.py) to list-wise rows and back; what is left out is counted."""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hps.data.listwise import write
from hps.data.rows import Places, Row, decode_json, opened, read_lines
from hps.io import files, hub
from hps.prepare import formats, manifests
from hps.prepare.formats import DROPS, FORMATS, Dropped, Record

ALPACA_JUDGE = "weighted_alpaca_eval_gpt4_turbo"  # of AlpacaEval 2; --subset names another
MAX_REASONS = 5
MANY_SHORT = 10  # implicit prompts that may be chance, and a tenth of the rows: that is no chance
EXPORT_DROPS = ("rows_no_pair", "rows_empty_response", "rows_equal_responses")
# Files that `datasets` reads, and how: a text that says NA is one.
TABLES: dict[str, dict[str, Any]] = {".parquet": dict(path="parquet"), ".csv": dict(path="csv", keep_default_na=False)}
HUB_NAME = re.compile(r"(?!.*\.(jsonl?|gz|xz|parquet|csv)$)[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Converted(NamedTuple):
    """Rows of one format as those of another, made while they are taken; the rest is whole when the last one was."""

    rows: Iterator[Any]
    counts: Counter[str]  # rows_read = rows_kept (rows_written) + rows_skipped + all drops; and `formats.notes`
    reasons: list[str]  # the first MAX_REASONS, each with file:line
    columns_left_out: set[str]  # of a foreign file, that no row holds

    def count(self, dropped: Dropped, where: str) -> None:
        self.counts[dropped.counter] += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(f"{where}: {dropped}")

    def nothing_left(self, what: str) -> ValueError:
        lost = ", ".join(f"{key} = {value}" for key, value in self.counts.items() if value)
        return ValueError("\n  ".join([f"{what}: {lost}", *self.reasons]))


def import_file(
    source: str,
    *inputs: str | Path,
    order: str = "",
    columns: Iterable[str] = (),
    subset: str = "",
    split: str = "",
    limit: int | None = None,
    skip: int = 0,
    chat: bool = False,
) -> Converted:
    """Read foreign files as rows: JSON Lines or one JSON list, plain, .gz or .xz; .parquet, .csv, or a data set by its
    folder or hub name (with `datasets`). A row of several inputs says under `origin` where it stood.

    source, order: keys of FORMATS and of its orders. columns: NAME=COLUMN, what a column of the file is called in the
    format; `user` and `system` make a prompt of turns. subset, split: of a data set. skip, limit: leave out the first
    `skip` usable rows, then take at most `limit`, so that (limit=a) and (skip=a) are disjoint. chat: a prompt that is a
    string becomes a user's turn (`prompts_made_turns`); white space around it and its answers, which joined them, goes.

    ValueError for an unknown order or name, a broken file, one of another format, no row left, or many rows whose
    prompt is the little that two answers begin with by chance.
    """
    if order not in (orders := FORMATS[source].orders):
        needs = "has one order: leave it out" if "" in orders else f"needs an order, one of {', '.join(orders)}"
        raise ValueError(f"order = {order!r} is of no use: source {source} {needs}")
    if skip < 0 or (limit is not None and limit < 1):
        raise ValueError(f"skip = {skip} must be at least 0 and limit = {limit} at least 1")
    if (subset or split) and not any(map(is_data_set, inputs)):
        raise ValueError("subset and split are those of a data set by its folder or hub name; leave them out for files")
    columns_read = FORMATS[source].names(order)
    names = _names(columns, columns_read)
    counts: Counter[str] = Counter(dict.fromkeys(("rows_read", "rows_kept", "rows_skipped", *DROPS), 0))
    read = ", ".join(map(str, inputs))

    def usable() -> Iterator[tuple[str, Record, Row]]:
        """Where each record stands, the record, and its row."""
        wheres, seen = [], Places()
        for input in inputs:
            where_is, records = _records(source, input, subset, split)
            wheres.append(where_is)
            for number, record in enumerate(records):
                where = where_is(number)
                if not isinstance(record, dict):
                    raise ValueError(f"{where}: a record must be a JSON object")
                counts["rows_read"] += 1
                try:
                    record = formats.renamed(record, names, where) if names else record
                    row = formats.read(source, record, where, order=order)
                    if chat and isinstance(row.prompt, str):
                        turn = {"role": "user", "content": row.prompt.strip()}
                        row = replace(row, prompt=(turn,), responses=tuple(text.strip() for text in row.responses))
                        counts["prompts_made_turns"] += 1
                    first = seen.add(row.id, number * len(inputs) + len(wheres) - 1)
                    if first is not None:
                        before, file = divmod(first, len(inputs))
                        raise Dropped("rows_duplicate", f"the same as {wheres[file](before)}")
                except Dropped as dropped:
                    found.count(dropped, where)
                else:
                    yield where, record, row

    def kept() -> Iterator[Row]:
        for where, record, row in usable():
            if counts["rows_skipped"] < skip:
                counts["rows_skipped"] += 1
                continue
            counts["rows_kept"] += 1
            found.columns_left_out.update(record.keys() - columns_read - row.others.keys())
            counts.update(formats.notes(source, record, row))
            yield replace(row, others=row.others | {"origin": where}) if len(inputs) > 1 else row
            if counts["rows_kept"] == limit:
                break
        if not counts["rows_kept"]:
            raise found.nothing_left(f"{read}: no row is left of this {source} file")
        if chat and not counts["prompts_made_turns"]:
            raise ValueError(f"{read}: no prompt is a string, of which --chat would make a turn: leave --chat out")
        if (short := counts["prompts_implicit_short"]) >= MANY_SHORT and short > counts["rows_kept"] / 10:
            alike = f"chosen and rejected begin with fewer than {formats.IMPLICIT_CHARACTERS} characters in common"
            advice = "they are answers alone. Name the prompt's column, --columns user=COLUMN or prompt=COLUMN"
            rows = f"in {short} of {counts['rows_kept']} rows"
            raise ValueError(f"{read}: there is no prompt, and {rows} {alike}: {advice}")

    found = Converted(kept(), counts, [], set())
    return found


def import_pairs(path: str | Path, folder: str | Path, need_rewards: bool = False) -> dict[str, Any]:
    """The list-wise file in `folder` of pairs in TRL's format, or of list-wise rows in a table, made if no run before
    has made it, under `path`; under `counts` how many records were read, and what is left out of them, by reason.
    need_rewards: refuse pairs, which have none (ValueError)."""
    first = next(_records("", path, "", "")[1], None)
    source = "listwise" if isinstance(first, dict) and "responses" in first else "trl"
    if need_rewards and source == "trl":
        raise ValueError(
            f"{path}: holds pairs without rewards: train on them with --method dpo-human; for a method that draws by "
            "rewards, make rows of them (data_prep.py import --source trl) and score those (data_prep.py annotate)"
        )
    out = Path(folder) / f"pairs-{files.sha256(Path(path))[:32]}.jsonl"
    manifest = Path(f"{out}.manifest.json")
    if not manifest.exists():
        found = import_file(source, path)
        write(out, found.rows)
        manifests.write([(str(path), str(path))], out, {"counts": dict(found.counts)})
        what = "rows of a table" if source == "listwise" else "pairs"
        print("\n".join([f"{path}: {what} imported", *found.reasons]), file=sys.stderr)
    counts = files.read_record(manifest, f"delete it, and {out}", counts=dict)["counts"]
    return {"path": str(out), "counts": {"records_read": counts["rows_read"]} | {key: counts[key] for key in DROPS}}


def export_rows(rows: Iterable[Row], *, pair: str = "human") -> Converted:
    """Rows as pairs in TRL's format: the answers that do not fit a pair, and the rewards, are not in them.

    pair: "human" (chosen, rejected) or "rewards" (the highest against the lowest, the first of equals).

    ValueError without a record left, and for prompts of both kinds, strings and messages: TRL's sets hold one kind.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("rows_read", "rows_written", "responses_left_out", *EXPORT_DROPS), 0))

    def records() -> Iterator[Record]:
        kinds: dict[type, str] = {}
        for row in rows:
            counts["rows_read"] += 1
            try:
                record = formats.to_trl(row, *_pair_of(row, pair))
            except Dropped as dropped:
                found.count(dropped, row.where or f"row {row.id!r}")
                continue
            kinds.setdefault(type(row.prompt), row.where)
            if len(kinds) == 2:
                both = f"that of {kinds[str]} is a string and that of {kinds[tuple]} a list of messages"
                raise ValueError(f"a TRL data set holds prompts of one kind, but {both}; export them from two files")
            counts["rows_written"] += 1
            counts["responses_left_out"] += len(row.responses) - 2
            yield record
        if not counts["rows_written"]:
            raise found.nothing_left(f"no row can be exported with pair {pair}")

    found = Converted(records(), counts, [], set())
    return found


def _pair_of(row: Row, pair: str) -> tuple[int, int]:
    """The indices of a row's preferred and dispreferred response; Dropped where it has no such pair."""
    chosen, rejected = row.chosen, row.rejected
    if pair == "rewards":
        if not row.rewards or min(row.rewards) == max(row.rewards):
            raise Dropped("rows_no_pair", f"row {row.id!r} has no two different rewards")
        chosen, rejected = (row.rewards.index(of(row.rewards)) for of in (max, min))
    if chosen is None or rejected is None:
        raise Dropped("rows_no_pair", f"row {row.id!r} has no chosen and rejected response")
    return chosen, rejected


def _names(columns: Iterable[str], known: set[str]) -> dict[str, str]:
    """NAME=COLUMN words, several in one with commas between them, as {name: column}."""
    known = known - {""} | ({"user", "system"} if "prompt" in known else set())
    names = {}
    for word in (part for words in columns for part in words.split(",")):
        name, equals, column = word.partition("=")
        if not equals or name not in known or not (column or name == "prompt"):
            raise ValueError(f"columns: {word!r} is not NAME=COLUMN with a name among {', '.join(sorted(known))}")
        names[name] = column
    if "prompt" in names and names.keys() & {"user", "system"}:
        raise ValueError("columns: a prompt is one column, or made of user and system; not both")
    return names


def located(input: str) -> tuple[str, str]:
    """What to read, and what it is called in a manifest: of a file of the hub its copy here, of a data set its commit.
    ValueError for a name, file or revision that is not there, or no network."""
    if Path(input).exists() or not (input.startswith("hf://") or is_data_set(input)):
        return input, input
    from huggingface_hub import HfApi, hf_hub_download, parse_hf_uri

    try:
        uri = parse_hf_uri(input if input.startswith("hf://") else f"hf://datasets/{input}")
        if uri.type != "dataset":
            raise ValueError("it must be hf://datasets/OWNER/NAME/FILE or hf://datasets/OWNER/NAME@REVISION/FILE")
        if not uri.path_in_repo:
            return (f"{uri.id}@{HfApi().dataset_info(uri.id, revision=uri.revision).sha}",) * 2
        local = hf_hub_download(uri.id, uri.path_in_repo, repo_type="dataset", revision=uri.revision)
    except Exception as error:  # of the system, the hub, the network's library
        raise ValueError(f"{input} could not be fetched: {' '.join(str(error).split())}") from error
    return local, f"hf://datasets/{uri.id}@{hub.commit_of_copy(local, uri.path_in_repo)}/{uri.path_in_repo}"


def is_data_set(input: str | Path) -> bool:
    """Whether an input is a folder, or the hub's name of a data set: OWNER/NAME or OWNER/NAME@REVISION."""
    return Path(input).is_dir() or bool(HUB_NAME.fullmatch(str(input)) and not Path(input).exists())


def _records(source: str, input: str | Path, subset: str, split: str) -> tuple[Callable[[int], str], Iterator[object]]:
    """Where a record stands by its number, from 0, and the records."""
    if source == "alpaca-eval" and Path(input).is_dir():
        return alpaca_lists(Path(input), subset or ALPACA_JUDGE)
    if is_data_set(input) or Path(input).suffix in TABLES:
        name = f"{input}/{split}" if is_data_set(input) else input
        return lambda number: f"{name}[{number}]", _by_datasets(str(input), subset, split)
    with opened(input) as file:
        is_list = file.read(1) == b"["
        values = decode_json(b"[" + file.read(), str(input)) if is_list else None
    if isinstance(values, list):
        return lambda number: f"{input}[{number}]", iter(values)
    return lambda number: f"{input}:{number + 1}", (value for _, value in read_lines(input))


def alpaca_lists(folder: Path, judge: str) -> tuple[Callable[[int], str], Iterator[object]]:
    """Of AlpacaEval's folder `results` one record for each instruction, of all models' MODEL/JUDGE/annotations.json,
    where answer 2 is the model's and a preference goes from 1 (the baseline's answer) to 2; `models` names who said it.
    """
    paths = sorted(folder.glob(f"*/{judge}/annotations.json"))
    if not paths:
        judges = sorted({path.parent.name for path in folder.glob("*/*/annotations.json")})
        known = f"name a judge with --subset: {', '.join(judges)}" if judges else "is it AlpacaEval's folder results?"
        raise ValueError(f"{folder}: there is no MODEL/{judge}/annotations.json; {known}")
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        where_is, records = _records("", path, "", "")
        for number, record in enumerate(records):
            where = where_is(number)
            if not isinstance(record, dict) or not {"instruction", "output_2", "preference"} <= record.keys():
                raise ValueError(f"{where}: an annotation must be an object with instruction, output_2 and preference")
            start = dict(instruction=record["instruction"], answers=[], preferences=[], models=[], unjudged=[])
            one, model = found.setdefault(str(record["instruction"]), start), path.parent.parent.name
            if record["preference"] is None:  # the judge gave no answer
                one["unjudged"].append(model)
                continue
            preference = formats.number(record["preference"])
            if preference is None or not 1 <= preference <= 2:
                raise ValueError(f"{where}: preference must be a number from 1 to 2, not {record['preference']!r}")
            for key, value in (("answers", record["output_2"]), ("preferences", preference - 1), ("models", model)):
                one[key].append(value)
    # The questions stand source by source in the files, and a split by skip and limit is to hold some of each.
    mixed = sorted(found, key=lambda text: hashlib.blake2b(text.encode(errors="surrogatepass")).digest())
    return lambda number: f"{folder}: {mixed[number][:40]!r}", (found[text] for text in mixed)


def _by_datasets(input: str, subset: str, split: str) -> Iterator[object]:
    """Record by record, nothing of it kept on the disk."""
    try:
        import datasets  # only here: JSON needs none of it
    except ImportError as error:
        raise ValueError(f"{input}: reading this needs datasets: pip install -e '.[data]'") from error
    name, _, revision = input.partition("@")
    how: dict[str, Any] = dict(path=name, name=subset or None, revision=revision or None)
    if table := TABLES.get(Path(input).suffix):
        how = dict(data_files=input, **table)
    try:
        found: Any = datasets.load_dataset(**how, streaming=True)
        split = split if is_data_set(input) else "train"  # as it calls all of a file
        if (split or len(found) > 1) and split not in found:
            raise ValueError(f"choose one of its splits with --split: {', '.join(found)}")
        yield from found[split or next(iter(found))]
    except Exception as error:  # of pyarrow, pandas, the network's library, datasets itself
        raise ValueError(f"{input}: cannot be read by datasets: {' '.join(str(error).split())}") from error
