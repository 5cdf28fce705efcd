"""A Hugging Face causal LM as a function from packed prompts to sequence log-probs: loading, limits, and the check
that packed responses get what they would get alone. Most of it serves reward models as well."""

import functools
import hashlib
import json
import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hps import attention
from hps.io import hub
from hps.logps import sequence_logps, token_logps
from hps.packing import Block, Packed, pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --dtype
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one's is ARM's name for them


class PolicyModel(nn.Module):
    """`forward(packed) -> (B, K) fp32` summed log-probs; `lm` is a causal LM, plain or wrapped by peft."""

    def __init__(self, lm: nn.Module, *, autocast: torch.dtype | None = None):
        super().__init__()
        self.lm = lm
        attention.install(self.causal_lm)
        self.dense_attention = False  # set by check_paths_agree for a model that needs it
        self.autocast = autocast  # compute dtype where nothing else (frozen bf16 weights, FSDP) lowers it

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model itself, with its adapters in place."""
        return unwrapped(self.lm)

    @property
    def decoder(self) -> nn.Module:
        """All of it below the output head."""
        return self.causal_lm.get_decoder()

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return decoder_layers(self.decoder)

    @property
    def head(self) -> Tensor:
        """The output head's weight, (V, D)."""
        return self.causal_lm.get_output_embeddings().weight

    def hidden(self, packed: Packed) -> Tensor:
        """States that predict the scored tokens, (T, D), in the compute dtype."""
        return states(self, packed)[packed.predictor]

    def forward(self, packed: Packed) -> Tensor:
        """Log-probs of every response, summed over its tokens, end token included, (B, K) fp32 nats."""
        head = self.head if self.autocast is None else self.head.to(self.autocast)
        logps = token_logps(self.hidden(packed), head, packed.targets)
        return sequence_logps(logps, packed.num_tokens)

    def alone(self, ids: Tensor, prompt: int) -> Tensor:
        """Log-prob of a sequence (N,) behind its `prompt` first tokens by the model's own logits, a scalar, nats."""
        with autocasting(self, ids):
            logits = self.causal_lm(input_ids=ids[None], use_cache=False).logits[0].float()
        logps = torch.log_softmax(logits[prompt - 1 : -1], -1)
        return logps.gather(-1, ids[prompt:, None]).sum()


def unwrapped(lm: Any) -> Any:
    """The transformers model inside a peft model, adapters in place, or the model itself."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def autocasting(model: Any, on: Tensor) -> torch.autocast:
    """The context in which a policy or reward model computes on a tensor's device."""
    return torch.autocast(on.device.type, model.autocast, enabled=model.autocast is not None)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a transformers decoder, in order."""
    stacks = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
    return list(max(stacks, key=len))


def states(model: Any, packed: Packed) -> Tensor:
    """Last states of a policy's or reward model's decoder at all packed positions, (R * N, D), in the compute dtype."""
    heads = model.decoder.config.get_text_config().num_attention_heads
    with autocasting(model, packed.input_ids):
        found = model.decoder(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            **attention.inputs(packed, heads=heads, dense=model.dense_attention),
        ).last_hidden_state
    return found.flatten(0, 1)


# -- loading --


@functools.cache  # so that the log says it once
def compute_dtype(name: str) -> torch.dtype:
    """torch's dtype of --dtype; the log says so where this machine would only emulate it."""
    known = torch.cpu.get_capabilities()
    if name == "bf16" and not torch.cuda.is_available() and not any(map(known.get, BF16_INSTRUCTIONS)):
        logging.getLogger(__name__).warning("this CPU emulates bf16, 8 to 27 times slower: use --dtype fp32")
    return DTYPES[name]


def load_causal_lm(path: str, *, dtype: torch.dtype, tokenizer: Any = None, merged: bool = False) -> nn.Module:
    """A causal LM from a local folder or the hub, in evaluation mode; an adapter stays beside its base, as in training.

    Args:
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
            lm = adapters.load_adapter(load_causal_lm(adapter[0], dtype=dtype), path, merged=merged)
        else:
            name, revision = hub.resolve(path)
            how: dict[str, Any] = dict(revision=revision, dtype=dtype, attn_implementation="sdpa")
            lm = loading.load_whole(AutoModelForCausalLM, name, trust_remote_code=False, **how)
        if tokenizer is not None:
            loading.check_vocabulary(lm, tokenizer)
    return lm


# -- what a model must be able to do --


def check_limits(lm: nn.Module, *, longest: int) -> None:
    """ValueError where `longest`, the tokens of the longest prompt with one response, is more than a model can take."""
    config = lm.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(f"a row has {longest} tokens, the model {positions} positions: set --max_length {positions}")
    # A block mask stands in for the model's own, so a sliding window would be silently widened.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and longest > window:
        raise ValueError(f"a row has {longest} tokens and the model a sliding window of {window}: lower --max_length")


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


def check_paths_agree(model: Any, *, vocab_size: int, share_prompt: bool = True) -> float:
    """Compare what a policy or reward model gives to packed responses and to each alone, on a few tokens; returns the
    largest difference.

    Catches what would make every number silently wrong on a user's model: soft-capped or scaled logits, a head bias,
    attention that ignores the block mask, positions that do not restart. A model whose attention the packed layout
    does not reach is switched to dense masks, with a line in the log.

    Raises:
        ValueError: the two differ by more than rounding.
    """
    coarse = model.autocast or next(model.decoder.parameters()).dtype
    tolerance = 1e-3 if coarse == torch.float32 else 0.5
    worst, name = _difference(model, vocab_size, share_prompt), type(unwrapped(model.lm)).__name__
    if not worst <= tolerance and share_prompt:  # NaN too
        model.dense_attention = True
        if (dense := _difference(model, vocab_size, share_prompt)) <= tolerance:
            logging.getLogger(__name__).warning("%s cannot take the packed layout: dense masks instead, slower", name)
        worst = min(worst, dense)
    if not worst <= tolerance:
        raise ValueError(
            f"packed responses get other values than by this model's own forward of each ({worst:.3g} apart): {name} "
            "changes its logits, pools another token than the last, or ignores block masks, which is not supported "
            "(soft-capping, logit scale, head bias, ALiBi); try --share_prompt false"
        )
    return worst


def _difference(model: Any, vocab_size: int, share_prompt: bool) -> float:
    """Largest difference of packed values from the model's own; infinite if the layout gets lost."""
    draw = np.random.default_rng(0)
    prompt, *responses = (draw.integers(0, vocab_size, size=size) for size in (5, 4, 3))
    device = next(model.parameters()).device
    with torch.inference_mode():
        try:
            packed = pack([Block(prompt, tuple(responses))], pad_id=0, share_prompt=share_prompt)
            ours = model(packed.to(device))[0]
        except attention.LayoutLost:
            return math.inf
        sequences = (torch.from_numpy(np.concatenate([prompt, y])).to(device) for y in responses)
        own = torch.stack([model.alone(ids, len(prompt)) for ids in sequences])
    return float((ours - own).abs().max())


def fingerprint(lm: nn.Module) -> str:
    """sha256 hex of a model's weights (names, dtypes, bytes) and architecture; equal content, equal name."""
    config = lm.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if hasattr(lm, "peft_config"):
        from hps import adapters

        digest.update(adapters.settings(lm).encode())
    for name, parameter in sorted(lm.named_parameters()):  # tied weights appear once
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
