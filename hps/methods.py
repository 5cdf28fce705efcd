"""What a method is made of, and which options a run of it uses: what follows from the options of train.py alone."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

from hps import config, losses
from hps.losses import Loss
from hps.options import Config, settings
from hps.samplers import DRAW_OPTIONS, SAMPLERS, sampler_options

# How the stages of several positives are weighed: options of the loss that the plan does not depend on.
POSITIVE_STAGES = {"positive_lambda", "exclude_positives"}

# Options that mean something only beside another one.
NEEDS = {"sample_prompts": "--sample_every", "eval_every": "--eval_data", "keep": "--eval_data"}
NEEDS |= {"export_dtype": "--lora_rank 0 (an adapter keeps its own dtype)"}
OF_LORA = {"lora_alpha", "lora_kind", "lora_targets", "load_in_4bit", "shard_frozen"}
NEEDS |= dict.fromkeys(OF_LORA, "a --lora_rank above 0")


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
        full = f"{method}-hps" if method in everything else f"dpo-{method}" if method in SAMPLERS else method
        raise ValueError(
            f"method = {method!r} does not exist{config.meant(full, known)} A method is LOSS-SAMPLER. Losses: "
            f"{', '.join(x for x in everything if x not in with_pl_only)}; with pl only: {', '.join(with_pl_only)}. "
            f"Samplers: {', '.join(SAMPLERS)}"
        )


def check(c: Config, given: dict[str, str]) -> tuple[Config, list[str]]:
    """The options as the run takes them, and the names of those in its --config file that it passes over: a file serves
    several methods. given: name of each option that was set -> "file" or "flag".

    Raises:
        ValueError: a choice that does not exist, a flag that the run would ignore.
    """
    check_method(c.method)
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
        from hps.extra import boards

        boards.check_names(c.log_to)
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


def changed_settings(c: Config) -> list[str]:
    """Names of the settings that the run uses at another value than their default."""
    return [key for key, value in settings(c).items() if key in used_options(c) and value != getattr(Config, key, None)]
