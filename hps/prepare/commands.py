"""Scripts of several sub-commands, each with options of its own."""

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hps import config


def read(
    commands: Mapping[str, type], argv: Sequence[str] | None, *, prog: str, page: str, foreign: Collection[str] = ()
) -> tuple[str, Any, Sequence[str]]:
    """The sub-command that the first word of `argv` names, its options (command -> dataclass of them, whose docstring
    says what it does), and the words that these were read from. Prints `page` and exits if there is none. foreign:
    commands whose --config file is another script's. ValueError: unknown, or as `config.parse`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(page)
        raise SystemExit(0)
    name, *words = argv
    if name not in commands:
        near = config.meant(name, commands)
        raise ValueError(f"unknown command {name!r}{near} Choose one of {', '.join(commands)}")
    about: dict[str, Any] = dict(prog=f"{prog} {name}", description=commands[name].__doc__)
    return name, config.parse(commands[name], words, foreign=name in foreign, **about)[0], words
