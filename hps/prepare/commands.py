"""Scripts of several sub-commands, each with options of its own."""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from hps import config


def run(
    commands: dict[str, tuple[type, Callable[..., None]]],
    argv: Sequence[str] | None,
    *,
    prog: str,
    page: str,
    foreign: Collection[str] = (),
) -> None:
    """Run the sub-command that the first word of `argv` names (command -> dataclass of its options, and function of
    them) on the options behind it; print `page` if there is none. foreign: commands whose --config file is another
    script's; their functions get the words too. ValueError: unknown, or as `config.parse`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(page)
        return
    if argv[0] not in commands:
        raise ValueError(f"unknown command {argv[0]!r}; choose one of {', '.join(commands)}")
    options, function = commands[argv[0]]
    name, *words = argv
    about: dict[str, Any] = dict(prog=f"{prog} {name}", description=function.__doc__ or page)
    c, _ = config.parse(options, words, foreign=name in foreign, **about)
    function(c, words) if name in foreign else function(c)
