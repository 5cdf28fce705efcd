"""page.py: report.html says what RESULTS.md says, runs nothing that the results hold, and loads nothing."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from test_report import results

from hps.evaluate import page, report

VOID = {"meta", "img"}
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</td></table></style></title> &lt;b&gt; & '",
]


class Page(HTMLParser):
    """Elements as [tag, attributes, text of the element and all below it], in the order of their start tags."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        assert not data.strip() or self.open, f"text outside of everything: {data!r}"
        for element in self.open:
            element[2] += data

    def all(self, tag):
        return [(attrs, text) for name, attrs, text in self.elements if name == tag]

    def texts(self, tag):
        return [text for _, text in self.all(tag)]


def tables(text):
    """The page's tables as lists of rows of Markdown cells."""
    found = []
    for table in re.findall(r"<table.*?</table>", text, re.S):
        table = table.replace("<strong>", "**").replace("</strong>", "**")
        rows = []
        for row in re.findall(r"<tr>.*?</tr>", table, re.S):
            cells = [text.split("~") for tag, _, text in Page(row).elements if tag in ("th", "td")]
            rows.append([" ".join(("".join(parts) + " ~" * (len(parts) - 1)).split()) for parts in cells])
        found.append(rows)
    return found


def markdown_tables(text):
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [
        [
            [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            for line in block.splitlines()
            if "| --- |" not in line
        ]
        for block in blocks
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    report.write_report(results(), out)
    return out, (out / "report.html").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_markdown(written):
    out, text = written
    ours = tables(text)
    assert ours == markdown_tables((out / "RESULTS.md").read_text())
    assert len(ours) == 6
    # Two by hand: a best, an overlap and an interval; and a missing number.
    assert ours[0][2:] == [["DPO-BT", "3", "0.51 [0.30, 0.70] ~"], ["HPS|x", "3", "**0.60** [0.45, 0.77]"]]
    assert ours[3][1] == ["SFT", "1", "-"]
    assert ours[4][1] == ["reward", "HPS|x", "DPO-BT", "+0.64 [+0.50, +0.80]", "a larger", "0.003"]
    assert ours[5][2] == ["c|d", "Table 3", "harm % 3.6", "[3.0, 4.0]", "does not hold"]


def test_every_number_sorts_by_its_mean(written):
    _, text = written
    values = [float(attrs["data-value"]) for attrs, _ in Page(text).all("td") if "data-value" in attrs]
    expected = []
    for group in dict.fromkeys(metric.group for metric in report.METRICS.values()):
        names = [
            name
            for name, metric in report.METRICS.items()
            if metric.group == group and any(name in row["metrics"] for row in results()["rows"])
        ]
        for row in results()["rows"] if names else []:
            expected += [row["seeds"], *(row["metrics"].get(name, {"mean": float("nan")})["mean"] for name in names)]
    expected += [item["mean"] for item in results()["comparisons"]]
    assert values == pytest.approx(expected, nan_ok=True, abs=0, rel=0)


def test_heading_legend_headers_and_captions(written):
    out, text = written
    html = Page(text)
    assert text.startswith("<!DOCTYPE html>\n")
    assert html.texts("h1") == html.texts("title") == ["Results: tiny"]
    assert html.texts("p")[0] == "Commit abc1234, two cores, 1.5 minutes."
    assert html.texts("p")[1].startswith(report.LEGEND.replace("`", ""))
    terms = dict(zip(html.texts("dt"), html.texts("dd"), strict=True))
    assert terms["beta"] == "0.1" and terms["RM2 (rm2)"] == report.METRICS["rm2"].meaning
    assert "RM10 (rm10)" not in terms  # only the columns that are there
    assert html.texts("h2") == [
        "Margins (nats)",
        "Distance to the reference (nats)",
        "Samples",
        "Samples against SFT",
        "Paired comparisons",
        "The paper's claims",
        "Figures",
    ]
    heads = [attrs for attrs, _ in html.all("th") if attrs["scope"] == "col"]
    assert len(heads) == len(html.all("button")) == 3 + 3 + 5 + 3 + 6 + 5  # each can be reached and pressed by keyboard
    assert {head["aria-sort"] for head in heads} == {"none"}
    ids = [attrs["id"] for attrs, _ in html.all("h2") if "id" in attrs]
    assert [attrs["aria-labelledby"] for attrs, _ in html.all("table")] == ids and len(set(ids)) == 6
    markdown = (out / "RESULTS.md").read_text()
    for (attrs, _), caption in zip(html.all("img"), html.texts("figcaption"), strict=True):
        assert f"![{attrs['alt']}](" in markdown and f"\n\n{caption}\n" in markdown and attrs["alt"] != caption
    assert "gamma from -5 to 0 and" in html.all("img")[-1][0]["alt"]


def test_images_are_the_figures_themselves(written):
    out, text = written
    images = [attrs["src"].removeprefix("data:image/png;base64,") for attrs, _ in Page(text).all("img")]
    decoded = [base64.b64decode(image, validate=True) for image in images]
    assert decoded == [
        (out / "figures" / f"{name}.png").read_bytes()
        for name in ("margins", "reward_kl", "series_strength", "series_n", "curves", "schedule")
    ]
    assert all(image.startswith(b"\x89PNG\r\n\x1a\n") for image in decoded)


def check_closed(text):
    """The policy allows the page's own style and script by hash, and nothing refers to anything outside."""
    html = Page(text)
    (policy,) = [
        attrs["content"] for attrs, _ in html.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    (style,), (script,) = html.texts("style"), html.texts("script")
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in (style, script)
    )
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; "
        f"script-src 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'"
    )
    assert script == page.SCRIPT and style == page.STYLE
    assert not re.search(r"https?:|//|url\(|@import|fetch|innerHTML", (style + script).replace("/*", ""))
    for tag, attrs, _ in html.elements:
        assert tag not in {"link", "base", "iframe", "object", "embed", "form", "a"}
        assert not {"style", "href", "srcset", "action"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    return html


def test_nothing_from_outside_is_allowed_or_named(written):
    _, text = written
    check_closed(text)
    assert not re.search(r"https?://", text)


def test_every_text_of_the_results_is_shown_and_not_run(tmp_path):
    hostile = results(*HOSTILE) | {"suite": HOSTILE[1], "commit": HOSTILE[0], "machine": HOSTILE[2]}
    hostile["settings"] = {HOSTILE[0]: HOSTILE[1], HOSTILE[2]: {HOSTILE[1]: HOSTILE[0]}}
    claim, paper, reason = HOSTILE
    hostile["claims"] = [{"claim": claim, "paper": paper, "verdict": "not measured here", "reason": reason}]
    lines = {HOSTILE[2]: [HOSTILE[0], HOSTILE[1]]}
    x = {"label": HOSTILE[1], "values": {HOSTILE[0]: 1, HOSTILE[1]: 2}}
    hostile["series"] = {"n": {"x": x, "panels": ["rm2"], "lines": lines}}
    report.write_report(hostile, tmp_path)
    html = check_closed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert html.texts("h1") == html.texts("title") == [f"Results: {HOSTILE[1]}"]
    assert html.texts("p")[0] == f"Commit {HOSTILE[0]}, {HOSTILE[2]}, 1.5 minutes."
    assert list(zip(html.texts("dt"), html.texts("dd"), strict=True))[:2] == [
        (key, json.dumps(value)) for key, value in hostile["settings"].items()
    ]
    assert [text for attrs, text in html.all("th") if attrs["scope"] == "row"][:3] == HOSTILE
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2]} <= set(html.texts("td"))  # of the comparisons
    claim = [text for attrs, text in html.all("th") if attrs["scope"] == "row"][-1]
    assert [claim, *html.texts("td")[-4:]] == [*HOSTILE, "-", "not measured here"]
    assert f"{report.CLAIMS_NOTE} 1 not measured here." in html.texts("p")
    assert any(HOSTILE[2] in attrs["alt"] and HOSTILE[1] in attrs["alt"] for attrs, _ in html.all("img"))
    assert len(html.all("img")) == 5


def test_every_argument_of_render_is_escaped():
    script, image, ends = HOSTILE
    row = [page.Cell(script), page.Cell(image, mark="best", interval=ends, value=1.0)]
    html = check_closed(
        page.render(
            ends,
            image,
            settings=[(script, ends)],
            legend=script,
            tables=[page.Table(script, [image, ends], [row], meanings=[(image, script)], note=ends)],
            figures=[page.Figure(caption=image, alt=ends, width=10, png=b"")],
        )
    )
    assert html.texts("title") == html.texts("h1") == [ends]
    assert html.texts("p") == [image, f"{script} Click a heading to sort.", ends]
    assert html.texts("dt") == [script, image] and html.texts("dd") == [ends, script]
    assert html.texts("h2") == [script, "Figures"] and html.texts("button") == [image, ends]
    assert html.texts("th")[2:] == [script] and html.texts("strong") == [image] and html.texts("small") == [ends]
    assert html.texts("figcaption") == [image] and html.all("img")[0][0]["alt"] == ends


def test_long_texts_wrap_and_numbers_do_not():
    row = [page.Cell("x" * 40), page.Cell("a word " * 6), page.Cell("short"), page.Cell("1" * 40, value=1.0)]
    html = Page(
        page.render(
            "t", "s", settings=[], legend="l", figures=[], tables=[page.Table("t", ["a", "b", "c", "d"], [row])]
        )
    )
    assert [attrs.get("class") for attrs, _ in html.all("td")] == ["prose", None, "number"]
    assert re.search(r"\.prose \{ white-space: normal;", page.STYLE)


def test_what_the_results_do_not_hold_is_left_out(tmp_path):
    bare = results()
    for row in bare["rows"]:
        row["metrics"] = {"win": {"mean": 50, "low": 40, "high": 60}}
    for key in ("comparisons", "settings", "curves", "schedule", "series", "claims"):
        del bare[key]
    report.write_report(bare, tmp_path)
    html = check_closed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert html.texts("h2") == ["Samples against SFT"] and html.texts("dt") == ["win % (win)"]
    assert not html.all("img")


DOM = """
const rows = ROWS.map(row => ({cells: row.map(value => typeof value === "string"
  ? {dataset: {}, textContent: value} : {dataset: {value: value === null ? "nan" : String(value)}})}));
const heads = ROWS[0].map((value, i) => ({
  className: typeof value === "string" ? "" : "number", attributes: {"aria-sort": "none"},
  setAttribute(name, to) { this.attributes[name] = to }, getAttribute(name) { return this.attributes[name] },
  button: {addEventListener(event, action) { this.click = action }}, querySelector() { return this.button }}));
const body = {rows, append(...sorted) { this.rows = sorted }};
const document = {querySelectorAll: () => [{tBodies: [body], tHead: {rows: [{cells: heads}]}}]};
SCRIPT
console.log(JSON.stringify([1, 1, 0, 0, 1].map(column => {
  heads[column].button.click();
  return [body.rows.map(row => row.cells[0].textContent), heads.map(head => head.attributes["aria-sort"])];
})));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_a_click_sorts_by_mean_with_missing_last_and_a_second_turns_it():
    table = [["m10", 0.5], ["m9", None], ["b", -2e-7], ["a", 10], ["c", 9]]
    source = DOM.replace("ROWS", json.dumps(table)).replace("SCRIPT", page.SCRIPT)
    done = subprocess.run(["node", "-e", source], capture_output=True, text=True, check=True)
    descending, up = ["none", "descending"], ["none", "ascending"]
    assert json.loads(done.stdout) == [
        [["a", "c", "m10", "b", "m9"], descending],
        [["b", "m10", "c", "a", "m9"], up],
        [["a", "b", "c", "m9", "m10"], ["ascending", "none"]],
        [["m10", "m9", "c", "b", "a"], ["descending", "none"]],
        [["a", "c", "m10", "b", "m9"], descending],
    ]
