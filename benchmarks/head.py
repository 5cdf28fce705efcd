"""The output head: chunked against dense, forward and backward. Time, memory beyond the inputs, error against float64.

    python benchmarks/head.py

Each contestant runs in processes of its own (peak memory is a process's), alternating, and medians are reported.
The last line is JSON.
"""

import json
import multiprocessing
import resource
import statistics
import time

import torch

from hps.logps import dense_token_logps, token_logps

WIDTH = 576  # SmolLM2-135M
SHAPES = [(256, 32_000), (1024, 49_152), (4096, 49_152)]
CONTESTANTS = {"dense": dense_token_logps, "chunked": token_logps}


def inputs(T: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States and a frozen head, bf16 as in a LoRA run, and targets."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, WIDTH, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(V, WIDTH, generator=g) / WIDTH**0.5).bfloat16()
    return hidden, weight, torch.randint(0, V, (T,), generator=g)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(name: str, T: int, V: int, repeats: int, queue: multiprocessing.Queue) -> None:
    """Seconds of each forward and backward after one that is not counted, and MiB above the inputs."""
    hidden, weight, targets = inputs(T, V)
    (hidden[:8].detach() @ weight.T).float()  # the libraries' own buffers are not ours to count
    before, seconds = peak_mib(), []
    for _ in range(repeats + 1):
        hidden.grad = None
        began = time.perf_counter()
        CONTESTANTS[name](hidden, weight, targets).sum().backward()
        seconds.append(time.perf_counter() - began)
    queue.put((seconds[1:], peak_mib() - before))


def error(name: str, T: int, V: int) -> float:
    """Largest error of the gradient to the states against float64, as a share of its largest entry."""
    hidden, weight, targets = inputs(T, V)
    exact = hidden.detach().double().requires_grad_()
    dense_token_logps_double(exact, weight.double(), targets).sum().backward()
    CONTESTANTS[name](hidden, weight, targets).sum().backward()
    assert exact.grad is not None and hidden.grad is not None
    return float((hidden.grad.double() - exact.grad).abs().max() / exact.grad.abs().max())


def dense_token_logps_double(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for T, V in SHAPES:
        seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        peak = dict.fromkeys(CONTESTANTS, 0.0)
        for _ in range(2):
            for name in CONTESTANTS:
                queue = spawn.Queue()
                process = spawn.Process(target=run, args=(name, T, V, 2, queue))
                process.start()
                took, mib = queue.get()
                process.join()
                seconds[name] += took
                peak[name] = max(peak[name], mib)
        rows.append({"T": T, "V": V})
        rows[-1] |= {f"{name}_ms": round(1000 * statistics.median(s), 1) for name, s in seconds.items()}
        rows[-1] |= {f"{name}_peak_mib": round(mib, 1) for name, mib in peak.items()}
    errors = {name: error(name, 96, 5000) for name in CONTESTANTS}

    print(f"{'T':>6}{'V':>8}" + "".join(f"{name + ' ms':>14}{name + ' MiB':>14}" for name in CONTESTANTS))
    for row in rows:
        cells = "".join(f"{row[f'{name}_ms']:>14}{row[f'{name}_peak_mib']:>14}" for name in CONTESTANTS)
        print(f"{row['T']:>6}{row['V']:>8}" + cells)
    print("gradient error against float64, bf16:", ", ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    ratio = statistics.median(row["chunked_ms"] / row["dense_ms"] for row in rows)
    peak_of_last = rows[-1]["chunked_peak_mib"]
    print(json.dumps({"rows": rows, "chunked_over_dense": round(ratio, 3), "peak_mib": peak_of_last, "error": errors}))


if __name__ == "__main__":
    main()
