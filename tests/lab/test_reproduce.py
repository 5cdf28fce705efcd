"""The sweep's arithmetic and restart: means and paired differences from the cells' files, finished stages kept."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tqdm import tqdm

from hps.evaluate import report
from hps.lab import reproduce


def cell(folder: Path, values: dict[str, dict[str, float]]) -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/per_prompt.json").write_text(json.dumps(values))
    (folder / "summary.json").write_text(json.dumps({"seconds": 3.0 + len(folder.name), "tokens": 5000}))
    same = {"loss": 0.5, "effective_negatives": 2}
    log = [same | {"step": s, "rewards/margins": s, "gamma": -5 + s} for s in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder / "eval"


@pytest.fixture
def cells(tmp_path) -> dict[str, list[Path]]:
    """SFT at zero; BT one below HPS on every prompt and seed; rmgap and harm undefined on some prompts."""
    g = np.random.default_rng(0)
    prompts = [f"p{i}" for i in range(40)]
    base = {p: float(g.normal(3.0)) for p in prompts}
    out = {"SFT": [cell(tmp_path / "SFT", {"rm2": dict.fromkeys(prompts, 0.0)})], "DPO-BT": [], "DPO-HPS": []}
    for name, shift in (("DPO-BT", 0.0), ("DPO-HPS", 1.0)):
        for seed in range(2):
            rm2 = {p: base[p] + shift + 0.1 * seed for p in prompts}
            harm = dict.fromkeys(prompts[::2], 50.0 * (1 - shift))
            out[name].append(cell(tmp_path / f"{name}-{seed}", {"rm2": rm2, "harm": harm}))
    return out


def test_rows_and_paired_differences(cells):
    rows, comparisons = reproduce.summarise(cells, [("DPO-HPS", "DPO-BT")])
    by_name = {row["method"]: row for row in rows}
    bt, hps = by_name["DPO-BT"], by_name["DPO-HPS"]
    values = json.loads((cells["DPO-BT"][0] / "per_prompt.json").read_text())["rm2"].values()
    assert bt["metrics"]["rm2"]["mean"] == pytest.approx(np.mean(list(values)) + 0.05)
    assert by_name["SFT"]["metrics"]["rm2"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert bt["metrics"]["harm"]["mean"] == 50.0 and bt["seeds"] == 2
    assert bt["metrics"]["train_tokens"]["mean"] == 5.0
    assert "train_seconds" in hps["metrics"] and "train_seconds" not in by_name["SFT"]["metrics"]
    # Prompts differ by about one, yet the paired difference is sharp: it is one on every prompt.
    assert bt["metrics"]["rm2"]["high"] - bt["metrics"]["rm2"]["low"] > 0.3
    (rm2,) = (c for c in comparisons if c["metric"] == "rm2")
    assert (rm2["a"], rm2["b"]) == ("DPO-HPS", "DPO-BT")
    assert rm2["mean"] == pytest.approx(1.0) and rm2["low"] > 0.8 and rm2["high"] < 1.2
    (harm,) = (c for c in comparisons if c["metric"] == "harm")
    assert harm["mean"] == pytest.approx(-50.0)


def test_the_report_accepts_what_the_sweep_makes(cells, tmp_path):
    rows, comparisons = reproduce.summarise(cells, [("DPO-HPS", "DPO-BT")])
    curves, schedule = reproduce.curves_of(cells)
    assert schedule["gamma"] == [-5, -4, -3]
    results = {"suite": "headline", "commit": "c", "machine": "m", "seconds": 1.0, "rows": rows}
    results |= {"comparisons": comparisons, "settings": {"seeds": 2}, "curves": curves, "schedule": schedule}
    written = report.write_report(results, tmp_path / "out")
    assert json.loads((tmp_path / "out/results.json").read_text())["rows"][1]["method"] == "DPO-BT"
    assert {"results.json", "RESULTS.md"} <= {path.name for path in written}


@pytest.mark.parametrize("suite", reproduce.SUITES)
def test_every_row_of_a_suite_is_a_command_that_train_accepts(suite):
    """Options that a method would ignore are errors, so each row's flags must belong to its method."""
    import train
    from hps import config

    spec = reproduce.SUITES[suite]()
    for name, flags in spec.methods.items():
        argv = ["--config", "configs/world.toml", "--model", "m", "--data", "d", "--out", "o", *flags]
        train.check(*config.parse(train.Config, argv, prog="train.py", description=""))
        assert not [word for word in flags if word == "--lr"], name
    assert {name for pair in spec.pairs for name in pair} <= spec.methods.keys()
    assert spec.splits.keys() <= spec.methods.keys()


def test_workers_end_with_a_killed_sweep(tmp_path):
    """SIGKILL of the parent while a worker is busy: the worker is gone within seconds."""
    driver = tmp_path / "driver.py"
    lines = ["import os, sys, time", "from hps.lab import reproduce", "if __name__ == '__main__':"]
    lines += ["    pool = reproduce.workers(1)", "    print(pool.submit(os.getpid).result(), flush=True)"]
    lines += ["    pool.submit(time.sleep, 600)", "    time.sleep(600)"]
    driver.write_text("\n".join(lines))
    parent = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    worker = int(parent.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def test_finished_stages_are_kept_and_failures_are_told(tmp_path):
    """A stage whose product exists does not run again; a script that fails is named with its last words."""
    script = tmp_path / "script.py"
    lines = ["import sys", "open(sys.argv[1], 'a').write('x')", "if len(sys.argv) > 2: sys.exit('no ' + sys.argv[2])"]
    script.write_text("\n".join(lines))
    with ThreadPoolExecutor(1) as pool, tqdm(total=3, disable=True) as bar:
        run = reproduce.Stages(pool, tmp_path, bar)
        product = tmp_path / "product"
        for _ in range(2):
            run.start(product, [str(script), str(product)], weight=1).result()
        assert product.read_text() == "x"
        failing = run.start(tmp_path / "other", [str(script), str(tmp_path / "other"), "luck"], weight=1)
        with pytest.raises(RuntimeError, match="script.py.*ended with status no luck"):
            failing.result()
    assert (tmp_path / "commands.log").read_text().count("python ") == 2
