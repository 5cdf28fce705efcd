"""report.py: the schema's messages, the tables' marks, and files that hold what they should."""

import copy
import json
import math

import matplotlib
import pytest

from hps.evaluate import report


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def results(sft="SFT", bt="DPO-BT", hps="HPS|x"):
    """A results file of three methods, by names that may be hostile."""
    steps = list(range(1, 41))
    return {
        "suite": "tiny",
        "commit": "abc1234",
        "machine": "two cores",
        "seconds": 90.0,
        "settings": {"beta": 0.1, "prompts": 300},
        "rows": [
            {
                "method": sft,
                "seeds": 1,
                "metrics": {
                    "rm2": interval(0, 0, 0),
                    "kl_exact": interval(0, 0, 0),
                    "harm": interval(32.7, 30, 35),
                    "true_reward": interval(0.59, 0.5, 0.7),
                    "length": interval(17, 16, 18),
                },
            },
            {
                "method": bt,
                "seeds": 3,
                "metrics": {
                    "rm2": interval(0.512, 0.3, 0.7),
                    "kl_exact": interval(6.1, 5.5, 6.6),
                    "harm": interval(2.84, 2, 4),
                    "true_reward": interval(1.14, 1.0, 1.3),
                    "length": interval(19, 18, 20),
                    "win": interval(54.5, 51, 57),
                },
            },
            {
                "method": hps,
                "seeds": 3,
                "metrics": {
                    "rm2": interval(0.6, 0.45, 0.77),
                    "kl_exact": interval(5.2, 4.9, 5.6),
                    "harm": interval(3.6, 3, 4),
                    "true_reward": interval(1.78, 1.6, 1.9),
                    "length": interval(18, 17, 19),
                    "win": interval(70.25, 68, 73),
                },
            },
        ],
        "comparisons": [
            {"a": hps, "b": bt, "metric": "true_reward", **interval(0.64, 0.5, 0.8), "p": 0.00321},
            {"a": hps, "b": bt, "metric": "rm2", **interval(-0.001, -0.2, 0.2)},
            {"a": hps, "b": sft, "metric": "harm", **interval(-29.1, -32, -26)},
        ],
        "curves": {
            method: {
                "step": steps,
                "loss": [scale * math.exp(-0.1 * s) for s in steps],
                "margin": [scale * s for s in steps],
            }
            for method, scale in ((bt, 0.7), (hps, 9))
        },
        "schedule": {
            "step": steps,
            "gamma": [-5.0 + s // 8 for s in steps],
            "effective_negatives": [2.0 + s for s in steps],
        },
        "series": {
            "strength": {
                "x": {"metric": "kl_exact"},
                "panels": ["rm2", "junk", "true_reward"],
                "lines": {"down": [hps, bt, sft], "one": [bt]},
            },
            "n": {
                "x": {"label": "candidates", "values": {bt: 5, hps: 20.5}},
                "panels": ["win"],
                "lines": {"up": [bt, hps]},
            },
        },
        "claims": [
            {
                "claim": "a < b",
                "paper": "Table 2: 1 vs 2",
                "verdict": "holds",
                "kind": "difference",
                "metric": "true_reward",
                **interval(0.641, 0.5, 0.8),
            },
            {
                "claim": "c|d",
                "paper": "Table 3",
                "verdict": "does not hold",
                "kind": "value",
                "metric": "harm",
                **interval(3.6, 3, 4),
            },
            {
                "claim": "as cheap",
                "paper": "Sec. 6: x 1.03",
                "verdict": "unresolved",
                "kind": "ratio",
                "metric": "train_tokens",
                **interval(1.016, 0.96, 1.16),
            },
            {
                "claim": "a constant",
                "paper": "Sec. 6",
                "verdict": "holds",
                "kind": "difference",
                "metric": "harm",
                **interval(-2, -2, -2),
            },
            {
                "claim": "people like it",
                "paper": "Table 3: 3.93",
                "verdict": "not measured here",
                "reason": "needs human raters",
            },
        ],
    }


def cells(markdown, first):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").replace(r"\|", "/").split("|")]


# ---- validate -------------------------------------------------------------------------------------


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(item):
        for key in path:
            item = item[key]
        item[last] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("commit"), r"^results: misses commit"),
        (put("comparison", []), r"^results: unknown key comparison"),
        (put("suite", ""), r"^suite: need a non-empty string"),
        (put("seconds", math.inf), r"^seconds: need a finite number, got inf"),
        (put("settings", ["beta"]), r"^settings: need a dict"),
        (put("comparisons", {}), r"^comparisons: need a list"),
        (put("rows", []), r"^rows: need at least one row"),
        (put("rows", 2, "method", "SFT"), r"^rows\[2\]\.method: 'SFT' appears twice"),
        (put("rows", 1, "seeds", 0), r"^rows\[1\]\.seeds"),
        (put("rows", 1, "seeds", True), r"^rows\[1\]\.seeds"),
        (put("rows", 1, "metrics", "rm2", "low", math.nan), r"^rows\[1\]\.metrics\.rm2\.low: .*nan"),
        (put("rows", 1, "metrics", "rm2", "mean", "1"), r"^rows\[1\]\.metrics\.rm2\.mean: .*'1'"),
        (put("rows", 1, "metrics", "rm2", "low", 0.6), r"^rows\[1\]\.metrics\.rm2: need low <= mean <= high"),
        (put("rows", 1, "metrics", "rm2", "high", 0.5), r"^rows\[1\]\.metrics\.rm2: need low <= mean <= high"),
        (put("rows", 1, "metrics", "rm2", {"mean": 1.0}), r"^rows\[1\]\.metrics\.rm2: misses high, low"),
        (put("rows", 1, "metrics", "rm3", interval(1, 1, 1)), r"^rows\[1\]\.metrics: unknown metric 'rm3'"),
        (put("comparisons", 1, "b", "PL"), r"^comparisons\[1\]\.b: no row for method 'PL'"),
        (put("comparisons", 1, "metric", "rm3"), r"^comparisons\[1\]\.metric: unknown metric 'rm3'"),
        (put("comparisons", 0, "p", 1.5), r"^comparisons\[0\]\.p: need a probability"),
        (put("comparisons", 0, "high", 0.0), r"^comparisons\[0\]: need low <= mean <= high"),
        (put("curves", "PL", {}), r"^curves: no row for method 'PL'"),
        (put("curves", "DPO-BT", "loss", [1.0]), r"^curves\.DPO-BT\.loss: has 1 values for 40 steps"),
        (put("curves", "DPO-BT", "margin", 3, math.nan), r"^curves\.DPO-BT\.margin\[3\]: .*nan"),
        (put("schedule", "gamma", []), r"^schedule\.gamma: need a non-empty list"),
        (put("series", [1]), r"^series: need a dict"),
        (put("series", "../n", {}), r"^series: '\.\./n' cannot name a file"),
        (put("series", "n", "x", {}), r"^series\.n\.x: misses label, values"),
        (put("series", "n", "x", "label", ""), r"^series\.n\.x\.label: need a non-empty string"),
        (put("series", "n", "x", "values", {"DPO-BT": 5}), r"^series\.n\.x\.values: misses HPS\|x"),
        (put("series", "n", "x", "values", "DPO-BT", math.inf), r"^series\.n\.x\.values\.DPO-BT: .*inf"),
        (put("series", "strength", "x", "metric", "rm3"), r"^series\.strength\.x\.metric: unknown metric 'rm3'"),
        (put("series", "strength", "panels", []), r"^series\.strength\.panels: need a non-empty list"),
        (put("series", "strength", "panels", 1, "rm3"), r"^series\.strength\.panels: unknown metric 'rm3'"),
        (put("series", "strength", "lines", {}), r"^series\.strength\.lines: need a non-empty object"),
        (put("series", "strength", "lines", "one", []), r"^series\.strength\.lines\.one: need a non-empty list"),
        (put("series", "strength", "lines", "one", ["PL"]), r"^series\.strength\.lines\.one: no row for method 'PL'"),
        (put("claims", {}), r"^claims: need a list"),
        (put("claims", 0, "verdict", "proven"), r"^claims\[0\]\.verdict: need one of holds, .*'proven'"),
        (put("claims", 0, "verdict", "not measured here"), r"^claims\[0\]: misses reason"),
        (put("claims", 4, "verdict", "holds"), r"^claims\[4\]: misses high, kind, low, mean, metric"),
        (put("claims", 4, "reason", ""), r"^claims\[4\]\.reason: need a non-empty string"),
        (put("claims", 1, "kind", "mean"), r"^claims\[1\]\.kind: need one of difference, value, ratio; got 'mean'"),
        (put("claims", 1, "metric", "rm3"), r"^claims\[1\]\.metric: unknown metric 'rm3'"),
        (put("claims", 1, "low", 5.0), r"^claims\[1\]: need low <= mean <= high"),
        (put("claims", 1, "paper", ""), r"^claims\[1\]\.paper: need a non-empty string"),
    ],
)
def test_validate_names_the_first_wrong_thing(change, message, tmp_path):
    broken = results()
    change(broken)
    with pytest.raises(ValueError, match=message):
        report.validate(broken)
    with pytest.raises(ValueError, match=message):
        report.write_report(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_validate_accepts_rounding_and_missing_options():
    good = results()
    for key in ("comparisons", "settings", "curves", "schedule", "series", "claims"):
        del good[key]
    good["rows"][0]["metrics"]["rm2"] = interval(0.3, 0.1 + 0.2, 0.3)  # low above mean by one rounding
    report.validate(good)
    assert report.comparisons_table(good) == ""


# ---- tables ---------------------------------------------------------------------------------------


def test_table_marks_the_best_and_claims_nothing_about_overlaps():
    text = report.table(results())
    assert cells(text, "method") == [
        "method",
        "seeds",
        "RM2 (+)",
        "KL (exact)",
        "reward (+)",
        "harm % (-)",
        "words",
        "win % (+)",
    ]
    assert cells(text, "SFT") == [
        "SFT",
        "1",
        "0.00",
        "0.00",
        "0.59 [0.50, 0.70]",
        "32.7 [30.0, 35.0]",
        "17.0 [16.0, 18.0]",
        "-",
    ]
    # rm2 overlaps the best, reward does not; of harm the smallest is best; KL and words have no best.
    assert cells(text, "DPO-BT") == [
        "DPO-BT",
        "3",
        "0.51 [0.30, 0.70] ~",
        "6.10 [5.50, 6.60]",
        "1.14 [1.00, 1.30]",
        "**2.8** [2.0, 4.0]",
        "19.0 [18.0, 20.0]",
        "54.5 [51.0, 57.0]",
    ]
    assert cells(text, r"HPS\|x") == [
        "HPS/x",
        "3",
        "**0.60** [0.45, 0.77]",
        "5.20 [4.90, 5.60]",
        "**1.78** [1.60, 1.90]",
        "3.6 [3.0, 4.0] ~",
        "18.0 [17.0, 19.0]",
        "**70.2** [68.0, 73.0]",
    ]
    assert report.LEGEND in text


def test_table_bolds_ties_together_and_nothing_when_all_are_equal():
    tied = results()
    for row in tied["rows"]:
        row["metrics"] = {"junk": interval(5, 4, 6), "harm": interval(1, 1, 1)}
    tied["rows"][0]["metrics"]["harm"] = interval(-0.001, -0.001, -0.001)
    tied["rows"][1]["metrics"]["harm"] = interval(-0.001, -0.001, -0.001)
    text = report.table(tied)
    assert [cells(text, m)[2:] for m in ("SFT", "DPO-BT", r"HPS\|x")] == [
        ["**0.0**", "5.0 [4.0, 6.0]"],
        ["**0.0**", "5.0 [4.0, 6.0]"],
        ["1.0", "5.0 [4.0, 6.0]"],
    ]


def test_comparisons_have_a_plain_verdict():
    lines = report.comparisons_table(results()).splitlines()[2:]
    assert lines == [
        r"| reward | HPS\|x | DPO-BT | +0.64 [+0.50, +0.80] | a larger | 0.003 |",
        r"| RM2 | HPS\|x | DPO-BT | +0.00 [-0.20, +0.20] | unresolved | - |",
        r"| harm % | HPS\|x | SFT | -29.1 [-32.0, -26.0] | b larger | - |",
    ]
    touching = results()
    touching["comparisons"] = [{"a": "SFT", "b": "SFT", "metric": "rm2", **interval(0.1, 0.0, 0.2)}]
    assert report.comparisons_table(touching).splitlines()[2].endswith("| unresolved | - |")


def test_claims_stand_beside_the_papers_figures(written):
    section = (written[0] / "RESULTS.md").read_text().split("## The paper's claims\n\n")[1]
    lines = section.split("\n\n")[0].splitlines()
    assert lines[0] == "| claim | paper | here | interval | verdict |"
    assert lines[2:] == [
        "| a < b | Table 2: 1 vs 2 | reward +0.64 | [+0.50, +0.80] | holds |",
        r"| c\|d | Table 3 | harm % 3.6 | [3.0, 4.0] | does not hold |",
        "| as cheap | Sec. 6: x 1.03 | tokens (k) x 1.02 | [0.96, 1.16] | unresolved |",
        "| a constant | Sec. 6 | harm % -2.0 | - | holds |",
        "| people like it | Table 3: 3.93 | needs human raters | - | not measured here |",
    ]


# ---- the files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    before = dict(matplotlib.rcParams)
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    paths = report.write_report(results(), out)
    assert dict(matplotlib.rcParams) == before  # the style stays inside
    return out, paths


def test_written_files_are_the_listed_ones(written):
    out, paths = written
    on_disk = {path for path in out.rglob("*") if path.is_file()}
    assert on_disk == set(paths) and len(paths) == 9  # nothing temporary is left
    assert json.loads((out / "results.json").read_text()) == results()
    shuffled = copy.deepcopy(results())
    shuffled = dict(reversed(shuffled.items()))
    report.write_report(shuffled | {"curves": {}}, out.parent / "again")
    first = json.loads((out / "results.json").read_text())
    assert list(first) == sorted(first)
    assert list(json.loads((out.parent / "again" / "results.json").read_text())) == sorted(first)


def test_results_md_holds_every_method_number_and_figure(written):
    out, paths = written
    text = (out / "RESULTS.md").read_text()
    assert text.startswith("# Results: tiny\n\nCommit `abc1234`, two cores, 1.5 minutes.\n")
    assert "* beta: `0.1`" in text
    for row in results()["rows"]:
        assert row["method"].replace("|", r"\|") in text
        for name, item in row["metrics"].items():
            for value in item.values():
                assert f"{value:.{report.METRICS[name].digits}f}" in text
            assert f"(`{name}`): {report.METRICS[name].meaning}" in text
    assert "(`rm10`)" not in text  # only the columns that are there
    assert report.comparisons_table(results()) in text
    assert text.index(report.comparisons_table(results())) < text.index("## The paper's claims")
    assert f"{report.CLAIMS_NOTE} 2 holds, 1 does not hold, 1 unresolved, 1 not measured here.\n" in text
    assert text.count(report.LEGEND) == 1
    for path in paths[3:]:
        assert f"](figures/{path.name})" in text


def test_figures_without_numbers_are_left_out(tmp_path):
    bare = results()
    for row in bare["rows"]:
        row["metrics"] = {"win": interval(50, 40, 60)}
    for key in ("comparisons", "curves", "schedule", "claims"):
        del bare[key]
    del bare["series"]["n"]  # it shows win; the other series has nothing left to show
    paths = report.write_report(bare, tmp_path)
    assert [path.name for path in paths] == ["results.json", "RESULTS.md", "report.html"]
    assert "figures/" not in (tmp_path / "RESULTS.md").read_text()


def test_settings_that_are_not_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="settings: not writable as JSON"):
        report.write_report(results() | {"settings": {"x": math.nan}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
