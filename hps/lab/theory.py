"""The paper's theorems, measured with their premises: `python -m hps.lab.theory` writes theory.json and THEORY.md.

Each `theorem...` function measures one statement of theory.toml: it returns rows of numbers, a verdict computed from
them ("holds", "does not hold", or "identity" where algebra leaves no choice) and what else the statement's text names.

The world of Theorem 1 meets its Assumption 1 exactly: r_theta(x, y) = <theta, phi(x, y)>, phi uniform on the sphere of
radius sqrt(D), so |r| <= sqrt(D) |theta| (alpha_0), |grad r| = sqrt(D) (alpha_1), no curvature (alpha_2 = 0). theta* is
the first unit vector, so r* is the first feature, of standard deviation 1. Rankings are Plackett-Luce at theta*: sorted
*scores*, r* plus Gumbel noise. By symmetry the minimiser of any expected loss is c theta*; consistency is c = 1.
"""

import math
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hps.config import parse, run_main
from hps.evaluate import md
from hps.io.files import write_json, write_text
from hps.losses import LOSSES, plackett_luce_loss, stage_loss
from hps.samplers import log_q

D = 8  # dimension of theta
B = 2.0  # Assumption 1b: |theta| <= B, so alpha_0 = B sqrt(D)
DELTA = 0.05  # the bounds hold with probability 1 - DELTA
CHUNK = 4_000_000  # float64 features held at once

Loss = Callable[[Tensor, Tensor], Tensor]  # (r_theta, r_est), both (P, n) in ranked order -> (P,)
Bound = Callable[[int, int], float]  # (m, n) -> the paper's bound with its constant set to 1
Row = dict[str, Any]
Statement = dict[str, Any]  # verdict, rows, and what else theory.toml names; in the report also its texts
WORDS = {True: "holds", False: "does not hold"}
TEXTS = tomllib.loads(Path(__file__).with_name("theory.toml").read_text(encoding="utf-8"))


@dataclass
class Options:
    out: str = "runs/theory"  # folder of theory.json and THEORY.md
    small: bool = False  # seconds instead of minutes: checks the path, not the claims


def hps(gamma: float, *, kappa_n: bool = True) -> Loss:
    """The full HPS loss (Eqs. 8-10), kappa = N = n - 1 or else 1; gamma = 0 with kappa = N is Eq. 6."""
    return lambda r, r_est: stage_loss(
        LOSSES["dpo"], r, log_q(r_est[:, 1:], gamma), beta=1.0, kappa=r.shape[1] - 1 if kappa_n else 1
    )


def pl(r: Tensor, r_est: Tensor) -> Tensor:
    """The Plackett-Luce loss of the whole ranking (Eqs. 4-5)."""
    return plackett_luce_loss(LOSSES["dpo"], r, beta=1.0)


def bt(r: Tensor, r_est: Tensor) -> Tensor:
    """The Bradley-Terry loss of the first against the last (Eq. 2)."""
    return stage_loss(LOSSES["dpo"], r[:, [0, -1]], r.new_zeros(len(r), 1), beta=1.0)


# ---- Theorem 1: estimation ------------------------------------------------------------------------


def zeta(n: int) -> float:
    """zeta(N) of Eq. 20, the least curvature of the logistic loss at rewards of at most alpha_0."""
    alpha_0 = B * math.sqrt(D)
    return 1 / (2 + math.exp(2 * alpha_0 + math.log(n - 1)) + math.exp(-2 * alpha_0))


def bound_hps(m: int, n: int) -> float:
    """Psi_1 of Theorem 1 without C_1: its leading term, O(n / sqrt(m)); the other one falls as 1/m."""
    return math.sqrt((D + math.log(1 / DELTA)) / m) / zeta(n)


def bound_pl(m: int, n: int) -> float:
    """Psi_2 of Theorem 1 without C_2, O(n^2 / sqrt(m))."""
    return math.sqrt(n**4 * math.exp(8 * B * math.sqrt(D)) * (D + math.log(1 / DELTA)) / m)


def ranked_prompts(replicates: int, m: int, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Data sets drawn from PL(theta*): features (R, m, n, D) and scores (R, m, n), float64, best first."""
    phi = torch.randn(replicates, m, n, D, generator=generator, dtype=torch.float64)
    phi *= math.sqrt(D) / phi.norm(dim=-1, keepdim=True)
    gumbel = -(-torch.rand(phi.shape[:3], generator=generator, dtype=torch.float64).log()).log()
    scores, order = (phi[..., 0] + gumbel).sort(dim=-1, descending=True)
    return phi.gather(2, order[..., None].expand_as(phi)), scores


def fit(loss: Loss, phi: Tensor, r_est: Tensor) -> Tensor:
    """theta of least mean loss (Eq. 11), (R, D), of each replicate phi (R, m, n, D), r_est (R, m, n)."""
    R, m, n, _ = phi.shape
    # From theta*: near the answer, and the losses are convex in theta, so it does not sway it.
    theta = torch.eye(D, dtype=torch.float64)[:1].repeat(R, 1).requires_grad_()
    stops = dict(max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-14)
    solver = torch.optim.LBFGS([theta], line_search_fn="strong_wolfe", **stops)

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss((phi @ theta[:, None, :, None]).reshape(R * m, n), r_est.reshape(R * m, n)).sum() / m
        value.backward()
        return value

    solver.step(closure)
    closure()
    assert theta.grad is not None and theta.grad.abs().max() < 1e-5 and theta.abs().max() < 50, "no finite minimiser"
    return theta.detach()


def semi_norm(delta: Tensor, phi: Tensor) -> Tensor:
    """|delta|_Sigma_D of Theorem 1, (R,), from (R, D) and phi (R, m, n, D).

    The mean over pairs of <delta, phi_j - phi_k>^2 is twice the sample variance of <delta, phi_j>.
    """
    return (2 * (phi @ delta[:, None, :, None])[..., 0].var(dim=2).mean(dim=1)).sqrt()


def measure(loss: Loss, *, m: int, n: int, replicates: int, seed: int, by_scores: bool = False) -> dict[str, float]:
    """Estimates of theta from `replicates` data sets of m prompts with n responses; the same data for every loss. q is
    built from r* or, `by_scores`, from the scores that were sorted into the ranking.

    Returns error and error_se, root mean square of |theta - theta*|_Sigma_D with its standard error; c and c_se, mean
    of <theta, theta*>.
    """
    generator = torch.Generator().manual_seed(seed + 7919 * n + 104729 * m)
    squares, along = [], []
    size = max(1, CHUNK // (m * n * D))
    for start in range(0, replicates, size):
        phi, scores = ranked_prompts(min(size, replicates - start), m, n, generator=generator)
        theta = fit(loss, phi, scores if by_scores else phi[..., 0])
        along.append(theta[:, 0])
        squares.append(semi_norm(theta - torch.eye(D, dtype=theta.dtype)[0], phi) ** 2)
    square, c = torch.cat(squares), torch.cat(along)
    error, root = square.mean().sqrt(), math.sqrt(replicates)
    values = {"error": error, "error_se": square.std() / root / (2 * error), "c": c.mean(), "c_se": c.std() / root}
    return {key: float(value) for key, value in values.items()}


def _rates(cells: list[dict[str, int]], losses: dict[str, tuple[Loss, Bound | None]], **draw: int) -> list[Row]:
    """A row for each loss and each m and n, with the paper's bound, constant 1, where there is one."""
    rows = []
    for (method, (loss, bound)), cell in product(losses.items(), cells):
        found = measure(loss, **cell, **draw)
        rows.append({"method": method} | cell | {key: found[key] for key in ("error", "error_se")})
        rows[-1] |= {"bound": bound(**cell)} if bound else {}
    return rows


def exponents(rows: list[Row], axis: str) -> tuple[dict[str, tuple[float, float]], str]:
    """Of each method a of the power law error ~ axis^a, m or n, with its standard error, and these as a text: least
    squares in logs, weighted by the errors of the logs."""
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [[row[key] for key in (axis, "error", "error_se")] for row in rows if row["method"] == method]
        x, y, y_se = np.array(mine).T
        (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, w=y / y_se, cov="unscaled")
        found[method] = float(slope), float(covariance[0, 0] ** 0.5)
    return found, ", ".join(f"{method} {value:.3f} +- {se:.3f}" for method, (value, se) in found.items())


def theorem1_in_m(*, ms: Sequence[int], n: int, replicates: int, seed: int) -> Statement:
    """Theorem 1, error against the number of prompts m; no rate is asserted for HPS with gamma != 0, nor for BT."""
    losses = {"Eq. 6": (hps(0), bound_hps), "PL": (pl, bound_pl), "HPS gamma 2": (hps(2), None), "BT": (bt, None)}
    rows = _rates([{"m": m, "n": n} for m in ms], losses, replicates=replicates, seed=seed)
    found, text = exponents(rows, "m")
    right = [abs(found[name][0] + 0.5) < 0.02 + 3 * found[name][1] for name in ("Eq. 6", "PL")]  # 0.02: m is finite
    return {"verdict": WORDS[all(right)], "rows": rows, "exponents": text}


def theorem1_in_n(*, m: int, ns: Sequence[int], replicates: int, seed: int) -> Statement:
    """Theorem 1, error against the number of responses n; that the bounds grow as n and n^2 is not what is judged."""
    losses: dict[str, tuple[Loss, Bound | None]] = {"Eq. 6": (hps(0), bound_hps), "PL": (pl, bound_pl)}
    rows = _rates([{"m": m, "n": n} for n in ns], losses, replicates=replicates, seed=seed)
    closer = all(eq6["error"] < full["error"] for eq6, full in zip(rows, rows[len(ns) :]))
    return {"verdict": WORDS[closer], "rows": rows, "exponents": exponents(rows, "n")[1]}


def theorem1_consistency(*, m: int, n: int, replicates: int, seed: int) -> Statement:
    """Theorem 1's premise that the expected loss is least at theta* (its proof: E[V] = 0): so for Eq. 6 and PL only."""
    methods: list[tuple[str, str, Loss]] = [("Eq. 6", "", hps(0)), ("PL", "", pl), ("BT", "", bt)]
    methods.append(("gamma 0, kappa 1", "", hps(0, kappa_n=False)))
    for source, gamma, kappa in product(("r*", "scores"), (1, 2, 5), "N1"):
        methods.append((f"gamma {gamma}, kappa {kappa}", source, hps(gamma, kappa_n=kappa == "N")))
    rows = []
    for method, source, loss in methods:
        found = measure(loss, m=m, n=n, replicates=replicates, seed=seed, by_scores=source == "scores")
        rows.append({"method": method, "q from": source} | {key: found[key] for key in ("c", "c_se", "error")})
    good = [abs(row["c"] - 1) < 4 * row["c_se"] + 10 / m for row in rows]  # the bias of a likelihood falls as 1 / m
    only = ", but for Eq. 6 (and PL)" if all(good[:2]) and not any(good[2:]) else ""
    return {"verdict": "holds" if all(good) else f"does not hold{only}", "rows": rows}


def margin_slopes(phi: Tensor, theta: Tensor, gamma: float) -> Tensor:
    """X of Appendix B.1: gradients in theta of g = r_1 - log N E_q[e^{r_j}], (m, D), from phi (m, n, D), q from r*."""
    weights = torch.softmax((phi @ theta)[:, 1:] + log_q(phi[:, 1:, 0], gamma), dim=1)
    return phi[:, 0] - (weights[..., None] * phi[:, 1:]).sum(1)


def theorem1_curvature(*, m: int, ns: Sequence[int], gammas: Sequence[float], thetas: int, seed: int) -> Statement:
    """Eq. 20 at random theta of the ball, with g as the loss has it; and at theta* the proof's next step, for which
    X'X / m has to be at least Sigma_D: `c` is the largest number for which it is at least c Sigma_D."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    for n, gamma in product(ns, gammas):
        phi = ranked_prompts(1, m, n, generator=generator)[0][0]
        mean_loss = partial(lambda theta, phi, loss: loss(phi @ theta, phi[..., 0]).mean(), phi=phi, loss=hps(gamma))
        drawn = torch.randn(thetas, D, generator=generator, dtype=torch.float64)
        drawn *= B * torch.rand(thetas, 1, generator=generator, dtype=torch.float64) / drawn.norm(dim=1, keepdim=True)
        excess = []
        for theta in drawn:
            X = margin_slopes(phi, theta, gamma)
            excess.append(float(torch.linalg.eigvalsh(torch.func.hessian(mean_loss)(theta) - zeta(n) * X.T @ X / m)[0]))
        X = margin_slopes(phi, torch.eye(D, dtype=phi.dtype)[0], gamma)
        off = phi - phi.mean(1, keepdim=True)
        root = torch.linalg.cholesky(2 * torch.einsum("mnd,mne->de", off, off) / (m * (n - 1))).inverse()  # of Sigma_D
        c = float(torch.linalg.eigvalsh(root @ (X.T @ X / m) @ root.T)[0])
        rows.append({"n": n, "gamma": float(gamma), "smallest eigenvalue": min(excess), "c": c})
    first, then = all(row["smallest eigenvalue"] > 0 for row in rows), all(row["c"] >= 1 for row in rows)
    return {"verdict": f"Eq. 20 {WORDS[first]}, X'X / m >= Sigma_D {WORDS[then]}", "rows": rows}


# ---- Theorem 2: gamma to infinity -----------------------------------------------------------------


def supremum(r: Tensor) -> Tensor:
    """sup over p of Eq. 12 for each prompt, (P,), r_theta (P, n): all mass on the largest dispreferred reward."""
    return F.softplus(r[:, 1:].amax(1) + math.log(r.shape[1] - 1) - r[:, 0])


def rewards(correlation: float, *, prompts: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """r_theta and r_est, (P, n) float64 standard normal, columns ranked by r_est."""
    noise = torch.randn(2, prompts, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    r_est = noise[0].sort(dim=1, descending=True).values
    return correlation * r_est + math.sqrt(1 - correlation**2) * noise[1], r_est


def theorem2_own_reward(*, gammas: Sequence[float], prompts: int, n: int, seed: int) -> Statement:
    """Theorem 2 with q built from r_theta, which its proof needs (it bounds gamma r_est where r_theta < M - eps)."""
    r, _ = rewards(0.0, prompts=prompts, n=n, seed=seed)
    losses = torch.stack([hps(gamma)(r, r) for gamma in gammas])
    gaps = supremum(r) - losses
    rises = bool((losses.diff(dim=0) > -1e-12).all())
    rows = [
        {"gamma": float(g), "loss": float(x.mean()), "gap": float(gap.mean()), "largest gap": float(gap.max())}
        for g, x, gap in zip(gammas, losses, gaps)
    ]
    reached = bool(gaps[-1].abs().max() < 1e-9)
    return {"verdict": WORDS[rises and reached], "rows": rows, "rises": "yes" if rises else "no"}


def theorem2_other_reward(*, correlations: Sequence[float], prompts: int, n: int, seed: int) -> Statement:
    """Theorem 2 as stated, q built from r_est: the limit is the loss against argmax r_est alone, which is the supremum
    where r_theta is largest for that same response."""
    rows = []
    for correlation in correlations:
        r, r_est = rewards(correlation, prompts=prompts, n=n, seed=seed)
        limit = hps(1e9)(r, r_est)  # for infinity
        gap = supremum(r) - limit
        agree = r[:, 1:].argmax(1) == 0
        row = {"correlation": correlation, "argmaxes agree": agree.double().mean(), "limit": limit.mean()}
        row |= {"supremum": supremum(r).mean(), "gap": gap.mean(), "gap_se": gap.std() / math.sqrt(prompts)}
        row["largest gap, agreeing"] = gap[agree].abs().max() if agree.any() else 0.0
        row["off pair loss"] = (limit - F.softplus(r[:, 1] + math.log(n - 1) - r[:, 0])).abs().max()
        rows.append({key: float(value) for key, value in row.items()})
    only = "does not hold, but where r_est and r_theta have the same argmax"
    return {"verdict": "holds" if all(abs(row["gap"]) < 1e-9 for row in rows) else only, "rows": rows}


# ---- Theorem 3: the margin ------------------------------------------------------------------------


def margin(r: Tensor) -> Tensor:
    """r_1 - max_{j > 1} r_j of each prompt (Eq. 14), (P,), from r_theta (P, n)."""
    return r[:, 0] - r[:, 1:].amax(1)


def limiting_loss(r: Tensor, log_p: Tensor) -> Tensor:
    """-log(e^{r_1} / E_p e^{r_j}) of each prompt (Eq. 13), (P,), from r_theta (P, n) and log p (P, n - 1)."""
    return torch.logsumexp(r[:, 1:] + log_p, dim=1) - r[:, 0]


def theorem3_identity(*, prompts: int, n: int, seed: int) -> Statement:
    """Theorem 3's first step. Not asserted: that leaving out log N "does not change the minimizers": loss - log N -
    Eq. 13 = log(1 + e^margin / N) is negligible for margins well below log N only."""
    generator = torch.Generator().manual_seed(seed)
    r = 3 * torch.randn(prompts, n, generator=generator, dtype=torch.float64)
    one_hot = torch.stack([limiting_loss(r, log_p) for log_p in torch.eye(n - 1, dtype=r.dtype).log()])
    some = 3 * torch.randn(50, prompts, n - 1, generator=generator, dtype=r.dtype)
    mixed = torch.stack([limiting_loss(r, log_p) for log_p in torch.log_softmax(some, dim=2)])
    off, excess = float((one_hot.amax(0) + margin(r)).abs().max()), float((mixed + margin(r)).max())
    rows = []
    for N, size in product((4, 99, 999), (0.0, 2.0, 5.0)):
        r_pair = torch.tensor([[size] + [0.0] * N], dtype=torch.float64)
        rows.append({"N": N, "margin": size, "left out": float(hps(0)(r_pair, r_pair)) - math.log(N) + size})
    verdict = "identity" if off < 1e-12 and excess < 1e-12 else "does not hold"
    return {"verdict": verdict, "rows": rows, "off": off, "excess": excess}


def ascend(phi: Tensor, *, steps: int, rate: float, unit: bool) -> tuple[list[float], float]:
    """Mean margin at every subgradient step on it and the last |theta|; r_theta = <phi, theta>, phi (m, n, D).

    unit: theta is scaled back to length 1 after every step; else nothing holds it (no KL term, no bound).
    """
    theta, prompt, margins = phi.new_full((D,), D**-0.5), torch.arange(len(phi)), []
    for _ in range(steps):
        r = phi @ theta
        margins.append(float(margin(r).mean()))
        theta = theta + rate * (phi[:, 0] - phi[prompt, 1 + r[:, 1:].argmax(1)]).mean(0)
        theta = theta / theta.norm() if unit else theta
    return margins, float(theta.norm())


def theorem3_minimiser(*, ns: Sequence[int], m: int, steps: int, seed: int) -> Statement:
    """Theorem 3's theta*, the maximiser of the mean margin, for rewards linear in theta: margin(c theta) is
    c margin(theta), so a positive one grows without bound, and where none is positive theta = 0 attains the maximum."""
    rows = []
    for ranking, n in product(("by r*", "PL"), ns):
        phi, _ = ranked_prompts(1, m, n, generator=torch.Generator().manual_seed(seed))
        if ranking == "by r*":
            phi = phi.gather(2, phi[..., :1].argsort(dim=2, descending=True).expand_as(phi))
        free, length = ascend(phi[0], steps=steps, rate=0.1, unit=False)
        unit, _ = ascend(phi[0], steps=steps, rate=0.1, unit=True)
        diverges, collapses = free[-1] > 1.5 * free[steps // 2] > 0, unit[-1] < 0 and length < 0.3
        outcome = "diverges" if diverges else "collapses to 0" if collapses else "neither"
        row = {"ranking": ranking, "n": n, "margin, length 1": unit[-1], "free, half way": free[steps // 2]}
        rows.append(row | {"free, end": free[-1], "length, end": length, "outcome": outcome})
    neither = any(row["outcome"] == "neither" for row in rows)
    return {"verdict": "undecided" if neither else "does not hold without a bound on theta or a KL term", "rows": rows}


# ---- the report -----------------------------------------------------------------------------------


def sizes(small: bool) -> dict[Callable[..., Statement], dict[str, Any]]:
    """The arguments of each statement's function, for minutes or for a few seconds."""
    ms, ns = ((200, 400, 800), (3, 10)) if small else ((200, 400, 800, 1600, 3200), (3, 10, 30, 100))
    sets, drawn = dict(replicates=16 if small else 100), dict(prompts=500 if small else 5000, n=20)
    return {
        theorem1_in_m: dict(ms=ms, n=5, **sets),
        theorem1_in_n: dict(m=400, ns=ns, **sets),
        theorem1_consistency: dict(m=800 if small else 4000, n=10, replicates=16),
        theorem1_curvature: dict(m=400, ns=(3, 10, 30), gammas=(0, 1, 5), thetas=3 if small else 20),
        theorem2_own_reward: dict(gammas=(0, 1, 2, 5, 10, 30, 100, 1e3, 1e9), **drawn),
        theorem2_other_reward: dict(correlations=(0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0), **drawn),
        theorem3_identity: drawn,
        theorem3_minimiser: dict(ns=(2, 10), m=500 if small else 2000, steps=400),
    }


def statements(of_each: dict[Callable[..., Statement], dict[str, Any]]) -> dict[str, Statement]:
    """All statements by the names of their functions."""
    found = {}
    for statement, options in of_each.items():
        found[statement.__name__] = each = statement(**options, seed=0)
        each |= {key: text.strip().format(D=D, **options, **each) for key, text in TEXTS[statement.__name__].items()}
    return found


def write(found: dict[str, Statement], out: Path, *, seconds: float) -> None:
    """Write theory.json, last, and THEORY.md under `out`, which is made if missing."""

    def table(rows: Sequence[Row]) -> str:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(key, "") for key in columns] for row in rows]
        return md.table(columns, [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in cells])

    out.mkdir(parents=True, exist_ok=True)
    parts = ["# The theorems, measured", f"`python -m hps.lab.theory`, {seconds:.0f} CPU seconds."]
    parts += [table([{key: s[key] for key in ("title", "claim", "verdict")} for s in found.values()])]
    for s in found.values():
        summary = [md.wrapped(f"* {key.title()}: {s[key]}.") for key in ("premise", "claim", "verdict")]
        parts += [f"## {s['title']}", "\n".join(summary), table(s["rows"]), md.wrapped(s["note"])]
    write_text(out / "THEORY.md", "\n\n".join(parts) + "\n")
    write_json(out / "theory.json", found)


def main() -> None:
    options, _ = parse(Options, prog="python -m hps.lab.theory", description="The paper's theorems, measured.")
    out, began = Path(options.out), time.process_time()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    found = statements(sizes(options.small))
    seconds = time.process_time() - began
    write(found, out, seconds=seconds)
    for s in found.values():
        print(f"{s['title']}: {s['claim']}: {s['verdict'].upper()}")
    print(f"{seconds:.0f} CPU seconds; {out / 'THEORY.md'}")


if __name__ == "__main__":
    run_main(main)
