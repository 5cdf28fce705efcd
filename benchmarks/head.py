"""The output head on a CPU: chunked against dense, forward and backward. Time, memory beyond inputs and outputs, error.

    python benchmarks/head.py

Each contestant runs in processes of its own (peak memory is a process's), alternating, and medians are reported. The
head is frozen. Errors are of the gradient to the states, against float64, as a share of its largest entry. Heads that
train, bf16 and the Triton kernels are seen to by gpu.py.
"""

import statistics

import harness
import torch
from torch import Tensor

from hps.logps import token_logps

WIDTH = 576  # SmolLM2-135M
SHAPES = [(T, V) for V in (32_000, 49_152, 128_256) for T in (256, 4096)]
DENSE_LIMIT = 2**28  # logits that the dense path may hold (three fp32 copies): 4,096 tokens of 49,152 and no more


def dense_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[targets], (T,), the plain way, at least in fp32. Arguments as `token_logps`."""
    logits = hidden.to(weight.dtype) @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


CONTESTANTS = {"dense": dense_token_logps, "chunked": token_logps}


def run(name: str, T: int, V: int) -> dict[str, float]:
    """Median ms of a forward and backward after one that is not counted, MiB above inputs and outputs, and of few
    tokens the gradient's error."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, WIDTH, generator=draw).requires_grad_()
    # In place: a quotient beside its numerator would raise the process's peak by more than the contestants do.
    weight, targets = torch.randn(V, WIDTH, generator=draw).div_(WIDTH**0.5), torch.randint(0, V, (T,), generator=draw)
    hidden.grad = torch.zeros_like(hidden)
    (hidden[:8].detach() @ weight.T).float()  # the libraries' own buffers are not ours to count
    before = harness.memory("VmHWM")

    def once() -> None:
        CONTESTANTS[name](hidden, weight, targets).sum().backward()

    once()
    times = [harness.seconds(once) for _ in range(1 if T > 1000 else 3)]
    found = {"ms": 1000 * statistics.median(times), "peak_mib": harness.memory("VmHWM") - before}
    if T <= 1000:
        hidden.grad.zero_()
        once()
        states = hidden.detach().double().requires_grad_()
        exact = torch.autograd.grad(dense_token_logps(states, weight.double(), targets).sum(), states)[0]
        found["error"] = float((hidden.grad.double() - exact).abs().max() / exact.abs().max())
    return found


def main() -> None:
    results = []
    for T, V in SHAPES:
        names = [name for name in CONTESTANTS if name != "dense" or T * V <= DENSE_LIMIT]
        found = harness.take_turns(names, 3, lambda name, r, T=T, V=V: harness.alone(run, name, T, V))
        results += [{"path": name, "tokens": T, "vocabulary": V} | m for name, m in harness.medians(found).items()]
    header = ["path", "tokens", "vocabulary", "ms", "MiB beyond inputs and outputs", "error"]
    harness.print_table(header, [[*row.values(), "-"][:6] for row in results])
    largest = [row["peak_mib"] for row in results if row["path"] == "chunked"][-1]
    harness.finish({"peak_mib": largest, "threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    main()
