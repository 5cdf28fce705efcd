"""Causal LMs from local folders and the hub, adapters beside their base; named by their content, told their dtype."""

import functools
import hashlib
import json
import logging
from typing import Any

import torch
from torch import nn

from hps.io import hub
from hps.model import DTYPES

BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one's is ARM's name for them


@functools.cache  # so that the log says it once
def compute_dtype(name: str) -> torch.dtype:
    """torch's dtype of --dtype; the log says so where this machine has another one that is many times faster."""
    known = torch.cpu.get_capabilities()
    if name == "fp32" and torch.cuda.is_available():  # TF32 would round as bf16 does, which fp32 was chosen to avoid
        logging.getLogger(__name__).warning("fp32 products take no tensor cores, 10 times slower: use --dtype bf16")
    if name == "bf16" and not torch.cuda.is_available() and not any(map(known.get, BF16_INSTRUCTIONS)):
        logging.getLogger(__name__).warning("this CPU emulates bf16, 8 to 27 times slower: use --dtype fp32")
    return DTYPES[name]


def load_causal_lm(path: str, *, dtype: torch.dtype | None, tokenizer: Any = None, merged: bool = False) -> nn.Module:
    """A causal LM from a local folder or the hub, in evaluation mode; an adapter stays beside its base, as in training.

    Args:
        dtype: of its weights; None as in loading.load_whole.
        tokenizer: must have no id without an embedding; None where nothing is tokenised.
        merged: put an adapter into the weights of its base, all of which can train then. In bf16 that loses most of it.

    Raises:
        ValueError: no such model, one whose weights are not all there, or one that would have to be unpickled, or to
            run its own code.
    """
    from transformers import AutoModelForCausalLM

    from hps import adapters, loading

    with loading.explain_load_errors("model", path):
        adapter = adapters.adapter_in(path)
        if adapter:
            base = load_causal_lm(adapter[0], dtype=dtype or torch.float32)
            lm = adapters.load_adapter(base, path, merged=merged)
        else:
            name, revision = hub.resolve(path)
            how: dict[str, Any] = dict(revision=revision, dtype=dtype)
            lm = loading.load_whole(AutoModelForCausalLM, name, trust_remote_code=False, **how)
        if tokenizer is not None:
            loading.check_vocabulary(lm, tokenizer)
    return lm


def checkpoint_layers(lm: nn.Module) -> None:
    """Recompute each decoder layer in the backward pass, in place.

    transformers does so only in training mode, where dropout would be on too: it is set to zero first.
    """
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    lm.activation_checkpointing_enable()  # without re-entrance, which FSDP needs
    lm.train()


def fingerprint(lm: nn.Module, *, dtype: torch.dtype | None = None) -> str:
    """sha256 hex of a model's weights (names, dtypes, bytes) and architecture; equal content, equal name. dtype: what
    they will be cast to, if to anything."""
    config = lm.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if hasattr(lm, "peft_config"):
        from hps import adapters

        digest.update(adapters.settings(lm).encode())
    for name, parameter in sorted(lm.named_parameters()):  # tied weights appear once
        cast = parameter.detach().to(dtype)
        digest.update(f"{name} {cast.dtype} {tuple(cast.shape)}".encode())
        digest.update(cast.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
