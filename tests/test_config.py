"""The option parser: both sources, every type, and every mistake with the place where it stands."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hps.config import as_dict, check_choices, check_used, named_files, parse, run_main

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    # -- data --
    data: str  # the file to read, with a # inside its help
    max_length: int = 512  # tokens; a note: 100% of them
    # not a heading, and no help either
    shuffle: bool = True  # order anew in each epoch
    # -- optimiser --
    lr: float = 1e-4  # learning rate
    method: str = "hps"  # this is not the help  # the loss
    warmup: float | None = None  # share of the steps
    steps: int | None = 10  # stop after so many
    tag: str | None = "x"  # label of the run


def run(*argv: str) -> tuple[Options, frozenset[str]]:
    return parse(Options, argv, prog="prog", description="What it does.")


def fails(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        run(*argv)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_defaults_and_names_set():
    config, names = run("--data", "a")
    assert as_dict(config) == {
        "data": "a", "max_length": 512, "shuffle": True, "lr": 1e-4,
        "method": "hps", "warmup": None, "steps": 10, "tag": "x",
    }  # fmt: skip
    assert list(as_dict(config)) == list(Options.__annotations__)
    assert names == {"data"}


def test_flags_win_over_toml_wherever_config_stands(toml):
    path = toml('data = "from file"\nlr = 1\nsteps = "none"\nshuffle = false\n')
    for argv in (["--config", path, "--lr", "2e-5"], ["--lr=2e-5", f"--config={path}"]):
        config, names = run(*argv)
        assert (config.data, config.lr, config.steps, config.shuffle) == ("from file", 2e-5, None, False)
        assert type(config.lr) is float
        assert names == {"data", "lr", "steps", "shuffle"}
    assert type(run("--config", path)[0].lr) is float  # an int in the file is fine for a float


def test_a_value_that_equals_the_default_counts_as_set():
    assert run("--data=a", "--max_length=512")[1] == {"data", "max_length"}


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max_length", "7"], "max_length", 7),
        (["--max-length=7"], "max_length", 7),
        (["--steps", "-3"], "steps", -3),
        (["--steps", "none"], "steps", None),
        (["--warmup", "0.1"], "warmup", 0.1),
        (["--lr", "3"], "lr", 3.0),
        (["--lr=-.5e-3"], "lr", -0.0005),
        (["--shuffle"], "shuffle", True),
        (["--shuffle", "false"], "shuffle", False),
        (["--shuffle=true"], "shuffle", True),
        (["--method="], "method", ""),
        (["--method=--x=1"], "method", "--x=1"),
        (["--method", "none"], "method", "none"),
        (["--method", "5"], "method", "5"),
        (["--tag", "none"], "tag", None),
    ],
)
def test_a_flag_of_each_type(argv, name, value):
    config, names = run("--data", "a", *argv)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert names == {"data", name}
    assert run(*argv, "--data", "a") == (config, names)  # a bare bool does not swallow the next flag


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63), 2**63 - 1), st.text(min_size=1))
def test_flags_give_back_any_value(number, whole, text):
    config, _ = run(f"--lr={number!r}", f"--max_length={whole}", f"--data={text}")
    assert (config.lr, config.max_length, config.data) == (number, whole, text)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_lenght", "5"], ["--max_lenght", "--max_length"]),
        (["--cofig=a.toml"], ["--cofig", "--config"]),
        (["--METHOD", "x"], ["--METHOD", "--method"]),
        (["--max_length", "5.0"], ["--max_length 5.0", "an int"]),
        (["--max_length", "true"], ["--max_length true", "an int"]),
        (["--max_length", "none"], ["--max_length none", "an int"]),
        (["--steps", "x"], ["--steps x", "an int or none"]),
        (["--lr", "1e-4x"], ["--lr 1e-4x", "a finite float"]),
        (["--lr", "nan"], ["--lr nan", "a finite float"]),
        (["--lr", "-inf"], ["--lr -inf", "a finite float"]),
        (["--lr", "1e999"], ["--lr 1e999", "a finite float"]),
        (["--lr", "9" * 400], ["--lr 999", "a finite float"]),
        (["--warmup", "true"], ["--warmup true", "a finite float or none"]),
        (["--shuffle", "yes"], ["--shuffle yes", "true or false"]),
        (["--shuffle", "1"], ["--shuffle 1", "true or false"]),
        (["--method"], ["--method needs a value"]),
        (["--method", "--lr", "1"], ["--method needs a value"]),
        (["--lr", "1", "--lr=2"], ["--lr is given twice"]),
        (["--max-length=1", "--max_length=1"], ["--max_length is given twice"]),
        (["file.jsonl"], ["'file.jsonl'", "--key value"]),
        (["-lr", "1"], ["'-lr'", "--key value"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    message = fails("--data", "a", *argv)
    assert message.startswith("command line: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("lr = 1\n\nmax_lenght = 5\n", 3, ["unknown key max_lenght", "nearest is max_length"]),
        ("max-length = 5\n", 1, ["unknown key max-length", "nearest is max_length"]),
        ("# lr = 3\nlr = 'max_length'\n", 2, ["lr = 'max_length'", "a finite float"]),
        ("lr = nan\n", 1, ["lr = nan", "a finite float"]),
        ("lr = inf\n", 1, ["lr = inf", "a finite float"]),
        ("lr = " + "9" * 400, 1, ["a finite float"]),
        ("lr = true\n", 1, ["lr = True", "a finite float"]),
        ("max_length = true\n", 1, ["max_length = True", "an int"]),
        ("max_length = 1.0\n", 1, ["max_length = 1.0", "an int"]),
        ("steps = '5'\n", 1, ["steps = '5'", "an int or none"]),
        ("method = 5\n", 1, ["method = 5", "a string"]),
        ("method = ['hps']\n", 1, ["method = ['hps']", "a string"]),
        ("shuffle = 1\n", 1, ["shuffle = 1", "true or false"]),
        ("shuffle = 'true'\n", 1, ["shuffle = 'true'", "true or false"]),
        ("lr = 1\n[optimiser]\nlr = 2\n", 2, ["optimiser is a table", "flat"]),
        ("lr = 1\noptimiser.lr = 2\n", 2, ["optimiser is a table", "flat"]),
        ('lr = 1\n\n"steps" = 1.5\n', 3, ["steps = 1.5", "an int or none"]),
        ("lr = 1\nmethod = hps\n", 2, ["not TOML"]),
        ("lr = 1\nlr = 2\n", 2, ["not TOML"]),
        ("lr = 1\nmethod = [\n", 2, ["not TOML"]),
        ("lr = 1\r\nsteps = 'x'\r\n", 2, ["steps = 'x'", "an int or none"]),
    ],
)
def test_mistakes_in_the_file_name_their_line(toml, text, line, words):
    path = toml(text)
    message = fails("--data=a", "--config", path, "--lr=1", "--steps=2")  # a flag does not hide a mistake
    assert message.startswith(f"{path}:{line}: ")
    assert all(word in message for word in words), message


def test_files_that_cannot_be_read(toml, tmp_path):
    absent, binary = str(tmp_path / "absent.toml"), toml(b"lr = '\xff'")
    assert absent in fails("--config", absent) and "No such file" in fails("--config", absent)
    assert f"{binary} is not UTF-8" in fails("--config", binary)
    assert str(tmp_path) in fails("--config", str(tmp_path))


def test_all_missing_options_are_listed(toml):
    @dataclass
    class Two:
        a: int  # first
        b: str  # second
        c: int = 0  # third

    with pytest.raises(ValueError, match=r"missing --a, --b: "):
        parse(Two, ["--c", "1"], prog="p", description="d")
    assert parse(Two, ["--config", toml("a = 1"), "--b=x"], prog="p", description="d")[0] == Two(1, "x")


def test_help_shows_group_type_default_and_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--data", "a", "--help")
    assert caught.value.code == 0
    head, general, data, optimiser = capsys.readouterr().out.split("\n\n", 1)[1].split("\n\n")
    assert head == "What it does."
    assert general.startswith("general\n  --config FILE.toml ")
    lines = [line.split(maxsplit=1) for line in data.splitlines()]
    assert lines[0] == ["data"]
    assert lines[1] == ["--data", "str              the file to read, with a # inside its help (required)"]
    assert [line[0] for line in lines] == ["data", "--data", "--max_length", "--shuffle"]
    assert "--max_length int        tokens; a note: 100% of them (default 512)" in data
    assert "order anew in each epoch (default true)" in data
    words = [" ".join(line.split()) for line in optimiser.splitlines()]
    assert words == [
        "optimiser",
        "--lr float learning rate (default 0.0001)",
        "--method str the loss (default hps)",
        "--warmup float or none share of the steps (default none)",
        "--steps int or none stop after so many (default 10)",
        "--tag str or none label of the run (default x)",
    ]


def test_an_option_without_help_is_our_bug():
    @dataclass
    class Mute:
        a: int = 0  # told
        b: int = 0

    with pytest.raises(AssertionError, match="b has no comment"):
        parse(Mute, [], prog="p", description="d")


def test_check_used():
    check_used({"beta"}, {"beta", "gamma"}, what="method hps")
    with pytest.raises(ValueError) as caught:
        check_used(frozenset({"kappa", "gamma", "beta"}), ["smoothing", "beta"], what="method dpo-bt")
    message = str(caught.value)
    assert "method dpo-bt does not use gamma, kappa:" in message
    assert message.endswith("It uses beta, smoothing")


def test_check_choices():
    config, _ = run("--data", "a", "--method", "bt")
    check_choices(config, data=("a", "b"), method=("hps", "bt"))
    with pytest.raises(ValueError, match="method = 'bt' does not exist; choose one of hps, pl"):
        check_choices(config, data=("a", "b"), method=("hps", "pl"))


def test_named_files():
    assert named_files("a=x/a.jsonl, b = y=z.jsonl") == {"a": "x/a.jsonl", "b": "y=z.jsonl"}
    for text in ("", "a=x", "a=x,a=y", "a=x,y", "a=x,b=", "a=x,=y", "a=x,"):
        with pytest.raises(ValueError, match="NAME=FILE,NAME=FILE,... with two or more different names"):
            named_files(text)


def test_run_main_reports_a_mistake_without_a_traceback():
    code = (
        "from hps.config import run_main\n"
        "def main(): raise {error}\n"
        "run_main(main)\n"
    )  # fmt: skip

    def run_with(error: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", code.format(error=error)]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)

    mistake = run_with("ValueError('a.jsonl:3: fix it')")
    assert (mistake.returncode, mistake.stdout, mistake.stderr) == (2, "", "error: a.jsonl:3: fix it\n")
    bug = run_with("KeyError('x')")
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "KeyError" in bug.stderr
    assert run_main(lambda: None) is None
