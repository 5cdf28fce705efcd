"""What a file from outside can do to each of the readers: functions of bytes, and how inputs for them are made.

Each target takes an input that may be anything. It ends well, and then what came out is finite and of the right kind,
or with a ValueError that says where: nothing else is allowed. test_fuzz.py draws the inputs with hypothesis.
"""

import dataclasses
import gzip
import hashlib
import json
import lzma
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load, save

from hps import config, dist, reference
from hps.data import listwise, store
from hps.data.rows import Row, check_manifest, parse_row
from hps.evaluate import export, judge, survey
from hps.evaluate.endpoint import Endpoint
from hps.io import files, loggers
from hps.options import Config, check, settings
from hps.prepare import importers, journal
from hps.prepare.formats import FORMATS
from hps.record import check_folder, claim

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SECONDS = 20  # that an input may take, on a busy machine


class Target(NamedTuple):
    """seeds: valid inputs as lists of JSON values. join: their texts, changed or not, -> the input. run: the reader.
    place: what a refusal must name."""

    seeds: list[list[Any]]
    join: Callable[[list[str]], bytes]
    run: Callable[[bytes, Path], object]
    place: str = ""  # a regular expression; empty: the folder's name


def outcome(name: str, data: bytes, folder: Path) -> str:
    """ "accepted" or "refused"; AssertionError, or what the reader raised, for what is neither."""
    target = TARGETS[name]
    try:
        with time_limit():
            target.run(data, folder)
    except ValueError as mistake:
        said = str(mistake)
        assert re.search(target.place or re.escape(str(folder)), said), (
            f"refused without a place: {type(mistake).__name__}: {said[:500]}"
        )
        assert len(said) < 20_000, f"a message of {len(said)} characters: {said[:500]}"
        return "refused"
    return "accepted"


@contextmanager
def time_limit() -> Iterator[None]:
    def late(*_):
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def finite(value: Any) -> None:
    assert all(isinstance(x, int) or math.isfinite(x) for x in numbers(value)), f"not finite: {value!r:.500}"


# ---- data and foreign formats --------------------------------------------------------------------

ROW = {"id": "a", "prompt": "why", "responses": ["tea is hot", ""], "rewards": [1, -0.5], "chosen": 0, "rejected": 1}
TALK = {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "why"}], "responses": [],
        "id": "b", "source": "toy"}  # fmt: skip


def lines(parts: list[str]) -> bytes:
    return "\n".join([*parts, ""]).encode(errors="surrogatepass")


def whole(parts: list[str]) -> bytes:
    return parts[0].encode(errors="surrogatepass")


def check_row(row: Any) -> None:
    assert isinstance(row, Row) and row.where
    finite(row.rewards or ())
    n = len(row.responses)
    assert row.rewards is None or len(row.rewards) == n
    assert all(k is None or 0 <= k < n for k in (row.chosen, row.rejected))
    again = parse_row(json.loads(json.dumps(listwise._record(row)).encode()), row.where)
    assert again == row


def data_file(suffix: str, pack: Callable[[bytes], bytes]) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / f"x.jsonl{suffix}"
        path.write_bytes(pack(data))
        for row in listwise.read(path):
            check_row(row)

    return run


def imported(source: str, order: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / "x.jsonl"
        path.write_bytes(data)
        found = importers.import_file(source, path, order=order)
        for row in found.rows:
            check_row(row)
        counts = {key: n for key, n in found.counts.items() if key.startswith("rows_")}
        assert counts["rows_read"] == sum(counts.values()) - counts["rows_read"] and counts["rows_kept"]
        assert len(found.reasons) <= importers.MAX_REASONS

    return run


def fixture(*names: str) -> list[list[Any]]:
    return [[json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()] for name in names]


# ---- options -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    name: str = "x"  # a text
    steps: int = 1  # a number
    lr: float = 0.1  # a factor
    words: tuple[str, ...] = ()  # some
    mixed: bool = False  # a choice


TRAIN = {"method": "dpo-hps", "lr": 2e-4, "positives": 2, "hps_form": "full", "positive_lambda": "1,0.5", "beta": 0.1,
         "lora_rank": 8, "gamma_schedule": "left_knots", "epochs": 2, "shuffle": "epochs", "seed": 3, "dtype": "bf16",
         "save_every": 8, "log_to": ""}  # fmt: skip
TOML = {"name": "a b", "steps": 3, "lr": 1, "words": ["a", "b"], "mixed": True}


def toml(keys: list[str]) -> Callable[[list[str]], bytes]:
    def join(parts: list[str]) -> bytes:
        table = "\n".join(f"{key} = {text}" for key, text in zip(keys, parts, strict=False))
        return table.encode(errors="surrogatepass")

    return join


def options(data: bytes, folder: Path) -> None:
    (folder / "x.toml").write_bytes(data)
    found, _ = config.parse(Options, ["--config", str(folder / "x.toml")], prog="x", description="x")
    finite(list(vars(found).values()))
    kinds = {"name": str, "steps": int, "lr": float, "words": tuple, "mixed": bool}
    for name, value in vars(found).items():
        assert type(value) is kinds[name] and (type(value) is not int or abs(value) <= 2**63), (name, value)


def training_options(data: bytes, folder: Path) -> None:
    (folder / "x.toml").write_bytes(data)
    argv = ["--model=m", "--data=d", "--out=o", "--config", str(folder / "x.toml")]
    found, given = config.parse(Config, argv, prog="x", description="x")
    finite(list(vars(found).values()))
    check(found, given)
    json.dumps(settings(found), allow_nan=False)


# ---- what earlier runs have left ------------------------------------------------------------------

CONFIG = Config("a/b", "d.jsonl", "o", lr=1e-4)
RUN = {
    "config": settings(CONFIG), "changed": ["lr"], "inputs": {"model": "ab", "tokenizer": "cd", "data": "ef"},
    "world_size": 1, "argv": [],
}  # fmt: skip
SUMMARY = {"steps": 6, "first_step": 0, "seconds": 1.5, "tokens": 900, "counts": {"rows_read": 9, "rows_kept": 8}}
RESULT = {"mean": 0.1, "low": 0.0, "high": 0.2, "prompts": 3}
EVALUATION = {"config": {"model": "policy", "data": "t.jsonl", "reference": "a/b"}, "metrics": {"rm2": RESULT}}
MANIFEST = {"input": {"path": "x"}, "output": {"path": "y", "sha256": hashlib.sha256(b"tea").hexdigest()}}
STORE = {"files": {}, "identity": {"data": "ab"}, "counts": {"rows_read": 1}, "longest": 3}


def sealed(run: Callable[[bytes, Path], object]) -> Callable[[bytes, Path], object]:
    """With the checksum that belongs to what is there, as another version of the code would leave it."""

    def with_checksum(data: bytes, folder: Path) -> None:
        try:
            record = json.loads(data)
            record = record | {"checksum": files._checksum(record)}
            data = json.dumps(record).encode()
        except (ValueError, TypeError, RecursionError):
            pass  # no record at all: as it is
        run(data, folder)

    return with_checksum


def checked(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"checksum": files._checksum(record)}


def manifest(data: bytes, folder: Path) -> None:
    (folder / "y").write_bytes(b"tea")
    (folder / "y.manifest.json").write_bytes(data)
    check_manifest(folder / "y")


def run_json(data: bytes, folder: Path) -> None:
    (folder / "run.json").write_bytes(data)
    check_folder(folder, CONFIG, True)


def inputs_of_a_run(data: bytes, folder: Path) -> None:
    (folder / "run.json").write_bytes(data)
    alone = dist.Ranks(rank=0, world_size=1, device=torch.device("cpu"), sharded=False)
    written, files.write_record = files.write_record, lambda *_: None
    try:
        claim(folder, CONFIG, RUN["inputs"], True, alone)
    finally:
        files.write_record = written


def store_header(data: bytes, folder: Path) -> None:
    (folder / "store.json").write_bytes(data)
    about = store._read_header(folder)
    assert isinstance(about["longest"], int)


class Enough(BaseException):
    pass


def exported(data: bytes, folder: Path) -> None:
    """run.json, summary.json and eval.json, one a line, as the export of a policy reads them."""
    data = data.replace(b'"policy"', json.dumps(str(folder / "policy")).encode())
    for name, part in zip(("run.json", "summary.json", "eval.json"), (data.split(b"\n") + 3 * [b""])[:3], strict=True):
        (folder / name).write_bytes(part)
    real = export.model.load_causal_lm, export.reward_model.load_reward_model

    def stop(*_, **__):
        raise Enough

    export.model.load_causal_lm = export.reward_model.load_reward_model = stop
    try:
        words = {"model": folder / "policy", "out": folder / "out", "eval_json": folder / "eval.json"}
        export.main([f"--{key}={value}" for key, value in words.items()])
    except Enough:
        pass
    finally:
        export.model.load_causal_lm, export.reward_model.load_reward_model = real


SETTINGS = {"n": 2, "model": "ab", "temperature": 0.9}
NOTES = [SETTINGS, {"id": "a", "found": ["x", ""], "counts": {"samples": 2}},
         {"id": "b", "found": [], "counts": {}}]  # fmt: skip


def journal_file(data: bytes, folder: Path) -> None:
    (folder / "out.jsonl.journal-0").write_bytes(data)
    found = journal.read(folder / "out.jsonl", SETTINGS)
    for id, record in found.items():
        assert type(id) is str and any(
            {type(one) for one in record["found"]} <= kinds for kinds in ({str}, {float, type(None)})
        )
        finite(record["counts"])


def metrics(data: bytes, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    loggers.cut(path, 2)
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(type(line["step"]) is int and line["step"] < 2 for line in kept)


# ---- judge and survey -----------------------------------------------------------------------------

SCORES = dict.fromkeys(judge.CRITERIA, 3.5)


def check_scores(found: dict[str, float] | None) -> None:
    assert found is None or list(found) == list(judge.CRITERIA)
    assert all(type(x) is float and 0 <= x <= 5 and (2 * x).is_integer() for x in (found or {}).values())


def judged(data: bytes, folder: Path) -> None:
    check_scores(judge.parse_scores(data.decode(errors="replace")))
    check_scores(judge.parse_scores(data.decode(errors="surrogateescape")))


CLIENT = Endpoint("http://127.0.0.1", "m", max_tokens=9, attempts=1, timeout=1.0, per_minute=0.0,
                  stopped=threading.Event())  # fmt: skip


def completion(data: bytes, folder: Path) -> None:
    reply = CLIENT._read(data.decode(errors="replace"))
    assert reply is None or (type(reply.text) is str and type(reply.model) is str)
    if reply is not None:
        check_scores(judge.parse_scores(reply.text or ""))


ANSWERS = [{"item": item, "model": "m", "answer": json.dumps(SCORES), "max_tokens": 9} for item in ("i1", "i2")]


def answers(data: bytes, folder: Path) -> None:
    (folder / "answers.jsonl").write_bytes(data)
    found = judge.read_answers(folder / "answers.jsonl", 9)
    for given in found.values():
        check_scores(judge.first_scores(given))
        assert all(type(line["model"]) is str for line in given)


KEY = {
    "study": "s1",
    "methods": ["SFT", "HPS"],
    "items": {
        "r1": {"prompt": "a", "method": "HPS", "response": 0},
        "r2": {"prompt": "b", "method": "SFT", "response": 3},
    },
}
RATER = {"study": "s1", "rater": "ann", "complete": False, "ratings": {
    "r1": {"correctness": 4, "helpfulness": 5, "safety": 3.5, "clarity": 4.25}, "r2": {"safety": 1}}}  # fmt: skip


def ratings(data: bytes, folder: Path) -> None:
    (folder / "ratings").mkdir(exist_ok=True)
    (folder / "ratings/1.json").write_bytes(data)
    found = survey.read_ratings(folder / "ratings", KEY)
    finite([given["ratings"] for given in found])
    finite(survey.results_of(KEY, found))


def key_file(data: bytes, folder: Path) -> None:
    (folder / "key.json").write_bytes(data)
    key = survey.load_key(folder / "key.json")
    given = {"complete": False, "ratings": {item: {"safety": 1} for item in key["items"]}}
    survey.markdown(survey.results_of(key, [given]))


# ---- safetensors ----------------------------------------------------------------------------------

SHARD = save({"keys": np.arange(32, dtype=np.uint8).reshape(2, 16), "logps": np.array([-1.5, -2], np.float32)})


def header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def tensors(data: bytes) -> Callable[[list[str]], bytes]:
    """The file with another header, of its right length."""
    body = data[8 + int.from_bytes(data[:8], "little") :]

    def join(parts: list[str]) -> bytes:
        text = parts[0].encode(errors="surrogatepass")
        return len(text).to_bytes(8, "little") + text + body

    return join


def shard(name: Callable[[bytes], str]) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        for path in folder.glob("shard-*"):
            path.unlink()
        (folder / f"{name(data)}.safetensors").write_bytes(data)
        wanted = np.arange(32, dtype=np.uint8).view("S16")
        found = reference.find(folder, wanted)
        assert found.shape == (2,) and found.dtype == np.float32 and not np.any(found > 0) and not np.isinf(found).any()

    return run


NAME = reference.shard_name(*(load(SHARD)[key] for key in ("keys", "logps")))


def right_name(data: bytes) -> str:
    """As if the shard had been written like this."""
    try:
        found = load(data)
        return reference.shard_name(found["keys"], found["logps"])
    except Exception:  # safetensors raises types of its own; no shard, so that any name will do: the reader must refuse
        return NAME


NAMES = "|".join(field.name for field in dataclasses.fields(Config))
TARGETS: dict[str, Target] = {
    "data": Target([[ROW, TALK]], lines, data_file("", bytes)),
    "data.gz": Target([[ROW, TALK]], lines, data_file(".gz", lambda data: gzip.compress(data, mtime=0))),
    "broken gz": Target([[ROW]], lambda parts: gzip.compress(lines(parts), mtime=0), data_file(".gz", bytes)),
    "broken xz": Target([[ROW]], lambda parts: lzma.compress(lines(parts)), data_file(".xz", bytes)),
    **{f"{source} {order}".strip(): Target(
        fixture(source, *(["trl-standard"] if source == "trl" else [])), lines, imported(source, order)
    ) for source, form in FORMATS.items() for order in form.orders},
    "JSON list": Target([fixture("hh-rlhf")], whole, imported("hh-rlhf", "")),
    "options": Target([list(TOML.values())], toml(list(TOML)), options),
    "training options": Target([list(TRAIN.values())], toml(list(TRAIN)), training_options, rf"x\.toml|\b({NAMES})\b"),
    "manifest": Target([[checked(MANIFEST)]], whole, manifest),
    "sealed manifest": Target([[MANIFEST]], whole, sealed(manifest)),
    "run.json": Target([[checked(RUN)]], whole, run_json),
    "sealed run.json": Target([[RUN]], whole, sealed(run_json)),
    "inputs of run.json": Target([[RUN | {"config": {}}]], whole, sealed(inputs_of_a_run)),
    "store.json": Target([[STORE]], whole, sealed(store_header)),
    "export": Target([[RUN, SUMMARY, EVALUATION]], lines, exported),
    "journal": Target([NOTES], lines, journal_file),
    "metrics.jsonl": Target([[{"step": i, "loss": 0.5, "lr": 1e-4} for i in range(3)]], lines, metrics),
    "judge's answer": Target([[SCORES], [SCORES, SCORES]], lambda parts: b"Here: " + lines(parts), judged),
    "completion": Target(
        [[{"model": "m", "choices": [{"message": {"role": "assistant", "content": json.dumps(SCORES)}}]}]], whole,
        completion),
    "answers.jsonl": Target([ANSWERS], lines, answers),
    "ratings": Target([[RATER], [RATER | {"complete": True, "ratings":
        dict.fromkeys(KEY["items"], RATER["ratings"]["r1"])}]], whole, ratings),
    "key.json": Target([[KEY]], whole, key_file),
    "shard": Target([[header(SHARD)]], tensors(SHARD), shard(lambda data: NAME)),
    "named shard": Target([[header(SHARD)]], tensors(SHARD), shard(right_name)),
}  # fmt: skip
NEVER_REFUSE = {"judge's answer", "completion"}  # what a judge says is no mistake of the user's: None stands for none
