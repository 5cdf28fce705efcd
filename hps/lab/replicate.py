"""How far a record's intervals carry: two runs of the same suites, their paired differences laid side by side.

    python -m hps.lab.replicate --first docs/results/first --second docs/results

Worlds are equal but for rounding: on another machine, or after a change of code that should change nothing, SFT ends
elsewhere, and with it candidates and runs. So a second record is a replication, and shows whether the first one's
intervals over three worlds were wide enough (with right ones, about 83 % of the second means lie in the first's 95 %
intervals). Reads the reports (SUITE.md) that `hps.lab.reproduce` writes; the last line is JSON.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from hps import config

Interval = tuple[float, float, float]  # mean, low, high
NUMBER = r"([+-]?[\d.]+)"
ROW = re.compile(rf"\| (.+?) \| (.+?) \| (.+?) \| {NUMBER} \[{NUMBER}, {NUMBER}\] \|")


@dataclass
class Options:
    first: str  # folder of reports, SUITE.md
    second: str  # another


def differences(report: str) -> dict[tuple[str, str, str], Interval]:
    """(metric, a, b) -> a - b with its interval, from a report's table of paired comparisons."""
    _, _, section = report.partition("\n## Paired comparisons\n")
    section = section.partition("\n## ")[0]
    rows = (ROW.match(line) for line in section.splitlines())
    return {(m[1], m[2], m[3]): (float(m[4]), float(m[5]), float(m[6])) for m in rows if m}


def compare(first: Interval, second: Interval) -> dict[str, int]:
    """Counts of one difference: whether the second mean lies in the first interval, and how the verdicts agree."""

    def verdict(interval: Interval) -> int:
        return (interval[1] > 0) - (interval[2] < 0)

    a, b = verdict(first), verdict(second)
    return {
        "differences": 1,
        "inside": first[1] <= second[0] <= first[2],
        "same": a == b,
        "in_one": (a == 0) != (b == 0),
        "reversed": a * b < 0,
    }


def main() -> None:
    c, _ = config.parse(Options, prog="python -m hps.lab.replicate", description=str(__doc__).split("\n")[0])
    found: dict[str, dict[str, int]] = {}
    seen: set[tuple[str, str, str]] = set()  # suites share rows: each difference counts once
    for path in sorted(Path(c.first).glob("*.md")):
        other = Path(c.second) / path.name
        if not other.exists():
            continue
        ours, theirs = differences(path.read_text()), differences(other.read_text())
        for key in (ours.keys() & theirs.keys()) - seen:
            seen.add(key)
            for into in (path.stem, "all"):
                counts = found.setdefault(into, dict.fromkeys(compare((0, 0, 0), (0, 0, 0)), 0))
                for name, n in compare(ours[key], theirs[key]).items():
                    counts[name] += n
    if not found:
        raise ValueError(f"{c.first} and {c.second} have no difference in common: give two folders of reports SUITE.md")
    print("| suite | differences | second mean in the first interval | same verdict | resolved in one | reversed |")
    print("|---|---|---|---|---|---|")
    for name in [*sorted(found.keys() - {"all"}), "all"]:
        n = found[name]
        share = f"{n['inside']} ({100 * n['inside'] / n['differences']:.0f} %)"
        print(f"| {name} | {n['differences']} | {share} | {n['same']} | {n['in_one']} | {n['reversed']} |")
    print(json.dumps(found))


if __name__ == "__main__":
    config.run_main(main)
