"""The output head: chunked against dense, forward and backward. Time, memory beyond inputs and outputs, error.

    python benchmarks/head.py

Each contestant runs in processes of its own (peak memory is a process's), alternating, and medians are reported.
Errors are of the gradient to the states, against float64, as a share of its largest entry. The Triton kernels are
timed by gpu.py.
"""

import statistics

import harness
import torch

from hps.logps import token_logps

WIDTH = 576  # SmolLM2-135M
SHAPES = [(T, V) for V in (32_000, 49_152, 128_256) for T in (256, 4096)]
DENSE_LIMIT = 2**28  # logits that the dense path may hold (three fp32 copies): 4,096 tokens of 49,152 and no more


def dense_token_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(hidden @ weight.T)[targets], (T,) fp32, the plain way. Arguments as `token_logps`."""
    logps = torch.log_softmax((hidden.to(weight.dtype) @ weight.T).float(), dim=-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1)


def inputs(T: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States and a frozen head, fp32, and targets."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, WIDTH, generator=g).requires_grad_()
    # In place: a quotient beside its numerator would raise the process's peak by more than the contestants do.
    weight = torch.randn(V, WIDTH, generator=g).div_(WIDTH**0.5)
    return hidden, weight, torch.randint(0, V, (T,), generator=g)


CONTESTANTS = {"dense": dense_token_logps, "chunked": token_logps}


def run(name: str, T: int, V: int) -> tuple[list[float], float]:
    """Seconds of each forward and backward after one that is not counted, and MiB above inputs and outputs."""
    hidden, weight, targets = inputs(T, V)
    hidden.grad = torch.zeros_like(hidden)
    (hidden[:8].detach() @ weight.T).float()  # the libraries' own buffers are not ours to count
    before = harness.memory("VmHWM")
    repeats = 1 if T > 1000 else 3
    times = [
        harness.seconds(lambda: CONTESTANTS[name](hidden, weight, targets).sum().backward()) for _ in range(repeats + 1)
    ]
    return times[1:], harness.memory("VmHWM") - before


def error(function, T: int, V: int, dtype: torch.dtype) -> float:
    """Largest error of the gradient to the states, as a share of the largest entry."""
    hidden, weight, targets = inputs(T, V)
    hidden, weight = hidden.detach().to(dtype).requires_grad_(), weight.to(dtype)
    h = hidden.detach().double().requires_grad_()
    logps = torch.log_softmax(h @ weight.double().T, dim=-1).gather(-1, targets[:, None])
    exact = torch.autograd.grad(logps.sum(), h)[0]
    function(hidden, weight, targets).sum().backward()
    assert hidden.grad is not None
    return float((hidden.grad.double() - exact).abs().max() / exact.abs().max())


def main() -> None:
    results = []
    for T, V in SHAPES:
        names = [name for name in CONTESTANTS if name != "dense" or T * V <= DENSE_LIMIT]
        found = harness.take_turns(names, 3, lambda name, r, T=T, V=V: harness.alone(run, name, T, V))
        for name, runs in found.items():
            ms = 1000 * statistics.median(second for times, _ in runs for second in times)
            row = {"tokens": T, "vocabulary": V, "path": name, "ms": ms}
            results.append(row | {"peak_mib": statistics.median(peak for _, peak in runs)})
    header = ["path", "tokens", "vocabulary", "ms", "MiB beyond inputs and outputs"]
    keys = ("path", "tokens", "vocabulary", "ms", "peak_mib")
    harness.print_table(header, [[row[key] for key in keys] for row in results])
    errors = {
        f"{name}_{short}": error(function, 256, 32_000, dtype)
        for name, function in CONTESTANTS.items()
        for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    shown = [[name, f"{value:.2g}"] for name, value in errors.items()]
    harness.print_table(["gradient to the states", "error"], shown)
    largest = next(row["peak_mib"] for row in results[::-1] if row["path"] == "chunked")
    harness.finish({"peak_mib": largest, "threads": torch.get_num_threads(), "errors": errors, "results": results})


if __name__ == "__main__":
    main()
