"""Options of the scripts: one flat dataclass each, filled from a TOML file, then from flags. Strict.

A field is the whole of an option, on one line: its name is the flag and the TOML key, its annotation the type (str,
int, float, bool, one of them `| None`, or `tuple[str, ...]`: words behind the flag, a TOML array), its trailing comment
the help text; a comment line `# -- name --` above fields starts a group of `--help`.

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
import re
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

T = TypeVar("T")
FIELD = re.compile(r"^    (\w+): .*?  # (.+)$")
GROUP = re.compile(r"^    # -- (.+) --$")
EXPECTED = {str: "a string", int: "an int of 64 bits", float: "a finite float", bool: "true or false", tuple: "strings"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:  # argparse would print its usage and exit
        hint = " (--key=VALUE when it begins with -)" if "expected" in message else ""
        raise ValueError(f"command line: {message}{hint}")


class Once(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"--{self.dest} is given twice: keep one")
        setattr(namespace, self.dest, values)


def parse(
    cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str, foreign: bool = False
) -> tuple[T, frozenset[str]]:
    """Build `cls`, a dataclass as above, from `--config FILE.toml` and flags; also the names set in either place.

    Args:
        argv: words of the command line, `sys.argv[1:]` when None. `--key value`, `--key=value`, and for a
            bool a bare `--key`; `-` in a flag's name means `_`. The word `none` gives None where allowed.
        prog, description: what `--help` shows first; `--help` prints and exits with status 0.
        foreign: the file is another script's, which checks it; keys that are no options here are passed over.

    Raises:
        ValueError: an unknown, doubled, ill-typed or missing option; an unreadable or nested TOML file.
    """
    kinds, usage = typing.get_type_hints(cls), f"{prog} [--config FILE.toml] [--key value ...]"
    parser = Parser(prog, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120)
    parser._negative_number_matcher = re.compile(r"-[\d.]")  # argparse takes -1e-4 for a flag
    parser.add_argument("--config", action=Once, metavar="FILE.toml", help="keys as below; a flag wins over the file")
    groups: dict[str, Any] = {"": parser}
    defaults = {}
    for name, (group, text) in help_texts(cls).items():
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        defaults[name] = default = getattr(cls, name, dataclasses.MISSING)
        shown = str(default).lower() if default is None or isinstance(default, bool) else str(default) or '""'
        text += " (required)" if default is dataclasses.MISSING else f" (default {shown})"
        base, optional = base_of(kinds[name])
        more: dict[str, Any] = {bool: {"nargs": "?", "const": "true"}, tuple: {"nargs": "+"}}.get(base, {})
        metavar = "str" if base is tuple else base.__name__ + " or none" * optional
        groups[group].add_argument(f"--{name}", action=Once, metavar=metavar, help=text.replace("%", "%%"), **more)

    words = sys.argv[1:] if argv is None else argv
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    given, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].partition("=")[0]
        what = f"unknown option {flag}{nearest(flag[2:], kinds)}" if flag[:2] == "--" else f"unexpected {unknown[0]!r}"
        raise ValueError(f"command line: {what}; options are written --key value (see --help)")
    flags = vars(given)
    values = read_toml(Path(flags.pop("config")), kinds, foreign) if "config" in flags else {}
    for name, text in flags.items():
        shown = " ".join(text) if isinstance(text, list) else text
        values[name] = convert(text, kinds[name], f"command line: --{name} {shown}", from_text=True)
    if missing := [name for name, x in defaults.items() if x is dataclasses.MISSING and name not in values]:
        raise ValueError(f"missing --{', --'.join(missing)}: give as flags or in the --config file")
    return cls(**values), frozenset(values)


@functools.cache
def help_texts(cls: type) -> dict[str, tuple[str, str]]:
    """The group and the help text of each field, read from the source of `cls`."""
    group, found = "", {}
    for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
        if match := GROUP.match(line):
            group = match[1]
        elif match := FIELD.match(line):
            found[match[1]] = group, match[2]
    names = [field.name for field in dataclasses.fields(cls)]
    assert list(found) == names, f"a field's line ends with a comment, its help text: {names}, {list(found)}"
    return found


def read_toml(path: Path, kinds: dict[str, Any], foreign: bool) -> dict[str, Any]:
    """The values of a flat TOML file by option name, each checked against its option's type."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+)", str(error))  # absent at the end of the document
        raise ValueError(f"{path}:{found[1] if found else len(text.splitlines())}: not TOML: {error}") from error
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, thousands of digits, brackets in brackets ...
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    values = {}
    for key, value in table.items():
        # tomllib keeps no positions; the keys of a flat file stand at the start of their lines.
        at_key = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[].=]""")
        lines = [number for number, line in enumerate(text.splitlines(), 1) if at_key.match(line)]
        where = f"{path}:{lines[0]}" if lines else str(path)
        if isinstance(value, dict):
            raise ValueError(f"{where}: {key} is a table, and options are flat: write key = value lines only")
        if key in kinds:
            values[key] = convert(value, kinds[key], f"{where}: {key} = {brief(value)}")
        elif not foreign:
            raise ValueError(f"{where}: unknown key {key}{nearest(key, kinds)} (see --help)")
    return values


def base_of(kind: Any) -> tuple[type, bool]:
    """str, int, float, bool or tuple, and whether None is allowed beside it."""
    kinds = {tuple} if typing.get_origin(kind) is tuple else set(typing.get_args(kind)) or {kind}
    (base,) = kinds - {NoneType}
    assert base in EXPECTED, f"{kind} is no option type"
    return base, NoneType in kinds


def convert(value: Any, kind: Any, where: str, *, from_text: bool = False) -> Any:
    """A TOML value, or the text of a flag, as the type of its option; `where` begins the ValueError if it is none."""
    base, optional = base_of(kind)
    if optional and value == "none":
        return None
    if from_text and base is bool:
        value = {"true": True, "false": False}.get(value)
    elif from_text and base in (int, float):
        with contextlib.suppress(ValueError):
            value = base(value)
    elif base is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    elif base is tuple and isinstance(value, list) and all(isinstance(word, str) for word in value):
        value = tuple(value)
    in_range: dict[type, Callable[[Any], bool]] = {int: lambda x: -(2**63) <= x < 2**63, float: math.isfinite}
    if type(value) is not base or (base in in_range and not in_range[base](value)):
        raise ValueError(f"{where}: expected {EXPECTED[base]}{' or none' if optional else ''}")
    return value


def brief(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # Python prints no int of more than 4,300 digits
        return "thousands of digits or brackets"


def nearest(name: str, names: Collection[str]) -> str:
    found = difflib.get_close_matches(name.lower().replace("-", "_"), [*names, "config"], n=1)
    return f": the nearest is --{found[0]}" if found else ""


# ------------------------------------------------------------------------------------------------ what scripts share


def check_used(set_keys: Collection[str], used: Collection[str], *, what: str) -> None:
    """Raise ValueError when an option that the user set, `set_keys`, is none that `what` (say "method dpo-bt") uses."""
    if unused := sorted(set(set_keys) - set(used)):
        uses = ", ".join(sorted(used)) or "none of these options"
        raise ValueError(f"{what} does not use {', '.join(unused)}: remove that. It uses {uses}")


def check_choices(config: Any, **known: Collection[str]) -> None:
    """Raise ValueError for an option of `config` whose value is not among its known ones."""
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            raise ValueError(f"{name} = {value!r} does not exist; choose one of {', '.join(values)}")


def named_files(words: Collection[str]) -> dict[str, str]:
    """Path by name out of words NAME=FILE, those of --methods; ValueError unless two names or more differ."""
    pairs = [word.partition("=") for word in words]
    named = {name: path for name, _, path in pairs}
    if len(pairs) < 2 or len(named) < len(pairs) or not all(name and path for name, _, path in pairs):
        raise ValueError(f"--methods {' '.join(words)}: need NAME=FILE NAME=FILE ... with two or more different names")
    return named


def as_dict(config: Any) -> dict[str, Any]:
    """The options by name, in the order of the dataclass."""
    return dataclasses.asdict(config)


def run_command(
    commands: dict[str, tuple[type, Callable[[Any], None]]], argv: Sequence[str] | None, *, prog: str, page: str
) -> None:
    """Run the sub-command that the first word of `argv` names (command -> dataclass of its options, and function of
    them) on the options behind it; print `page` if there is none. ValueError: unknown, or as `parse`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(page)
        return
    if argv[0] not in commands:
        raise ValueError(f"unknown command {argv[0]!r}; choose one of {', '.join(commands)}")
    options, run = commands[argv[0]]
    c, _ = parse(options, argv[1:], prog=f"{prog} {argv[0]}", description=run.__doc__ or page)
    run(c)


def run_main(main: Callable[[], None]) -> None:
    """Run `main`; for a ValueError, which is a user's mistake, print its message and exit with status 2."""
    try:
        main()
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
