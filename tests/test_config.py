"""The option parser: both sources, every type, and every mistake with the place where it stands."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from hps.config import parse, run_main


@dataclass
class Options:
    # -- data --
    data: str  # the file to read, with a # inside its help
    max_length: int = 512  # tokens; a note: 100% of them
    # not a heading, and no help either
    shuffle: bool = True  # order anew in each epoch
    files: tuple[str, ...] = ()  # names of files
    # -- optimiser --
    lr: float = 1e-4  # learning rate
    method: str = ""  # the loss


def run(*argv: str, **how) -> tuple[Options, dict[str, str]]:
    return parse(Options, argv, prog="prog", description="What it does.", **how)


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_defaults_names_and_both_sources(toml):
    c, names = run("--data", "a")
    assert c == Options("a", 512, True, (), 1e-4, "") and set(names) == {"data"}
    path = toml('data = "from file"\nlr = 1\nshuffle = false\nfiles = ["a", "b"]\n')
    for argv in (["--config", path, "--lr", "2e-5"], ["--lr=2e-5", f"--config={path}"]):  # flags win, wherever
        c, names = run(*argv)
        assert c == Options("from file", 512, False, ("a", "b"), 2e-5, "")
        assert set(names) == {"data", "lr", "shuffle", "files"}
    assert type(run("--config", path)[0].lr) is float  # an int in the file is fine for a float
    assert run("--data=a", "--max_length=512")[1].keys() == {"data", "max_length"}  # the default's value counts as set
    assert run("--data=a", "--config", toml("lr = 1\nother = 2\n"), foreign=True)[0].lr == 1.0


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max-length=7"], "max_length", 7),
        (["--max_length", "-3"], "max_length", -3),
        (["--lr", "3"], "lr", 3.0),
        (["--lr=-.5e-3"], "lr", -0.0005),
        (["--shuffle"], "shuffle", True),
        (["--shuffle", "false"], "shuffle", False),
        (["--method="], "method", ""),
        (["--method=--x=1"], "method", "--x=1"),
        (["--method", "5"], "method", "5"),
        (["--files", "a=x", "b c"], "files", ("a=x", "b c")),
    ],
)
def test_a_flag_of_each_type(argv, name, value):
    config, names = run("--data", "a", *argv)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert set(names) == {"data", name}
    assert run(*argv, "--data", "a") == (config, names)  # a bare bool does not swallow the next flag


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cofig=a.toml"], "--cofig: did you mean --config?"),
        (["--METHOD", "x"], "--METHOD: did you mean --method?"),
        (["--zzz", "x"], "unknown option --zzz. Options are written"),  # no absurd guess
        (["--max_length", str(2**63)], f"--max_length {2**63}: expected a whole number of 64 bits"),
        (["--lr", "1e999"], "--lr 1e999: expected a finite number"),
        (["--shuffle", "1"], "--shuffle 1: expected true or false"),
        (["--method", "--lr", "1"], "--method: expected one argument (--key=VALUE when it begins with -)"),
        (["--files"], "--files: expected at least one argument"),
        (["-lr", "1"], "unknown option -lr: did you mean --lr?"),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    """Beside those of docs/MISTAKES.md, which tests/test_mistakes.py types."""
    with pytest.raises(ValueError) as caught:
        run("--data", "a", *argv)
    assert str(caught.value).startswith("command line: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("lr = 1\n\nmax_lenght = 5\n", "3: max_lenght = 5", "unknown key max_lenght: did you mean max_length?"),
        ("# lr = 3\nlr = 'max_length'\n", "2: lr = 'max_length'", "expected a finite number"),
        ("lr = nan\n", "1: lr = nan", "expected a finite number"),
        ("lr = " + "9" * 400, "1: lr = 999", "expected a finite number"),
        ("max_length = true\n", "1: max_length = true", "expected a whole number of 64 bits"),
        ("max_length = 1.0\n", "1: max_length = 1.0", "expected a whole number of 64 bits"),
        ('lr = 1\n\n"max_length" = "5"\n', '3: "max_length" = "5"', "expected a whole number of 64 bits"),
        (f"max_length = 0x{'f' * 5000}", "1: max_length = 0xff", "expected a whole number of 64 bits"),
        ("method = 5\n", "1: method = 5", "expected a string"),
        ("shuffle = 'true'\r\n", "1: shuffle = 'true'", "expected true or false"),
        ("files = [1]\n", "1: files = [1]", "expected strings"),
        ("lr = 1\n[optimiser]\nlr = 2\n", "2: [optimiser]", "optimiser is a table"),
        ("lr = 1\noptimiser.lr = 2\n", "2: optimiser.lr = 2", "optimiser is a table"),
    ],
)
def test_mistakes_in_the_file_name_their_line(toml, text, place, words):
    path = toml(text)
    with pytest.raises(ValueError) as caught:
        run("--data=a", "--config", path, "--lr=1")  # a flag does not hide a mistake
    assert str(caught.value).startswith(f"{path}:{place}") and words in str(caught.value)


def test_files_that_cannot_be_read(toml, tmp_path):
    for path, reason in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"--config {path} cannot be read: .*{reason}"):
            run("--config", str(path))
    for text, reason in (
        (b"lr = '\xff'", "'utf-8' codec"),
        ("lr = 1\nlr = 2\n", r"\(at line 2, "),
        ("lr = [", r"\(at end of document\)"),
        ("lr = " + "9" * 5000, "Exceeds the limit"),
        ("lr = " + "[" * 100_000, "recursion"),
    ):
        with pytest.raises(ValueError, match=f"cannot be read: .*{reason}"):
            run("--config", toml(text))


def test_help_shows_group_type_default_and_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--data", "a", "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert words.startswith("usage: prog [--config FILE.toml] [--key value ...] What it does.")
    assert "\ndata:\n" in shown and "\noptimiser:\n" in shown
    for line in (
        "--config FILE.toml keys as below; a flag wins over the file",
        "--data str the file to read, with a # inside its help (required)",
        "--max_length int tokens; a note: 100% of them (default 512)",
        "order anew in each epoch (default true)",
        "--lr float learning rate (default 0.0001)",
        '--method str the loss (default "")',
    ):
        assert line in words, line


def test_run_main_reports_a_mistake_without_a_traceback(capsys, monkeypatch):
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(lambda: fail(ValueError("a.jsonl:3: fix it")))
    assert caught.value.code == 2 and capsys.readouterr() == ("", "error: a.jsonl:3: fix it\n")
    with pytest.raises(KeyError):  # a bug
        run_main(lambda: fail(KeyError("x")))
    waited: list[int] = []  # a rank with a mistake of its own is heard too
    monkeypatch.setattr("hps.config.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        run_main(lambda: fail(ValueError("mine")))
    assert waited[-1] == 5 and capsys.readouterr().err == "error: mine\n"


@pytest.mark.parametrize("script", [["train.py"], ["eval.py"], ["data_prep.py", "generate"]], ids=" ".join)
def test_a_typo_is_told_before_torch_is_loaded(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    command = [sys.executable, str(ROOT / script[0]), *script[1:], "--modle=x"]
    found = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "did you mean --model?" in found.stderr


def test_a_log_gets_few_states_of_a_bar():
    """A script's bar, written to a pipe: its beginning and its end, not ten states a second."""
    bar = "from tqdm import tqdm; import time; [time.sleep(0.01) for _ in tqdm(range(100))]"
    code = f"from hps import config; config.run_main(lambda: None); {bar}"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).stderr
    assert b"100%" in told and told.count(b"\r") <= 3
