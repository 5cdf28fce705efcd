"""What the loggers are told, against metrics.jsonl.

Neither tensorboard nor wandb is a dependency. In their place stand modules that record how they are called and, from
what their documentation says of purge_step and of repeated steps, what a user would then see; no real one is asked.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import jsonl, run

import train
from hps.io import loggers


@pytest.fixture
def events(monkeypatch) -> dict[str, dict]:
    """TensorBoard's view of each folder: (tag, step) -> values; those from purge_step on are forgotten by a writer."""
    seen: dict[str, dict] = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int = 0) -> None:
            kept = {key: values for key, values in seen.get(folder, {}).items() if key[1] < purge_step}
            self.shown, self.unwritten = seen.setdefault(folder, {}), []
            self.shown.clear()
            self.shown |= kept

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.unwritten.append(((tag, step), value))

        def flush(self) -> None:
            for key, value in self.unwritten:
                self.shown.setdefault(key, []).append(value)
            self.unwritten = []

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return seen


@pytest.fixture
def server(monkeypatch) -> SimpleNamespace:
    """Weights & Biases: runs by id, each step -> its values; a step that is not new is ignored, as wandb does."""
    server = SimpleNamespace(runs={}, settings={})

    def init(*, dir: str, id: str, resume: str, name: str, config: dict) -> SimpleNamespace:
        assert resume == "allow" and Path(dir).name == name
        steps, server.settings[id] = server.runs.setdefault(id, {}), config

        def log(values: dict[str, float], step: int) -> None:
            if step > max(steps, default=-1):
                steps[step] = values

        return SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return server


def test_steps_done_again_stand_once_in_all(tiny_world, tmp_path, events, server, monkeypatch):
    """Killed at step 4 with a checkpoint of 3. The values that depend on the clock differ in the second life."""
    real = train.lr_at

    def kill(c, step, steps):
        if step == 4:
            raise KeyboardInterrupt
        return real(c, step, steps)

    monkeypatch.setattr(train, "lr_at", kill)
    monkeypatch.setattr(train, "peak_gib", lambda device: 1.0)
    monkeypatch.setattr(train.time, "perf_counter", iter(range(10**6)).__next__)
    options = dict(log_to="tensorboard,wandb", save_every=3, sample_every=1, sample_prompts=1)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_world, tmp_path, **options)
    assert max(step for _, step in events[str(tmp_path / "tensorboard")]) == 3
    assert jsonl(tmp_path / "samples.jsonl")[-1]["step"] == 4
    monkeypatch.setattr(train, "lr_at", real)
    run(tiny_world, tmp_path, **options)
    lines = jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert [sample["step"] for sample in jsonl(tmp_path / "samples.jsonl")] == list(range(7))
    wanted = {(name, line["step"]): [x] for line in lines for name, x in line.items() if name != "step"}
    assert events == {str(tmp_path / "tensorboard"): wanted}
    [(_, steps)] = server.runs.items()
    steps[3]["perf/tokens_per_s"] = lines[3]["perf/tokens_per_s"]  # wandb keeps the first life's
    assert steps == {line["step"]: {name: x for name, x in line.items() if name != "step"} for line in lines}
    [settings] = server.settings.values()
    assert settings["lr"] == 3e-3 and settings["method"] == "dpo-hps"


def test_a_run_that_begins_again_is_a_new_one(tmp_path, events, server):
    """Without a checkpoint: the old steps go, and wandb gets a run of its own."""
    for value in (1.0, 2.0):
        log = loggers.open_log(tmp_path, "tensorboard,wandb", done=0, settings={})
        log({"step": 0, "loss": value})
    assert jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2.0}]
    assert events == {str(tmp_path / "tensorboard"): {("loss", 0): [2.0]}}
    assert list(server.runs.values()) == [{0: {"loss": 1.0}}, {0: {"loss": 2.0}}]


def test_a_line_that_the_system_takes_in_parts(tmp_path, monkeypatch):
    taken, real = [], Path.open
    short = SimpleNamespace(name="log", write=lambda data: taken.append(data[:3]) or len(taken[-1]))
    monkeypatch.setattr(Path, "open", lambda p, *mode, **how: short if "buffering" in how else real(p, *mode, **how))
    loggers.open_log(tmp_path, "", done=0, settings={})({"step": 0, "loss": 0.5})
    assert b"".join(taken) == b'{"step": 0, "loss": 0.5}\n'


def test_names_are_checked_before_training(tiny_world, tmp_path, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=f"{name} is missing .*: pip install {name}"):
            run(tiny_world, tmp_path / "out", log_to=name)
    assert not (tmp_path / "out").exists()
