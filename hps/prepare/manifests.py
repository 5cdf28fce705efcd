"""OUTPUT.manifest.json, which says what a command of data_prep.py made a file of and how, and what became of the rows.

By it a command knows its own finished output again, and what it must not overwrite.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hps import hosts
from hps.io import files
from hps.prepare import journal

Inputs = Sequence[tuple[str, str]]  # of each the path, and what it is called instead, as `importers.located` has them


def is_finished(c: Any, command: str, inputs: Inputs | None = None) -> bool:
    """Whether the output is there already as this command makes it, which is said then.

    Raises:
        ValueError: the output is the input, by whatever name, a file that no command of ours has made, or one of
            another command or of other options. Of inputs or a model that have changed it is made again.
    """
    output, manifest = Path(c.output), Path(f"{c.output}.manifest.json")
    for path in map(Path, [c.input] if isinstance(c.input, str) else c.input):
        if path.exists() and output.exists() and path.samefile(output):
            raise ValueError(f"--output {c.output} is the input, which would be lost: choose another name")
    if not output.is_file() or journal.journals(output):  # of a run that was killed before its manifest
        return False
    types = dict(output=dict, command=str, options=dict)
    before = files.read_record(manifest, f"delete it, and {output}", **types) if manifest.exists() else {"output": {}}
    if before["output"].get("sha256") != files.sha256(output):
        raise ValueError(
            f"--output {output} is not what a finished data_prep.py left: delete it, or choose another name"
        )
    now = {"command": command, **options_of(c), "input": described(inputs or [(c.input, c.input)])}
    asked, given = (one.pop("options") | {"command": one.pop("command")} for one in (now, before))
    pairs = [(key, given[key], value) for key, value in asked.items() if key in given.keys() - journal.SPEED]
    if other := "; ".join(f"{key}: {a!r} -> {b!r}" for key, a, b in pairs if a != b):
        raise ValueError(f"--output {output} was made otherwise ({other}): delete it, or choose another name")
    if changed := [key for key, value in now.items() if before.get(key) != value]:
        print(f"{output}: is made again, since {' and '.join(changed)} changed", file=sys.stderr)
        return False
    print(f"{output}: is finished; delete it to make it again", file=sys.stderr)
    return True


def finish(
    c: Any, command: str, counts: dict[str, int], reasons: list[str], *, inputs: Inputs | None = None, **more: Any
) -> None:
    """Print what was left out and why, and write it to the manifest."""
    for reason in reasons:
        print(reason, file=sys.stderr)
    facts = {"command": command, **options_of(c), "counts": counts, **more, "first_reasons": reasons}
    write(inputs or [(c.input, c.input)], c.output, facts)
    print_counts(c.output, counts)


def print_counts(output: str, counts: dict[str, int]) -> None:
    print(f"{output}: {', '.join(f'{key} {n}' for key, n in counts.items())}", file=sys.stderr)


def options_of(c: Any) -> dict[str, Any]:
    """What a manifest says of a command's options, and of what a model or scorer holds that they name."""
    options = {key: value for key, value in vars(c).items() if key not in ("input", "output")}
    models = {key: hosts.behind(key, options[key]) for key in ("model", "scorer") if key in options}
    return json.loads(json.dumps({"options": options, "models": models}))


def write(inputs: Inputs, output: str | Path, facts: dict[str, Any]) -> None:
    """Write OUTPUT.manifest.json: `facts` (options, counts) and what identifies the files, as `sha256sum` checks them.
    Equal files and facts give equal bytes: there is no time in it."""
    record = {"input": described(inputs), "output": described([(str(output), str(output))])} | facts
    files.write_record(Path(f"{output}.manifest.json"), record)


def described(inputs: Inputs) -> Any:
    """What identifies files in a manifest; of one file not as a list. A data set's name has its commit."""
    about = []
    for path, called in inputs:
        file = Path(path)
        sums = {"bytes": file.stat().st_size, "sha256": files.sha256(file)} if file.is_file() else {}
        about.append({"path": called} | sums)
    return about[0] if len(about) == 1 else about
