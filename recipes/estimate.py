"""What a recipe takes, before anything of it is run or rented: memory, tokens and hours of each of its stages.

    PROMPTS=10000 GPUS=4 python -m recipes.estimate --recipe recipes/paper.sh --gpu_gib 48 --tflops 362 --gb_per_s 864

The stages are the commands that the recipe prints with PYTHON=echo, each with its own options; their sizes are those of
the environment. Of the models config.json alone is read, so a folder of configs/shapes can stand in for a hub name. A
row of the table says what it assumes; what holds for all stands below it (PREMISES).
"""

import math
import os
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data_prep
import eval as evaluation
from hps import config, loading, model, options
from hps.evaluate import md
from hps.lab import estimate
from hps.packing import pack, pieces
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


class Data(NamedTuple):
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


class Cost(NamedTuple):
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
        gpus = next((int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node=")), 1)
        script, *argv = words[words.index("--") + 1 :] if "--" in words else words
        kinds: dict[str, Any] = {"train.py": options.Config, "eval.py": evaluation.Config}
        kinds |= data_prep.OPTIONS
        if script == "data_prep.py":
            script, *argv = argv
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
        if o.engine == "vllm":  # takes its share of the GPU, and decodes what fits into it
            gpus, remedy = o.tensor_parallel, ""
            share, row = VLLM_SHARE * self.c.gpu_gib * GIB, self.kv_bytes(shape, o.dtype, self.c.response_tokens)
            at_once = max(1, min(VLLM_ROWS, int((gpus * share - of.weights) / row)))
            taken = max(share, (of.weights + row) / gpus)
        else:
            at_once, decoding = o.max_rows, decoding_bytes(o, draws, o.max_prompt_length, shape)
            taken, remedy = of.weights + decoding, self.fewer_rows(o, of.weights, decoding)
        hours = self.decoding_hours(of, prompts, draws, at_once, shape, o.dtype) / gpus
        about = f"{draws} draws per prompt for {o.n} that end and differ, {at_once} rows at once{remedy}"
        return Stage(f"candidates, {o.engine}", gpus, taken, prompts * draws * self.c.response_tokens, hours, about)

    def annotate(self, o: data_prep.Annotate, gpus: int) -> Stage:
        """Rewards: a forward of each prompt with all its responses."""
        rows = self.data[o.output] = self.rows_of(o.input)
        of = self.scoring(self.shape(o.scorer), o.dtype, rows.responses, o.tokens_per_micro_batch, reward=True)
        tokens, hours = rows.prompts * self.tokens(rows.responses), self.hours(rows.prompts * of.flops / gpus)
        about = f"{rows.responses} responses per prompt, which is read once per {o.tokens_per_micro_batch} tokens"
        return Stage("rewards", gpus, of.weights + of.activations, tokens, hours, about)

    def train(self, o: options.Config, gpus: int) -> Stage:
        """A training run, as `hps.lab.estimate` has it."""
        rows, preference = self.rows_of(o.data), o.loss == "preference"
        self.start[f"{o.out}/policy"] = o.model
        _, sampler = o.method.split("-")
        n = min(o.candidates or rows.responses, rows.responses)
        drawn = {"hps": 1 + o.hps_samples, "uniform": 1 + o.hps_samples, "pl": min(o.pl_responses or n, n)}
        responses = n if o.hps_form == "full" else drawn.get(sampler, 2)
        responses = responses if preference else {"sft": 1}.get(o.loss, 2)
        known = {field.name for field in fields(estimate.Options)}
        how = {key: value for key, value in (vars(o) | vars(self.c)).items() if key in known}
        how |= dict(shape=self.shape(o.model), world_size=gpus, responses=responses)
        how |= dict(method=f"dpo-{sampler}")  # whatever the loss, which costs next to nothing
        found = step(**how)
        flops = rows.prompts * (o.epochs * found["visit"] + found["reference"] * preference)
        about = f"{o.epochs} epochs" + "; the reference's log-probs, which runs share, counted for each" * preference
        about += "" if found["fits"] else f"; {estimate.remedy(estimate.Options(**how), found)}"
        tokens, name = rows.prompts * o.epochs * self.tokens(responses), sampler if preference else o.loss
        taken = found["bytes_per_rank"]["total"]
        return Stage(f"training, {name}", gpus, taken, tokens, self.hours(flops / gpus), about)

    def eval(self, o: evaluation.Config, gpus: int) -> Stage:
        """Log-probs of all candidates, KL on the winner; samples, the reference's log-probs of these, and rewards."""
        rows, policy, ref = self.rows_of(o.data), self.shape(o.model), self.shape(o.reference)
        prompts, budget = min(rows.prompts, o.limit or rows.prompts), o.tokens_per_micro_batch
        of, winner = (self.scoring(policy, o.dtype, k, budget) for k in (rows.responses, 1))
        flops, tokens = of.flops + 2 * winner.flops, self.tokens(rows.responses)
        if (ref, o.data) not in self.scored:
            self.scored.add((ref, o.data))
            flops += of.flops
        beside = of.weights + self.scoring(ref, o.dtype, 1, budget).weights
        taken, about, decoded = beside + of.activations, "the reference's log-probs once per data", 0.0
        if o.samples:
            drawn, by_ref = (self.scoring(shape, o.dtype, o.samples, budget) for shape in (policy, ref))
            decoded = self.decoding_hours(drawn, prompts, o.samples, o.max_rows, policy, o.dtype)
            tokens += o.samples * self.c.response_tokens
            flops += by_ref.flops
            about += f"; {o.samples} samples per prompt, {o.max_rows} rows at once"
            if o.scorer != "none":
                judge = self.scoring(self.shape(o.scorer), o.scorer_dtype, o.samples, budget, reward=True)
                flops += judge.flops
                taken = max(taken, judge.weights + judge.activations)  # the others have left by then
            decoding = decoding_bytes(o, o.samples, rows.longest or o.max_length, policy)
            about += self.fewer_rows(o, beside, decoding)
            taken = max(taken, beside + decoding)
        hours = (self.hours(prompts * flops) + decoded) / gpus
        return Stage("evaluation", gpus, taken, prompts * tokens, hours, about)

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

    def tokens(self, responses: int) -> int:
        return self.c.prompt_tokens + responses * self.c.response_tokens

    def hours(self, flops: float) -> float:
        return flops / (self.c.tflops * 1e12 * self.c.mfu) / 3600

    def scoring(self, shape: str, dtype: str, responses: int, budget: int = 4096, reward: bool = False) -> Cost:
        """Of a prompt with so many responses."""
        lengths = self.c.prompt_tokens, self.c.response_tokens
        weights, beside, _ = forward(shape, dtype, budget // 2, budget - budget // 2, 1, reward)
        parts = pieces(estimate.block(*lengths, responses), tokens=budget)
        return Cost(weights, beside, sum(forward(shape, dtype, *lengths, len(p.responses), reward)[2] for p in parts))

    def kv_bytes(self, shape: str, dtype: str, response_tokens: float) -> float:
        """Keys and values of a prompt with so much of a response."""
        return kv_bytes(shape, dtype) * (self.c.prompt_tokens + response_tokens)

    def fewer_rows(self, o: Any, beside: float, decoding: float) -> str:
        """What makes decoding fit into the GPU beside so many bytes, if it does not."""
        rows = int(o.max_rows * (self.c.gpu_gib * GIB - beside) / decoding)
        return "" if rows >= o.max_rows else f"; --max_rows {rows} fits" if rows > 0 else "; no --max_rows fits"

    def decoding_hours(self, of: Cost, prompts: int, draws: int, at_once: int, shape: str, dtype: str) -> float:
        """Of so many draws per prompt, `at_once` of all; of.flops are those of scoring a prompt's."""
        rows, tokens = prompts * draws, prompts * draws * self.c.response_tokens
        read = of.weights / min(at_once, rows) + self.kv_bytes(shape, dtype, self.c.response_tokens / 2)
        return max(tokens * read / (self.c.gb_per_s * 1e9 * self.c.mbu) / 3600, self.hours(of.flops * prompts))


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


def decoding_bytes(o: Any, draws: int, longest: int, shape: str) -> int:
    """Keys and values of hps.prepare.decode: max_new_tokens of each row, a prompt once for all its rows; and three of
    the rows' logits, fp32, while a token is drawn."""
    cached = o.max_rows * o.max_new_tokens + math.ceil(o.max_rows / draws) * longest
    return kv_bytes(shape, o.dtype) * cached + 3 * 4 * o.max_rows * about(shape).get_text_config().vocab_size


@cache
def unfilled(shape: str, dtype: str) -> tuple[model.PolicyModel, FakeTensorMode]:
    """A causal language model on tensors without content, and their mode."""
    from transformers import AutoModelForCausalLM

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(about(shape), dtype=model.DTYPES[dtype], trust_remote_code=False).eval()
    with fake:
        lm.to_empty(device="cpu").tie_weights()
    return model.PolicyModel(lm), fake


@cache
def forward(shape: str, dtype: str, prompt: int, response: int, count: int, reward: bool) -> tuple[int, int, float]:
    """Bytes of a model's weights and of what a forward of `count` responses to a prompt without gradients holds beside
    them, and its FLOPs; of a reward model all but the head."""
    tracker = estimate.Tracker()
    with loading.explain_load_errors("model", shape), estimate.unrun(estimate.Options(world_size=1)):
        net, fake = unfilled(shape, dtype)
        with fake, torch.no_grad():
            tracker.track_external(*net.parameters(), *net.buffers())
            (held,) = tracker.get_tracker_snapshot().values()
            packed = pack([estimate.block(prompt, response, count)], pad_id=0, share_prompt=not net.padded)
            with tracker:
                net.hidden(packed) if reward else net(packed)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    tied = net.head is net.causal_lm.get_input_embeddings().weight
    head = 0 if tied or not reward else net.head.nbytes
    return held["Total"] - head, peak["Total"] - held["Total"], tracker.counter.get_total_flops()


@cache
def step(**how: Any) -> dict[str, Any]:
    """`estimate.step` of these options, each kind of run once."""
    with loading.explain_load_errors("model", how["shape"]):
        return estimate.step(estimate.Options(**how))


def commands(recipe: str) -> list[list[str]]:
    """The words of each command that a recipe would run from its beginning."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHON": "echo", "OUT": f"{folder}/run", "PLAN": ""}
        try:
            done = subprocess.run([str(Path(recipe).resolve())], env=environment, capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"--recipe {recipe} cannot be run: {error}") from error
    if done.returncode:
        raise ValueError(f"{recipe}: {done.stderr.strip()}")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def stages(c: Options) -> list[Stage]:
    """The stages in the order in which they begin; those of one name and one number of GPUs together."""
    if wrong := [field.name for field in fields(c) if field.name != "recipe" and getattr(c, field.name) <= 0]:
        raise ValueError(f"{wrong[0]} must be positive")
    recipe, found = Recipe(c), {}
    for one in filter(None, map(recipe.stage, commands(c.recipe))):
        same = found.setdefault((one.name, one.gpus, one.assumes), one)
        if same is not one:
            same.times, same.bytes = same.times + 1, max(same.bytes, one.bytes)
            same.tokens, same.hours = same.tokens + one.tokens, same.hours + one.hours
    return list(found.values())


def table(c: Options, found: list[Stage]) -> str:
    def row(name: str, times: str, gpus: str, gib: str, some: list[Stage], assumes: str) -> list[str]:
        sums = sum(x.tokens for x in some) / 1e6, sum(x.hours for x in some), sum(x.hours * x.gpus for x in some)
        return [name, times, gpus, gib, f"{sums[0]:,.1f}", f"{sums[1]:,.2f}", f"{sums[2]:,.2f}", assumes]

    rows = []
    for x in found:
        gib = f"{x.bytes / GIB:.1f}{' **too much**' * (x.bytes > c.gpu_gib * GIB)}"
        rows.append(row(x.name, str(x.times), str(x.gpus), gib, [x], x.assumes))
    rows.append(row("all", "", "", "", found, "one after the other"))
    header = ["stage", "times", "GPUs", "GiB of a GPU", "M tokens", "hours", "GPU hours", "assumes"]
    return f"{md.table(header, rows)}\n\n{md.wrapped(PREMISES.format(c=c))}"


def main() -> None:
    c, _ = config.parse(Options, prog="python -m recipes.estimate", description=str(__doc__).split("\n")[0])
    print(table(c, stages(c)))


if __name__ == "__main__":
    config.run_main(main)
