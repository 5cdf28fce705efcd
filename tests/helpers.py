"""What several test files need: runs of train.py, small models and tokenizers, a chat server, a results file.

Nothing here is a test. Test files import from this module and conftest.py only, never from each other.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hps import dist
from hps.data import tokens

ROOT = Path(__file__).resolve().parent.parent
ALONE = dist.Ranks(rank=0, world_size=1, device=torch.device("cpu"), sharded=False)

# ------------------------------------------------------------------------------------ runs of train.py


def flags(**options) -> list[str]:
    """A command line; what is None is left out, and a tuple is several words."""
    words = []
    for key, value in options.items():
        if value is not None:
            words += [f"--{key}", *value] if isinstance(value, tuple) else [f"--{key}={value}"]
    return words


def arguments(world: Path, out: Path, **changes) -> list[str]:
    """A short full-tuning run whose losses move: 24 prompts, 2 epochs, 6 steps of 8."""
    options = dict(
        model=world / "model",
        data=world / "train.jsonl",
        out=out,
        method="dpo-hps",
        lora_rank=0,
        lr=3e-3,
        epochs=2,
        prompts_per_step=8,
        max_length=128,
        beta=0.5,
        token_cache=world / "tokens",
        reference_cache=world / "cache",
    )
    return flags(**options | changes)


SFT = dict(loss="sft", method=None, beta=None, reference_cache=None)  # for `arguments`


def jsonl(path: Path) -> list[dict]:
    """The records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(out: Path, key: str = "loss") -> list[float]:
    """A column of a run's log."""
    return [record[key] for record in jsonl(out / "metrics.jsonl")]


def run(world: Path, out: Path, **changes) -> list[float]:
    """Train in this process; the losses."""
    import train

    train.main(arguments(world, out, **changes))
    return losses(out)


def run_ranks(world: Path, out: Path, ranks: int, **changes) -> list[float]:
    """The same on several ranks."""
    torchrun(ranks, ["train.py", *arguments(world, out, **changes)])
    return losses(out)


# A fork of a process that has imported everything starts in a hundredth of a second instead of ten. It runs no test
# code, so it has no threads and no state of the tests.
os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # the server imports the scripts from there
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train", "data_prep", "eval", "torch.distributed.run", "torch.distributed.checkpoint", "peft.tuners.lora",
     "transformers.models.llama.modeling_llama", "torch._dynamo"]
)  # fmt: skip


def fork(work: Callable, args: tuple, log: Path, environment: dict[str, str]) -> BaseProcess:
    """A process of the server's that does `work(*args)`; what it says is in a file."""
    process = SERVER.Process(target=child, args=(work, args, str(log), environment))
    process.start()
    return process


def child(work: Callable, args: tuple, log: str, environment: dict[str, str]) -> None:
    sys.path.insert(0, str(ROOT))
    os.environ |= environment
    os.chdir(ROOT)
    redirect(log)
    work(*args)


def redirect(log: str) -> None:
    """What this process says goes into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_script(script: str, argv: list[str]) -> None:
    """What `python SCRIPT.py ARGV` does."""
    from hps import config

    config.run_main(lambda: importlib.import_module(script).main(argv))


def on_ranks(ranks: int, work: Callable, args: tuple, *, seconds: float = 300) -> None:
    """`work(*args)` on several gloo ranks, to a good end: as torchrun does, without its seconds.

    What torchrun itself does, tests/faults sees to.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        environments = [os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        processes = [fork(work, args, *each) for each in zip(logs, environments, strict=True)]
        try:
            until = time.monotonic() + seconds
            for process in processes:
                process.join(max(0, until - time.monotonic()))
            said = "\n".join(log.read_text()[-3000:] for log in logs)
            assert [process.exitcode for process in processes] == [0] * ranks, said
        finally:
            for process in processes:
                process.kill()


def torchrun(ranks: int, words: list[str]) -> None:
    """A script and its arguments on several ranks."""
    on_ranks(ranks, run_script, (words[0].removesuffix(".py"), words[1:]))


def rewrite(world: Path, folder: Path, change: Callable[[list[dict]], object]) -> Path:
    """A copy of the training file with `change(list of dicts)` applied."""
    rows = jsonl(world / "train.jsonl")
    change(rows)
    path = folder / "changed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def distinct(rows: list[dict]) -> None:
    """Rows of three and more different responses whose rewards all differ."""
    for row in rows:
        pairs = dict(zip(row["responses"], row["rewards"], strict=True))
        row["responses"] = list(pairs)
        row["rewards"] = [reward + 1e-3 * i for i, reward in enumerate(pairs.values())]
    rows[:] = [row for row in rows if len(row["responses"]) >= 3]


# ---------------------------------------------------------------------------------- models and tokenizers

VOCABULARY = 61  # of `tiny` models and `blocks_of`

SMALL = dict(  # a model to decode, of uneven next-token distributions
    vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip


def flat(groups) -> list:
    """Token ids of the samples of each prompt, and whether they ended."""
    return [[(one.token_ids.tolist(), one.finished) for one in group] for group in groups]


def block_mask(packed) -> torch.Tensor:
    """The dense mask of a packed row, (1, 1, N, N) bool, by the rule that FlexAttention is given."""
    from hps.attention_cuda import may_attend

    at = torch.arange(packed.input_ids.shape[1])
    return may_attend(packed)(0, 0, at[:, None], at)[None, None]


def noisy(lm: nn.Module) -> Any:
    """Far from uniform predictions, so that a wrong mask shows."""
    for p in lm.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return lm.eval()


def tiny(name: str) -> nn.Module:
    """A random causal LM of two layers: llama, qwen2 or gpt2."""
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    if name == "llama":  # grouped keys, tied head
        lm = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
    elif name == "qwen2":  # biases, its own head
        lm = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=False))
    else:  # learned positions
        lm = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    lm.set_attn_implementation("sdpa")
    return noisy(lm)


def blocks_of(K: int, seed: int = 0, B: int = 3) -> list:
    """B random prompts of K responses."""
    from hps.packing import Block

    g = np.random.default_rng(seed)
    return [
        Block(
            g.integers(0, VOCABULARY, g.integers(1, 9)),
            tuple(g.integers(0, VOCABULARY, g.integers(1, 12)) for _ in range(K)),
        )
        for _ in range(B)
    ]


def plain_logp(lm: nn.Module, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """Summed log-prob of a response by one unpacked, unpadded forward and torch's own log-softmax, nats."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    logps = torch.log_softmax(lm(input_ids=ids[None]).logits[0].float(), -1)
    return torch.stack([logps[t - 1, ids[t]] for t in range(len(prompt), len(ids))]).sum()


def separate_logps(lm: nn.Module, blocks: list) -> torch.Tensor:
    """Every (prompt, response) alone, (B, K)."""
    rows = [plain_logp(lm, block.prompt, y) for block in blocks for y in block.responses]
    return torch.stack(rows).view(len(blocks), -1)


def classifier(tokenizer, folder, *, labels: int = 1, pad: int | None = None, positions: int = 256) -> str:
    """A small random reward model with the world's tokenizer, in a folder."""
    torch.manual_seed(labels)
    lm = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=labels,
            intermediate_size=48, max_position_embeddings=positions, pad_token_id=pad, initializer_range=0.3,
        )
    )  # fmt: skip
    nn.init.normal_(lm.score.weight)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<unk>", "tea", "is", "hot", "cold", "why"]
TURNS = "{% for m in messages %}<user> {{ m.content }} {% endfor %}"


def save(folder: Path, *, labels: int = 0, template: str | None = "<bos> " + TURNS, positions: int = 16) -> Path:
    """A word tokenizer, with a causal LM of some positions or a classifier of some labels."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named).save_pretrained(folder)
    sizes = dict(vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = LlamaConfig(**sizes, max_position_embeddings=positions, num_labels=labels or 2)
    (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config).save_pretrained(folder)
    return folder


CORPUS = ["the sour yes", "The answer is yes", "theanswer isyes", "Question: why? Answer: because"] * 20


def byte_tokenizer(**more) -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges a lot, adds BOS by itself and has no pad token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<|tool|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **more)


# ------------------------------------------------------------------------------------------ a chat endpoint

Reply = tuple[int, dict[str, str], str]  # status, headers, body


def completion(text: str | None, model: str = "judge-2") -> Reply:
    return 200, {}, json.dumps({"model": model, "choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def chat_server(behave: Callable[[int, str], Reply]) -> Iterator[SimpleNamespace]:
    """A server on loopback that answers request number i with behave(i, question). `.requests` are dicts of path,
    headers, body and the time of arrival; `.url` ends in /v1."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append(dict(path=self.path, headers=self.headers, body=body, at=time.monotonic()))
            status, headers, text = behave(number, body["messages"][-1]["content"])
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client went away

        do_GET = do_POST  # what a followed redirect would be

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}/v1", requests=requests)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ------------------------------------------------------------------------------------------ a results file


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def results(sft="SFT", bt="DPO-BT", hps="HPS|x"):
    """A results file of three methods, by names that may be hostile."""
    columns = {  # of the three methods
        "rm2": [(0, 0, 0), (0.512, 0.3, 0.7), (0.6, 0.45, 0.77)],
        "kl_exact": [(0, 0, 0), (6.1, 5.5, 6.6), (5.2, 4.9, 5.6)],
        "harm": [(32.7, 30, 35), (2.84, 2, 4), (3.6, 3, 4)],
        "true_reward": [(0.59, 0.5, 0.7), (1.14, 1.0, 1.3), (1.78, 1.6, 1.9)],
        "length": [(17, 16, 18), (19, 18, 20), (18, 17, 19)],
        "win": [None, (54.5, 51, 57), (70.25, 68, 73)],
    }
    rows = []
    for i, (method, seeds) in enumerate(((sft, 1), (bt, 3), (hps, 3))):
        found = {name: interval(*column[i]) for name, column in columns.items() if column[i]}
        rows.append({"method": method, "runs": seeds, "metrics": found})
    claims = [  # text, the paper's figure, table, verdicts, kind, metric, numbers
        ("a < b", "Table 2: 1 vs 2", "Claims", "holds", "holds", "difference", "true_reward", (0.641, 0.5, 0.8)),
        ("as cheap", "Sec. 6: x 1.03", "Claims", "holds", "unresolved", "ratio", "train_tokens", (1.016, 0.96, 1.16)),
        ("c|d", "Table 3", "Ours", "does not hold", "does not hold", "value", "harm", (3.6, 3, 4)),
        ("a constant", "Sec. 6", "Ours", "holds", "holds", "difference", "harm", (-2, -2, -2)),
    ]
    keys = ("claim", "paper", "table", "verdict", "after_holm", "kind", "metric")
    unmeasured = {"claim": "people like it", "paper": "Table 3: 3.93", "verdict": "not measured here"}
    worlds, again = {"values": [0.1, None, 0.3]}, f"{bt} again"
    compared = [  # a, b, metric, numbers, p, and the rest
        (hps, bt, "true_reward", (0.64, 0.5, 0.8), 0.0032, {"p_holm": 0.0064}),
        (hps, bt, "rm_dpo", (-0.001, -0.2, 0.2), 0.9, {"p_holm": 0.9}),
        (hps, sft, "harm", (-29.1, -32, -26), 0.03, {"p_holm": 0.06}),
        (again, bt, "harm", (-1, -1.5, -0.5), 0.04, {}),
        (again, bt, "rm_dpo", (0.1, -0.2, 0.4), 0.4, {}),
    ]
    x = {"label": "candidates", "values": {bt: 5, hps: 20.5}}
    lines = {"down": [hps, bt, sft], "one": [bt]}
    return {
        "suite": "tiny",
        "commit": "abc1234",
        "machine": "two cores",
        "seconds": 90.0,
        "worlds": 3,
        "settings": {"beta": 0.1, "prompts": 300},
        "rows": rows,
        "comparisons": [
            {"a": a, "b": b, "metric": metric, "p": p} | interval(*numbers) | worlds | rest
            for a, b, metric, numbers, p, rest in compared
        ],
        "series": {
            "strength": {"x": {"metric": "kl_exact"}, "panels": ["rm2", "junk", "true_reward"], "lines": lines},
            "n": {"x": x, "panels": ["win"], "lines": {"up": [bt, hps]}},
        },
        "claims": [dict(zip(keys, claim)) | interval(*numbers) | {"values": [0.5, 0.7]} for *claim, numbers in claims]
        + [unmeasured | {"table": "Claims", "reason": "needs human raters"}],
    }


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids of one prompt."""
    return tokens.Encoder(tokenizer).prompt(prompt)


def encode_response(tokenizer, text: str) -> list[int]:
    """Token ids of one response."""
    return next(tokens.Encoder(tokenizer).responses([text]))


def tokenize_rows(tokenizer, rows, **how) -> tuple[list[tokens.Example], dict[str, int]]:
    """All that `tokens.tokenize` gives, and its counts."""
    counts: dict[str, int] = {}
    return list(tokens.tokenize(tokenizer, rows, counts, **how)), counts
