"""Products with bf16 weights in fp32, against float64, and whether a model's layers use them where they should."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hps import products
from hps.logps import token_logps


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request, monkeypatch) -> bool:
    """Both kinds of CPU, whichever this one is."""
    monkeypatch.setattr(products, "bf16_is_emulated", lambda: request.param)
    return request.param


@pytest.mark.parametrize("part", [1, 40, 2**22])
def test_products_are_those_of_float64_rounded_to_fp32(monkeypatch, part):
    """A weight cut into parts of any size: parts of one row, of 5, and the whole."""
    monkeypatch.setattr(products, "PART", part)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 8, generator=g).bfloat16()
    x, grad = torch.randn(2, 3, 8, generator=g).bfloat16(), torch.randn(2, 3, 13, generator=g).bfloat16()
    for found, exact in (
        (products.times_transposed(x, weight), x.double() @ weight.double().T),
        (products.times(grad, weight), grad.double() @ weight.double()),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_is_no_further_from_float64_than_torchs(emulated):
    """Value and gradient of its input, with a bias; an adapter beside it still gets its own gradient."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 96).bfloat16().requires_grad_(False)
    x = torch.randn(1, 10, 64, generator=g).bfloat16()
    upstream = torch.randn(1, 10, 96, generator=g).bfloat16()
    exact = (x.double() @ layer.weight.double().T + layer.bias.double(), upstream.double() @ layer.weight.double())

    def errors() -> list[float]:
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.backward(upstream)
        assert y.dtype == inputs.grad.dtype == torch.bfloat16
        return [float((a.detach().double() - b.detach()).abs().max()) for a, b in zip((y, inputs.grad), exact)]

    plain = errors()
    products.use_fp32_products(layer)
    assert ("forward" in vars(layer)) == emulated
    assert all(a <= b for a, b in zip(errors(), plain))


def test_a_layer_that_trains_is_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "bf16_is_emulated", lambda: True)
    layer = products.use_fp32_products(nn.Linear(4, 3).bfloat16())
    layer(torch.ones(2, 4).bfloat16()).sum().backward()
    assert layer.weight.grad.tolist() == [[2.0] * 4] * 3


def test_a_model_of_either_kind_of_cpu_is_within_bf16_of_fp32(emulated):
    """Log-probs through the layers and the head; fp32 models are untouched."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    lm = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval().requires_grad_(False)
    ids, targets = torch.arange(20)[None], torch.arange(1, 21)

    def logps() -> torch.Tensor:
        return token_logps(lm.get_decoder()(input_ids=ids).last_hidden_state[0], lm.lm_head.weight, targets)

    exact = logps()
    products.use_fp32_products(lm)
    assert not any("forward" in vars(m) for m in lm.modules())
    products.use_fp32_products(lm.bfloat16())
    assert any("forward" in vars(m) for m in lm.modules()) == emulated
    torch.testing.assert_close(logps(), exact, rtol=0, atol=0.05)
