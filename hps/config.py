"""Options of the scripts: one flat dataclass each, filled from a TOML file, then from flags. Strict.

A field is the whole of an option: its name is the flag and the TOML key, its annotation the type, its
trailing comment the help text; a comment line `# -- name --` above fields starts a group of `--help`.

    @dataclass
    class Options:
        # -- data --
        data: str  # list-wise JSON Lines file
        max_length: int = 512  # tokens of prompt and response together; longer prompts are cut on the left
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import re
import reprlib
import sys
import textwrap
import tokenize
import tomllib
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

T = TypeVar("T")
EXPECTED = {str: "a string", int: "an int", float: "a finite float", bool: "true or false"}


@dataclass(frozen=True)
class _Option:
    name: str
    kind: type  # str, int, float or bool
    optional: bool  # may be none as well
    default: Any  # MISSING: the user must give it
    help: str
    group: str


def parse(
    cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str, foreign: bool = False
) -> tuple[T, frozenset[str]]:
    """Build `cls` from `--config FILE.toml` and flags, of which the flags win.

    Args:
        cls: a dataclass as in the module's docstring; types str, int, float, bool, or one of them `| None`.
        argv: words of the command line, `sys.argv[1:]` when None. `--key value`, `--key=value`, and for a
            bool a bare `--key`; `-` in a flag's name means `_`. The word `none` gives None where allowed.
        prog, description: what `--help` shows first; `--help` prints and exits with status 0.
        foreign: the file is another script's, which checks it; keys that are no options here are passed over.

    Returns:
        The instance, and the names that the user set, in either place.

    Raises:
        ValueError: an unknown, doubled, ill-typed or missing option; an unreadable or nested TOML file.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = {option.name: option for option in _options(cls)}
    if "--help" in argv or "-h" in argv:
        print(_help(options.values(), prog, description))
        raise SystemExit(0)
    flags = _read_flags(argv, options)
    values = _read_toml(Path(flags.pop("config")), options, foreign) if "config" in flags else {}
    values |= {name: _from_text(text, options[name]) for name, text in flags.items()}
    missing = [name for name, option in options.items() if option.default is MISSING and name not in values]
    if missing:
        names = ", ".join(f"--{name}" for name in missing)
        raise ValueError(f"missing {names}: give as flags or in the --config file")
    build: Callable[..., T] = cls
    return build(**values), frozenset(values)


def check_used(set_keys: Collection[str], used: Collection[str], *, what: str) -> None:
    """Raise ValueError when the user set an option that `what` (say "method dpo-bt") will not use.

    Args:
        set_keys: the names that `parse` returned, or those of them that depend on `what`.
        used: the names that `what` uses.
    """
    unused = sorted(set(set_keys) - set(used))
    if unused:
        uses = ", ".join(sorted(used)) or "none of these options"
        raise ValueError(f"{what} does not use {', '.join(unused)}: remove that. It uses {uses}")


def check_choices(config: Any, **known: Collection[str]) -> None:
    """Raise ValueError for an option of `config` whose value is not among its known ones."""
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            raise ValueError(f"{name} = {value!r} does not exist; choose one of {', '.join(values)}")


def named_files(text: str) -> dict[str, str]:
    """Path by name out of the option --methods, "NAME=FILE,NAME=FILE"; ValueError unless two names or more differ."""
    pairs = [[side.strip() for side in part.partition("=")] for part in text.split(",")]
    named = {name: path for name, _, path in pairs}
    if len(pairs) < 2 or len(named) < len(pairs) or not all(name and path for name, _, path in pairs):
        raise ValueError(f"--methods {text}: need NAME=FILE,NAME=FILE,... with two or more different names")
    return named


def as_dict(config: Any) -> dict[str, Any]:
    """The options by name, in the order of the dataclass."""
    return dataclasses.asdict(config)


def run_command(
    commands: dict[str, tuple[type, Callable[[Any], None]]], argv: Sequence[str] | None, *, prog: str, page: str
) -> None:
    """Run the sub-command that the first word names, on the options that the others give.

    Args:
        commands: name -> (dataclass of its options, function of them).
        argv: words of the command line, `sys.argv[1:]` when None. page: what is printed without a command.

    Raises:
        ValueError: no such command, or what `parse` refuses.
    """
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


def _options(cls: Any) -> list[_Option]:
    """The fields of `cls` with their comments and groups, read from its source."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    lines = {ast.unparse(n.target): n.end_lineno or 0 for n in body if isinstance(n, ast.AnnAssign)}
    types = typing.get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        name, line = field.name, lines[field.name]
        kinds = set(typing.get_args(types[name]) or [types[name]])
        optional = NoneType in kinds
        kinds -= {NoneType}
        assert len(kinds) == 1 and kinds <= EXPECTED.keys(), f"{name}: {types[name]} is no option type"
        assert line in comments, f"{name} has no comment, which would be its help text"
        assert field.default_factory is MISSING and name not in ("config", "help"), name
        above = [text for at, text in comments.items() if at < line and re.fullmatch("-- .+ --", text)]
        group = above[-1].strip("- ") if above else "options"
        options.append(_Option(name, kinds.pop(), optional, field.default, comments[line], group))
    return options


def _help(options: Collection[_Option], prog: str, description: str) -> str:
    rows = [("general", "--config FILE.toml", "keys as below without the dashes; a flag wins over the file")]
    for option in options:
        kind = option.kind.__name__ + (" or none" if option.optional else "")
        default = "required" if option.default is MISSING else f"default {_show(option.default)}"
        rows.append((option.group, f"--{option.name} {kind}", f"{option.help} ({default})"))
    width = max(len(left) for _, left, _ in rows) + 4
    out = [f"usage: {prog} [--config FILE.toml] [--key value ...]", "", description]
    for number, (group, left, right) in enumerate(rows):
        if number == 0 or group != rows[number - 1][0]:
            out += ["", group]
        right = textwrap.wrap(right, max(110 - width, 40), break_long_words=False, break_on_hyphens=False)
        out += [f"  {left:<{width - 2}}{right[0]}", *(" " * width + line for line in right[1:])]
    return "\n".join(out)


def _show(value: Any) -> str:
    """A value as the user would write it on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value) or '""'


def _read_flags(argv: Sequence[str], options: dict[str, _Option]) -> dict[str, str]:
    """The words of the command line as text by option name, `config` among them."""
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word, equals, text = words.pop(0).partition("=")
        if not word.startswith("--"):
            raise ValueError(f"command line: unexpected {word!r}: options are written --key value")
        name = word[2:].replace("-", "_")
        if name != "config" and name not in options:
            nearest = _nearest(name, [*options, "config"])
            raise ValueError(f"command line: unknown option {word}: the nearest is --{nearest} (see --help)")
        if name in flags:
            raise ValueError(f"command line: --{name} is given twice: keep one")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not equals and name in options and options[name].kind is bool:
            text = "true"
        elif not equals:
            raise ValueError(f"command line: --{name} needs a value (--{name}=VALUE when it starts with --)")
        flags[name] = text
    return flags


def _read_toml(path: Path, options: dict[str, _Option], foreign: bool) -> dict[str, Any]:
    """The values of a flat TOML file by option name, each checked against its option's type."""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not UTF-8 text: {error.reason}") from error
    except tomllib.TOMLDecodeError as error:
        found = re.search(r" \(at line (\d+)", str(error))  # absent at the end of the document
        line = int(found[1]) if found else max(len(text.splitlines()), 1)
        raise ValueError(f"{path}:{line}: not TOML: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets in ...
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    values = {}
    for key, value in table.items():
        # tomllib keeps no positions; the keys of a flat file stand at the start of their lines.
        at_key = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[].=]""")
        lines = [number for number, line in enumerate(text.splitlines(), 1) if at_key.match(line)]
        where = f"{path}:{lines[0]}" if lines else str(path)
        if isinstance(value, dict):
            raise ValueError(f"{where}: {key} is a table, and options are flat: write key = value lines only")
        if key not in options:
            if foreign:
                continue
            nearest = _nearest(key, options)
            raise ValueError(f"{where}: unknown key {key}: the nearest is {nearest} (see --help)")
        values[key] = _typed(value, options[key], f"{where}: {key} = {_brief(value)}")
    return values


def _brief(value: Any) -> str:
    """A value for a message: its beginning where it is long or deep."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no int of more than 4300 digits
        return "an int of thousands of digits"


def _nearest(name: str, names: Collection[str]) -> str:
    return difflib.get_close_matches(name.lower(), names, n=1, cutoff=0)[0]


def _from_text(text: str, option: _Option) -> Any:
    """A flag's text as the TOML value of the same meaning, then checked like one."""
    value: Any = text
    if option.kind is bool:
        value = {"true": True, "false": False}.get(text, text)
    elif option.kind in (int, float):
        try:
            value = option.kind(text)
        except ValueError:
            pass  # text it stays: `none`, or an error in a moment
    return _typed(value, option, f"command line: --{option.name} {text}")


def _typed(value: Any, option: _Option, where: str) -> Any:
    if option.optional and value == "none":
        return None
    if option.kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    good = type(value) is option.kind
    if good and option.kind is float:
        good = math.isfinite(value)
    if good and option.kind is int:
        good = -(2**63) <= value < 2**63  # what arrays and seeds hold
    if not good:
        what = EXPECTED[option.kind] + (" of 64 bits" if type(value) is int and option.kind is int else "")
        raise ValueError(f"{where}: expected {what}{' or none' if option.optional else ''}")
    return value
