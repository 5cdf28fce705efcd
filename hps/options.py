"""The options of train.py and what each of them may be. Nothing here needs torch: a typo is told at once."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hps import config


@dataclass
class Config:
    # -- what is trained --
    model: str  # start of the policy: a local folder (weights or adapter) or a hub name
    data: str  # list-wise JSON Lines with rewards (or .gz, .xz); for dpo-human and sft also pairs as TRL has them
    out: str  # folder of the run: metrics.jsonl, checkpoints, the final policy; an unfinished run there goes on
    loss: str = "preference"  # preference (see method), sft (likelihood of the best response), reward (a reward model)
    method: str = "dpo-hps"  # LOSS-SAMPLER: dpo, exo, ipo, sppo, nca, ... and hps, uniform, bt, pl, random, human
    reference: str = ""  # reference model; empty means the policy itself before its first update
    # -- the loss --
    beta: float = 0.1  # KL strength
    label_smoothing: float = 0.0  # dpo: cDPO's epsilon, the share of labels that are wrong
    exo_eps: float = 1e-3  # exo: target mass on the opponents
    length_norm: bool = True  # ipo, simpo: divide by scored tokens, as TRL does
    target_margin: float = 0.5  # simpo: margin that is asked for, in reward units
    slic_delta: float = 1.0  # slic: margin that is asked for, in nats
    slic_lambda: float = 0.1  # slic: weight of the preferred response's likelihood
    rdpo_alpha: float = 0.01  # rdpo: reward units that a token of length is worth
    label_temperature: float = 1.0  # exo_rw, infonca, nca_soft: labels are softmax(rewards / it)
    desirable_weight: float = 1.0  # kto: weight of the preferred response
    undesirable_weight: float = 1.0  # kto: weight of each response that it is contrasted with
    n_factor: str = "one"  # N of Eq. 8: one, or n_minus_one (number of dispreferred responses)
    # -- whom it contrasts --
    length_penalty: float = 0.0  # reward units taken off for every scored token before anything looks at the rewards
    hps_form: str = "sample"  # sample: draws from q; full: all dispreferred responses weighted by q
    hps_samples: int = 1  # draws from q at each visit
    positives: int = 1  # hps_form full: this many best responses count as valid, a stage of the loss each (App. E)
    positive_lambda: str = ""  # weights of their stages, comma-separated, say 1,0.5; empty: 1 / positives each
    exclude_positives: bool = False  # contrast them with the responses below them all only, not with each other
    gamma_schedule: str = "left_knots"  # left_knots, inclusive, linear, constant, or mixture (knots in random order)
    gamma_start: float = -5.0  # hardness at the start; negative draws the worst responses
    gamma_end: float = 5.0  # hardness that the ramp runs to; positive draws the hardest
    gamma_phases: int = 5  # constant pieces of the ramp
    reward_norm: str = "none"  # rewards as the sampler sees them: none (raw), or zscore of each prompt
    reward_scale: float = 1.0  # factor on the (normalised) rewards
    pl_form: str = "stagewise"  # pl: stagewise, or official (the list-wise form of exo's, nca's and sppo's authors)
    pl_responses: int = 8  # ranks that Plackett-Luce sees: best, worst and evenly spaced ones; 0 means all
    # -- optimiser --
    lr: float = 1e-5  # peak learning rate of AdamW (the paper's 5e-7 moves a LoRA adapter by almost nothing)
    epochs: int = 2  # passes over the prompts
    prompts_per_step: int = 64  # prompts of one optimizer step over all ranks
    warmup_steps: int = 0  # linear warm-up
    lr_end: float = 0.0  # where the cosine ends, as a share of lr
    weight_decay: float = 0.0  # AdamW's decay
    optim: str = "adamw"  # adamw, or adamw_8bit (moments in 8 bits, by bitsandbytes)
    adam_beta1: float = 0.9  # AdamW's first moment
    adam_beta2: float = 0.999  # AdamW's second moment
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 means never
    shuffle: str = "epochs"  # epochs: a new order in each; together: all epochs as one list; no: the file's order
    seed: int = 0  # of the order, the draws and the adapter's start
    # -- model --
    lora_rank: int = 8  # 0 trains all weights
    lora_alpha: int = 16  # scale of the adapter is alpha / rank
    lora_kind: str = "lora"  # lora, rslora (scale alpha / root of rank), or dora (trains magnitudes too)
    lora_targets: str = "q_proj,v_proj"  # linear layers that get an adapter, comma-separated, or all-linear
    load_in_4bit: bool = False  # the frozen base below a LoRA adapter in NF4 (QLoRA, by bitsandbytes)
    dtype: str = "fp32"  # compute dtype, fp32 or bf16; trained weights are fp32 either way
    export_dtype: str = "model"  # of the final policy without LoRA: model (that of its files), fp32 or bf16
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    share_prompt: bool = True  # compute a prompt once for all its responses; false pads plain rows
    # -- on several ranks --
    shard_frozen: str = "auto"  # the weights below a LoRA adapter: true, false (whole on each rank), auto (if they fit)
    shard_ranks: int = 0  # shard over groups of so many ranks that hold the same (HSDP), say those of a host; 0: all
    reshard_after_forward: bool = True  # false keeps gathered layers until the backward: more memory, fewer bytes sent
    # -- batches --
    candidates: int = 0  # use the first so many responses of each prompt; 0 means all
    max_length: int = 2048  # tokens of prompt and response together
    truncate: str = "drop"  # beyond max_length: drop (and count) the response, error, or keep_end of the prompt
    template_options: str = ""  # NAME=VALUE,... of the chat template: enable_thinking=false, date=2026-01-31
    tokens_per_micro_batch: int = 4096  # packed tokens of one forward; the step's gradient does not depend on it
    # -- run --
    token_cache: str = "runs/token_cache"  # folder of the data as token ids, shared by all runs
    reference_cache: str = "runs/reference_cache"  # folder of reference log-probs, shared by all runs
    save_minutes: float = 10.0  # minutes between checkpoints, with which the same command goes on; 0 for none by time
    save_every: int = 0  # steps between checkpoints, beside those by time; 0 for none by steps
    sample_every: int = 0  # steps between greedy answers to the same prompts, in samples.jsonl; 0 draws none
    sample_prompts: int = 4  # the first so many prompts of the data are answered then
    eval_data: str = ""  # held-out data like --data: its loss and margins go to metrics.jsonl as eval/...
    eval_every: int = 0  # steps between two looks at them; 0 looks once per epoch, and the last step always does
    keep: str = "last"  # the policy that is exported: last, or best (of the lowest held-out loss)
    log_to: str = ""  # beside metrics.jsonl: tensorboard, wandb, or both, comma-separated
    timeout: float = 10.0  # minutes that ranks wait for each other before the run ends
    dry_run: bool = False  # a few steps, what the run would take, and an end: only the caches are written
    stop_after: int = 0  # stop (with a checkpoint) after this many steps in all; 0 runs to the end


# What a word may be.
CHOICES = {
    "loss": ("preference", "sft", "reward"),
    "hps_form": ("sample", "full"),
    "n_factor": ("one", "n_minus_one"),
    "pl_form": ("stagewise", "official"),
    "gamma_schedule": ("left_knots", "inclusive", "linear", "constant", "mixture"),
    "reward_norm": ("none", "zscore"),
    "shuffle": ("epochs", "together", "no"),
    "truncate": ("drop", "error", "keep_end"),
    "lora_kind": ("lora", "rslora", "dora"),
    "optim": ("adamw", "adamw_8bit"),
    "dtype": ("fp32", "bf16"),
    "export_dtype": ("model", "fp32", "bf16"),
    "shard_frozen": ("auto", "true", "false"),
    "keep": ("last", "best"),
}
# What a number must be, and of which options that is asked.
RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    ("be positive", lambda x: x > 0, "beta lr epochs prompts_per_step positives hps_samples tokens_per_micro_batch"),
    ("be positive", lambda x: x > 0, "slic_delta label_temperature reward_scale sample_prompts timeout"),
    ("not be negative", lambda x: x >= 0, "target_margin slic_lambda rdpo_alpha desirable_weight undesirable_weight"),
    ("not be negative", lambda x: x >= 0, "candidates length_penalty lora_rank warmup_steps weight_decay stop_after"),
    ("not be negative", lambda x: x >= 0, "max_grad_norm save_minutes save_every sample_every eval_every shard_ranks"),
    ("lie in [0, 0.5)", lambda x: 0 <= x < 0.5, "label_smoothing"),
    ("lie in (0, 1)", lambda x: 0 < x < 1, "exo_eps"),
]


def read(argv: Sequence[str] | None = None, *, description: str = "") -> tuple[Config, dict[str, str]]:
    """The options of a command line, as `config.parse` reads them; ValueError for a value that none may have."""
    c, given = config.parse(Config, argv, prog="train.py", description=description)
    config.check_choices(c, **CHOICES)
    for words, allowed, keys in RANGES:
        for key in keys.split():
            if not allowed(getattr(c, key)):
                raise ValueError(f"{key} must {words}, got {getattr(c, key)}")
    return c, given


# Settings that do not decide the result: a run may go on with other values of them.
FREE = {*"out token_cache reference_cache tokens_per_micro_batch shard_frozen shard_ranks log_to timeout".split()}
FREE |= {*"reshard_after_forward save_every save_minutes stop_after sample_every sample_prompts dry_run".split()}


def settings(c: Config) -> dict[str, object]:
    """The options that decide the result."""
    free = FREE | ({"eval_data", "eval_every"} if c.keep == "last" else set())
    return {key: value for key, value in dataclasses.asdict(c).items() if key not in free}
