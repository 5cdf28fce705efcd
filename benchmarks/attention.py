"""Attention of one layer over packed rows, forward and backward: dense mask, blockwise, padded; and the rule's choice.

    python benchmarks/attention.py --dtype fp32 --threads 1

Rows are those that training meets: pairs and eight responses of real text (SmolLM2's heads), pairs and a hundred
candidates of the self-made world (its model's heads). Beside the times stands one product of the layer's linear maps,
forward alone, to compare with. Contestants alternate in one process; medians. The last line is JSON.
"""

import json
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from hps import attention, config, model
from hps.packing import Block, Packed, pack

SMOLLM2, WORLD = (9, 3, 64, 3_538_944), (4, 4, 16, 53_248)  # heads, key heads, head size, numbers in a layer's maps


@dataclass
class Options:
    dtype: str = "fp32"  # fp32 or bf16
    threads: int = 1  # OpenMP threads
    repeats: int = 7  # of each contestant on each row


def rows() -> dict[str, tuple[tuple[int, int, int, int], Packed]]:
    """Name -> model sizes and a packed row, with lengths as in HH-RLHF and in the world."""
    draw = np.random.default_rng(0)

    def row(prompts: list[int], K: int, low: int, high: int) -> Packed:
        ids = np.zeros(4096, dtype=np.int32)
        return pack([Block(ids[:P], tuple(ids[:n] for n in draw.integers(low, high, K))) for P in prompts], pad_id=0)

    world = draw.integers(7, 12, 16).tolist()
    return {
        "HH-RLHF, pairs": (SMOLLM2, row([98, 220, 60, 125], 2, 20, 90)),
        "HH-RLHF, 8 responses": (SMOLLM2, row([98, 220], 8, 20, 90)),
        "world, pairs": (WORLD, row(world, 2, 8, 30)),
        "world, 100 candidates": (WORLD, row(world[:2], 100, 8, 30)),
    }


def dense(packed: Packed):
    mask = attention.block_mask(packed)
    return lambda q, k, v, scale: scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/attention.py", description=str(__doc__).split("\n")[0])
    torch.set_num_threads(c.threads)
    dtype = model.DTYPES[c.dtype]
    results = []
    print(f"{'ms':<24}{'tokens':>8}{'dense':>9}{'blockwise':>11}{'padded':>9}{'maps':>8}  chosen")
    for name, ((heads, groups, size, numbers), packed) in rows().items():
        N = packed.input_ids.shape[1]
        q, k, v = (torch.randn(1, h, N, size, dtype=dtype, requires_grad=True) for h in (heads, groups, groups))
        ways = {"dense": dense(packed), "blockwise": attention._blockwise(packed), "padded": attention._padded(packed)}
        width = heads * size
        x, maps = torch.randn(N, width, dtype=dtype), torch.randn(numbers // width, width, dtype=dtype)
        times: dict[str, list[float]] = {way: [] for way in (*ways, "maps")}
        for _ in range(c.repeats + 1):
            for way, attend in ways.items():
                began = time.perf_counter()
                attend(q, k, v, size**-0.5).sum().backward()
                times[way].append(time.perf_counter() - began)
            began = time.perf_counter()
            x @ maps.T
            times["maps"].append(time.perf_counter() - began)
        ms = {way: 1000 * statistics.median(taken[1:]) for way, taken in times.items()}
        chosen = "padded" if attention.padding_pays(packed, heads) else "blockwise"
        results.append({"row": name, "tokens": N, "chosen": chosen, "ms": {w: round(t, 2) for w, t in ms.items()}})
        columns = "".join(f"{ms[way]:>{width}.1f}" for way, width in zip(ms, (9, 11, 9, 8), strict=True))
        print(f"{name:<24}{N:>8}{columns}  {chosen}")
    over = {r["row"]: round(r["ms"][r["chosen"]] / r["ms"]["dense"], 3) for r in results}
    print(json.dumps({"chosen_over_dense": over, "dtype": c.dtype, "threads": c.threads, "results": results}))


if __name__ == "__main__":
    config.run_main(main)
