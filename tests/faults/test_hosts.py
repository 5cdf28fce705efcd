"""Two hosts: what they do not share is told before any work; the trajectory of one process across them; the cable is
cut; a host dies and comes back.

Two that share no disk, or have other files or options, are two folders on one machine. For the cable they are two
network namespaces that share a file system, which needs the right to make namespaces, and `ip` (Debian: iproute2); they
have no way to anywhere but each other, 10.77.0.1 and 10.77.0.2.
"""

import contextlib
import importlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import pytest
from harness import LOST, TIMEOUT
from helpers import ROOT, arguments, flags, on_ranks

from hps import dist
from hps.hosts import GLANCE_BYTES, check

STEPS = 12
PORT = 29400  # in a namespace of its own, no other program has it
CABLE = "veth0"  # at both of its ends


def ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True, timeout=30).stdout


def asks(folder: str) -> None:
    """What each of two ranks is told by `check`, one difference after the other."""
    rank, large = int(os.environ["RANK"]), GLANCE_BYTES
    os.chdir(f"{folder}/{rank}")
    Path("model").mkdir()
    for name, text in (("config.json", b"{}"), ("weights", bytes(3 * large)), ("odd", bytes(large) + bytes([rank]))):
        Path("model", name).write_bytes(text)
    Path("one").symlink_to(folder)
    same = {"model": "model/weights", "lr": 1e-5, "data": "", "timeout": float(rank)}
    with dist.session(timeout=timedelta(minutes=1)) as ranks:

        def told(shared: list[str], **alike: Any) -> str:
            try:
                check(SimpleNamespace(**same | alike), {name: Path(name, "new", "run") for name in shared}, ranks)
            except ValueError as error:
                return str(error)
            return ""

        here = socket.gethostname()
        assert told(["one"]) == ""
        assert told(["one"], model="one/nowhere") == ""  # on none: that is told by whoever loads it
        unseen = f"{here} (rank 1) does not see the --own of {here} (rank 0)"
        assert told(["one", "own"]).startswith(f"{unseen}. All hosts must share --one, --own, on one disk, and have ")
        assert Path("own").exists() == (rank == 0)  # a host that shares nothing is left as it was
        for change in ({"model": "model"}, {"model": "model/odd"}, {"lr": rank}, {"data": "model/odd"}):
            assert told(["one"], **change).startswith(
                f"{here} (rank 1) has another --{next(iter(change))} than {here} (rank 0). All hosts "
            )
        assert told(["own"], lr=rank).startswith(f"{unseen} and has another --lr than ")
        dist.barrier()
        assert list(Path("one/new/run").iterdir()) == []


def test_ranks_agree_on_what_each_can_see(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    on_ranks(2, asks, (str(tmp_path),))


def sees_another_disk(folder: str, script: str, argv: list[str], option: str) -> None:
    """A command of a rank in a folder of its own."""
    os.chdir(f"{folder}/{os.environ['RANK']}")
    message = rf"^\S+ \(rank 1\) does not see the --{option} of \S+ \(rank 0\)\. All hosts must "
    with pytest.raises(ValueError, match=message):
        importlib.import_module(script).main(argv)


def test_hosts_without_a_shared_disk_end_in_a_line(tiny_world, tmp_path):
    """Every command that runs on several hosts, each in a folder of its own: both end at once, both say why."""
    world, model = tiny_world, tiny_world / "model"
    evaluation = dict(model=model, reference=model, data=world / "test.jsonl", reference_cache=world / "cache")
    prepared = dict(input=world / "train.jsonl", output="new/out.jsonl")
    commands = [
        ("train", arguments(world, Path("run")), "out"),
        ("eval", flags(**evaluation, out="run"), "out"),
        ("data_prep", ["generate", *flags(**prepared, model=model)], "output"),
        ("data_prep", ["annotate", *flags(**prepared, scorer="world-true")], "output"),
    ]
    for number, command in enumerate(commands):
        for host in range(2):
            (tmp_path / str(number) / str(host)).mkdir(parents=True)
        on_ranks(2, sees_another_disk, (str(tmp_path / str(number)), *command), seconds=60)


def test_a_host_that_never_comes_ends_in_a_line(tiny_world, tmp_path):
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    words = dict(model=tiny_world / "model", input=tiny_world / "train.jsonl", output=tmp_path / "out.jsonl")
    argv = ["generate", *flags(**words, timeout=TIMEOUT)]
    with harness.Job(argv, tmp_path / "log", script="data_prep", env=place) as job:
        assert job.end(60) == 1
        assert re.search(LOST, job.text()), job.text()[-3000:]


class Hosts:
    """Two namespaces, and a veth pair between them."""

    def __init__(self) -> None:
        self.names = [f"hps-{os.getpid()}-{i}" for i in range(2)]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for i, name in enumerate(self.names):
            # IPv6 off, or gloo may choose an address of that kind. tcp_retries2: torchrun on the host without the store
            # asks it again and again, with no timeout of its own but TCP's; as Linux sets it, 15 minutes can pass
            # after the worker has ended before torchrun does. With 3 it is about 3 s.
            for words in ("1 > /proc/sys/net/ipv6/conf/all/disable_ipv6", "3 > /proc/sys/net/ipv4/tcp_retries2"):
                ip("netns", "exec", name, "sh", "-c", f"echo {words}", check=False)
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", CABLE)
            ip("-n", name, "link", "set", "lo", "up")
        self.cable("up")

    def cable(self, state: str) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", CABLE, state)

    def kill(self, host: int) -> None:
        """Everything that runs on a host, at once."""
        for pid in ip("netns", "pids", self.names[host], check=False).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)

    def remove(self) -> None:
        for i, name in enumerate(self.names):
            self.kill(i)
            ip("netns", "del", name, check=False)

    def job(self, host: int, argv: list[str], log: Path, *, nodes: str, conf: str = "", **how: Any):
        """A torchrun of one worker on a host; the first one holds the store by which they find each other."""
        # is_host: torchrun looks for its endpoint among the addresses of the machine's name, which here are loopback's.
        sizes = {"HOSTS": nodes, "HOST": str(host), "CONF": conf, "PORT": str(PORT), "TORCHRUN": "echo"}
        sizes |= {"FIRST": "10.77.0.1", "ADDRESS": f"10.77.0.{host + 1}"}
        recipe = [ROOT / "recipes/slurm.sh", "two_hosts"]  # whose line it is that is run
        words = subprocess.run(
            recipe, env=os.environ | sizes, check=True, capture_output=True, text=True
        ).stdout.split()
        enter = f"""
import ctypes, os
space = os.open("/run/netns/{self.names[host]}", os.O_RDONLY)
assert ctypes.CDLL(None).setns(space, {0x40000000}) == 0
"""
        env = {"GLOO_SOCKET_IFNAME": CABLE}
        if ":" in nodes:  # or the first host keeps its store's address to itself from the second round on (torch 2.13)
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return harness.Job(argv, log, torchrun=words, env=env, setup=enter, **how)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not shutil.which("ip"):
        pytest.skip("needs ip (Debian: apt-get install iproute2)")
    made = Hosts()
    try:
        try:
            made.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def begin(world: Path, folder: Path) -> tuple[list[str], list[Path]]:
    """A run that nobody disturbs, in `calm`; the command of the other one, in `run`, and the logs of its two hosts."""
    more: dict[str, Any] = dict(prompts_per_step=4, save_every=2, tokens_per_micro_batch=150, timeout=TIMEOUT)
    more |= dict(reference_cache=folder / "cache")
    harness.run(arguments(world, folder / "calm", **more), folder / "log")
    return arguments(world, folder / "run", **more), [folder / "0", folder / "1"]


def end(first: harness.Job, second: harness.Job) -> str:
    """Both come to a good end; what they have said."""
    ends = [first.end(), second.end()]
    text = first.text() + second.text()
    assert ends == [0, 0], text[-5000:]
    return text


def test_a_cable_that_is_cut(tiny_world, tmp_path, hosts):
    """In the middle of a step. Both sides end, and say why; with the cable mended, the same two commands go on. What
    they do in the end, steps of the first job and of the second, is what one process does."""
    argv, logs = begin(tiny_world, tmp_path)
    mark, how = tmp_path / "mark", dict(nodes="2", conf="read_timeout=2")
    fault = harness.Fault("wait", "gradient", mark, step=5)
    with hosts.job(0, argv, logs[0], **how) as first, hosts.job(1, argv, logs[1], fault=fault, **how) as second:
        second.wait(mark)
        hosts.cable("down")
        mark.with_suffix(".go").touch()
        for job in (first, second):
            assert job.end(90) != 0
            assert re.search(LOST, job.text()), job.text()[-3000:]
    assert harness.checkpoint_of(tmp_path / "run") == 4 and not (tmp_path / "run/policy").exists()
    hosts.cable("up")
    with hosts.job(0, argv, logs[0], nodes="2") as first, hosts.job(1, argv, logs[1], nodes="2") as second:
        assert f"step-00000004 (4 of {STEPS} steps)" in end(first, second)
    apart = harness.check_follows(tmp_path / "run", tmp_path / "calm")
    print(f"\nthe cable was cut; losses apart by at most {apart:.1e}")


def test_a_host_that_dies_and_comes_back(tiny_world, tmp_path, hosts, amount):
    """torchrun --nnodes 1:2: the one that is left goes on alone from the last checkpoint, and when the other is back
    they go on together from the step in which it came, all by themselves.

    What torch asks for: the host that holds the c10d store must be the one that lives. It goes on only when the dead
    one has missed its keep-alive messages (keep_alive_interval x keep_alive_max_attempt, 15 s unless set) and nobody
    has come for last_call_timeout (30 s unless set).
    """
    if amount(0, 1) == 0:
        pytest.skip("with --soak only")
    argv, logs = begin(tiny_world, tmp_path)
    death, alone = tmp_path / "death", tmp_path / "alone"
    conf = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,read_timeout=20"
    how: dict[str, Any] = dict(nodes="1:2", conf=conf)
    with hosts.job(0, argv, logs[0], fault=harness.Fault("wait", "step", alone, step=7), **how) as first:
        with hosts.job(1, argv, logs[1], fault=harness.Fault("wait", "gradient", death, step=5), **how) as second:
            second.wait(death)
            hosts.kill(1)
            began = time.time()
            second.process.join(10)
        first.wait(alone)
        seconds = time.time() - began
        assert re.search(LOST, first.text()) and f"step-00000004 (4 of {STEPS} steps)" in first.text()
        with hosts.job(1, argv, logs[1], **how) as second:
            text = end(first, second)
    assert f"stopped after 8 of {STEPS} steps; the same command goes on" in text
    assert f"step-00000008 (8 of {STEPS} steps)" in text
    apart = harness.check_follows(tmp_path / "run", tmp_path / "calm")
    print(f"\na host died: {seconds:.1f} s until the other was in step 7 alone; losses apart by at most {apart:.1e}")
