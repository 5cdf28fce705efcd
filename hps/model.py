"""A Hugging Face causal LM as a function from packed prompts to sequence log-probs."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from hps import attention
from hps.io import files, hub
from hps.logps import sequence_logps, token_logps
from hps.packing import Block, Packed, micro_batches, pack, pieces

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = {"lm_head", "score"}  # linear layers that get no adapter


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
        """The transformers model itself, with adapters in place if there are any."""
        return self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return decoder_layers(self.causal_lm.get_decoder())

    @property
    def head(self) -> Tensor:
        """The output head's weight, (V, D)."""
        return self.causal_lm.get_output_embeddings().weight

    def hidden(self, packed: Packed) -> Tensor:
        """States that predict the scored tokens, (T, D), in the compute dtype."""
        decoder = self.causal_lm.get_decoder()
        return states(decoder, packed, dense=self.dense_attention, autocast=self.autocast)[packed.predictor]

    def forward(self, packed: Packed) -> Tensor:
        """Log-probs of every response, summed over its tokens, end token included, (B, K) fp32 nats."""
        head = self.head if self.autocast is None else self.head.to(self.autocast)
        logps = token_logps(self.hidden(packed), head, packed.targets)
        return sequence_logps(logps, packed.sequence, packed.valid.shape)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a transformers decoder, in order."""
    stacks = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
    return list(max(stacks, key=len))


def states(decoder: nn.Module, packed: Packed, *, dense: bool, autocast: torch.dtype | None) -> Tensor:
    """Last states of all packed positions, (R * N, D), in the compute dtype."""
    heads = decoder.config.get_text_config().num_attention_heads
    with torch.autocast(packed.input_ids.device.type, autocast, enabled=autocast is not None):
        found = decoder(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            **attention.inputs(packed, heads=heads, dense=dense),
        ).last_hidden_state
    return found.flatten(0, 1)


def score(
    model: nn.Module, blocks: Sequence[Block], *, device: torch.device, budget: int, pad_id: int, progress: str = ""
) -> list[np.ndarray]:
    """What a model gives to all responses, on one rank: one (K,) float32 array a block, in order.

    Args:
        model: packed prompts -> (B, K), a PolicyModel (log-probs, nats) or a RewardModel (rewards).
        budget: packed tokens a micro-batch.
        progress: name of the progress bar; empty for none.
    """
    whole: list[list[float]] = [[] for _ in blocks]
    cut = [(b, piece) for b, block in enumerate(blocks) for piece in pieces(block, tokens=budget)]
    scored: list[list[float]] = [[] for _ in cut]
    batches = micro_batches([len(piece) for _, piece in cut], budget=budget, world_size=1)[0]
    for members in tqdm(batches, desc=progress, unit="batch", disable=not progress):
        with torch.no_grad():
            rows = model(pack([cut[i][1] for i in members], pad_id=pad_id).to(device)).tolist()
        for i, row in zip(members, rows, strict=True):
            scored[i] = row[: len(cut[i][1].responses)]
    for (b, _), row in zip(cut, scored, strict=True):
        whole[b] += row
    return [np.array(row, dtype=np.float32) for row in whole]


def load_causal_lm(path: str, *, dtype: torch.dtype) -> nn.Module:
    """A causal LM from a local folder or the hub, in evaluation mode; an adapter folder comes merged into its base.

    Raises:
        ValueError: no such model, or one whose log-probs the packed path would get wrong.
    """
    from transformers import AutoModelForCausalLM

    if adapter := adapter_settings(path):
        from peft import PeftModel

        base = load_causal_lm(base_of(adapter), dtype=dtype)
        lm = PeftModel.from_pretrained(base, path).merge_and_unload()
        return lm.requires_grad_(True).eval()  # peft froze it
    how: dict[str, Any] = dict(dtype=dtype, attn_implementation="sdpa")
    try:
        name, how["revision"] = hub.resolve(path)
        lm = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True, **how)
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"cannot load the model {path!r}: {why_not(path, e)}") from e
    return lm.eval()  # dropout off, in scoring and in training alike


def adapter_settings(path: str) -> dict[str, Any] | None:
    """The adapter_config.json of a folder that holds an adapter, or None.

    Raises:
        ValueError: it names no base of its own, or its weights are pickled.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").exists():
        return None
    about = files.read_json(folder / "adapter_config.json")
    base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    if not isinstance(base, str) or (Path(base) / "adapter_config.json").exists():
        raise ValueError(f"{folder / 'adapter_config.json'}: base_model_name_or_path must be a model, not {base!r}")
    if not (folder / "adapter_model.safetensors").exists():  # peft would unpickle adapter_model.bin
        raise ValueError(f"cannot load the adapter {path!r}: no adapter_model.safetensors there{_pickled(folder)}")
    return about


def base_of(adapter: dict[str, Any]) -> str:
    """What an adapter was trained on: a folder, or a hub name with the revision that its settings pin."""
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    return f"{base}@{revision}" if revision and not Path(base).exists() else base


def why_not(path: str, error: Exception) -> str:
    """On one line why a model could not be loaded."""
    return " ".join(str(error).split()) + _pickled(Path(path))


def _pickled(folder: Path) -> str:
    found = sorted(file.name for file in folder.glob("*.bin"))
    return f"; {found[0]} is a pickle, which can run code, and is not read: save it as safetensors" if found else ""


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

    task: peft's name of it; with SEQ_CLS the head that gives the reward is trained as well. revision: the commit of a
    model of the hub, for whoever loads the adapter: the model may move on there.

    Raises:
        ValueError: a target that the model does not have, or its output head.
    """
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, m in lm.named_modules() if isinstance(m, nn.Linear)}
    names |= {name.rsplit(".", 1)[-1] for name, m in lm.named_modules() if type(m).__name__ == "Conv1D"}
    wrong = [t for t in targets if t not in names or t in HEADS]
    if wrong:
        raise ValueError(f"lora_targets {wrong} cannot be used; this model has {sorted(names - HEADS)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type=task,
        revision=revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # every rank must start from the same adapter
        return get_peft_model(lm, config).eval()


def check_limits(lm: nn.Module, *, vocab_size: int, longest: int) -> None:
    """ValueError where the data asks for more than a model has.

    Args:
        vocab_size: tokens of the tokenizer. longest: tokens of the longest prompt with one response.
    """
    rows = lm.get_input_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens and the model embeddings for {rows}: they do not belong together"
        )
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


def check_paths_agree(model: PolicyModel, *, vocab_size: int, share_prompt: bool = True) -> float:
    """Compare the packed path with the model's own logits on a few tokens, and return the largest difference.

    Catches what would make every number silently wrong on a user's model: soft-capped or scaled logits, a head
    bias, attention that ignores the block mask, positions that do not restart. A model whose attention the packed
    layout does not reach is switched to dense masks, with a line in the log.

    Raises:
        ValueError: the two differ by more than rounding.
    """
    worst = _difference(model, vocab_size, share_prompt)
    coarse = model.autocast or model.head.dtype
    tolerance = 1e-3 if coarse == torch.float32 else 0.5
    if not worst <= tolerance and share_prompt:
        model.dense_attention = True
        if (dense := _difference(model, vocab_size, share_prompt)) <= tolerance:
            name = type(model.causal_lm).__name__
            logging.getLogger(__name__).warning("%s cannot take the packed layout: dense masks instead, slower", name)
        worst = min(worst, dense)
    if not worst <= tolerance:
        raise ValueError(
            f"packed log-probs differ from this model's own logits by {worst:.3g} nats: the architecture "
            f"{type(model.causal_lm).__name__} changes its logits or ignores block masks, which is not supported "
            "(soft-capping, logit scale, head bias, ALiBi); try --share_prompt false"
        )
    return worst


def _difference(model: PolicyModel, vocab_size: int, share_prompt: bool) -> float:
    """Largest difference (nats) of packed log-probs from the model's own logits; infinite if the layout gets lost."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, vocab_size, size=size) for size in (5, 4, 3)]
    block = Block(ids[0], (ids[1], ids[2]))
    device = model.head.device
    with torch.inference_mode():
        try:
            ours = model(pack([block], pad_id=0, share_prompt=share_prompt).to(device))[0].cpu()
        except attention.LayoutLost:
            return math.inf
        own = []
        for response in block.responses:
            whole = torch.from_numpy(np.concatenate([block.prompt, response])).long().to(device)
            with torch.autocast(device.type, model.autocast, enabled=model.autocast is not None):
                logits = model.causal_lm(input_ids=whole[None], use_cache=False).logits[0].float()
            logps = torch.log_softmax(logits, -1)
            own.append(sum(logps[t - 1, whole[t]] for t in range(len(block.prompt), len(whole))).cpu())
    return float((ours - torch.stack(own)).abs().max())


def fingerprint(lm: nn.Module) -> str:
    """sha256 hex of a model's weights (names, dtypes, bytes) and architecture; equal content, equal name."""
    config = lm.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(lm.named_parameters()):  # tied weights appear once
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
