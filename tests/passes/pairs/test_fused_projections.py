"""Queries, keys and values fused into one dense layer from factorized ones, as diffusers' `fuse_qkv_projections` does it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32, bias=bias) for _ in range(3))
        self.to_out, self.fused = nn.Linear(32, 32), False

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, -1) if self.fused else (f(x) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v))

    @torch.no_grad()
    def fuse_projections(self):
        layers = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([f.weight.data for f in layers])
        self.to_qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None)
        self.to_qkv.weight.copy_(weight)
        if self.to_qkv.bias is not None:
            self.to_qkv.bias.copy_(torch.cat([f.bias.data for f in layers]))
        self.fused = True


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_fused_is_exact_and_factorizes_again_without_loss(bias):
    model, x = nn.Sequential(nn.Linear(8, 32), Attention(bias), nn.Linear(32, 4)).eval(), torch.randn(2, 5, 8)
    small = fxrank.factorize(model, x, rank=0.25)
    wanted = small(x)
    small[1].fuse_projections()
    assert type(small[1].to_qkv) is nn.Linear
    assert torch.allclose(small(x), wanted, atol=1e-6)
    again = fxrank.factorize(small, x, rank={"1.to_qkv": 8}, form="qkv")
    assert isinstance(again[1].to_qkv, fxrank.FactorPair)
    assert torch.allclose(again(x), wanted, atol=1e-5)
