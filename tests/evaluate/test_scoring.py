"""What eval.py and scorers ask of a model: all responses in order, and the exact KL against scipy's."""

import numpy as np
import torch
from helpers import blocks_of, separate_logps, tiny
from scipy.stats import entropy

from hps import logps
from hps.evaluate import scoring
from hps.evaluate.scoring import score, token_kl
from hps.model import PolicyModel


def test_score_keeps_order_over_pieces(monkeypatch):
    """More candidates than a piece holds, scored in pieces, two blocks at a time, come back whole and in order."""
    monkeypatch.setattr(scoring, "MICRO_BATCHES_AT_ONCE", 2)
    lm, blocks = tiny("llama"), blocks_of(70, B=3)
    assert len(list(scoring.windows(blocks, budget=300))) == 2
    rows = list(score(PolicyModel(lm), blocks, device=torch.device("cpu"), budget=300, pad_id=0))
    expected = separate_logps(lm, blocks).detach().numpy()
    np.testing.assert_allclose(np.stack(rows), expected, rtol=1e-5, atol=1e-4)


def test_token_kl_against_scipy(monkeypatch):
    monkeypatch.setitem(logps.CHUNK_LOGITS, "cpu", 200)  # three chunks
    g = torch.Generator().manual_seed(9)
    (h, w), (r, v) = ((torch.randn(9, 8, generator=g), torch.randn(50, 8, generator=g)) for _ in range(2))
    p, q = torch.softmax(h.double() @ w.T.double(), -1), torch.softmax(r.double() @ v.T.double(), -1)
    by_scipy = np.array([entropy(a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)])
    np.testing.assert_allclose(token_kl(h, w, r, v).numpy(), by_scipy, rtol=1e-3, atol=1e-5)
    assert token_kl(h, w, h, w).max() == 0
