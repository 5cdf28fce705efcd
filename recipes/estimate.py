"""What a recipe takes, before anything of it is run or rented: memory, tokens and hours of each of its stages.

    PROMPTS=10000 GPUS=4 python -m recipes.estimate --recipe recipes/paper.sh --gpu_gib 48 --tflops 362 --gb_per_s 864

The stages are the commands that the recipe prints with PYTHON=echo, each with its own options; their sizes are those of
the environment. Of the models config.json alone is read, so a folder of configs/shapes can stand in for a hub name. A
row of the table says what it assumes; what holds for all stands below it (PREMISES).
"""

import json
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data_prep
import eval as evaluation
from hps import config, loading, model, options
from hps.evaluate import md
from hps.lab import estimate
from hps.packing import Block, pack, pieces
from hps.prepare import generate

GIB = 2**30
VLLM_SHARE, VLLM_ROWS = 0.9, 256  # of a GPU that vLLM takes whatever it needs, and sequences that it decodes at once
PREMISES = """All prompts are of {c.prompt_tokens} tokens and all responses of {c.response_tokens}; memory alone also
counts the longest. FLOPs are made at {c.mfu:g} of {c.tflops:g} TFLOP/s, memory is read at {c.mbu:g} of {c.gb_per_s:g}
GB/s. A decoded token costs the FLOPs of scoring it or, where that takes longer, reads its share of the weights, once
per step for all rows, and the keys and values of its prompt and of half its response. Loading, texts, files and what
CUDA and NCCL take (some GiB) are not in it, nor are stages without a model. Nothing of this is measured."""


@dataclass
class Options:
    recipe: str  # script whose commands are estimated; its own sizes come from the environment
    prompt_tokens: int = 200  # mean length of a prompt with its template (an example: data_prep.py doctor tells yours)
    response_tokens: int = 200  # mean length of a response
    gpu_gib: float = 48.0  # memory of one GPU (L40S), GiB
    tflops: float = 362.0  # peak, 1e12 FLOPs a second (L40S, dense bf16 by its data sheet)
    mfu: float = 0.4  # share of it that is reached
    gb_per_s: float = 864.0  # bandwidth of the GPU's memory, 1e9 bytes a second (L40S by its data sheet)
    mbu: float = 0.6  # share of it that is reached


@dataclass(frozen=True)
class Data:
    """What is known of a file of rows before it is there."""

    prompts: int
    responses: int  # per prompt
    longest: int = 0  # tokens of a prompt at most; 0 where no command says it


@dataclass
class Stage:
    """What a command takes, or several alike: `bytes` of one GPU at most, tokens and hours of all of them."""

    name: str
    gpus: int
    bytes: float
    tokens: float
    hours: float
    assumes: str
    times: int = 1


@dataclass(frozen=True)
class Model:
    """Bytes of a model's weights, of its head alone, and of what a full micro-batch holds beside them; FLOPs."""

    weights: int
    head: int  # 0 where it is the embeddings too
    activations: int
    per_token: float
    per_pair: float  # of a token and one that it sees
    per_scored: float  # token, by the head


@dataclass(frozen=True)
class Cost:
    """Bytes of a model's weights and of what a full micro-batch holds beside them; FLOPs of one row of the data."""

    weights: int
    activations: int
    flops: float


class Recipe:
    """Goes through the commands in order; knows of each file its rows, and of each trained model its start."""

    def __init__(self, c: Options):
        self.c = c
        self.data: dict[str, Data] = {}
        self.start: dict[str, str] = {}
        self.scored: set[tuple[str, str]] = set()  # by which reference which data are scored already

    def stage(self, words: list[str]) -> Stage | None:
        """What a command of the recipe takes; None where it runs no model."""
        gpus = 1
        if "torch.distributed.run" in words:
            [gpus] = (int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node="))
            words = words[words.index("--") + 1 :]
        script, *argv = words
        kinds: dict[str, Any] = {"train.py": options.Config, "eval.py": evaluation.Config}
        if script == "data_prep.py":
            script, *argv = argv
            kinds = {name: kind for name, (kind, _) in data_prep.COMMANDS.items()}
        if script == "-m" and argv[0] == "hps.evaluate.export":
            given = dict(word[2:].split("=", 1) for word in argv[1:])
            self.start[given["out"]] = given["model"]
        handle = getattr(self, script.removesuffix(".py").replace("import", "imported"), None)
        return handle(config.parse(kinds[script], argv, prog=script, description="")[0], gpus) if handle else None

    def imported(self, o: data_prep.Import, _: int) -> None:
        if not o.limit:
            raise ValueError(f"{o.output}: no --limit says how many rows it will have")
        self.data[o.output] = Data(o.limit, 2)

    def generate(self, o: data_prep.Generate, gpus: int) -> Stage:
        """Candidates: decoding alone."""
        rows, shape = self.rows_of(o.input), self.shape(o.model)
        prompts = min(rows.prompts, o.limit or rows.prompts)
        self.data[o.output] = Data(prompts, rows.responses + o.n, o.max_prompt_length)
        draws = math.ceil(o.n * generate.OVERSAMPLE)
        of = self.scoring(shape, o.dtype, draws)
        at_once, remedy = o.max_rows, ""
        if o.engine == "vllm":  # takes its share of the GPU, and decodes what fits into it
            gpus = o.tensor_parallel
            room = gpus * VLLM_SHARE * self.c.gpu_gib * GIB - of.weights
            row = kv_bytes(shape, o.dtype) * (self.c.prompt_tokens + self.c.response_tokens)
            at_once = max(1, min(VLLM_ROWS, int(room / row)))
            taken = max(VLLM_SHARE * self.c.gpu_gib * GIB, (of.weights + row) / gpus)
        else:
            decoding = self.decoding_bytes(o, draws, o.max_prompt_length, shape)
            taken, remedy = of.weights + decoding, self.fewer_rows(o, of.weights, decoding)
        hours = self.decoding_hours(of, prompts * draws / gpus, min(at_once, prompts * draws), shape, o.dtype, draws)
        about = f"{draws} draws per prompt for {o.n} that end and differ, {at_once} rows at once{remedy}"
        return Stage(f"candidates, {o.engine}", gpus, taken, prompts * draws * self.c.response_tokens, hours, about)

    def annotate(self, o: data_prep.Annotate, gpus: int) -> Stage:
        """Rewards: a forward of each prompt with all its responses."""
        rows = self.data[o.output] = self.rows_of(o.input)
        of = self.scoring(self.shape(o.scorer), o.dtype, rows.responses, o.tokens_per_micro_batch, reward=True)
        tokens, hours = self.tokens(rows), self.hours(rows.prompts * of.flops / gpus)
        about = f"{rows.responses} responses per prompt, which is read once per {o.tokens_per_micro_batch} tokens"
        return Stage("rewards", gpus, of.weights + of.activations, tokens, hours, about)

    def train(self, o: options.Config, gpus: int) -> Stage:
        """A training run, as `hps.lab.estimate` has it."""
        c, rows = self.c, self.rows_of(o.data)
        self.start[f"{o.out}/policy"] = o.model
        _, sampler = o.method.split("-")
        n = min(o.candidates or rows.responses, rows.responses)
        drawn = {"hps": 1 + o.hps_samples, "uniform": 1 + o.hps_samples, "pl": min(o.pl_responses or n, n)}
        name, responses = f"training, {sampler}", n if o.hps_form == "full" else drawn.get(sampler, 2)
        if o.loss != "preference":
            name, responses = f"training, {o.loss}", {"sft": 1}.get(o.loss, 2)
        known = {field.name for field in fields(estimate.Options)}
        method = f"dpo-{sampler}"  # whatever the loss, which costs next to nothing
        how = {key: value for key, value in (vars(o) | vars(c)).items() if key in known}
        how |= dict(method=method, shape=self.shape(o.model), world_size=gpus, responses=responses)
        found = step(json.dumps(how))
        flops = rows.prompts * (o.epochs * found["visit"] + (found["reference"] if o.loss == "preference" else 0))
        tokens = rows.prompts * o.epochs * (c.prompt_tokens + responses * c.response_tokens)
        about = f"{o.epochs} epochs"
        about += "; the reference's log-probs, which runs share, counted for each" * (o.loss == "preference")
        about += "" if found["fits"] else f"; {estimate.remedy(estimate.Options(**how), found)}"
        return Stage(name, gpus, found["bytes_per_rank"]["total"], tokens, self.hours(flops / gpus), about)

    def eval(self, o: evaluation.Config, gpus: int) -> Stage:
        """Log-probs of all candidates, KL on the winner; samples, the reference's log-probs of these, and rewards."""
        rows, policy, ref = self.rows_of(o.data), self.shape(o.model), self.shape(o.reference)
        prompts = min(rows.prompts, o.limit or rows.prompts)
        of = self.scoring(policy, o.dtype, rows.responses, o.tokens_per_micro_batch)
        winner = self.scoring(policy, o.dtype, 1, o.tokens_per_micro_batch)
        per_prompt, tokens = of.flops + 2 * winner.flops, prompts * self.tokens(replace(rows, prompts=1))
        if (ref, o.data) not in self.scored:
            self.scored.add((ref, o.data))
            per_prompt += of.flops
        other = self.scoring(ref, o.dtype, 1, o.tokens_per_micro_batch)
        beside = of.weights + other.weights
        taken, hours = beside + of.activations, self.hours(prompts * per_prompt / gpus)
        about = "the reference's log-probs once per data"
        if o.samples:
            drawn, by_ref = (self.scoring(m, o.dtype, o.samples, o.tokens_per_micro_batch) for m in (policy, ref))
            rows_at_once = min(o.max_rows, prompts * o.samples)
            how = (rows_at_once, policy, o.dtype, o.samples)
            hours += self.decoding_hours(drawn, prompts * o.samples / gpus, *how)
            tokens += prompts * o.samples * self.c.response_tokens
            about += f"; {o.samples} samples per prompt, {o.max_rows} rows at once"
            hours += self.hours(prompts * by_ref.flops / gpus)
            if o.scorer != "none":
                how = (o.scorer_dtype, o.samples, o.tokens_per_micro_batch)
                judge = self.scoring(self.shape(o.scorer), *how, reward=True)
                hours += self.hours(prompts * judge.flops / gpus)
                taken = max(taken, judge.weights + judge.activations)  # the others have left by then
            decoding = self.decoding_bytes(o, o.samples, rows.longest or o.max_length, policy)
            about += self.fewer_rows(o, beside, decoding)
            taken = max(taken, beside + decoding)
        return Stage("evaluation", gpus, taken, tokens, hours, about)

    # -- what they are made of --

    def rows_of(self, path: str) -> Data:
        if path not in self.data:
            raise ValueError(f"{self.c.recipe}: no import says how many rows {path} has")
        return self.data[path]

    def shape(self, path: str) -> str:
        """Folder or hub name of the model whose config.json is a trained one's too."""
        while path in self.start:
            path = self.start[path]
        return path

    def tokens(self, rows: Data) -> int:
        return rows.prompts * (self.c.prompt_tokens + rows.responses * self.c.response_tokens)

    def hours(self, flops: float) -> float:
        return flops / (self.c.tflops * 1e12 * self.c.mfu) / 3600

    def scoring(self, shape: str, dtype: str, responses: int, budget: int = 4096, reward: bool = False) -> Cost:
        P, Y = self.c.prompt_tokens, self.c.response_tokens
        with loading.explain_load_errors("model", shape):
            found = measured(shape, dtype, budget)
        flops = 0.0
        for piece in pieces(block(P, Y, responses), tokens=budget):
            k = len(piece.responses)
            flops += found.per_token * len(piece) + found.per_pair * pairs(P, Y, k)
            flops += 0 if reward else found.per_scored * k * Y
        return Cost(found.weights - (found.head if reward else 0), found.activations, flops)

    def decoding_bytes(self, o: Any, draws: int, longest: int, shape: str) -> int:
        """Keys and values of hps.prepare.decode: max_new_tokens of each row, a prompt once for all its rows; and three
        of the rows' logits, fp32, while a token is drawn."""
        cached = o.max_rows * o.max_new_tokens + math.ceil(o.max_rows / draws) * longest
        return kv_bytes(shape, o.dtype) * cached + 3 * 4 * o.max_rows * about(shape).get_text_config().vocab_size

    def fewer_rows(self, o: Any, beside: float, decoding: float) -> str:
        """What makes decoding fit into the GPU beside so many bytes, if it does not."""
        rows = int(o.max_rows * (self.c.gpu_gib * GIB - beside) / decoding)
        return "" if rows >= o.max_rows else f"; --max_rows {rows} fits" if rows > 0 else "; no --max_rows fits"

    def decoding_hours(self, of: Cost, draws: float, rows: float, shape: str, dtype: str, per_prompt: int) -> float:
        """Of `draws` responses, so many rows at once; of.flops are those of scoring `per_prompt` of them."""
        read = of.weights / rows + kv_bytes(shape, dtype) * (self.c.prompt_tokens + self.c.response_tokens / 2)
        bound = draws * self.c.response_tokens * read / (self.c.gb_per_s * 1e9 * self.c.mbu) / 3600
        return max(bound, self.hours(of.flops * draws / per_prompt))


@cache
def about(shape: str) -> Any:
    """A model's config."""
    from transformers import AutoConfig

    with loading.explain_load_errors("model", shape):
        return AutoConfig.from_pretrained(shape, trust_remote_code=False)


def kv_bytes(shape: str, dtype: str) -> int:
    """Keys and values of one token in all layers."""
    c = about(shape).get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * width * model.DTYPES[dtype].itemsize


@cache
def measured(shape: str, dtype: str, budget: int) -> Model:
    """A causal language model's forwards without gradients, on tensors without content."""
    from transformers import AutoModelForCausalLM

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with estimate.unrun(estimate.Options(world_size=1)):
        with torch.device("meta"):
            how = dict(dtype=model.DTYPES[dtype], trust_remote_code=False)
            lm = AutoModelForCausalLM.from_config(about(shape), **how).eval()
        net, flops, most = model.PolicyModel(lm), [], estimate.Tracker()
        how = dict(pad_id=0, share_prompt=not net.padded)
        with fake, torch.no_grad():
            net.to_empty(device="cpu")
            lm.tie_weights()
            for length in (8, 16):  # two equations: so much per token, so much per pair
                with (counted := estimate.Tracker()):
                    net.hidden(pack([block(length, length, 1)], **how))
                flops.append(counted.counter.get_total_flops())
            most.track_external(*net.parameters(), *net.buffers())
            (held,) = most.get_tracker_snapshot().values()
            with most:
                net(pack([block(budget // 2, budget - budget // 2, 1)], **how))
    (peak,) = most.get_tracker_snapshot("peak").values()
    per_pair = (flops[1] - 2 * flops[0]) / (pairs(16, 16, 1) - 2 * pairs(8, 8, 1))
    per_token = (flops[0] - per_pair * pairs(8, 8, 1)) / 16
    own_head = 0 if net.head is lm.get_input_embeddings().weight else net.head.numel() * net.head.itemsize
    return Model(held["Total"], own_head, peak["Total"] - held["Total"], per_token, per_pair, 2 * net.head.numel())


def block(prompt: int, response: int, responses: int) -> Block:
    return Block(np.zeros(prompt, np.int64), (np.zeros(response, np.int64),) * responses)


def pairs(prompt: int, response: int, responses: int) -> int:
    """Of a token and one that it sees, itself among them."""
    return prompt * (prompt + 1) // 2 + responses * (response * prompt + response * (response + 1) // 2)


@cache
def step(how: str) -> dict[str, Any]:
    """`estimate.step` of the options in JSON, each kind of run once."""
    o = estimate.Options(**json.loads(how))
    with loading.explain_load_errors("model", o.shape):
        return estimate.step(o)


def commands(recipe: str) -> Iterator[list[str]]:
    """The words of each command that a recipe would run from its beginning."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHON": "echo", "OUT": f"{folder}/run", "PLAN": ""}
        try:
            done = subprocess.run([str(Path(recipe).resolve())], env=environment, capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"--recipe {recipe} cannot be run: {error}") from error
    if done.returncode:
        raise ValueError(f"{recipe}: {done.stderr.strip()}")
    yield from map(shlex.split, done.stdout.splitlines())


def stages(c: Options) -> list[Stage]:
    """The stages in the order in which they begin; those of one name and one number of GPUs together."""
    if wrong := [field.name for field in fields(c) if field.name != "recipe" and getattr(c, field.name) <= 0]:
        raise ValueError(f"{wrong[0]} must be positive")
    recipe, found = Recipe(c), {}
    for one in filter(None, map(recipe.stage, commands(c.recipe))):
        if (same := found.get((one.name, one.gpus, one.assumes))) is None:
            found[one.name, one.gpus, one.assumes] = one
        else:
            same.times, same.bytes = same.times + 1, max(same.bytes, one.bytes)
            same.tokens, same.hours = same.tokens + one.tokens, same.hours + one.hours
    return list(found.values())


def table(c: Options, found: list[Stage]) -> str:
    rows = [
        [x.name, str(x.times), str(x.gpus), f"{x.bytes / GIB:.1f}{' **too much**' * (x.bytes > c.gpu_gib * GIB)}",
         f"{x.tokens / 1e6:,.1f}", f"{x.hours:,.2f}", f"{x.hours * x.gpus:,.2f}", x.assumes]
        for x in found
    ]  # fmt: skip
    hours, gpu_hours = sum(x.hours for x in found), sum(x.hours * x.gpus for x in found)
    tokens = sum(x.tokens for x in found)
    rows.append(
        ["all", "", "", "", f"{tokens / 1e6:,.1f}", f"{hours:,.2f}", f"{gpu_hours:,.2f}", "one after the other"]
    )
    header = ["stage", "times", "GPUs", "GiB of a GPU", "M tokens", "hours", "GPU hours", "assumes"]
    return f"{md.table(header, rows)}\n\n{md.wrapped(PREMISES.format(c=c))}"


def main() -> None:
    c, _ = config.parse(Options, prog="python -m recipes.estimate", description=str(__doc__).split("\n")[0])
    print(table(c, stages(c)))


if __name__ == "__main__":
    config.run_main(main)
