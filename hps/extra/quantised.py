"""What bitsandbytes makes smaller: the frozen base below an adapter, in 4 bits (QLoRA), and AdamW's moments, in 8.

Apart from it, since it is optional; imported for --load_in_4bit and --optim adamw_8bit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hps.adapters import OUTPUT_HEADS


def library(option: str) -> Any:
    """bitsandbytes; ValueError, which names the option that asks for it, where it is not installed."""
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"--{option} needs bitsandbytes ({error}): pip install -e '.[bnb]'") from error
    return bitsandbytes


def to_4bit(lm: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Put a model's linear layers in 4 bits on the device, in place: NF4 with its scales in 8 bits, as QLoRA has it.

    The output head and embeddings keep their dtype, and so does what peft adds. Layers go to the device one by one;
    each computes in `dtype`, in which its weight is before it is rounded.

    Raises:
        ValueError: bitsandbytes is not there, or the model has no such layer.
    """
    bnb = library("load_in_4bit")
    linear = [(name, m) for name, m in lm.named_modules() if type(m) is nn.Linear]
    linear = [(name, m) for name, m in linear if name.rpartition(".")[2] not in OUTPUT_HEADS]
    if not linear:
        raise ValueError(f"--load_in_4bit: {type(lm).__name__} has no linear layers that could be put in 4 bits")
    for name, m in linear:
        how: dict[str, Any] = dict(quant_type="nf4", compress_statistics=True)
        small = bnb.nn.Linear4bit(m.in_features, m.out_features, m.bias is not None, dtype, device="meta", **how)
        small.weight = bnb.nn.Params4bit(m.weight.detach().to(dtype), requires_grad=False, module=small, **how)
        small.bias = m.bias
        small.support_avx512bf16_for_cpu = False  # repacks a weight in place at its first forward, for inference alone
        lm.set_submodule(name, small.to(device))
    lm.is_loaded_in_4bit = True  # peft asks
    return lm.eval()


def adamw_8bit(parameters: list[Tensor], **how: Any) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, in blocks of 256 with a scale each; tensors of less than 4,096 numbers keep fp32.
    `state` is that of checkpoints from the start: tensors alone, none of which shares its memory."""
    bnb = library("optim adamw_8bit")

    class AdamW8bit(bnb.optim.AdamW8bit):
        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            state = self.state[p]
            step, state["step"] = state["step"], int(state["step"])  # as bitsandbytes counts
            super().update_step(group, p, gindex, pindex)
            state["step"] = step.fill_(state["step"])

    optimizer = AdamW8bit(parameters, **how)
    for pindex, p in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], p, 0, pindex)
        state = optimizer.state[p]
        state |= {key: value.clone() for key, value in state.items() if key.startswith("qmap")}
        state["step"] = torch.zeros(())
    return optimizer
