"""Attention over packed rows: which position may look at which."""

import torch
from torch import Tensor

from hps.packing import Packed


def block_mask(packed: Packed) -> Tensor | None:
    """The dense mask of packed rows, (R, 1, N, N) bool, True where query (row) may attend to key (column).

    A token sees earlier tokens of its own block that belong to the prompt or to its own response. Pads see each
    other's past, so that no softmax row is empty (an empty row is NaN). None where plain causal is enough: the
    pads stand at the end of a row, so no real token looks at them.
    """
    if packed.causal:
        return None
    N = packed.input_ids.shape[1]
    same_block = packed.block[:, :, None] == packed.block[:, None, :]
    key_segment, query_segment = packed.segment[:, None, :], packed.segment[:, :, None]
    visible = (key_segment == 0) | (key_segment == query_segment)
    causal = torch.ones(N, N, dtype=torch.bool, device=packed.input_ids.device).tril()
    return (same_block & visible & causal)[:, None]
