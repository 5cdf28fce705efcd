"""Scripts of several sub-commands, each with options of its own."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from hps import config


def run(
    commands: dict[str, tuple[type, Callable[[Any], None]]], argv: Sequence[str] | None, *, prog: str, page: str
) -> None:
    """Run the sub-command that the first word of `argv` names (command -> dataclass of its options, and function of
    them) on the options behind it; print `page` if there is none. ValueError: unknown, or as `config.parse`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(page)
        return
    if argv[0] not in commands:
        raise ValueError(f"unknown command {argv[0]!r}; choose one of {', '.join(commands)}")
    options, function = commands[argv[0]]
    c, _ = config.parse(options, argv[1:], prog=f"{prog} {argv[0]}", description=function.__doc__ or page)
    function(c)
