"""The options of data_prep.py's commands; a class says what its command does. Nothing here needs torch: a typo is told
at once."""

from dataclasses import dataclass


@dataclass
class World:
    """Write a self-made world: an untrained model, demonstrations for SFT, prompts for training, choice and report."""

    out: str  # folder for model/ (untrained), sft.jsonl, train.jsonl, valid.jsonl, test.jsonl
    seed: int = 0  # of the world's facts, its splits and the untrained weights
    domain: str = "safe"  # safe (single turn, half of it risky), help (multi-turn, facts) or both
    train: int = 400  # prompts to train preferences on
    valid: int = 100  # prompts to choose settings on
    test: int = 300  # prompts to report on
    demonstrations: int = 48000  # answers for supervised fine-tuning, the first half of good quality


@dataclass
class Import:
    """Turn a foreign file of preferences into list-wise rows, and count what is left out."""

    source: str  # listwise, hh-rlhf, pku-saferlhf, ultrafeedback, nectar, alpaca-eval, trl, simpo or authors
    input: tuple[str, ...]  # files: .jsonl, .json (.gz, .xz), .parquet, .csv, hf://...; data sets: OWNER/NAME@REVISION
    output: str  # list-wise JSON Lines to write, and OUTPUT.manifest.json beside it
    order: str = ""  # pku-saferlhf: helpful or safe; ultrafeedback: overall or fine-grained
    columns: tuple[str, ...] = ()  # NAME=COLUMN: where the file has it; user= and system= make a prompt of turns
    subset: str = ""  # of a data set by its hub name; alpaca-eval: the judge
    split: str = ""  # of a data set by its hub name, if it has several
    limit: int = 0  # rows to keep at most; 0 means all
    skip: int = 0  # usable rows to leave out first, so that splits are disjoint
    chat: bool = False  # make a user's turn of a prompt that is a string, for a model with a chat template


@dataclass
class Export:
    """Write the pairs of list-wise rows in TRL's format, which other trainers read, and count what is left out."""

    input: str  # list-wise JSON Lines
    output: str  # JSON Lines in TRL's format (standard for string prompts), and OUTPUT.manifest.json beside it
    pair: str = "human"  # human (chosen, rejected) or rewards (highest against lowest)


@dataclass
class Generate:
    """Add n distinct candidates of a model to the responses of each prompt; a killed run goes on, torchrun shares."""

    model: str  # model that answers: a local folder or a hub name
    input: str  # list-wise JSON Lines with prompts
    output: str  # the same with candidates behind the responses that were there
    n: int = 8  # distinct candidates per prompt
    temperature: float = 0.9  # of sampling
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability; 1: from all
    max_new_tokens: int = 256  # a response that has not ended there is dropped and counted
    max_prompt_length: int = 1024  # longer prompts are dropped and counted, tokens
    limit: int = 0  # so many prompts, the first that are short enough; 0: all
    seed: int = 0  # of sampling; a prompt's candidates depend on it and on the prompt's id only
    dtype: str = "fp32"  # fp32 or bf16
    max_rows: int = 512  # sequences decoded at once (a small model gains from more); vLLM gets 64 times so many
    template_options: str = ""  # NAME=VALUE,... of the chat template: enable_thinking=false, date=2026-01-31
    engine: str = "hf"  # hf (this code, on any transformers model) or vllm (if it is installed)
    tensor_parallel: int = 1  # vllm: GPUs over which the model is spread
    timeout: float = 10.0  # minutes that ranks wait for each other; for each other's shares of the prompts longer


@dataclass
class Annotate:
    """Give every response a reward; a killed run goes on, and torchrun shares the prompts out."""

    scorer: str  # world-est[:SEED], world-true[:SEED], or a reward model: folder or hub name
    input: str  # list-wise JSON Lines
    output: str  # the same with rewards
    pairs: bool = False  # give rows without a human pair one: two random responses, the one of higher reward chosen
    dtype: str = "fp32"  # of a reward model's weights, fp32 or bf16; rewards are fp32 either way
    objectives: str = "one"  # of a reward model's head: one, or of several mean, score (ArmoRM's gate) or one's name
    template_options: str = ""  # NAME=VALUE,... of a reward model's chat template: enable_thinking=false
    tokens_per_micro_batch: int = 4096  # packed tokens of a reward model's forward
    timeout: float = 10.0  # minutes that ranks wait for each other; for each other's shares of the prompts longer


@dataclass
class Doctor:
    """Measure what training would see of a file, and say what to change; status 1 where it cannot be trained on.

    --config is the training's own: its limits are taken from there, and its q is shown."""

    input: str  # list-wise JSON Lines
    model: str  # its tokenizer counts the tokens
    max_length: int = 2048  # tokens of prompt and response together
    truncate: str = "drop"  # beyond max_length: drop (and count) the response, error, or keep_end of the prompt
    test: str = ""  # list-wise JSON Lines whose prompts should not be among these
    template_options: str = ""  # NAME=VALUE,... of the chat template: enable_thinking=false, date=2026-01-31
    json: bool = False  # print JSON for machines instead of a page


OPTIONS = {
    "world": World, "import": Import, "export": Export, "generate": Generate, "annotate": Annotate, "doctor": Doctor
}  # fmt: skip
