"""Evaluations side by side: differences and wins by hand, what does not compare, samples read in a browser."""

import json
import re
import shutil

import pytest
from helpers import flags

from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import compare

SETTINGS = dict(reference="sft", scorer="rm", samples=2, temperature=0.9, max_new_tokens=8, max_length=64, dtype="fp32")


def evaluation(folder, margins, rewards=(), texts=None, **settings):
    """What eval.py leaves: id -> margin, and for each prompt the rewards of its two samples."""
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps({"config": SETTINGS | settings}))
    table = {"rm_dpo": margins}
    if rewards:
        table["true_reward"] = {id: sum(found) / 2 for id, found in zip(margins, rewards, strict=True)}
        rows = []
        for id, found in zip(margins, rewards, strict=True):
            prompt = ({"role": "user", "content": f"question {id}"},)
            rows.append(Row(id, prompt, (texts or {}).get(id, ("a", "b")), found, None, None, "policy"))
        listwise.write(folder / "samples.jsonl", rows)
    (folder / "per_prompt.json").write_text(json.dumps(table))
    return folder


def run(out, *words, **options):
    compare.main([*words, *flags(**dict(baseline="A", out=out) | options)])
    return {(x["a"], x["metric"]): x for x in json.loads((out / "results.json").read_text())["comparisons"]}


def test_differences_and_wins_by_hand(tmp_path):
    """B has two runs: their prompts are averaged, and prompt r, which A lacks, is left out. B - A is 1 and 3 of RM_DPO;
    of reward 1 and 0. Its samples beat A's 3 times and lose once in run 0, win 2 and tie 2 in run 1."""
    a = evaluation(tmp_path / "a", {"p": 1.0, "q": 2.0}, [(0, 0), (1, 1)])
    evaluation(tmp_path / "b/run-0/test", {"p": 1.5, "q": 4.0, "r": 9.0}, [(1, 1), (2, 0), (5, 5)])
    evaluation(tmp_path / "b/run-1/test", {"p": 2.5, "q": 6.0}, [(1, 1), (1, 1)])
    found = run(tmp_path / "out", f"A={a}", f"B={tmp_path / 'b'}")
    assert found["B", "rm_dpo"]["mean"] == 2 and found["B", "true_reward"]["mean"] == 0.5
    # t of two values 1 and 3: 2 -+ 12.706 * 1
    assert found["B", "rm_dpo"]["low"] == pytest.approx(2 - 12.7062, abs=1e-3)
    assert found["B", "lead"]["mean"] == (100 + (0 + 0) / 2) / 2
    text = (tmp_path / "out/RESULTS.md").read_text()
    assert re.search(r"\| RM_DPO \| B \| A \| \+2\.00 \[-10\.71, \+14\.71\] \|", text)


def test_what_does_not_compare_is_refused(tmp_path):
    a = evaluation(tmp_path / "a", {"p": 1.0})
    b, c = evaluation(tmp_path / "b", {"p": 1.0}, dtype="bf16"), evaluation(tmp_path / "c", {"z": 1.0})
    cases = {
        "two or more different names": [f"A={a}"],
        "different names": [f"A={a}", f"A={b}"],
        "NAME=FOLDER": [f"A={a}", str(b)],
        "--baseline A: choose one of": [f"B={a}", f"C={c}"],
        "no eval.json there or below": [f"A={a}", f"B={tmp_path / 'none'}"],
        "dtype fp32; .*: bf16. Evaluate them the same way": [f"A={a}", f"B={b}"],
        "no prompt that all of them have": [f"A={a}", f"C={c}"],
    }
    for message, words in cases.items():
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", *words)
    with pytest.raises(ValueError, match="no evaluation has samples"):
        run(tmp_path / "out", f"A={a}", f"B={evaluation(tmp_path / 'd', {'p': 1.0})}", formats="alpaca_eval")
    assert not (tmp_path / "out").exists()


def test_samples_in_the_formats_of_other_judges(tmp_path):
    rewards = [(0, 1)]
    a = evaluation(tmp_path / "a", {"p": 1.0}, rewards, {"p": ("first", "second")})
    b = evaluation(tmp_path / "b", {"p": 1.0}, rewards, {"p": ("caf\u00e9\u2028", "x")})
    run(tmp_path / "out", f"A={a}", f"B={b}", formats="alpaca_eval,arena_hard")
    record = {"instruction": "question p", "output": "first", "generator": "A"}
    assert json.loads((tmp_path / "out/alpaca_eval/A.json").read_text()) == [record]
    [line] = (tmp_path / "out/arena_hard/model_answer/B.jsonl").read_text().split("\n")[:-1]
    answer = json.loads(line)
    assert (answer["uid"], answer["model"]) == ("p", "B")
    assert answer["messages"][-1] == {"role": "assistant", "content": {"answer": "caf\u00e9\u2028"}}


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromium and chromedriver")
def test_800_prompts_are_read_sorted_and_searched(tmp_path, browser):
    """B is best on prompt 7 and worst on prompt 500, whose samples hold markup that must not run."""
    ids, nasty = [f"p{i}" for i in range(800)], "<img src=x onerror=\"document.title='ran'\"></script>"
    a = evaluation(tmp_path / "a", dict.fromkeys(ids, 0.0), [(0, 0)] * 800)
    better = [(9, 9) if i == 7 else (-9, -9) if i == 500 else (1, 1) for i in range(800)]
    b = evaluation(tmp_path / "b", dict.fromkeys(ids, 0.0), better, {"p500": (nasty, "needle")})
    run(tmp_path / "out", f"A={a}", f"B={b}")
    browser.open(tmp_path / "out/samples.html")

    def shown():
        return browser.js("document.getElementById('prompt').querySelector('h3').textContent")

    def choose(id, event, value):
        script = "Object.assign(document.getElementById(arguments[0]), {value: arguments[2]})"
        browser.js(script + ".dispatchEvent(new Event(arguments[1]))", id, event, value)

    assert shown() == "p0" and browser.text("count") == "800"
    assert browser.js("[...document.querySelectorAll('#methods h2')].map(e => e.textContent)") == ["A", "B"]
    browser.js("document.getElementById('next').click()")
    assert shown() == "p1"
    choose("order", "change", "1")
    assert shown() == "p7"
    choose("order", "change", "2")
    assert shown() == "p500" and nasty in browser.text("methods") and browser.js("document.title") != "ran"
    choose("number", "change", "800")
    assert shown() == "p7"
    choose("words", "input", "NEEDLE")
    assert shown() == "p500" and browser.text("count") == "1"
    choose("words", "input", "nowhere to be found")
    assert "No prompt or sample contains that" in browser.text("prompt")
    assert not browser.log("browser")
