"""Evaluations side by side: differences and wins by hand, what does not compare, samples read in a browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import flags
from scipy import stats

from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import compare, metrics

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
        "A and B are one folder": [f"A={a}", f"B={tmp_path / 'x/../a'}"],
        "a name becomes that of a file": [f"A={a}", f"../B={a}"],
        "data None; .*: other.jsonl": [f"A={a}", f"B={evaluation(tmp_path / 'e', {'p': 1.0}, data='other.jsonl')}"],
        "no eval.json there or below: did you mean a.": [f"A={a}", f"B={tmp_path / 'aa'}"],
        "dtype fp32; .*: bf16. Evaluate them the same way": [f"A={a}", f"B={b}"],
        "no prompt that all of them have": [f"A={a}", f"C={c}"],
    }
    for message, words in cases.items():
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", *words)
    with pytest.raises(ValueError, match="no evaluation has samples"):
        run(tmp_path / "out", f"A={a}", f"B={evaluation(tmp_path / 'd', {'p': 1.0})}", formats="alpaca_eval")
    for wrong in ("", a / "eval.json"):
        with pytest.raises(ValueError, match="--out .*: name a folder"):
            run(wrong, f"A={a}", f"B={c}")
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

    assert shown() == "p0" and browser.text("count") == "800"
    assert browser.js("[...document.querySelectorAll('#methods h2')].map(e => e.textContent)") == ["A", "B"]
    browser.js("document.getElementById('next').click()")
    assert shown() == "p1"
    browser.enter("order", "1")
    assert shown() == "p7"
    browser.enter("order", "2")
    assert shown() == "p500" and nasty in browser.text("methods") and browser.js("document.title") != "ran"
    browser.enter("number", "800")
    assert shown() == "p7"
    browser.enter("words", "NEEDLE")
    assert shown() == "p500" and browser.text("count") == "1"
    browser.enter("words", "nowhere to be found")
    assert "No prompt or sample contains that" in browser.text("prompt")
    assert not browser.log("browser")


# ---- what suites of several worlds are made of ---------------------------------------------------


def trained(folder: Path, values: dict[str, dict[str, float]], rewards: dict | None = None) -> Path:
    (folder / "test").mkdir(parents=True)
    (folder / "test/per_prompt.json").write_text(json.dumps(values))
    if rewards:
        rows = [Row(id, "p", ("x",) * len(r), r, None, None) for id, r in rewards.items()]
        listwise.write(folder / "test/samples.jsonl", rows)
    if not folder.name.startswith("SFT"):
        (folder / "summary.json").write_text(json.dumps({"seconds": 3.0 + len(folder.name), "tokens": 5000}))
    return folder / "test"


@pytest.fixture
def cells(tmp_path) -> dict[str, list[list[Path]]]:
    """Three worlds with prompts of their own. SFT at zero; HPS above BT by one, by three, by two in each of them; harm
    undefined on some prompts, not the same ones in each world, and in the last on all."""
    g, out = np.random.default_rng(0), {name: [] for name in ("SFT", "DPO-BT", "DPO-HPS", "DPO-HPS again")}
    for world, lead in enumerate((1.0, 3.0, 2.0)):
        prompts = [f"p{world}{i}" for i in range(40)]
        base = {p: float(g.normal(3.0)) for p in prompts}
        out["SFT"].append([trained(tmp_path / f"SFT-{world}", {"rm10": dict.fromkeys(prompts, 0.0)})])
        for name, shift in (("DPO-BT", 0.0), ("DPO-HPS", lead), ("DPO-HPS again", lead)):
            out[name].append([])
            for repeat in range(2):
                rm10 = {p: base[p] + shift + 0.1 * repeat + 2 * world for p in prompts}
                values = {"rm10": rm10, "harm": dict.fromkeys(prompts[world::2] if world < 2 else [], 50.0 + shift)}
                rewards = dict.fromkeys(prompts, (shift, 0.0, -shift))
                out[name][-1].append(trained(tmp_path / f"{name}-{world}-{repeat}", values, rewards))
    return out


def test_rows_and_paired_differences(cells):
    pairs = [("DPO-HPS", "DPO-BT"), ("DPO-HPS", "SFT"), ("DPO-HPS again", "DPO-HPS")]
    rows, comparisons = compare.summarise(cells, pairs)
    bt, hps = (next(row for row in rows if row["method"] == name) for name in ("DPO-BT", "DPO-HPS"))
    read = [json.loads((folders[0] / "per_prompt.json").read_text())["rm10"].values() for folders in cells["DPO-BT"]]
    values = [np.mean(list(v)) + 0.05 for v in read]  # the second run is 0.1 above the first
    assert bt["metrics"]["rm10"]["values"] == pytest.approx(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    found = [bt["metrics"]["rm10"][key] for key in ("mean", "low", "high")]
    assert found == pytest.approx([np.mean(values), theirs.low, theirs.high])
    assert bt["metrics"]["harm"]["values"] == [50, 50, None] and bt["runs"] == 6
    assert bt["metrics"]["train_tokens"]["values"] == [5, 5, 5]
    assert "train_seconds" in hps["metrics"] and "train_seconds" not in rows[0]["metrics"]
    of = {(c["a"], c["b"], c["metric"]): c for c in comparisons}
    rm10 = of["DPO-HPS", "DPO-BT", "rm10"]
    assert rm10["values"] == pytest.approx([1, 3, 2])
    assert rm10["p"] == pytest.approx(stats.ttest_1samp([1, 3, 2], 0).pvalue)
    # Worlds and prompts differ by more than that, but of both rows alike. Two runs meet one SFT model.
    assert of["DPO-HPS", "SFT", "rm10"]["mean"] == pytest.approx(hps["metrics"]["rm10"]["mean"])
    assert of["DPO-HPS", "DPO-BT", "harm"]["values"] == [1, 3, None]
    # Samples by number: the first wins, the second ties, the third loses.
    assert of["DPO-HPS", "DPO-BT", "lead"]["values"] == [0, 0, 0] and ("DPO-HPS", "SFT", "lead") not in of
    pair = [of["DPO-HPS", other, "rm10"] for other in ("DPO-BT", "SFT")]  # adjusted for the two of its metric
    assert [c["p_holm"] for c in pair] == pytest.approx(metrics.holm([c["p"] for c in pair])) != [c["p"] for c in pair]
    assert of["DPO-HPS", "DPO-BT", "harm"]["p_holm"] == of["DPO-HPS", "DPO-BT", "harm"]["p"]
    assert [c["mean"] for c in comparisons if "p_holm" not in c] == [0, 0, 0] and len(comparisons) == 4 + 3


def test_a_row_between_two_by_kl_is_linear_by_prompt(tmp_path):
    """KL 1 and 3 in the first world, 4 and 8 in the second, which 2.5 does not reach: three quarters of the way."""
    cells = {"near": [], "far": [], "other": []}
    for world, (low, high) in enumerate([(1.0, 3.0), (4.0, 8.0)]):
        for name, kl, rm10 in (("near", low, 2.0), ("far", high, 4.0), ("other", low, 1.0)):
            values = {"kl_exact": {"p": kl - 1, "q": kl + 1}, "rm10": {"p": rm10, "q": 2 * rm10}}
            cells[name].append([trained(tmp_path / f"{name}-{world}", values)])
    frontiers = {"line": (2.5, ["near", "far"])}
    rows, comparisons = compare.summarise(cells, [("line", "other"), ("line", "line")], frontiers)
    line = rows[-1]["metrics"]
    assert line["rm10"]["values"] == [(3.5 + 7) / 2, None] and line["kl_exact"]["values"] == [2.5, None]
    of = {(c["b"], c["metric"]): c["values"] for c in comparisons}
    assert of["other", "rm10"] == [(2.5 + 5) / 2, None] and of["line", "rm10"] == [0, None]
    assert rows[-1]["runs"] == 0 and ("other", "lead") not in of
    back = compare.on_frontier([compare.per_prompt(cells[name][0]) for name in ("far", "near")], 2.5)
    assert back == {}  # a line goes outwards


def test_head_to_head_by_hand(tmp_path):
    """Run beside run, the shorter side repeated, on the prompts that both have: wins less losses in per cent."""
    scored = [{"p": (1.0, 2.0, 0.0, 1.0), "q": (1.0,)}, {"p": (0.0,) * 4}, {"p": (0.0, 1.0, 0.0, 2.0), "s": (1.0,)}]
    *a, b = [trained(tmp_path / f"{i}", {}, rewards) for i, rewards in enumerate(scored)]
    assert compare.head_to_head(a, [b]) == {"p": pytest.approx(((50 - 25) + (0 - 50)) / 2)}
    assert compare.head_to_head([b], a) == {"p": pytest.approx(12.5)}


def test_the_machine_names_its_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: ["H200", "L4", "H200"][i])
    assert compare.machine().endswith(" cores, 2 x H200, 1 x L4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert compare.machine().endswith(" cores, no GPU")
