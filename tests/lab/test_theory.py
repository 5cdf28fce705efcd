"""The theorems' statements against scipy, brute force and hand algebra, in worlds small enough for both."""

import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import linalg, optimize

from hps.lab import theory


def data(replicates: int, m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return theory.ranked_prompts(replicates, m, n, generator=torch.Generator().manual_seed(seed))


def by_hand(name: str, r: np.ndarray, r_est: np.ndarray) -> float:
    """Mean loss of (P, n) rewards in ranked order, as the paper writes it: plain exponentials, no log-space."""
    e, n = np.exp(r), r.shape[1]
    if name == "PL":
        return float(sum(-np.log(e[:, j] / e[:, j:].sum(1)) for j in range(n)).mean())
    if name == "BT":
        return float(-np.log(e[:, 0] / (e[:, 0] + e[:, -1])).mean())
    gamma, kappa = {"Eq. 6": (0, n - 1), "HPS": (2, n - 1), "HPS, one": (2, 1)}[name]
    q = np.exp(gamma * r_est[:, 1:])
    q /= q.sum(1, keepdims=True)
    return float(-np.log(e[:, 0] / (e[:, 0] + kappa * (q * e[:, 1:]).sum(1))).mean())


LOSSES = {"Eq. 6": theory.hps(0), "PL": theory.pl, "BT": theory.bt, "HPS": theory.hps(2)}
LOSSES["HPS, one"] = theory.hps(2, kappa_n=False)


# ---- Theorem 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_estimates_are_scipys(name):
    """Two data sets fitted at once give what scipy finds for each alone, with the losses written by hand."""
    phi, _ = data(2, 150, 4)
    r_est = phi[..., 0]
    found = theory.fit(LOSSES[name], phi, r_est)
    for i in range(2):
        features, est = phi[i].numpy(), r_est[i].numpy()
        fitted = optimize.minimize(lambda t, x=features, e=est: by_hand(name, x @ t, e), np.zeros(theory.D), tol=1e-10)
        np.testing.assert_allclose(found[i].numpy(), fitted.x, atol=1e-5)


def test_semi_norm_is_the_papers_matrix():
    phi, _ = data(2, 7, 4)
    delta = torch.randn(2, theory.D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i in range(2):
        sigma = sum(torch.outer(z, z) for x in phi[i] for j in range(4) for k in range(j + 1, 4) for z in [x[j] - x[k]])
        sigma = 2 / (7 * 4 * 3) * sigma
        expected = (delta[i] @ sigma @ delta[i]).sqrt()
        torch.testing.assert_close(theory.semi_norm(delta, phi)[i], expected)


def test_bounds_have_the_papers_orders():
    a = 2 * math.sqrt(8)
    for m, n in ((50, 5), (400, 21)):
        root = math.sqrt((8 + math.log(20)) / m)
        assert theory.bound_hps(m, n) == pytest.approx(root * (2 + (n - 1) * math.exp(2 * a) + math.exp(-2 * a)))
        assert theory.bound_pl(m, n) == pytest.approx(root * n**2 * math.exp(4 * a))


def test_exponent_of_a_power_law():
    """Two points with relative errors e: the slope's error is sqrt(2) e / log(x2 / x1)."""
    rows = [{"method": "a", "m": m, "error": error, "error_se": 0.1 * error} for m, error in ((1, 2.0), (4, 1.0))]
    found, text = theory.exponents(rows, "m")
    assert found["a"] == pytest.approx((-0.5, math.sqrt(2) * 0.1 / math.log(4))) and text == "a -0.500 +- 0.102"


def gradients_at_truth(loss, phi: torch.Tensor) -> torch.Tensor:
    """Gradient in theta of each prompt's loss at theta*, (P, D), q from r*."""
    r = phi[0, ..., 0].clone().requires_grad_()
    (by_reward,) = torch.autograd.grad(loss(r, phi[0, ..., 0]).sum(), r)
    return torch.einsum("pn,pnd->pd", by_reward, phi[0])


def test_only_likelihoods_have_no_gradient_at_truth():
    """z of each of the D components over 20,000 prompts: Eq. 6 and PL as noise, gamma = 5 far off along theta*."""
    phi, _ = data(1, 20_000, 6)

    def z(loss):
        g = gradients_at_truth(loss, phi)
        return (g.mean(0) / g.std(0) * math.sqrt(len(g))).abs()

    assert z(theory.hps(0)).max() < 4 and z(theory.pl).max() < 4
    assert z(theory.hps(5))[0] > 50 and z(theory.hps(5))[1:].max() < 4
    assert z(theory.bt)[0] > 50


def fisher(loss, m: int, n: int) -> float:
    """sqrt(tr(Sigma I^-1) / m), the asymptotic error of a likelihood; I is the second moment of gradients at theta*,
    and Sigma = 2 I: phi has covariance I."""
    g = gradients_at_truth(loss, data(1, 50_000, n, seed=9)[0])
    return float((2 * (g.T @ g / len(g)).inverse().trace() / m).sqrt())


def test_errors_fall_as_the_root_of_m_as_fisher_says():
    found = theory.theorem1_in_m(ms=(200, 800), n=5, replicates=24, seed=1)
    rows = {(row["method"], row["m"]): row for row in found["rows"]}
    for method in ("Eq. 6", "PL"):
        for m in (200, 800):
            row, expected = rows[method, m], fisher(LOSSES[method], m, 5)
            assert abs(row["error"] - expected) < 3 * row["error_se"] + 0.03 * expected
        assert rows[method, 200]["error"] / rows[method, 800]["error"] == pytest.approx(2, rel=0.3)
        assert rows[method, 200]["bound"] == pytest.approx(2 * rows[method, 800]["bound"])
    assert rows["PL", 200]["bound"] == theory.bound_pl(200, 5) and found["exponents"].startswith("Eq. 6 -0.4")
    assert rows["HPS gamma 2", 800]["error"] > 0.9 * rows["HPS gamma 2", 200]["error"]
    assert "bound" not in rows["BT", 200]
    assert found["verdict"] == "holds"


def test_standard_errors_are_the_spread_over_seeds():
    found = [theory.measure(theory.pl, m=200, n=3, replicates=12, seed=seed) for seed in range(40)]
    for key in ("error", "c"):
        spread = np.std([row[key] for row in found], ddof=1)
        assert np.mean([row[f"{key}_se"] for row in found]) == pytest.approx(spread, rel=0.35)


def test_consistency_table():
    """And who is closer as n grows: PL."""
    found = theory.theorem1_in_n(m=300, ns=(3, 12), replicates=8, seed=0)
    eq6, full = [row["error"] for row in found["rows"][:2]], [row["error"] for row in found["rows"][2:]]
    assert full[0] < eq6[0] and full[1] < eq6[1] / 2 and found["verdict"] == "does not hold"
    found = theory.theorem1_consistency(m=500, n=5, replicates=4, seed=0)
    c = {(row["method"], row["q from"]): row["c"] for row in found["rows"]}
    assert len(c) == 16 and found["verdict"].startswith("does not hold, but for Eq. 6")
    assert c["gamma 5, kappa N", "r*"] < 0 < c["gamma 5, kappa N", "scores"] < 1


# ---- Theorem 2 ------------------------------------------------------------------------------------


def test_supremum_of_eq_12_by_brute_force():
    r = np.random.default_rng(0).normal(size=(20, 6))
    p = np.concatenate([np.eye(5), np.random.default_rng(1).dirichlet(np.full(5, 0.3), size=500)])
    losses = -np.log(np.exp(r[:, :1]) / (np.exp(r[:, :1]) + 5 * np.exp(r[:, 1:]) @ p.T))  # (prompts, p)
    np.testing.assert_allclose(theory.supremum(torch.from_numpy(r)), losses.max(1), atol=1e-12)


def test_limits_of_gamma_by_hand():
    """r_est prefers the second response, r_theta the third: the limit is 1 + log 2, the supremum 2 + log 2."""
    r, r_est = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.tensor([[5.0, 4.0, 3.0]]).double()
    assert float(theory.hps(1e9)(r, r_est)) == pytest.approx(np.log1p(2 * math.e), abs=1e-12)
    assert float(theory.supremum(r)) == pytest.approx(np.log1p(2 * math.e**2), abs=1e-12)
    assert float(theory.hps(1e9)(r, r)) == pytest.approx(np.log1p(2 * math.e**2), abs=1e-12)


def test_own_reward_rises_to_the_supremum():
    found = theory.theorem2_own_reward(gammas=(0, 1, 4, 16, 1e9), prompts=300, n=8, seed=0)
    gaps = [row["gap"] for row in found["rows"]]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.3 and abs(gaps[-1]) < 1e-12
    assert found["rises"] == "yes" and found["verdict"] == "holds"
    falling = theory.theorem2_own_reward(gammas=(16, 4), prompts=300, n=8, seed=0)
    assert falling["rises"] == "no" and falling["verdict"] == "does not hold"


def test_other_reward_stays_below_the_supremum():
    found = theory.theorem2_other_reward(correlations=(0.0, 0.9, 1.0), prompts=4000, n=9, seed=0)
    none, high, same = found["rows"]
    assert none["argmaxes agree"] == pytest.approx(1 / 8, abs=4 * math.sqrt(7 / 64 / 4000))
    assert none["gap"] > high["gap"] > 10 * high["gap_se"] > 0 == pytest.approx(same["gap"], abs=1e-12)
    for row in found["rows"]:
        assert row["off pair loss"] < 1e-12 and row["largest gap, agreeing"] < 1e-12
        assert row["supremum"] - row["limit"] == pytest.approx(row["gap"])
    assert same["argmaxes agree"] == 1 and found["verdict"].startswith("does not hold")
    r, r_est = theory.rewards(0.9, prompts=4000, n=9, seed=0)
    assert np.corrcoef(r.flatten(), r_est.flatten())[0, 1] == pytest.approx(0.9, abs=0.01)
    assert (r_est.diff(dim=1) <= 0).all()


# ---- Theorem 3 ------------------------------------------------------------------------------------


def test_supremum_of_eq_13_is_minus_the_margin():
    found = theory.theorem3_identity(prompts=200, n=7, seed=0)
    assert found["off"] < 1e-12 and found["excess"] < 0 and found["verdict"] == "identity"
    for row in found["rows"]:
        assert row["left out"] == pytest.approx(math.log1p(math.exp(row["margin"]) / row["N"]), abs=1e-12)
    r, log_p = np.array([[1.0, 4.0, 2.0]]), np.log([[0.25, 0.75]])
    expected = float(np.log(0.25 * np.exp(4) + 0.75 * np.exp(2))) - 1
    assert float(theory.limiting_loss(torch.from_numpy(r), torch.from_numpy(log_p))) == pytest.approx(expected)
    assert float(theory.margin(torch.from_numpy(r))) == -3


def test_margin_diverges_or_collapses():
    found = theory.theorem3_minimiser(ns=(2, 12), m=400, steps=200, seed=0)
    rows = {(row["ranking"], row["n"]): row for row in found["rows"]}
    outcomes = {key: row["outcome"] for key, row in rows.items()}
    assert outcomes.pop(("PL", 12)) == "collapses to 0" and set(outcomes.values()) == {"diverges"}
    assert rows["PL", 12]["margin, length 1"] < 0
    # With n = 2 the mean margin is <theta, v>, v the mean of phi_1 - phi_2: at length 1 its maximum is |v|, and a
    # free step adds rate |v|^2.
    phi, _ = data(1, 400, 2)
    v = (phi[0, :, 0] - phi[0, :, 1]).mean(0)
    assert rows["PL", 2]["margin, length 1"] == pytest.approx(float(v.norm()), rel=1e-6)
    growth = rows["PL", 2]["free, end"] - rows["PL", 2]["free, half way"]
    assert growth == pytest.approx(99 * 0.1 * float(v @ v), rel=1e-9)


def test_curvature_by_finite_differences():
    """X of Appendix B.1 and the smallest eigenvalue of Eq. 20 from the loss by hand; c from scipy's eigenvalues."""
    found = theory.theorem1_curvature(m=60, ns=(4,), gammas=(2,), thetas=1, seed=3)["rows"][0]
    generator = torch.Generator().manual_seed(3)
    phi = theory.ranked_prompts(1, 60, 4, generator=generator)[0][0]
    theta = torch.randn(1, theory.D, generator=generator, dtype=torch.float64)
    theta *= theory.B * torch.rand(1, 1, generator=generator, dtype=torch.float64) / theta.norm()
    x, t, est = phi.numpy(), theta[0].numpy(), phi[..., 0].numpy()

    def slopes(at):  # g by hand: its loss is log(1 + e^-g)
        def g(p, i):
            return -np.log(np.expm1(by_hand("HPS", (x[i] @ p)[None], est[i][None])))

        return np.array([optimize.approx_fprime(at, g, 1e-7, i) for i in range(60)])

    X, step, unit = slopes(t), 1e-3, np.eye(theory.D)
    np.testing.assert_allclose(theory.margin_slopes(phi, theta[0], 2).numpy(), X, atol=1e-5)

    def value(p):
        return by_hand("HPS", x @ p, est)

    def second(a, b):
        return (value(t + a + b) - value(t + a - b) - value(t - a + b) + value(t - a - b)) / (4 * step**2)

    hessian = np.array([[second(a, b) for b in step * unit] for a in step * unit])
    expected = np.linalg.eigvalsh(hessian - theory.zeta(4) * X.T @ X / 60)[0]
    assert found["smallest eigenvalue"] == pytest.approx(expected, abs=1e-5) and expected > 0
    truth = slopes(unit[0])
    pairs = [np.outer(z, z) for p in x for j in range(4) for k in range(j + 1, 4) for z in [p[j] - p[k]]]
    sigma = 2 * sum(pairs) / (60 * 4 * 3)
    assert found["c"] == pytest.approx(linalg.eigvalsh(truth.T @ truth / 60, sigma)[0], rel=1e-5)
    assert found["c"] < 1


# ---- the report -----------------------------------------------------------------------------------


def test_everything_is_written_and_read_back(tmp_path, monkeypatch):
    """Of all statements, measured on next to nothing."""
    few = dict(prompts=50, n=5)
    sizes = {
        theory.theorem1_in_m: dict(ms=(200, 300), n=4, replicates=3),
        theory.theorem1_in_n: dict(m=100, ns=(3, 4), replicates=3),
        theory.theorem1_consistency: dict(m=100, n=4, replicates=2),
        theory.theorem1_curvature: dict(m=50, ns=(3,), gammas=(1,), thetas=1),
        theory.theorem2_own_reward: dict(gammas=(0, 1e9), **few),
        theory.theorem2_other_reward: dict(correlations=(0.0, 1.0), **few),
        theory.theorem3_identity: few,
        theory.theorem3_minimiser: dict(ns=(2,), m=50, steps=10),
    }
    for small in (True, False):
        asked = theory.sizes(small)
        assert {name: options.keys() for name, options in asked.items()} == {f: s.keys() for f, s in sizes.items()}
    assert [function.__name__ for function in sizes] == list(theory.TEXTS)
    out = tmp_path / "new/folder"
    monkeypatch.setattr(theory, "sizes", lambda small: sizes)
    monkeypatch.setattr("sys.argv", ["theory", f"--out={out}"])
    theory.main()
    found = theory.statements(sizes)
    assert {path.name for path in out.iterdir()} == {"theory.json", "THEORY.md"}
    assert json.loads((out / "theory.json").read_text()) == json.loads(json.dumps(found))
    page = (out / "THEORY.md").read_text()
    lines = [{cell.strip() for cell in line.split("|")} for line in page.splitlines()]
    for statement in found.values():
        assert statement["title"] in page and f"* Verdict: {statement['verdict']}" in " ".join(page.split())
        assert not re.search("[{}]", statement["premise"] + statement["note"])
        for row in statement["rows"]:
            cells = {f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()}
            assert any(cells <= line for line in lines), row
