"""The report: marks in its tables, figures that show the numbers given, a page that says the same and runs nothing."""

import base64
import json
import re

import matplotlib
import numpy as np
import pytest
from helpers import interval, results
from matplotlib.figure import Figure
from matplotlib.image import imread

from hps.evaluate import figures, md, report
from hps.evaluate.metrics import AGAIN, METRICS

FIGURES = ["reward_kl", "margins", "differences", "series_strength", "series_n"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    before = dict(matplotlib.rcParams)
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    report.write_report(results(), out)
    assert dict(matplotlib.rcParams) == before  # the style stays inside
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == sorted(["results.json", "RESULTS.md", "report.html", *(f"figures/{name}.png" for name in FIGURES)])
    return out


# ---- Markdown -------------------------------------------------------------------------------------


def cells(markdown, first):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").replace(r"\|", "/").split("|")]


def test_table_marks_the_best_and_what_overlaps_it():
    """rm2 overlaps the best, reward does not; of harm the smallest is best; KL and words have no best."""
    text = report.table(results())
    assert cells(text, "method")[2:] == ["RM2 (+)", "KL (exact)", "reward (+)", "harm % (-)", "words", "win % (+)"]
    assert cells(text, "SFT")[1:5] == ["1", "0.00", "0.00", "0.59 [0.50, 0.70]"]
    assert cells(text, "SFT")[5:] == ["32.7 [30.0, 35.0]", "17.0 [16.0, 18.0]", "-"]
    assert cells(text, "DPO-BT")[1:5] == ["3", "0.51 [0.30, 0.70] ~", "6.10 [5.50, 6.60]", "1.14 [1.00, 1.30]"]
    assert cells(text, "DPO-BT")[5:] == ["**2.8** [2.0, 4.0]", "19.0 [18.0, 20.0]", "54.5 [51.0, 57.0]"]
    best = cells(text, r"HPS\|x")
    assert best[1:5] == ["3", "**0.60** [0.45, 0.77]", "5.20 [4.90, 5.60]", "**1.78** [1.60, 1.90]"]
    assert best[5:] == ["3.6 [3.0, 4.0] ~", "18.0 [17.0, 19.0]", "**70.2** [68.0, 73.0]"]
    assert report.legend(results()) in " ".join(text.split()) and "Student's t over 3 worlds" in report.legend(
        results()
    )
    assert "over the prompts: it says nothing of other data" in report.legend({"worlds": 1, "rows": []})
    assert [report.legend({"worlds": 1, "rows": [{"method": f"a{end}"}]}).count("`...") for end in ("", AGAIN)] == [
        0,
        1,
    ]


def test_ties_are_bold_together_equals_not_at_all_and_one_number_alone_is_near():
    """Without an interval nothing sets a mean apart from the best one."""
    tied = results()
    for row, harm in zip(tied["rows"], (-0.001, -0.001, 1), strict=True):
        row["metrics"] = {"junk": interval(5, 4, 6), "harm": interval(harm, harm, harm)}
    found = [cells(report.table(tied), method)[2:] for method in ("SFT", "DPO-BT", r"HPS\|x")]
    assert found == [[mean, "5.0 [4.0, 6.0]"] for mean in ("**0.0**", "**0.0**", "1.0")]
    alone = results()
    alone["rows"][1]["metrics"]["true_reward"] |= {"low": None, "high": None}
    assert cells(report.table(alone), "DPO-BT")[4] == "1.14 ~"
    # What is apart from 0 is not shown as 0.
    assert md.interval(interval(0.004, 0.001, 0.007), 2, "+") == "+0.004 [+0.001, +0.007]"


def test_comparisons_have_a_plain_verdict():
    """By p, before and after Holm, with the number of worlds; those of a row with itself are counted."""
    table = report.comparisons_table(results())
    assert report.markdown(table).splitlines()[2:] == [
        r"| reward | HPS\|x | DPO-BT | +0.64 [+0.50, +0.80] | 2 | better | better | 0.003 |",
        r"| RM_DPO | HPS\|x | DPO-BT | +0.00 [-0.20, +0.20] | 2 | unresolved | unresolved | 0.9 |",
        r"| harm % | HPS\|x | SFT | -29.1 [-32.0, -26.0] | 2 | better | unresolved | 0.03 |",
        "| harm % | DPO-BT again | DPO-BT | -1.0 [-1.5, -0.5] | 2 | better | - | 0.04 |",
        "| RM_DPO | DPO-BT again | DPO-BT | +0.10 [-0.20, +0.40] | 2 | unresolved | - | 0.4 |",
    ]
    assert table.note.startswith(report.COMPARISONS_NOTE)
    assert table.note.endswith(
        "Of 2 differences of a row with itself, trained with another seed, 1 are resolved; 5 % are expected."
    )


def test_the_answer_is_told_in_sentences():
    """The count of verdicts, the best text with what it is not apart from, and the first rows beside the others."""
    found = results(hps="HPS")
    assert report.answer(found) == [
        "Of 4 claims that were measured 2 hold, 1 does not hold, 1 is unresolved (adjusted for their number, by Holm).",
        "3 worlds settle little: take more --seeds.",
        "The samples of the highest reward are those of HPS: 1.78 [1.60, 1.90], apart from all others.",
        "Reward of HPS: better than DPO-BT, +0.64 [+0.50, +0.80].",
        "Of so many intervals some miss 0 by chance: what is told apart is so after Holm's adjustment.",
    ]
    found["rows"][1]["metrics"]["true_reward"]["high"] = 1.7
    found["comparisons"][0]["p_holm"] = 0.2
    assert report.answer(found)[2].endswith("1.78 [1.60, 1.90]; the intervals of DPO-BT overlap its own.")
    assert report.answer(found)[3] == "Reward of HPS: not told apart from DPO-BT, +0.64 [+0.50, +0.80]."
    assert report.answer({"rows": [], "worlds": 1}) == []


def test_results_md_holds_every_number_and_figure(written):
    text = (written / "RESULTS.md").read_text()
    assert text.startswith("# Results: tiny\n\nCommit `abc1234`, two cores, 1.5 minutes.\n")
    flat = " ".join(text.split())
    assert "* beta: `0.1`" in text and flat.count(report.legend(results())) == 1
    for row in results()["rows"]:
        assert row["method"].replace("|", r"\|") in text
        for name, item in row["metrics"].items():
            assert all(f"{value:.{METRICS[name].digits}f}" in text for value in item.values())
            assert f"(`{name}`): {METRICS[name].meaning}" in text
    assert "(`rm10`)" not in text and "(`rm_dpo`)" in text  # only what is in a column or compared
    claims, ours, comparisons = re.split("## (?:Paired comparisons|Claims|Ours)\n\n", text)[1:]
    assert comparisons.startswith(report.markdown(report.comparisons_table(results())))
    assert claims.split("\n\n")[0].splitlines()[2:] == [
        "| a < b | Table 2: 1 vs 2 | reward +0.64 | [+0.50, +0.80] | 2 | holds | holds |",
        "| as cheap | Sec. 6: x 1.03 | tokens (k) x 1.02 | [0.96, 1.16] | 2 | holds | unresolved |",
        "| people like it | Table 3: 3.93 | needs human raters | - | - | not measured here | not measured here |",
    ]
    assert ours.split("\n\n")[0].splitlines()[2:] == [
        r"| c\|d | Table 3 | harm % 3.6 | [3.0, 4.0] | 2 | does not hold | does not hold |",
        "| a constant | Sec. 6 | harm % -2.0 | - | 2 | holds | holds |",
    ]
    counts = "2 holds, 1 not measured here; after Holm 1 holds, 1 unresolved, 1 not measured here."
    assert f"{report.CLAIMS_NOTE} {counts}" in flat
    assert re.findall(r"\]\(figures/(\w+)\.png\)", text) == FIGURES
    assert json.loads((written / "results.json").read_text()) == results()


def test_texts_in_markdown_are_shown_as_they_are():
    for text, plain, code in (
        ("a < b & c_d", "a < b & c_d", "`a < b & c_d`"),
        ("two\n\n  lines\t", "two lines", "`two lines`"),
        ("<b> &lt; [x](y)", r"\<b> \&lt; [x\](y)", "`<b> &lt; [x](y)`"),
        ("a `b`` \\", "a \\`b\\`\\` \\\\", "``` a `b`` \\ ```"),
    ):
        assert md.plain(text) == plain and md.code(text) == code
    assert md.cell("x|y") == r"x\|y"


def test_no_line_of_results_md_is_too_long(tmp_path):
    """A wide table becomes several, each with its first column; no line of a paragraph begins another block."""
    long = results("a method of a long name", "another one", "one more") | {
        "machine": "- aa + b # c > d 1. e * f " * 40
    }
    for row in long["rows"]:
        row["metrics"] = {name: interval(-1000.5, -2000.5, 3000.5) for name in METRICS}
    report.write_report(long | {"settings": {"words": ["- one", "# two", "3. three"] * 20}}, tmp_path)
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    assert max(map(len, lines)) <= 160
    heads = [line.split(" | ")[1:] for line in lines if line.startswith("| method |")]
    groups = {metric.group for metric in METRICS.values()}
    assert len(heads) > len(groups) and sum(map(len, heads)) == len(METRICS) + len(groups)  # each has its seeds
    begun = [line for line in lines if re.match(r" *([-+*#>]|\d+\.) ", line)]
    told = ("* Of 4 claims", "* The samples", "* Reward of", "* Of so many", "* 3 worlds")
    assert all(line.startswith(("# Results", "* words", "* **", *told)) for line in begun)


# ---- figures --------------------------------------------------------------------------------------


def test_figures_show_their_methods_colours(written):
    """And nothing is cut off: the outermost pixels are white."""
    for name, inches, colours in (
        ("margins", (3.6, 0.9 + 3 * 0.27), (0, 1, 2)),
        ("reward_kl", (4.8, 3.36), (0, 1, 2)),
        ("series_strength", (7.0, 2.9), (0, 1)),
        ("series_n", (4.8, 3.18), (0,)),
    ):
        image = np.round(imread(written / "figures" / f"{name}.png")[..., :3] * 255).astype(np.int64)
        assert image.shape[:2] == pytest.approx((inches[1] * figures.DPI, inches[0] * figures.DPI), abs=1)
        found = set(np.unique(image @ [65536, 256, 1]).tolist())
        assert {int(figures.COLOURS[i][1:], 16) for i in colours} <= found
        assert all((edge == 255).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


def drawn(of_results, name):
    """A figure of lines: panel title -> line label -> (points (n, 2), x ranges, y ranges) as on the canvas."""
    (plan,) = [plan for plan in figures.plans(of_results) if plan.name == name]
    figure = Figure(figsize=plan.size, layout="constrained")
    plan.draw(figure)
    panels = {}
    for axes in figure.axes:
        lines = panels[axes.get_title()] = {}
        for container in axes.containers:
            line, _, bars = container.lines
            ends = [np.reshape([s for s in bar.get_segments() if len(s)], (-1, 2, 2)) for bar in bars]
            *across, up = ends  # those of x, if there are any, come before those of y
            lines[container.get_label()] = line.get_xydata(), across[0][:, :, 0] if across else None, up[:, :, 1]
    return figure, panels


def test_lines_over_a_metric_or_numbers_of_ours_show_what_is_given():
    figure, panels = drawn(results(), "series_strength")
    assert list(panels) == ["RM2", "reward"]  # no row has junk
    points, across, up = panels["reward"]["down"]
    assert points.tolist() == [[5.2, 1.78], [6.1, 1.14], [0, 0.59]]  # in the order of the rows
    assert across == pytest.approx(np.array([[4.9, 5.6], [5.5, 6.6], [0, 0]]))
    assert up == pytest.approx(np.array([[1.6, 1.9], [1.0, 1.3], [0.5, 0.7]]))
    points, across, up = panels["RM2"]["one"]
    assert points.tolist() == [[6.1, 0.512]] and up == pytest.approx(np.array([[0.3, 0.7]]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["down", "one"]
    assert figure._supxlabel.get_text() == "KL (exact)"
    _, panels = drawn(results(), "reward_kl")  # one point per method
    assert {name: points.tolist() for name, (points, *_) in panels["reward"].items()} == {
        "SFT": [[0, 0.59]], "DPO-BT": [[6.1, 1.14]], "HPS|x": [[5.2, 1.78]]
    }  # fmt: skip
    figure, panels = drawn(results(), "series_n")
    points, across, up = panels["win %"]["up"]
    assert points.tolist() == [[5, 54.5], [20.5, 70.25]] and across is None
    assert up == pytest.approx(np.array([[51, 57], [68, 73]]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["5", "20.5"]


def test_a_strip_has_the_mean_and_every_worlds_value():
    figure = Figure()
    (plan,) = [plan for plan in figures.plans(results()) if plan.name == "differences"]
    plan.draw(figure)
    assert [axes.get_title() for axes in figure.axes] == ["RM_DPO", "reward", "harm %"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()][2] == "DPO-BT again - DPO-BT"
    strips = [line.get_xydata().tolist() for line in figure.axes[1].lines if line.get_marker() == "|"]
    assert strips == [[[0.1, 0.3], [0.3, 0.3]], [], []]  # two worlds have a value; two pairs none of this metric
    points = [bars.lines[0].get_xydata().tolist() for bars in figure.axes[1].containers]
    assert points[0] == [[0.64, 0.0]]


def test_a_missing_number_breaks_its_line():
    broken = results()
    del broken["rows"][1]["metrics"]["true_reward"]
    points, _, up = drawn(broken, "series_strength")[1]["reward"]["down"]
    assert np.isnan(points).any(1).tolist() == [False, True, False]
    assert up == pytest.approx(np.array([[1.6, 1.9], [0.5, 0.7]]))
    for row in broken["rows"]:
        row["metrics"].pop("kl_exact")
    assert [plan.name for plan in figures.plans(broken)] == ["margins", "differences", "series_n"]


def test_eight_lines_and_five_panels_are_told_apart():
    """A method at its own settings looks like itself, but hollow."""
    wide, names = results(), [*(f"line {i}" for i in range(8)), "line 0 tuned"]
    panels, lines = ["rm2", "harm", "true_reward", "length", "kl_exact"], {key: ["SFT", "DPO-BT"] for key in names}
    wide["series"] = {"wide": {"x": {"metric": "kl_exact"}, "panels": panels, "lines": lines}}
    figure, found = drawn(wide, "series_wide")
    assert len(figure.axes) == 5 and all(list(lines) == names for lines in found.values())
    main = [container.lines[0] for container in figure.axes[0].containers]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in main]
    assert len(set(looks)) == 8 and looks[8] == looks[0]
    assert main[8].get_markerfacecolor() == "white" and main[0].get_markerfacecolor() == looks[0][0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


# ---- the page -------------------------------------------------------------------------------------
# That hostile texts are shown and not run: tests/faults/test_security.py.

CELLS = """[...document.querySelectorAll('table')].map(table => [...table.rows].map(row => [...row.cells].map(cell => {
  const [best, interval, near] = ['strong', 'small', 'i'].map(tag => cell.querySelector(tag)?.textContent);
  const mean = interval === undefined ? cell.textContent : cell.firstChild.textContent.trim();
  return [best ? `**${best}**` : mean, interval, near].filter(Boolean).join(' ').trim();
})))"""


def texts(browser, selector, value="textContent"):
    return browser.js(f"[...document.querySelectorAll('{selector}')].map(each => each.{value})")


def test_the_page_says_what_the_markdown_says(browser, written):
    browser.open(written / "report.html")
    blocks = re.findall(r"(?:^\|.*\n)+", (written / "RESULTS.md").read_text(), re.MULTILINE)
    expected = []
    for block in blocks:
        lines = [line for line in block.splitlines() if "| --- |" not in line]
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        expected.append([[cell.strip().replace(r"\|", "|") for cell in row] for row in cells])
    assert browser.js(CELLS) == expected and len(expected) == 7
    markdown = " ".join((written / "RESULTS.md").read_text().split())
    assert texts(browser, "h1, title") == 2 * ["Results: tiny"]
    assert texts(browser, "p")[0] == "Commit abc1234, two cores, 1.5 minutes."
    assert texts(browser, "p")[1].startswith(report.legend(results()).replace("`", ""))
    terms = dict(zip(texts(browser, "dt"), texts(browser, "dd"), strict=True))
    assert terms["beta"] == "0.1" and terms["RM2 (rm2)"] == METRICS["rm2"].meaning and "RM10 (rm10)" not in terms
    groups = list(dict.fromkeys(metric.group for metric in METRICS.values()))[:4]
    assert texts(browser, "h2") == ["Claims", "Ours", *groups, "Paired comparisons", "Settings"]
    labels = "table => document.getElementById(table.getAttribute('aria-labelledby')).textContent"
    assert browser.js(f"[...document.querySelectorAll('table')].map({labels})") == texts(browser, "h2")[:7]
    alts = texts(browser, "img", "alt")
    sources = texts(browser, "img", "src")
    for name, alt, source, caption in zip(FIGURES, alts, sources, texts(browser, "figcaption"), strict=True):
        assert f"![{alt}](" in markdown and f") {caption} " in markdown and alt != caption
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert png == (written / "figures" / f"{name}.png").read_bytes()


def test_what_the_results_do_not_hold_is_left_out(browser, tmp_path):
    found = {key: results()[key] for key in ("suite", "commit", "machine", "seconds", "worlds", "rows")}
    for row in found["rows"]:
        row["metrics"] = {"win": interval(50, 40, 60)}
    report.write_report(found, tmp_path)
    assert "figures/" not in (tmp_path / "RESULTS.md").read_text() and not list((tmp_path / "figures").iterdir())
    browser.open(tmp_path / "report.html")
    assert texts(browser, "h2") == ["Samples against SFT"] and texts(browser, "dt") == ["win % (win)"]
    assert not texts(browser, "img")
