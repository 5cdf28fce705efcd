"""Tables from the files of runs and evaluations: means, paired differences, curves, agreement; machine and commit."""

import json
from pathlib import Path

import numpy as np
import pytest

from hps.data import listwise
from hps.data.rows import Row
from hps.lab import results


def run(folder: Path, values: dict[str, dict[str, float]]) -> Path:
    (folder / "test").mkdir(parents=True)
    (folder / "test/per_prompt.json").write_text(json.dumps(values))
    if folder.name.startswith("SFT"):
        return folder / "test"
    (folder / "summary.json").write_text(json.dumps({"seconds": 3.0 + len(folder.name), "tokens": 5000}))
    same = {"loss": 0.5, "effective_negatives": 2}
    log = [same | {"step": s, "rewards/margins": s, "gamma": -5 + s} for s in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder / "test"


@pytest.fixture
def cells(tmp_path) -> dict[str, list[list[Path]]]:
    """Two worlds with prompts of their own. SFT at zero; BT one below HPS on every prompt and repeat; harm undefined
    on some prompts, not the same ones in each world."""
    g = np.random.default_rng(0)
    out: dict[str, list[list[Path]]] = {"SFT": [], "DPO-BT": [], "DPO-HPS": []}
    for world in range(2):
        prompts = [f"p{world}{i}" for i in range(40)]
        base = {p: float(g.normal(3.0)) for p in prompts}
        out["SFT"].append([run(tmp_path / f"SFT-{world}", {"rm2": dict.fromkeys(prompts, 0.0)})])
        for name, shift in (("DPO-BT", 0.0), ("DPO-HPS", 1.0)):
            out[name].append([])
            for repeat in range(3):
                rm2 = {p: base[p] + shift + 0.1 * repeat + 2 * world for p in prompts}
                harm = dict.fromkeys(prompts[world::2], 50.0 * (1 - shift))
                out[name][-1].append(run(tmp_path / f"{name}-{world}-{repeat}", {"rm2": rm2, "harm": harm}))
    return out


def test_rows_and_paired_differences(cells):
    rows, comparisons = results.summarise(cells, [("DPO-HPS", "DPO-BT"), ("DPO-HPS", "SFT")])
    by_name = {row["method"]: row for row in rows}
    bt, hps = by_name["DPO-BT"], by_name["DPO-HPS"]
    read = [json.loads((folders[0] / "per_prompt.json").read_text())["rm2"].values() for folders in cells["DPO-BT"]]
    assert bt["metrics"]["rm2"]["mean"] == pytest.approx(np.mean([list(v) for v in read]) + 0.1)
    assert by_name["SFT"]["metrics"]["rm2"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert bt["metrics"]["harm"]["mean"] == 50.0 and bt["seeds"] == 6
    assert bt["metrics"]["train_tokens"]["mean"] == 5.0
    assert "train_seconds" in hps["metrics"] and "train_seconds" not in by_name["SFT"]["metrics"]
    # The worlds differ by two and prompts by about one, yet the paired difference is sharp: one on every prompt.
    assert bt["metrics"]["rm2"]["high"] - bt["metrics"]["rm2"]["low"] > 1.5
    rm2, over_sft = (c for c in comparisons if c["metric"] == "rm2")
    assert (rm2["a"], rm2["b"]) == ("DPO-HPS", "DPO-BT")
    assert (rm2["mean"], rm2["low"], rm2["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert over_sft["mean"] == pytest.approx(hps["metrics"]["rm2"]["mean"])  # three repeats against one SFT model
    (harm,) = (c for c in comparisons if c["metric"] == "harm")
    assert harm["mean"] == pytest.approx(-50.0)
    found = results.curves_of(cells)
    assert found["schedule"]["gamma"] == [-5, -4, -3] and list(found["curves"]) == ["DPO-BT", "DPO-HPS"]
    assert found["curves"]["DPO-BT"] == {"step": [0, 1, 2], "loss": [0.5] * 3, "margin": [0, 1, 2]}


def test_a_folder_of_runs_becomes_a_report(tmp_path, monkeypatch, capsys):
    """ROW/run-N/test as recipes write them: every row beside the first, and a second run of a row pairs with it."""
    for i in range(2):
        for name, rm2 in (("BT", 1.0), ("HPS", 2.0 + i)):
            run(tmp_path / name / f"run-{i}", {"rm2": {"p": rm2, "q": rm2}, "harm": {"q": 0.0}})
    rows = [Row(str(i), "p", ("a", "b"), r, 0, 1) for i, r in enumerate([(2.0, 1.0), (1.0, 1.0)])]
    listwise.write(tmp_path / "pairs.jsonl", rows)
    argv = ["results", f"--runs={tmp_path}", f"--annotated={tmp_path / 'pairs.jsonl'}"]
    monkeypatch.setattr("sys.argv", argv)
    results.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(row["method"], row["seeds"], row["metrics"]["rm2"]["mean"]) for row in found["rows"]] == [
        ("BT", 2, 1.0),
        ("HPS", 2, 2.5),
    ]
    assert [(c["a"], c["b"], c["mean"]) for c in found["comparisons"] if c["metric"] == "rm2"] == [("HPS", "BT", 1.5)]
    assert "pairs.jsonl: the rewards agree with people on 0.75" in capsys.readouterr().out
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
