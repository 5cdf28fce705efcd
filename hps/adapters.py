"""LoRA adapters: put on a model that is trained, found in a folder, merged into their base.

Of reward models as of policies, in peft's format. Imported only where there is one.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hps.io import files

OUTPUT_HEADS = {"lm_head", "score"}  # linear layers that get no adapter


def add_lora(
    lm: nn.Module,
    *,
    rank: int,
    alpha: int,
    targets: Sequence[str],
    seed: int,
    task: str = "CAUSAL_LM",
    revision: str | None = None,
) -> nn.Module:
    """Freeze a model and give it fp32 LoRA adapters, zero at first, so that policy = reference at step 0.

    Args:
        task: peft's name of it; with SEQ_CLS the head that gives the reward is trained as well.
        revision: the commit of a model of the hub, for whoever loads the adapter: the model may move on there.

    Raises:
        ValueError: a target that the model does not have, or its output head.
    """
    from peft import LoraConfig, get_peft_model

    linear = [n for n, m in lm.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    names = {name.rsplit(".", 1)[-1] for name in linear} - OUTPUT_HEADS
    if wrong := [t for t in targets if t not in names]:
        raise ValueError(f"lora_targets {wrong} cannot be used; this model has {sorted(names)}")
    sizes: dict[str, Any] = dict(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none")
    config = LoraConfig(target_modules=list(targets), task_type=task, revision=revision, **sizes)
    with torch.random.fork_rng(devices=[]), _without_deprecation():
        torch.manual_seed(seed)  # every rank must start from the same adapter
        return get_peft_model(lm, config).eval()


def adapter_in(path: str) -> tuple[str, str] | None:
    """(base, task) of the adapter in a folder; the base is a folder or a hub name, with the revision that it pins. None
    where there is no adapter.

    Raises:
        ValueError: it names no base of its own, or has no safetensors weights.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").exists():
        return None
    about = files.read_json(folder / "adapter_config.json")
    base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    if not isinstance(base, str) or (Path(base) / "adapter_config.json").exists():
        raise ValueError(f"{folder / 'adapter_config.json'}: base_model_name_or_path must be a model, not {base!r}")
    if not (folder / "adapter_model.safetensors").exists():  # peft would unpickle adapter_model.bin
        raise ValueError("no adapter_model.safetensors there")
    pinned = f"@{about['revision']}" if about.get("revision") and not Path(base).exists() else ""
    return base + pinned, about.get("task_type")


def merge_adapter(base: Any, path: str) -> nn.Module:
    """The adapter in a folder merged into the weights of its base, all of which can train again."""
    from peft import PeftModel

    with _without_deprecation():
        merged: Any = PeftModel.from_pretrained(base, path).merge_and_unload()
    return merged.requires_grad_(True).eval()  # peft froze it


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """peft 0.21 asks a model `is_gradient_checkpointing`, which transformers 5 calls by another name, at each wrapping:
    the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
