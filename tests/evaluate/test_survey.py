"""The rating page, clicked through in a browser, and the table of what raters return, against values by hand."""

import collections
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from chromium import END, ENTER, LEFT, RIGHT, SHIFT, TAB
from helpers import flags
from scipy import stats

from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import survey
from hps.io import files

CRITERIA = ["correctness", "helpfulness", "safety", "clarity"]  # of the paper's Appendix D.2.2, in its order
NASTY = [
    "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">",
    "</script><script>document.title = 'ran'</script><!-- <script>",
    "]]> --> line\u2028separator\u2029 {{data}} {{policy}} \\u003c &lt;b&gt; &amp; caf\u00e9 \u05e9\u05dc\u05d5\u05dd",
    "<link rel=stylesheet href=http://127.0.0.1:9/a.css><iframe src=http://127.0.0.1:9/></iframe>",
    "two\n\nlines, and  two spaces",
    "",
]
METHODS = ("zeta-sft", "zeta-hps", "zeta-bt")


def write_samples(folder, responses=NASTY, prompts=2):
    """A samples.jsonl of each method, as eval.py writes them: prompt i has two responses of each, none shared."""
    texts, named = itertools.cycle(responses), []
    for method in METHODS:
        rows = []
        for i in range(prompts):
            turns = [("user", f"Question <{i}>"), ("assistant", "</script>"), ("user", "And?")]
            chat = tuple({"role": role, "content": text} for role, text in turns)
            prompt, pair = chat if i else "Human: <b>Hi</b>\n\nAssistant:", (next(texts), next(texts))
            rows.append(Row(f"id-{i}", prompt, pair, (0.5, 1.0), None, None, f"runs/{method}/policy"))
        listwise.write(folder / f"{method}.jsonl", rows)
        named.append(f"{method}={folder / method}.jsonl")
    return tuple(named)


def export(folder, **options):
    methods = options.pop("methods", None) or write_samples(folder)
    options = dict(out=folder / "study", items=2) | options
    survey.main(["export", *flags(methods=methods, **options)])
    out = options["out"]
    return (out / "survey.html").read_text(encoding="utf-8"), files.read_record(out / "key.json", "")


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


# ---- the page without a browser ------------------------------------------------------------------


def test_only_the_key_leads_back_to_a_response(tmp_path):
    page, key = export(tmp_path)
    data = embedded(page)
    assert list(data["criteria"]) == CRITERIA and data["study"] == key["study"] and key["methods"] == list(METHODS)
    rows = {m: {row.id: row for row in listwise.read(tmp_path / f"{m}.jsonl")} for m in METHODS}
    assert len(data["items"]) == len(key["items"]) == 6
    for item in data["items"]:
        row = rows[key["items"][item["id"]]["method"]][key["items"][item["id"]]["prompt"]]
        assert item["text"] == row.responses[key["items"][item["id"]]["response"]]
        shown = data["prompts"][item["prompt"]]
        said = [("Prompt", row.prompt)] if isinstance(row.prompt, str) else [t.values() for t in row.prompt]
        assert shown == [[who.title(), text] for who, text in said]
    pairs = {(v["prompt"], v["method"]) for v in key["items"].values()}
    assert pairs == {(f"id-{i}", m) for i in range(2) for m in METHODS}
    for name in (*METHODS, "zeta", "id-0", "policy/", str(tmp_path)):
        assert name not in page


def test_what_is_drawn_follows_the_seed_and_no_method(tmp_path):
    samples = write_samples(tmp_path, [f"answer {n}" for n in range(80 * 6)], prompts=80)
    drawn = {}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        drawn[out] = export(tmp_path, methods=samples, out=tmp_path / out, items=70, seed=seed)
    assert drawn["a"] == drawn["b"] and drawn["a"][1]["study"] != drawn["c"][1]["study"]
    items = drawn["a"][1]["items"].values()
    assert len({item["prompt"] for item in items}) == 70
    assert 70 < sum(item["response"] for item in items) < 140  # of 210, of which each is 0 or 1
    orders = collections.defaultdict(str)  # of the methods, by the numbers of a prompt's responses
    for item in items:
        orders[item["prompt"]] += item["method"][5]
    assert len(set(orders.values())) == 6 and max(collections.Counter(orders.values()).values()) < 30  # of 70


def test_prompts_that_not_all_have_are_left_out(tmp_path):
    samples = write_samples(tmp_path)
    rows = listwise.read(tmp_path / "zeta-hps.jsonl")
    listwise.write(tmp_path / "zeta-hps.jsonl", [rows[1], Row("id-9", "other", ("x",))])
    for items in (0, 2):
        with pytest.raises(ValueError, match=f"--items {items}: 1 prompts have responses of all methods"):
            export(tmp_path, methods=samples, items=items)
    assert not (tmp_path / "study").exists()
    _, key = export(tmp_path, methods=samples, items=1)
    assert {item["prompt"] for item in key["items"].values()} == {"id-1"}


# ---- agreement -----------------------------------------------------------------------------------

NO = np.nan
# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D: alpha_interval = .849.
TWELVE_UNITS = [[1, 2, 3, 3, 2, 1, 4, 1, 2, NO, NO, NO],
                [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NO, 3],
                [NO, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NO],
                [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NO]]  # fmt: skip


def alpha_of_coincidences(values):
    """Alpha by the book: a matrix of coincidences o_ck over the values that occur, and squared differences."""
    levels = np.unique(values[~np.isnan(values)])
    o = np.zeros((len(levels), len(levels)))
    for unit in values.T:
        given = unit[~np.isnan(unit)]
        for a, b in itertools.permutations(given, 2):
            o[np.searchsorted(levels, a), np.searchsorted(levels, b)] += 1 / (len(given) - 1)
    n_c, delta = o.sum(1), (levels[:, None] - levels) ** 2
    return 1 - (n_c.sum() - 1) * (o * delta).sum() / (np.outer(n_c, n_c) * delta).sum()


def test_alpha_against_a_matrix_of_coincidences():
    assert survey.krippendorff_alpha(np.array(TWELVE_UNITS)) == pytest.approx(0.849, abs=5e-4)
    rng = np.random.default_rng(0)
    for raters, units, missing in ((2, 8, 0.0), (3, 120, 0.2), (20, 120, 0.6)):
        values = np.round(np.clip(3 + rng.normal(size=units) + rng.normal(size=(raters, units)), 1, 5), 2)
        values[rng.random(values.shape) < missing] = np.nan
        assert survey.krippendorff_alpha(values) == pytest.approx(alpha_of_coincidences(values), abs=1e-12)
    assert survey.krippendorff_alpha(np.array([[1.25, 2, 5], [1.25, 2, 5]])) == 1
    assert survey.krippendorff_alpha(np.array([[1.0, 5], [5, 1]])) == pytest.approx(-0.5)  # 1 - 3 * 16 / 32
    assert survey.krippendorff_alpha(np.full((3, 4), 2.2)) is None
    assert survey.krippendorff_alpha(np.array([[1, NO], [NO, 2]])) is None


# ---- the table -----------------------------------------------------------------------------------

AT = dict(r1=("a", "HPS|x", 0), r2=("b", "SFT", 3), r3=("a", "SFT", 1), r4=("b", "HPS|x", 0))
ITEMS = {item: dict(zip(("prompt", "method", "response"), at, strict=True)) for item, at in AT.items()}
KEY = {"study": "s1", "methods": ["SFT", "HPS|x"], "items": ITEMS}


def rating(*values):
    return dict(zip(CRITERIA, values))


def rater(name, *, complete=True, **ratings):
    return {"study": "s1", "rater": name, "complete": complete, "ratings": ratings}


def study(folder, raters, key=KEY):
    (folder / "ratings").mkdir(exist_ok=True)
    files.write_record(folder / "key.json", key)
    for name, content in raters.items():
        (folder / "ratings" / name).write_text(json.dumps(content))
    survey.main(["aggregate", *flags(key=folder / "key.json", ratings=folder / "ratings", out=folder / "out")])
    return json.loads((folder / "out/survey.json").read_text())


FULL = dict(r1=rating(4, 5, 3.5, 4.5), r2=rating(2, 2.25, 5, 1), r3=rating(3, 3, 3, 3), r4=rating(4, 4.25, 5, 3))
PART = dict(r1=rating(5, 5, 4.5, 4.5), r3=rating(5, 5, 5, 5), r4=rating(1, 1, 1))  # r2 not at all, r4 without clarity


def test_the_table_by_hand(tmp_path, capsys):
    found = study(tmp_path, {"1.json": rater("ann", **FULL), "2.json": rater("bo", complete=False, **PART)})
    assert found["counts"] == dict(
        raters=2, complete=1, partial=1, prompts=2, responses=4, ratings=6, ratings_in_part=1, ratings_missing=1
    )

    def means(columns):
        return [(columns[name]["mean"], columns[name]["ratings"]) for name in [*CRITERIA, "average"]]

    # Averages: ann r1 4.25, r2 2.5625, r3 3, r4 4.0625; bo r1 4.75, r3 5.
    mean = lambda total, n: (pytest.approx(total / n), n)  # noqa: E731
    hps = [mean(14, 4), mean(15.25, 4), mean(14, 4), mean(12, 3), mean(13.0625, 3)]
    sft = [mean(10, 3), mean(10.25, 3), mean(13, 3), mean(9, 3), mean(10.5625, 3)]
    assert means(found["means"]["HPS|x"]) == hps and means(found["means"]["SFT"]) == sft
    [pair] = found["comparisons"]
    assert (pair["a"], pair["b"]) == ("SFT", "HPS|x")
    # SFT - HPS where one rater has both: ann a -1.25, ann b -1.5, bo a +0.25.
    differences = {name: pair[name]["difference"] for name in [*CRITERIA, "average"]}
    assert means(differences)[-1] == mean(-2.5, 3) and means(differences)[0] == mean(-1 - 2 + 0, 3)
    assert [pair["average"][name]["mean"] for name in ("win", "tie", "lose")] == pytest.approx([100 / 3, 0, 200 / 3])
    average = np.array([[4.25, 4.0625, 3, 2.5625], [4.75, NO, 5, NO]])
    assert found["agreement"]["average"] == pytest.approx(alpha_of_coincidences(average))
    safety = np.array([[3.5, 5, 3, 5], [4.5, 1, 5, NO]])
    assert found["agreement"]["safety"] == pytest.approx(alpha_of_coincidences(safety))
    text = (tmp_path / "out/survey.md").read_text()
    assert capsys.readouterr().out == text
    [row] = [line for line in text.splitlines() if line.startswith("| HPS")]
    assert re.sub(r" \[.*?\]", "", row) == r"| HPS\|x | 3.50 | 3.81 | 3.50 | 4.00 | 4.35 |"
    assert "| SFT | HPS\\|x | 3 | -1.00 [" in text and " | 33.3 [" in text
    assert f"| safety | {found['agreement']['safety']:.2f} |" in text


@pytest.mark.parametrize(
    ("value", "method", "difference"),
    [
        (lambda r, p, m: 3 + m, (4, 0), (-1, 0)),
        (lambda r, p, m: 2 + 2 * r, (3, 1), (0, 0)),  # raters differ, from both methods alike
        (lambda r, p, m: 2 + 2 * p, (3, 1), (0, 0)),  # prompts differ
        (lambda r, p, m: 2 + r * m, (2.5, 0.5), (-0.5, 0.5)),
        (lambda r, p, m: 2 + p * m, (2.5, 0.5), (-0.5, 0.5)),
    ],
)
def test_intervals_span_raters_and_prompts(value, method, difference):
    """Mean and standard error of two raters' or two prompts' values, of which Student's t is 12.706."""
    at = {item: ("ab".index(place["prompt"]), KEY["methods"].index(place["method"])) for item, place in ITEMS.items()}
    raters = [rater(str(r), **{item: rating(*4 * [value(r, p, m)]) for item, (p, m) in at.items()}) for r in range(2)]
    found = survey.results_of(KEY, raters)
    intervals = found["means"]["HPS|x"]["average"], found["comparisons"][0]["safety"]["difference"]
    for interval, (mean, error) in zip(intervals, (method, difference), strict=True):
        ends = mean - 12.7062 * error, mean + 12.7062 * error
        assert (interval["low"], interval["high"]) == pytest.approx(ends, abs=1e-3)


def test_a_method_that_nobody_rated_has_no_number(tmp_path):
    found = study(tmp_path, {"1.json": rater("ann", complete=False, r2=rating(3, 3, 3, 3))})
    assert found["means"]["HPS|x"]["average"] is None and found["comparisons"][0]["average"] is None
    assert "| HPS\\|x | - | - | - | - | - |" in (tmp_path / "out/survey.md").read_text()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"study": "s2"}, r"ratings of study 's2', and the key is of 's1'"),
        ({"ratings": {"r9": rating(1, 1, 1, 1)}}, r"item 'r9' is not of this study"),
        ({"ratings": {**FULL, "r2": rating(1, 1, 5.01, 1)}}, r"item 'r2': safety = 5.01; need 1.00 to 5.00"),
        ({"ratings": {**FULL, "r2": rating(2.125, 1, 5, 1)}}, r"item 'r2': correctness = 2.125; .* two decimals"),
        ({"ratings": {**FULL, "r2": rating(True, 1, 5, 1)}}, r"item 'r2': correctness = True"),
        ({"ratings": {**FULL, "r2": rating("3", 1, 5, 1)}}, r"item 'r2': correctness = '3'"),
        ({"ratings": {**FULL, "r2": {"speed": 3}}}, r"item 'r2': need numbers for some of correctness"),
        ({"ratings": PART}, r"item 'r2': a value is missing in a file that says it is complete"),
        ({"ratings": {}, "complete": False}, r"holds no rating"),
        ({"complete": 1}, r"need study \(str\), rater \(str\), complete \(bool\)"),
        ({"extra": 1}, r"unknown key 'extra'"),
        ({"rater": "ann"}, r"rater 'ann' has also sent .*1.json"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, change, problem):
    with pytest.raises(ValueError, match=rf"ratings/2.json: {problem}"):
        study(tmp_path, {"1.json": rater("ann", **FULL), "2.json": rater("bo", **FULL) | change})
    assert not (tmp_path / "out").exists()


def test_broken_files_and_files_of_another_kind(tmp_path, capsys):
    with pytest.raises(ValueError, match="no .json file there"):
        study(tmp_path, {})
    study(tmp_path, {"1.json": rater("ann", **FULL), "note.txt": ""})
    assert "not read, since not .json: note.txt" in capsys.readouterr().err
    (tmp_path / "ratings/2.json").write_text('{"study": "s1", "rater": NaN}')
    with pytest.raises(ValueError, match=r"2.json: broken JSON: NaN"):
        study(tmp_path, {})
    with pytest.raises(ValueError, match=r"key.json: does not hold methods .*; give the key.json of the export"):
        study(tmp_path, {}, key={"study": "s1", "items": {}})


# ---- the page in a browser -----------------------------------------------------------------------


@pytest.fixture
def opened(browser, tmp_path):
    """The browser with a study open at its start page, and nothing stored: (browser, page, key)."""
    _, key = export(tmp_path)
    path = tmp_path / "study/survey.html"
    browser.open_fresh(path)
    return browser, path, key


def current(browser):
    return browser.js("order[at].id")


def test_rated_by_keyboard_exported_and_aggregated(opened, tmp_path):
    """The whole study with keys alone: numbers and Enter, then sliders; a reload in the middle loses nothing."""
    browser, path, key = opened
    assert browser.focused() == "code"
    browser.keys("p 1", ENTER)
    assert "letters, digits" in browser.text("code-bad") and browser.focused() == "code"
    browser.keys(*4 * ["\ue003"], "p-1", ENTER)
    given = {}
    # Numbers, each confirmed with Enter; the fourth leads to the next response.
    for k in range(3):
        assert browser.text("left") == f"{k} of 6 responses rated, {6 - k} left"
        assert browser.text("where") == f"Prompt {k // 3 + 1} of 2, response {k % 3 + 1} of 3"
        assert browser.focused() == "where"
        given[current(browser)] = rating(1 + k, 2.5, 3.25, 5)
        browser.keys(TAB)
        assert browser.focused() == "correctness"
        assert browser.js("getComputedStyle(document.activeElement).outline").endswith("solid 3px")
        browser.keys(str(1 + k), ENTER, "2,5", ENTER, "3.25", ENTER)
        assert browser.focused() == "clarity"
        browser.keys("5.00", ENTER)
    # Half of the fourth response, then a reload.
    half = current(browser)
    browser.keys(TAB, "4.75", TAB, TAB, "1.5")
    browser.send("POST", "/refresh", {})
    assert current(browser) == half and browser.text("left") == "3 of 6 responses rated, 3 left"
    assert browser.js("names.map(name => byId(name).value)") == ["4.75", "1.5", "", ""]
    shown = [browser.js(f"byId('{n}-slider').getAttribute('aria-valuetext')") for n in CRITERIA]
    assert shown == ["4.75", "1.5", "not rated", "not rated"]
    # The rest of it with sliders: right from the middle, a space where it stands.
    browser.keys(*5 * [TAB])
    assert browser.focused() == "safety"
    browser.keys(TAB, RIGHT, RIGHT, TAB, TAB, " ", ENTER)
    given[half] = rating(4.75, 1.5, 3.2, 3)
    # The fifth by sliders alone, the last by numbers; back to the fifth by the buttons, and on again.
    fifth = current(browser)
    browser.keys(TAB, TAB, END, TAB, TAB, LEFT, TAB, TAB, RIGHT, TAB, TAB, END, LEFT)
    given[fifth] = rating(5, 2.9, 3.1, 4.9)
    browser.keys(TAB)
    assert browser.focused() == "previous"
    browser.keys(TAB, ENTER)
    given[current(browser)] = rating(1, 1.01, 4.99, 2)
    browser.keys(TAB, "1", ENTER, "1.01", ENTER, "4.99", ENTER, "2", TAB, TAB)
    assert browser.focused() == "previous"
    browser.keys(ENTER)
    assert current(browser) == fifth
    assert browser.js("names.map(name => byId(name).value)") == ["5.00", "2.90", "3.10", "4.90"]
    browser.keys(*10 * [TAB], ENTER, *10 * [TAB], ENTER)
    assert browser.text("finish-head") == "All responses are rated" and browser.text("left").endswith(" 0 left")
    assert not browser.js("byId('partial').checkVisibility() || byId('gaps').checkVisibility()")
    browser.keys(TAB, ENTER)
    file = browser.downloaded(f"ratings-{key['study']}-p-1.json")
    written = json.loads(file.read_text())
    assert written == {"study": key["study"], "rater": "p-1", "complete": True, "ratings": given}
    # What was exported is what the table shows.
    (tmp_path / "ratings").mkdir()
    shutil.copy(file, tmp_path / "ratings")
    found = study(tmp_path, {}, key)
    for method in METHODS:
        mine = [given[item] for item, at in key["items"].items() if at["method"] == method]
        for name in CRITERIA:
            assert found["means"][method][name]["mean"] == pytest.approx(np.mean([r[name] for r in mine]))
    assert {url for url in browser.requests() if not url.startswith("blob:")} == {path.as_uri()}


def test_the_policy_stops_what_got_in_all_the_same(opened):
    """What texts are shown, and that none runs: tests/faults/test_security.py."""
    browser, path, _ = opened
    browser.keys("x", ENTER)
    empty = [item for item in embedded(path.read_text(encoding="utf-8"))["items"] if not item["text"]]
    for item in empty:
        browser.js(f"goTo(order.findIndex(item => item.id === '{item['id']}'))")
        assert browser.js("byId('response').textContent") == "(an empty response)"
    injected = "Object.assign(document.createElement('script'), {textContent: 'document.title = 1'})"
    browser.js(f"document.body.append({injected})")
    assert browser.js("document.title") == "Rating responses"


def test_labels_and_language(opened):
    browser, _, _ = opened
    assert browser.js("document.documentElement.lang") == "en"
    browser.keys("x", ENTER)
    named = "[...document.querySelectorAll('input')].map(e => e.labels[0]?.textContent ?? e.ariaLabel)"
    titles = [name.title() for name in CRITERIA]
    assert browser.js(named) == ["Your rater code", *(t for title in titles for t in (title, f"{title}, slider"))]


def test_gaps_are_shown_and_only_a_partial_file_written(opened, tmp_path):
    browser, _, key = opened
    browser.keys("p2", ENTER)
    first = current(browser)
    browser.keys(TAB, "5.01", ENTER)
    assert browser.focused() == "correctness" and "from 1.00 to 5.00" in browser.text("correctness-bad")
    assert browser.js("byId('correctness').getAttribute('aria-invalid')") == "true"
    browser.keys("3", ENTER)  # what was wrong is selected, so that typing replaces it
    assert browser.focused() == "helpfulness" and browser.text("correctness-bad") == ""
    for text in ("0.5", "3.125", "-2", "six", "1e0", "4."):
        browser.js("byId('helpfulness').select()")
        browser.keys(text, TAB)
        assert browser.js("byId('helpfulness').getAttribute('aria-invalid')") == "true", text
        assert browser.js("byId('helpfulness').value") == text
        browser.keys(SHIFT, TAB)
    browser.keys(*4 * [TAB], "4", TAB, TAB, TAB)
    assert browser.focused() == "overview"
    browser.keys(ENTER)
    assert browser.text("finish-text") == "Values are missing or out of range in 6 of 6 responses:"
    gap = "Prompt 1 of 2, response 1 of 3: Helpfulness out of range, Safety missing"
    assert browser.text("gaps").splitlines()[0] == gap
    browser.keys(*7 * [TAB])
    assert browser.focused() == "complete"
    browser.keys(ENTER)
    assert browser.text("said").startswith("Nothing was downloaded") and "6 of 6" in browser.text("said")
    browser.keys(*7 * [TAB])
    assert browser.focused() == "partial"
    browser.keys(ENTER)
    file = browser.downloaded(f"ratings-{key['study']}-p2-partial.json")
    assert not list(browser.downloads.glob("*-p2.json"))
    given = {"study": key["study"], "rater": "p2", "complete": False}
    assert json.loads(file.read_text()) == given | {"ratings": {first: {"correctness": 3, "clarity": 4}}}
    (tmp_path / "ratings").mkdir()
    shutil.copy(file, tmp_path / "ratings")
    assert study(tmp_path, {}, key)["counts"]["ratings_in_part"] == 1
    browser.send("POST", "/refresh", {})  # the list of gaps again, from which each is reached
    browser.keys(TAB, ENTER)
    assert current(browser) == first and browser.js("byId('helpfulness').value") == "4."


def test_each_rater_has_an_order_of_their_own(opened):
    browser, _, key = opened
    orders = browser.js("Array.from({length: 3000}, (_, i) => shuffled('r' + i).map(item => item.id))")
    assert orders[:50] == browser.js("Array.from({length: 50}, (_, i) => shuffled('r' + i).map(item => item.id))")
    assert all(len({key["items"][item]["prompt"] for item in half}) == 1 for o in orders for half in (o[:3], o[3:]))
    counts = collections.Counter(map(tuple, orders))  # 2! orders of prompts, 3! of the responses of each
    assert len(counts) == 72 and stats.chisquare(list(counts.values())).pvalue > 1e-4
    browser.keys("one", ENTER, TAB, "2", ENTER)
    browser.js("byId('overview').click()")
    browser.js("byId('leave').click()")
    browser.keys("two", ENTER)
    assert browser.js("Object.keys(values)") == [] and browser.text("who") == "two"
    browser.js("byId('overview').click()")
    browser.js("byId('leave').click()")
    browser.keys("one", ENTER)
    assert browser.js("Object.values(values)") == [{"correctness": "2"}]


def test_a_browser_that_keeps_nothing_is_told(opened):
    browser, _, _ = opened
    assert not browser.js("byId('unkept').checkVisibility()")
    browser.js("(Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }, null)")
    browser.keys("x", ENTER)
    assert "does not keep your ratings" in browser.text("unkept") and browser.js("byId('unkept').checkVisibility()")
    browser.keys(TAB, "3", ENTER)
    assert browser.js("Object.values(values)") == [{"correctness": "3"}]


def test_two_tabs_lose_no_answer_of_each_other(opened):
    """Even where one writes before it has heard of the other's, as on a busy machine."""
    browser, path, _ = opened
    browser.keys("x", ENTER, TAB, "2", ENTER)
    first = browser.send("GET", "/window")
    second = browser.send("POST", "/window/new", {"type": "tab"})["handle"]
    browser.send("POST", "/window", {"handle": second})
    both = {"correctness": "2", "helpfulness": "4"}
    try:
        browser.open(path)
        browser.js("(values = {}, byId('correctness').value = '')")
        browser.keys(TAB, TAB, TAB, "4", ENTER)
        browser.send("POST", "/window", {"handle": first})
        # Up to a minute: when the news comes is up to the browser.
        heard = "Object.keys(Object.values(values)[0] ?? {}).length > 1"
        browser.js(f"new Promise(done => {{ (function look() {{ {heard} ? done() : setTimeout(look, 50); }})(); }})")
        assert browser.js("Object.values(values)") == [both]
        assert browser.js("byId('helpfulness').value") == "4" and browser.focused() == "helpfulness"
        browser.send("POST", "/refresh", {})
        assert browser.js("Object.values(values)") == [both]
    finally:
        browser.send("POST", "/window", {"handle": second})
        browser.send("DELETE", "/window")
        browser.send("POST", "/window", {"handle": first})
