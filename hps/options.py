"""What a run may be told, and which of it the run uses: the options of train.py, and what follows from them alone."""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps import config, losses, model
from hps import plan as planning
from hps.data import tokens
from hps.losses import Loss
from hps.samplers import DRAW_OPTIONS, REWARD_NORMS, SAMPLERS, SCHEDULES, sampler_options


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


# How the stages of several positives are weighed: options of the loss that the plan does not depend on.
POSITIVE_STAGES = {"positive_lambda", "exclude_positives"}

# Options that mean something only beside another one.
NEEDS = {"sample_prompts": "--sample_every", "eval_every": "--eval_data", "keep": "--eval_data"}
NEEDS |= {"export_dtype": "--lora_rank 0 (an adapter keeps its own dtype)"}
OF_LORA = {"lora_alpha", "lora_kind", "lora_targets", "shard_frozen"}
NEEDS |= dict.fromkeys(OF_LORA, "a --lora_rank above 0")

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


def all_losses() -> dict[str, Loss]:
    """Every loss by name, also those beside the paper's five."""
    from hps.extra import losses as extra

    return losses.LOSSES | extra.LOSSES | extra.LISTWISE | {"kto": extra.KTO}


def parts(c: Config) -> tuple[Loss, str]:
    """The loss and the sampler of the method; the official form of a PL method is list-wise."""
    name, sampler = c.method.split("-")
    if sampler == "pl" and c.pl_form == "official":
        from hps.extra.losses import OFFICIAL

        name = OFFICIAL.get(name, name)
    return losses.LOSSES[name] if name in losses.LOSSES else all_losses()[name], sampler


def as_preference(c: Config) -> Config:
    """A reward model's loss in the terms of the others: -log sigmoid(r(chosen) - r(rejected)) (paper Eq. 15) is DPO on
    the human pair with rewards in the place of log-ratios and beta 1."""
    return dataclasses.replace(c, method="dpo-human", beta=1.0) if c.loss == "reward" else c


def form(c: Config) -> str:
    """What the loss looks at: "sft" and "reward" by name, of a preference loss "stage", "list" (rewards) or "kto"."""
    return parts(c)[0].form if c.loss == "preference" else c.loss


def needs_reference(c: Config) -> bool:
    """Whether log-probs of a reference are looked up: not by SFT and reward models, nor by SimPO and SLiC."""
    return c.loss == "preference" and parts(c)[0].needs_reference


def used_options(c: Config) -> set[str]:
    """Names of the options that the run will use; whatever else the user set is an error."""
    fields = {field.name for field in dataclasses.fields(Config)}
    of_losses = {name for loss in all_losses().values() for name in loss.options}
    of_samplers = {name for sampler in SAMPLERS for name in sampler_options(sampler)}
    of_methods = of_losses | of_samplers | POSITIVE_STAGES | {"pl_form"}
    if nameless := of_methods - fields:
        raise ValueError(f"options of a loss or sampler without a field of options.Config, with help text: {nameless}")
    used = fields - of_methods
    if c.loss == "sft":
        used -= {"method", "reference", "reference_cache", "share_prompt", "length_penalty"}
    elif c.loss == "reward":
        used -= {"method", "reference", "reference_cache", "length_penalty", "sample_every"}
        used |= {"label_smoothing"}
    else:
        loss, sampler = parts(c)
        used |= {*loss.options, *sampler_options(sampler)}
        used -= set() if loss.needs_reference else {"reference", "reference_cache"}
        used -= {"length_penalty"} if SAMPLERS[sampler].human_pairs else set()
        used |= {"pl_form"} if sampler == "pl" and c.method.split("-")[0] in losses.LOSSES else set()
        used |= POSITIVE_STAGES if c.positives > 1 else set()
        used -= DRAW_OPTIONS | POSITIVE_STAGES if loss.form == "kto" else set()  # no weights: one draw, or pl's ranks
        used -= {"hps_samples"} if c.hps_form == "full" else set()
        used -= {"constant": {"gamma_end", "gamma_phases"}, "linear": {"gamma_phases"}}.get(c.gamma_schedule, set())
    used -= {"sample_prompts"} if c.sample_every == 0 else set()
    used -= {"eval_every", "keep"} if not c.eval_data else set()
    return used - ({"export_dtype"} if c.lora_rank else OF_LORA)


def positive_stages(c: Config) -> dict[str, Any]:
    """How `losses.multi_positive_loss` makes and weighs the stages of several positives (App. E); ValueError unless
    the weights lambda_1..lambda_m are m numbers >= 0, not all of them 0."""
    try:
        weights = [float(word) for word in c.positive_lambda.split(",") if word] or [1 / c.positives] * c.positives
    except ValueError:
        weights = []
    if len(weights) != c.positives or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(
            f"positive_lambda = {c.positive_lambda!r}: give {c.positives} comma-separated weights >= 0, one for each "
            "of the positives, not all 0"
        )
    return {"weights": weights, "n_factor": c.n_factor, "exclude_positives": c.exclude_positives}


def check_method(method: str) -> None:
    """ValueError unless the method is LOSS-SAMPLER, of which both exist and go together."""
    everything = all_losses()
    with_pl_only = [name for name, loss in everything.items() if loss.form == "list"]
    known = [f"{x}-{sampler}" for x in everything for sampler in (["pl"] if x in with_pl_only else SAMPLERS)]
    if method not in known:
        near = difflib.get_close_matches(f"{method}-hps" if method in everything else method, known, n=1)
        raise ValueError(
            f"method = {method!r} does not exist{f': did you mean {near[0]}?' if near else '.'} A method is "
            f"LOSS-SAMPLER. Losses: {', '.join(x for x in everything if x not in with_pl_only)}; with pl "
            f"only: {', '.join(with_pl_only)}. Samplers: {', '.join(SAMPLERS)}"
        )


def check(c: Config, given: dict[str, str]) -> tuple[Config, list[str]]:
    """The options as the run takes them, and the names of those in its --config file that it passes over: a file serves
    several methods. given: name of each option that was set -> "file" or "flag".

    Raises:
        ValueError: a choice that does not exist, a flag that the run would ignore.
    """
    check_method(c.method)
    config.check_choices(c, loss=["preference", "sft", "reward"], dtype=model.DTYPES, truncate=tokens.TRUNCATE)
    config.check_choices(c, gamma_schedule=SCHEDULES, reward_norm=REWARD_NORMS, pl_form=["stagewise", "official"])
    config.check_choices(c, hps_form=planning.FORMS, n_factor=planning.N_FACTORS, shuffle=planning.SHUFFLES)
    config.check_choices(c, shard_frozen=["auto", "true", "false"], keep=["last", "best"])
    config.check_choices(c, export_dtype=["model", *model.DTYPES], lora_kind=["lora", "rslora", "dora"])
    for words, allowed, keys in RANGES:
        for key in keys.split():
            if not allowed(getattr(c, key)):
                raise ValueError(f"{key} must {words}, got {getattr(c, key)}")
    what, passed_over = f"method {c.method}" if c.loss == "preference" else f"loss {c.loss}", []
    while unused := {*given} - used_options(c) - {*passed_over}:
        flags = sorted(key for key in unused if given[key] == "flag")
        for key in flags:
            if key in NEEDS:
                raise ValueError(f"--{key} means nothing without {NEEDS[key]}: add that, or leave it out")
        config.check_used(flags, used_options(c), what=what)
        c = dataclasses.replace(c, **{key: getattr(Config, key) for key in unused})  # which may leave others unused
        passed_over += [key for key in given if key in unused]
    if c.positives > 1 and c.hps_form != "full":
        raise ValueError(f"positives = {c.positives} are set against all responses below them: add --hps_form full")
    positive_stages(c)
    if c.log_to:
        from hps.io import loggers

        loggers.check_names(c.log_to)
    if form(c) == "kto" and c.prompts_per_step < 2:
        raise ValueError("KTO puts the prompts of a step to each other's responses: prompts_per_step must be >= 2")
    if c.lora_rank and (Path(c.model) / "adapter_config.json").exists():
        raise ValueError(
            f"{c.model} is itself an adapter: another one on top of it would be loaded without it. Fold it into its "
            f"base first: python -m hps.evaluate.export --model {c.model} --out MERGED, and start from there"
        )
    if c.lora_rank and c.lr < 1e-6:
        warnings.warn(f"lr {c.lr} moves a LoRA adapter by almost nothing; 1e-5 to 2e-4 is usual", stacklevel=2)
    return c, passed_over


# Settings that do not decide the result: a run may go on with other values of them.
FREE = {
    *"out token_cache reference_cache tokens_per_micro_batch shard_frozen shard_ranks reshard_after_forward".split()
}
FREE |= {*"save_every save_minutes stop_after sample_every sample_prompts log_to timeout dry_run".split()}


def settings(c: Config) -> dict[str, object]:
    """The options that decide the result."""
    free = FREE | ({"eval_data", "eval_every"} if c.keep == "last" else set())
    return {key: value for key, value in dataclasses.asdict(c).items() if key not in free}


def changed_settings(c: Config) -> list[str]:
    """Names of the settings that the run uses at another value than their default."""
    return [key for key, value in settings(c).items() if key in used_options(c) and value != getattr(Config, key, None)]
