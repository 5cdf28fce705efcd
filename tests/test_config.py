"""The option parser: both sources, every type, and every mistake with the place where it stands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hps.config import as_dict, check_choices, check_used, named_files, parse, run_command, run_main


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
    method: str = "hps"  # the loss
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


def test_defaults_names_and_both_sources(toml):
    c, names = run("--data", "a")
    assert as_dict(c) == {
        "data": "a", "max_length": 512, "shuffle": True, "files": (), "lr": 1e-4,
        "method": "hps", "warmup": None, "steps": 10, "tag": "x",
    }  # fmt: skip
    assert names == {"data"}
    path = toml('data = "from file"\nlr = 1\nsteps = "none"\nshuffle = false\nfiles = ["a", "b"]\n')
    for argv in (["--config", path, "--lr", "2e-5"], ["--lr=2e-5", f"--config={path}"]):  # flags win, wherever
        c, names = run(*argv)
        assert (c.data, c.lr, c.steps, c.shuffle, c.files) == ("from file", 2e-5, None, False, ("a", "b"))
        assert names == {"data", "lr", "steps", "shuffle", "files"}
    assert type(run("--config", path)[0].lr) is float  # an int in the file is fine for a float
    assert run("--data=a", "--max_length=512")[1] == {"data", "max_length"}  # the default's value counts as set


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
        (["--lr", "-1e-4"], "lr", -0.0001),
        (["--files", "a=x", "b c"], "files", ("a=x", "b c")),
        (["--files=a,b"], "files", ("a,b",)),
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
        (["--max_lenght", "5"], ["--max_lenght", "nearest is --max_length"]),
        (["--cofig=a.toml"], ["--cofig", "nearest is --config"]),
        (["--METHOD", "x"], ["--METHOD", "nearest is --method"]),
        (["--zzz", "x"], ["unknown option --zzz; options are written"]),  # no absurd guess
        (["--files"], ["--files"]),
        (["--max_length", "5.0"], ["--max_length 5.0", "an int of 64 bits"]),
        (["--max_length", "true"], ["--max_length true", "an int of 64 bits"]),
        (["--max_length", "none"], ["--max_length none", "an int of 64 bits"]),
        (["--steps", "x"], ["--steps x", "an int of 64 bits or none"]),
        (["--lr", "1e-4x"], ["--lr 1e-4x", "a finite float"]),
        (["--lr", "nan"], ["--lr nan", "a finite float"]),
        (["--lr=-inf"], ["--lr -inf", "a finite float"]),
        (["--lr", "1e999"], ["--lr 1e999", "a finite float"]),
        (["--lr", "9" * 400], ["--lr 999", "a finite float"]),
        (["--warmup", "true"], ["--warmup true", "a finite float or none"]),
        (["--shuffle", "yes"], ["--shuffle yes", "true or false"]),
        (["--shuffle", "1"], ["--shuffle 1", "true or false"]),
        (["--method"], ["--method", "expected one argument"]),
        (["--method", "--lr", "1"], ["--method", "expected one argument", "--key=VALUE"]),
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
        ("lr = 1\n\nmax_lenght = 5\n", 3, ["unknown key max_lenght", "nearest is --max_length"]),
        ("max-length = 5\n", 1, ["unknown key max-length", "nearest is --max_length"]),
        ("# lr = 3\nlr = 'max_length'\n", 2, ["lr = 'max_length'", "a finite float"]),
        ("lr = nan\n", 1, ["lr = nan", "a finite float"]),
        ("lr = inf\n", 1, ["lr = inf", "a finite float"]),
        ("lr = " + "9" * 400, 1, ["a finite float"]),
        ("lr = true\n", 1, ["lr = True", "a finite float"]),
        ("max_length = true\n", 1, ["max_length = True", "an int of 64 bits"]),
        ("max_length = 1.0\n", 1, ["max_length = 1.0", "an int of 64 bits"]),
        ("steps = '5'\n", 1, ["steps = '5'", "an int of 64 bits or none"]),
        ("method = 5\n", 1, ["method = 5", "a string"]),
        ("method = ['hps']\n", 1, ["method = ['hps']", "a string"]),
        ("shuffle = 1\n", 1, ["shuffle = 1", "true or false"]),
        ("shuffle = 'true'\n", 1, ["shuffle = 'true'", "true or false"]),
        ("files = 'a'\n", 1, ["files = 'a'", "strings"]),
        ("files = [1]\n", 1, ["files = [1]", "strings"]),
        ("lr = 1\n[optimiser]\nlr = 2\n", 2, ["optimiser is a table", "flat"]),
        ("lr = 1\noptimiser.lr = 2\n", 2, ["optimiser is a table", "flat"]),
        ('lr = 1\n\n"steps" = 1.5\n', 3, ["steps = 1.5", "an int of 64 bits or none"]),
        ("lr = 1\nmethod = hps\n", 2, ["not TOML"]),
        ("lr = 1\nlr = 2\n", 2, ["not TOML"]),
        ("lr = 1\nmethod = [\n", 2, ["not TOML"]),
        ("lr = 1\r\nsteps = 'x'\r\n", 2, ["steps = 'x'", "an int of 64 bits or none"]),
    ],
)
def test_mistakes_in_the_file_name_their_line(toml, text, line, words):
    path = toml(text)
    message = fails("--data=a", "--config", path, "--lr=1", "--steps=2")  # a flag does not hide a mistake
    assert message.startswith(f"{path}:{line}: ")
    assert all(word in message for word in words), message


def test_files_that_cannot_be_read(toml, tmp_path):
    absent, binary = str(tmp_path / "absent.toml"), toml(b"lr = '\xff'")
    assert f"{absent} cannot be read" in fails("--config", absent) and "No such file" in fails("--config", absent)
    assert f"{binary} cannot be read: 'utf-8' codec" in fails("--config", binary)
    assert f"{tmp_path} cannot be read" in fails("--config", str(tmp_path))


def test_all_missing_options_are_listed(toml):
    @dataclass
    class Two:
        a: int  # first
        b: str  # second
        c: int = 0  # third

    with pytest.raises(ValueError, match=r"missing --a, --b: "):
        parse(Two, ["--c", "1"], prog="p", description="d")
    assert parse(Two, ["--config", toml("a = 1"), "--b=x"], prog="p", description="d")[0] == Two(1, "x")


def test_another_script_has_keys_of_its_own(toml):
    path = toml("lr = 1\nother = 2\n")
    assert parse(Options, ["--data=a", "--config", path], prog="p", description="d", foreign=True)[0].lr == 1.0
    with pytest.raises(ValueError, match="lr = 'x'"):
        parse(Options, ["--config", toml("lr = 'x'")], prog="p", description="d", foreign=True)


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
        "--warmup float or none share of the steps (default none)",
        "--steps int or none stop after so many (default 10)",
    ):
        assert line in words, line


def test_an_option_without_help_is_our_bug():
    @dataclass
    class Mute:
        a: int = 0  # told
        b: int = 0

    with pytest.raises(AssertionError, match="its help text"):
        parse(Mute, [], prog="p", description="d")


def test_used_options_choices_and_named_files():
    check_used({"beta"}, {"beta", "gamma"}, what="method hps")
    with pytest.raises(ValueError, match="method dpo-bt does not use gamma, kappa: .* It uses beta, smoothing$"):
        check_used(frozenset({"kappa", "gamma", "beta"}), ["smoothing", "beta"], what="method dpo-bt")
    c, _ = run("--data", "a", "--method", "bt")
    check_choices(c, data=("a", "b"), method=("hps", "bt"))
    with pytest.raises(ValueError, match="method = 'bt' does not exist; choose one of hps, pl"):
        check_choices(c, data=("a", "b"), method=("hps", "pl"))
    assert named_files(("a=x/a,b.jsonl", "b=y=z.jsonl")) == {"a": "x/a,b.jsonl", "b": "y=z.jsonl"}
    for words in ((), ("a=x",), ("a=x", "a=y"), ("a=x", "y"), ("a=x", "b="), ("a=x", "=y"), ("a=x,b=y",)):
        with pytest.raises(ValueError, match="NAME=FILE NAME=FILE ... with two or more different names"):
            named_files(words)


def test_a_command_by_its_name(capsys):
    seen: list[Options] = []
    for argv in ([], ["--help"]):
        run_command({"do": (Options, seen.append)}, argv, prog="p", page="The page.")
        assert capsys.readouterr().out == "The page.\n" and not seen
    run_command({"do": (Options, seen.append)}, ["do", "--data=a"], prog="p", page="The page.")
    assert seen[0].data == "a"
    with pytest.raises(ValueError, match="unknown command 'don'; choose one of do"):
        run_command({"do": (Options, seen.append)}, ["don"], prog="p", page="The page.")


def test_run_main_reports_a_mistake_without_a_traceback(capsys):
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(lambda: fail(ValueError("a.jsonl:3: fix it")))
    assert caught.value.code == 2 and capsys.readouterr() == ("", "error: a.jsonl:3: fix it\n")
    with pytest.raises(KeyError):  # a bug
        run_main(lambda: fail(KeyError("x")))
    assert run_main(lambda: None) is None
