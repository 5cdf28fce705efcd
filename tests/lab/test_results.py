"""Tables from the files of runs and evaluations: means, paired differences, agreement; machine and commit."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import metrics
from hps.lab import results


def run(folder: Path, values: dict[str, dict[str, float]], rewards: dict[str, tuple[float, ...]] | None = None) -> Path:
    (folder / "test").mkdir(parents=True)
    (folder / "test/per_prompt.json").write_text(json.dumps(values))
    if rewards:
        rows = [Row(id, "p", ("x",) * len(r), r, None, None) for id, r in rewards.items()]
        listwise.write(folder / "test/samples.jsonl", rows)
    if folder.name.startswith("SFT"):
        return folder / "test"
    (folder / "summary.json").write_text(json.dumps({"seconds": 3.0 + len(folder.name), "tokens": 5000}))
    return folder / "test"


@pytest.fixture
def cells(tmp_path) -> dict[str, list[list[Path]]]:
    """Three worlds with prompts of their own. SFT at zero; HPS above BT by one, by three, by two in each of them; harm
    undefined on some prompts, not the same ones in each world, and in the last on all."""
    g = np.random.default_rng(0)
    out: dict[str, list[list[Path]]] = {"SFT": [], "DPO-BT": [], "DPO-HPS": [], "DPO-HPS again": []}
    for world, lead in enumerate((1.0, 3.0, 2.0)):
        prompts = [f"p{world}{i}" for i in range(40)]
        base = {p: float(g.normal(3.0)) for p in prompts}
        out["SFT"].append([run(tmp_path / f"SFT-{world}", {"rm10": dict.fromkeys(prompts, 0.0)})])
        for name, shift in (("DPO-BT", 0.0), ("DPO-HPS", lead), ("DPO-HPS again", lead)):
            out[name].append([])
            for repeat in range(2):
                rm10 = {p: base[p] + shift + 0.1 * repeat + 2 * world for p in prompts}
                harm = dict.fromkeys(prompts[world::2] if world < 2 else [], 50.0 + shift)
                rewards = dict.fromkeys(prompts, (shift, 0.0, -shift))
                out[name][-1].append(run(tmp_path / f"{name}-{world}-{repeat}", {"rm10": rm10, "harm": harm}, rewards))
    return out


def test_rows_and_paired_differences(cells):
    pairs = [("DPO-HPS", "DPO-BT"), ("DPO-HPS", "SFT"), ("DPO-HPS again", "DPO-HPS")]
    rows, comparisons = results.summarise(cells, pairs)
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
    assert rm10["values"] == pytest.approx([1, 3, 2]) and rm10["p"] == pytest.approx(
        stats.ttest_1samp([1, 3, 2], 0).pvalue
    )
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
            cells[name].append([run(tmp_path / f"{name}-{world}", values)])
    frontiers = {"line": (2.5, ["near", "far"])}
    rows, comparisons = results.summarise(cells, [("line", "other"), ("line", "line")], frontiers)
    line = rows[-1]["metrics"]
    assert line["rm10"]["values"] == [(3.5 + 7) / 2, None] and line["kl_exact"]["values"] == [2.5, None]
    of = {(c["b"], c["metric"]): c["values"] for c in comparisons}
    assert of["other", "rm10"] == [(2.5 + 5) / 2, None] and of["line", "rm10"] == [0, None]
    assert rows[-1]["runs"] == 0 and ("other", "lead") not in of
    back = results.on_frontier([results.per_prompt(cells[name][0]) for name in ("far", "near")], 2.5)
    assert back == {}  # a line goes outwards


def test_head_to_head_by_hand(tmp_path):
    """Run beside run, the shorter side repeated, on the prompts that both have: wins less losses in per cent."""
    a = [
        run(tmp_path / f"a{i}", {}, r)
        for i, r in enumerate([{"p": (1.0, 2.0, 0.0, 1.0), "q": (1.0,)}, {"p": (0.0,) * 4}])
    ]
    b = [run(tmp_path / "b", {}, {"p": (0.0, 1.0, 0.0, 2.0), "s": (1.0,)})]
    assert results.head_to_head(a, b) == {"p": pytest.approx(((50 - 25) + (0 - 50)) / 2)}
    assert results.head_to_head(b, a) == {"p": pytest.approx(12.5)}


def test_a_folder_of_runs_becomes_a_report(tmp_path, monkeypatch, capsys):
    """ROW/run-N/test as recipes write them: every row beside the first, and a second run of a row pairs with it."""
    for i in range(2):
        for name, rm2 in (("BT", 1.0), ("HPS", 2.0 + i)):
            run(tmp_path / name / f"run-{i}", {"rm10": {"p": rm2, "q": rm2 + 1}, "harm": {"q": 0.0}})
    rows = [Row(str(i), "p", ("a", "b"), r, 0, 1) for i, r in enumerate([(2.0, 1.0), (1.0, 1.0)])]
    listwise.write(tmp_path / "pairs.jsonl", rows)
    argv = ["results", f"--runs={tmp_path}", f"--annotated={tmp_path / 'pairs.jsonl'}"]
    monkeypatch.setattr("sys.argv", argv)
    results.main()
    found = json.loads((tmp_path / "results.json").read_text())
    means = [(row["method"], row["runs"], row["metrics"]["rm10"]["mean"]) for row in found["rows"]]
    assert means == [("BT", 2, 1.5), ("HPS", 2, 3.0)] and found["worlds"] == 1
    # Of one world the interval is over its prompts, on which the difference is the same.
    (rm10,) = (c for c in found["comparisons"] if c["metric"] == "rm10")
    assert (rm10["a"], rm10["b"], rm10["low"], rm10["high"]) == ("HPS", "BT", 1.5, 1.5)
    assert "pairs.jsonl: the rewards agree with people on 0.75 [" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*argv, "--first=EXO"])
    with pytest.raises(ValueError, match="no ROW/run-N/test/per_prompt.json of row 'EXO' there; rows: BT, HPS"):
        results.main()


def test_agreement_by_hand(tmp_path):
    """Right, wrong, tie, right: (1 + 0 + 0.5 + 1) / 4."""
    pairs = [((2.0, 1.0), 0, 1), ((1.0, 2.0), 0, 1), ((1.0, 1.0), 0, 1), ((0.0, 3.0), 1, 0)]
    rows = [Row(str(i), "p", ("a", "b"), *pair) for i, pair in enumerate(pairs)]
    listwise.write(tmp_path / "rows.jsonl", rows)
    found = results.agreement(tmp_path / "rows.jsonl")
    assert found["mean"] == pytest.approx(0.625) and found["low"] <= 0.625 <= found["high"]


def test_the_machine_names_its_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: ["H200", "L4", "H200"][i])
    assert results.machine().endswith(" cores, 2 x H200, 1 x L4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert results.machine().endswith(" cores, no GPU")
