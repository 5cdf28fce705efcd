"""LoRA adapters: put on a model that is trained, found in a folder, put beside or into their base.

Of reward models as of policies, in peft's format. Imported only where there is one.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hps import loading
from hps.io import files

OUTPUT_HEADS = {"lm_head", "score"}  # linear layers that get no adapter
BASE_FILES = "base.json"  # beside an adapter: checksums of the weights that it was trained on


def add_lora(
    lm: nn.Module,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str],
    seed: int,
    kind: str = "lora",
    task: str = "CAUSAL_LM",
    revision: str | None = None,
) -> nn.Module:
    """Freeze a model and give it fp32 LoRA adapters, zero at first, so that policy = reference at step 0.

    Args:
        targets: last parts of the names of linear layers; ["all-linear"] means all of them.
        kind: lora, rslora (its scale is alpha over the root of the rank) or dora (magnitudes of columns beside it).
        task: peft's name of it; with SEQ_CLS the head that gives the reward is trained as well.
        revision: the commit of a model of the hub, for whoever loads the adapter: the model may move on there.

    Raises:
        ValueError: a target that the model does not have, or its output head.
    """
    from peft import LoraConfig, get_peft_model

    linear = [n for n, m in lm.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    names = {name.rsplit(".", 1)[-1] for name in linear} - OUTPUT_HEADS
    targets = sorted(names) if list(targets) == ["all-linear"] else targets
    if "all-linear" in targets:
        raise ValueError("lora_targets all-linear stands for all of them: name it alone")
    if wrong := [t for t in targets if t not in names]:
        raise ValueError(f"lora_targets {wrong} cannot be used; this model has {sorted(names)}, or all-linear")
    sizes: dict[str, Any] = dict(r=rank, lora_alpha=alpha, use_rslora=kind == "rslora", use_dora=kind == "dora")
    config = LoraConfig(target_modules=list(targets), task_type=task, revision=revision, **sizes)
    with torch.random.fork_rng(devices=[]), _without_deprecation():
        torch.manual_seed(seed)  # every rank must start from the same adapter
        return get_peft_model(lm, config).eval()


def adapter_in(path: str) -> tuple[str, str] | None:
    """(base, task) of the adapter in a folder; the base is a folder or a hub name, with the revision that it pins. None
    where there is no adapter.

    Raises:
        ValueError: it names no base of its own, has no safetensors weights, or its base is another one than it was
            trained on.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").exists():
        return None
    about = files.read_json(folder / "adapter_config.json")
    base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    if isinstance(base, str) and not Path(base).is_absolute() and (folder / base).is_dir():
        base = str(folder / base)
    elif isinstance(base, str) and not Path(base).is_absolute() and Path(base).is_dir():
        told = f"{path} names its base as {base!r}, which is taken for the folder {Path(base).resolve()}"
        logging.getLogger(__name__).warning(told)
    gone = isinstance(base, str) and Path(base).is_absolute() and not Path(base).is_dir()
    if not isinstance(base, str) or gone or (Path(base) / "adapter_config.json").exists():
        raise ValueError(f"{folder / 'adapter_config.json'}: base_model_name_or_path, {base!r}, is no model")
    if not (folder / "adapter_model.safetensors").exists():  # peft would unpickle adapter_model.bin
        raise ValueError("no adapter_model.safetensors there")
    if (folder / BASE_FILES).exists() and Path(base).is_dir():
        sums = files.read_record(folder / BASE_FILES, "restore it, or delete it to do without this check", sha256=dict)
        if why := files.first_corrupt_file(Path(base), sums["sha256"]):
            raise ValueError(
                f"it was trained on another base than {base} is now: {why}; name its own as base_model_name_or_path in "
                f"adapter_config.json, or, where this one is meant, delete {folder / BASE_FILES}"
            )
    pinned = f"@{about['revision']}" if about.get("revision") and not Path(base).exists() else ""
    return base + pinned, about.get("task_type")


def name_base(lm: Any, folder: Path) -> None:
    """Make an adapter that is written into a folder name its base so that it is found, and known, from anywhere: a
    folder by its absolute path and the checksums of its weights; a name on the hub has its commit."""
    for about in lm.peft_config.values():
        base = Path(about.base_model_name_or_path or "")
        if about.base_model_name_or_path and base.is_dir():
            about.base_model_name_or_path = str(base.resolve())
            sums = {path.name: files.sha256(path) for path in sorted(base.glob("*.safetensors"))}
            files.write_record(folder / BASE_FILES, {"sha256": sums})


def settings(lm: Any) -> str:
    """What of an adapter's settings decides what a model computes, in a fixed order."""
    named = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"}
    about = [{k: v for k, v in one.to_dict().items() if k not in named} for one in lm.peft_config.values()]
    return json.dumps(about, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))


def load_adapter(base: Any, path: str, *, merged: bool = False) -> nn.Module:
    """The base with the adapter in a folder beside its weights, in fp32, as it was trained; or merged into them.

    Raises:
        ValueError: weights that are missing, left over or of another size; an adapter that is more than layers put
            into its base; one of the output head where it would be lost.
    """
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    about = PeftConfig.from_pretrained(path)
    kind = getattr(about.peft_type, "value", about.peft_type)
    if about.is_prompt_learning or kind == "XLORA" or getattr(about, "alora_invocation_tokens", None):
        raise ValueError(f"it is an adapter of the kind {kind}, which changes more than the weights of its base")
    about.inference_mode = False  # so that what it trains can be told
    head = base.get_output_embeddings()
    tied = head is not None and head.weight is base.get_input_embeddings().weight
    with _without_deprecation():
        whole: Any = PeftModel(base, about)
        if not isinstance(whole.base_model, BaseTuner):
            raise ValueError(f"it is an adapter of the kind {kind}, which changes more than the weights of its base")
        own = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        for p in own.values():
            nn.init.constant_(p, torch.nan)  # whatever loading does not fill stays so
        try:
            names = getattr(base, "_checkpoint_conversion_mapping", {})
            found = whole.load_adapter(path, "default", key_mapping=names)
        except RuntimeError as error:
            raise ValueError(_sizes(error, base)) from error
        # Of embeddings that were resized peft writes the trained copy twice, under two names.
        unused = {n for n in found.unexpected_keys if n.replace("_to_save.", "_to_save.default.") not in own}
        lacking = {name for name, p in own.items() if p.isnan().any()}
        loading.check_weights(lacking, unused, of="an adapter on this base")
        if merged:
            return whole.merge_and_unload().requires_grad_(True).eval()
    lm = whole.get_base_model().requires_grad_(False).eval()
    head = lm.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):  # log-probs are taken by the head's weight
        if tied or head.weight.dtype != torch.float32:
            raise ValueError(
                "it changes the output head, which is exact only in fp32 and where the head is not the embeddings: "
                "use --dtype fp32, or merge it into its base with peft first"
            )
        head.merge()
    return lm


def _sizes(error: RuntimeError, base: Any) -> str:
    """What peft says of weights that do not fit, and what to do where they are those of tokens that were added."""
    pattern = r"size mismatch for (\S+): .*?Size\(\[([\d, ]*)\]\).*?Size\(\[([\d, ]*)\]\)"
    found = re.findall(pattern, " ".join(str(error).split()))
    found = [(name, *sizes) for name, *sizes in found if ".original_module." not in name]  # which are named once more
    said = "; ".join(
        f"{name} is [{theirs}] in the adapter and [{ours}] on its base" for name, theirs, ours in found[:3]
    )
    rows = str(len(base.get_input_embeddings().weight))
    added = [theirs.split(", ")[0] for _, theirs, ours in found if ours.split(", ")[0] == rows]
    if added:
        said += (
            f". It was trained with {added[0]} tokens and its base has {rows}: save the base with "
            f"resize_token_embeddings({added[0]}) and name that as base_model_name_or_path in adapter_config.json"
        )
    return said or str(error)


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """peft 0.21 asks a model `is_gradient_checkpointing`, which transformers 5 calls by another name, at each wrapping:
    the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
