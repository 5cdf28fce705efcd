"""The raters' page, clicked through in a browser, and the count of what they return, by hand."""

import collections
import json
import re

import pytest
from helpers import flags

from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import survey
from hps.io import files

METHODS = ("zeta-sft", "zeta-hps", "zeta-bt")
CHAT = tuple({"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "</b>"), ("user", "And?")))


def write_samples(folder, prompts=2, text=lambda place: place):
    """A samples.jsonl of each method, as eval.py writes them: two responses to each prompt, none shared."""
    for m, method in enumerate(METHODS):
        texts = [(text(f"{i}/{m}/0"), text(f"{i}/{m}/1")) for i in range(prompts)]
        rows = [Row(f"id-{i}", CHAT if i else "<b>Hi</b>", pair, None, None, None) for i, pair in enumerate(texts)]
        listwise.write(folder / f"{method}.jsonl", rows)
    return tuple(f"{method}={folder / method}.jsonl" for method in METHODS)


def export(methods, out, **options):
    survey.main(["export", *flags(methods=methods, out=out, **dict(items=2) | options)])
    page, key = (out / "survey.html").read_text(encoding="utf-8"), files.read_record(out / "key.json", "")
    [data] = re.findall(r'json" id="data">(.*?)</script>', page, re.DOTALL)
    return page, json.loads(data), key


def test_only_the_key_leads_back_to_a_method(tmp_path):
    page, shown, key = export(write_samples(tmp_path), tmp_path / "out")
    assert shown["study"] == key["study"] and key["methods"] == list(METHODS) and len(shown["pairs"]) == 6
    for pair, names in zip(shown["pairs"], key["pairs"], strict=True):
        prompt = names["prompt"].removeprefix("id-")
        for side in "ab":
            assert pair[side].startswith(f"{prompt}/{METHODS.index(names[side])}/")
        assert (
            len(pair["turns"]) == (3 if prompt == "1" else 1) and pair["turns"][0][1] == ["<b>Hi</b>", "Q"][int(prompt)]
        )
    pairs = {(names["prompt"], *sorted((names["a"], names["b"]))) for names in key["pairs"]}
    assert len(pairs) == 6  # each pair of methods once on each prompt
    for name in (*METHODS, "zeta", "id-0", str(tmp_path)):
        assert name not in page


def test_what_is_drawn_follows_the_seed_and_no_method(tmp_path):
    samples = write_samples(tmp_path, prompts=80)
    drawn = [export(samples, tmp_path / out, items=70, seed=seed) for out, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert drawn[0] == drawn[1] and drawn[0][2]["study"] != drawn[2][2]["study"]
    _, shown, key = drawn[0]
    assert len({pair["prompt"] for pair in key["pairs"]}) == 70 and len(key["pairs"]) == 210
    sides = collections.Counter(pair["a"] for pair in key["pairs"])  # of 140 each
    assert all(50 < n < 90 for n in sides.values()) and len(sides) == 3
    assert 70 < sum(pair["a"].endswith("1") for pair in shown["pairs"]) < 140  # which of the two responses
    assert [pair["prompt"] for pair in key["pairs"][:3]] != [key["pairs"][0]["prompt"]] * 3  # not prompt after prompt


def test_prompts_that_not_all_have_are_left_out(tmp_path):
    samples = write_samples(tmp_path)
    rows = listwise.read(tmp_path / "zeta-hps.jsonl")
    listwise.write(tmp_path / "zeta-hps.jsonl", [rows[1], Row("id-9", "other", ("x",))])
    for items in (0, 2):
        with pytest.raises(ValueError, match=f"--items {items}: 1 prompts have responses of all methods"):
            export(samples, tmp_path / "study", items=items)
    assert not (tmp_path / "study").exists()
    assert {pair["prompt"] for pair in export(samples, tmp_path / "study", items=1)[2]["pairs"]} == {"id-1"}


AT = [("p", "SFT", "HPS|x"), ("q", "HPS|x", "SFT"), ("p", "BT", "SFT"), ("q", "BT", "HPS|x")]
PAIRS = [dict(zip(("prompt", "a", "b"), at, strict=True)) for at in AT]
KEY = {"study": "s1", "methods": ["SFT", "HPS|x", "BT"], "pairs": PAIRS}


def aggregate(folder, key=KEY, **votes):
    (folder / "ratings").mkdir(exist_ok=True)
    files.write_record(folder / "key.json", key)
    for name, content in votes.items():
        (folder / f"ratings/{name}.json").write_text(json.dumps(content))
    survey.main(["aggregate", *flags(key=folder / "key.json", ratings=folder / "ratings", out=folder / "out")])
    return json.loads((folder / "out/survey.json").read_text())


def rater(name, *votes):
    return {"study": "s1", "rater": name, "votes": votes}


def test_the_count_of_wins_by_hand(tmp_path, capsys):
    """SFT against HPS: on p lost twice; on q, where HPS is A, won once and tied once: -100 and +50 per cent."""
    found = aggregate(tmp_path, one=rater("ann", "b", "b", "tie", None), two=rater("bo", "b", "tie", None, None))
    assert found["counts"] == dict(raters=2, pairs=4, votes=5, missing=3)
    first, second, third = found["comparisons"]
    lead = first.pop("lead")
    assert first == dict(a="SFT", b="HPS|x", win=1, tie=1, lose=2)
    assert lead["mean"] == -25 and lead["low"] == pytest.approx(-25 - 12.7062 * 75, abs=0.1)
    assert (second["a"], second["b"], second["tie"]) == ("SFT", "BT", 1) and second["lead"]["low"] is None
    assert (third["a"], third["b"], third["lead"]) == ("HPS|x", "BT", None)  # nobody voted
    text = (tmp_path / "out/survey.md").read_text()
    assert capsys.readouterr().out == text and r"| SFT | HPS\|x | 1 | 1 | 2 | -25.0 [-978.0, 928.0] |" in text


def test_mistakes_in_a_file_name_it(tmp_path):
    with pytest.raises(ValueError, match="no .json file there"):
        aggregate(tmp_path)
    for change, problem in (
        ({"study": "s2"}, "votes of study 's2', and the key is of 's1'"),
        ({"votes": ["a"]}, r"need 4 votes, each a, b, tie or null, not \['a'\]"),
        ({"votes": ["a", "b", "c", None]}, "need 4 votes"),
        ({"votes": [[], "b", "a", None]}, "need 4 votes"),
        ({"votes": None}, "need 4 votes"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"rater": 1}, "the rater must be a string, not 1"),
        ({"rater": "ann"}, "rater 'ann' has also sent .*1.json"),
    ):
        files_of = {"1": rater("ann", "a", "b", "tie", None), "2": rater("bo", *4 * ["a"]) | change}
        with pytest.raises(ValueError, match=rf"ratings/2.json: {problem}"):
            aggregate(tmp_path, **files_of)
    (tmp_path / "ratings/2.json").write_text('{"study": "s1", "rater": NaN}')
    with pytest.raises(ValueError, match=r"2.json: broken JSON: NaN"):
        aggregate(tmp_path)
    with pytest.raises(ValueError, match=r"key.json: does not hold methods .*; give the key.json of the export"):
        aggregate(tmp_path, key={"study": "s1", "pairs": []})
    assert not (tmp_path / "out").exists()


def test_voted_on_in_a_browser_and_counted(browser, tmp_path):
    """By keys and buttons; a reload loses nothing. Markup in answers is shown, and neither runs nor loads anything."""
    nasty = "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
    _, shown, key = export(write_samples(tmp_path, text=lambda t: f"{t} {nasty}" if t[0] == "1" else ""), tmp_path)
    path, pairs, hostile = tmp_path / "survey.html", shown["pairs"], 0
    browser.open_fresh(path)
    for n, pair in enumerate(pairs):
        assert browser.text("where") == f"{n + 1} of 6, {n} voted on"
        for side in "ab":
            assert browser.js(f"byId('{side}').textContent") == (pair[side] or "(an empty answer)")
            hostile += nasty in pair[side]
        assert browser.js("[...document.querySelectorAll('#prompt .text')].map(e => e.textContent)") == [
            text for _, text in pair["turns"]
        ]
        if n == 1:
            browser.js("document.querySelector('[data-vote=tie]').click()")
        elif n < 5:
            browser.press("1" if n == 0 else "3")
        if n == 2:
            browser.send("POST", "/refresh", {})
    assert hostile == 6
    browser.js("byId('back').click()")
    assert browser.js("document.querySelector('[aria-pressed=true]').dataset.vote") == "b"
    browser.press("2")
    browser.js("byId('download').click()")
    assert browser.text("said").startswith("First give your code") and browser.focused() == "rater"
    browser.enter("rater", "p-1")
    browser.js("byId('download').click()")
    written = browser.downloaded(f"votes-{key['study']}-p-1.json")
    assert browser.text("said") == "Downloaded: 5 of 6 votes."
    votes = ["a", "tie", "b", "b", "tie", None]
    assert json.loads(written.read_text()) == {"study": key["study"], "rater": "p-1", "votes": votes}
    found = aggregate(tmp_path, key, one=json.loads(written.read_text()))
    assert sum(pair["tie"] for pair in found["comparisons"]) == 2 and found["counts"]["votes"] == 5
    injected = "Object.assign(document.createElement('script'), {textContent: 'document.title = 1'})"
    browser.js(f"document.body.append({injected})")
    assert browser.js("document.title") == "Which answer is better?"
    assert {url for url in browser.requests() if not url.startswith("blob:")} == {path.as_uri()}
    browser.js("(Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }, null)")
    browser.press("1")
    assert "does not keep your votes" in browser.text("said")
