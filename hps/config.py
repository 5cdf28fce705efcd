"""Options of the scripts: one flat dataclass each, filled from a TOML file, then from flags. Strict.

A field is the whole of an option, on one line: its name is the flag and the TOML key, its annotation the type (str,
int, float, bool, or `tuple[str, ...]`: words behind the flag, a TOML array), its trailing comment the help text; a
comment line `# -- name --` above fields starts a group of `--help`.

    @dataclass
    class Options:
        # -- data --
        data: str  # list-wise JSON Lines file
        max_length: int = 512  # tokens of prompt and response together; longer prompts are cut on the left
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
import textwrap
import time
import tomllib
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")
FIELD = re.compile(r"^    (\w+): .*?  # (.+)$")
GROUP = re.compile(r"^    # -- (.+) --$")
EXPECTED = {str: "a string", int: "a whole number of 64 bits", float: "a finite number, such as 0.1"}
EXPECTED |= {bool: "true or false", tuple: "strings"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:  # argparse would print its usage and exit
        hint = " (--key=VALUE when it begins with -)" if "expected" in message else ""
        raise ValueError(f"command line: {message}{hint}")


def parse(
    cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str, foreign: bool = False
) -> tuple[T, dict[str, str]]:
    """Build `cls`, a dataclass as above, from `--config FILE.toml` and flags; also where each option that was set was
    set: name -> "file" or "flag".

    Args:
        argv: words of the command line, `sys.argv[1:]` when None. `--key value`, `--key=value`, and for a
            bool a bare `--key`; `-` in a flag's name means `_`.
        prog, description: what `--help` shows first; `--help` prints and exits with status 0.
        foreign: the file is another script's, which checks it; keys that are no options here are passed over.

    Raises:
        ValueError: an unknown, doubled, ill-typed or missing option; an unreadable or nested TOML file.
    """
    kinds = {name: typing.get_origin(kind) or kind for name, kind in typing.get_type_hints(cls).items()}
    usage = f"{prog} [--config FILE.toml] [--key value ...]"
    parser = Parser(prog, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120)
    parser._negative_number_matcher = re.compile(r"-[\d.]")  # argparse takes -1e-4 for a flag
    add = functools.partial(parser.add_argument, action="append")  # so that a flag given twice is seen
    add("--config", metavar="FILE.toml", help="keys as below; a flag wins over the file")
    defaults, told = {field.name: field.default for field in dataclasses.fields(cast(Any, cls))}, []
    for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
        if match := GROUP.match(line):
            add = functools.partial(parser.add_argument_group(match[1]).add_argument, action="append")
        elif match := FIELD.match(line):
            name, text = match.groups()
            kind, default = kinds[name], defaults[name]
            shown = (str(default).lower() if kind is bool else str(default)) or '""'
            text += " (required)" if default is dataclasses.MISSING else f" (default {shown})"
            more: dict[str, Any] = {bool: {"nargs": "?", "const": "true"}, tuple: {"nargs": "+"}}.get(kind, {})
            metavar = "str" if kind is tuple else kind.__name__
            add(f"--{name}", metavar=metavar, help=text.replace("%", "%%"), **more)
            told.append(name)
    assert told == list(defaults), f"a field's line ends with a comment, its help text: {list(defaults)}, {told}"

    words = sys.argv[1:] if argv is None else argv
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    given, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = meant(flag.lstrip("-"), [*kinds, "config"], "--")
        what = f"unknown option {flag}{near}" if flag[:1] == "-" else f"unexpected {unknown[0]!r}."
        raise ValueError(f"command line: {what} Options are written --key value (see --help)")
    flags = vars(given)
    if twice := [name for name, texts in flags.items() if len(texts) > 1]:
        raise ValueError(f"command line: --{twice[0]} is given twice: keep one")
    values = read_toml(Path(flags.pop("config")[0]), kinds, foreign) if "config" in flags else {}
    given = dict.fromkeys(values, "file") | dict.fromkeys(flags, "flag")
    for name, (text,) in flags.items():
        shown = " ".join(text) if isinstance(text, list) else text
        values[name] = convert(text, kinds[name], f"command line: --{name} {shown}", from_text=True)
    if missing := [name for name, x in defaults.items() if x is dataclasses.MISSING and name not in values]:
        raise ValueError(f"missing --{', --'.join(missing)}: give as flags or in the --config file")
    return cls(**values), given


def read_toml(path: Path, kinds: dict[str, type], foreign: bool) -> dict[str, Any]:
    """The values of a flat TOML file by option name, each checked against its option's type."""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # not TOML, not UTF-8, brackets in brackets in brackets ...
        raise ValueError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    values = {}
    for key, value in table.items():
        # tomllib keeps no positions; the keys of a flat file stand at the start of their lines.
        at_key = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[].=]""")
        lines = [f":{n}: {line:.80}" for n, line in enumerate(text.splitlines(), 1) if at_key.match(line)]
        where = f"{path}{lines[0] if lines else f': {key}'}"
        if isinstance(value, dict):
            raise ValueError(f"{where}: {key} is a table, and options are flat: write key = value lines only")
        if key in kinds:
            values[key] = convert(value, kinds[key], where)
        elif not foreign:
            raise ValueError(f"{where}: unknown key {key}{meant(key, kinds)} See --help")
    return values


def convert(value: Any, kind: type, where: str, *, from_text: bool = False) -> Any:
    """A TOML value, or the text of a flag, as the type of its option; `where` begins the ValueError if it is none."""
    with contextlib.suppress(ValueError, OverflowError):  # what stays of another type is refused below
        if from_text and kind is bool:
            value = {"true": True, "false": False}.get(value)
        elif (from_text and kind in (int, float)) or (kind is float and type(value) is int):
            value = kind(value)
        elif kind is tuple and isinstance(value, list) and all(isinstance(word, str) for word in value):
            value = tuple(value)
    in_range: dict[type, Callable[[Any], bool]] = {int: lambda x: -(2**63) <= x < 2**63, float: math.isfinite}
    if type(value) is not kind or (kind in in_range and not in_range[kind](value)):
        raise ValueError(f"{where}: expected {EXPECTED[kind]}")
    return value


# What TRL and transformers call it.
ELSEWHERE = {"learning_rate": "lr", "output_dir": "out", "num_train_epochs": "epochs", "model_name_or_path": "model"}
ELSEWHERE |= {"dataset_name": "data", "per_device_train_batch_size": "prompts_per_step", "ref_model": "reference"}
ELSEWHERE |= {"lora_r": "lora_rank", "lora_target_modules": "lora_targets", "report_to": "log_to", "bf16": "dtype"}


def meant(word: str, known: Collection[str], prefix: str = "") -> str:
    """What an unknown word may have meant, by another program's name of an option or by its letters."""
    word = word.lower()
    found = [*({ELSEWHERE.get(word.replace("-", "_"))} & {*known}), *difflib.get_close_matches(word, known, n=1)]
    return f": did you mean {prefix}{found[0]}?" if found else "."


# ------------------------------------------------------------------------------------------------ what scripts share


def check_used(set_keys: Collection[str], used: Collection[str], *, what: str) -> None:
    """Raise ValueError when an option that the user set, `set_keys`, is none that `what` (say "method dpo-bt") uses."""
    if unused := sorted(set(set_keys) - set(used)):
        raise ValueError(f"{what} does not use {', '.join(unused)}: remove that")


def check_choices(config: Any, **known: Collection[str]) -> None:
    """Raise ValueError for an option of `config` whose value is not among its known ones."""
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            near = meant(value, values)
            raise ValueError(f"{name} = {value!r} does not exist{near} Choose one of {', '.join(values)}")


def run_main(main: Callable[[], None]) -> None:
    """Run `main`; a ValueError, which is a user's mistake, ends it with its message and status 2, Ctrl-C with 130."""
    if not sys.stderr.isatty():  # a log keeps every state of a bar
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds; read when tqdm is imported
    try:
        main()
    except (ValueError, KeyboardInterrupt) as end:
        # Of a mistake on all ranks the first speaks: torchrun ends the others, while they wait, when that has ended.
        time.sleep(5 * (isinstance(end, ValueError) and os.environ.get("RANK", "0") != "0"))
        print(f"error: {end}" if isinstance(end, ValueError) else "interrupted", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(end, ValueError) else 130) from None  # 130: a shell's name for Ctrl-C
