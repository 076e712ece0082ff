"""Quantizers after factorizing: torch's dynamic one, and tensors of a class of its own in the place of weights, as torchao has them."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import fxrank

if "fbgemm" not in torch.backends.quantized.supported_engines:
    pytest.skip("no engine for quantized layers", allow_module_level=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning"),
]


class Rounded(torch.Tensor):
    """A weight in eight bits, which knows the products of a linear layer and nothing else, as torchao's do."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)

    def __init__(self, weight):
        self.scale = weight.detach().abs().max() / 127
        self.int8 = (weight.detach() / self.scale).round().to(torch.int8)

    def dequantize(self):
        return self.int8 * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear and not isinstance(args[0], Rounded):
            return F.linear(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return args[0]
        raise NotImplementedError(f"unimplemented operator/function: {func}")


class Net(nn.Module):
    """Linear layers called, read, and within attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.attention = nn.Linear(8, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.middle, self.qkv, self.head = nn.Linear(32, 32), nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x):
        h = F.linear(self.middle(self.stem(x)), self.qkv.weight, self.qkv.bias)[..., :32]
        return self.head(self.attention(h, h, h, need_weights=False)[0])


def example():
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))


def rounded(model):
    """As torchao's `quantize_` does it, which passes the same class by as torch does."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear):
            layer.weight = nn.Parameter(Rounded(layer.weight), requires_grad=False)
    return model


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def close(found, wanted):
    """8 bits are 1/255 of the range, in some layers one after another."""
    return (found - wanted).abs().max() < 0.05 * wanted.abs().max()


QUANTIZERS = {"rounded": rounded, "dynamic": dynamic}


@pytest.mark.parametrize("form", ["channel", "qkv"])
@pytest.mark.parametrize("way", QUANTIZERS)
def test_a_factorized_model_is_quantized_as_a_dense_one(way, form):
    x = example()
    small = fxrank.factorize(Net().eval(), x, rank=0.3, form=form)
    wanted = small(x)
    quantized = QUANTIZERS[way](copy.deepcopy(small))
    assert {type(m) for m in (quantized.attention.out_proj.u, quantized.attention.out_proj.v)} == {
        NonDynamicallyQuantizableLinear
    }
    for layer in (quantized.middle.u, quantized.middle.v, quantized.qkv.u):
        assert isinstance(layer.weight, Rounded) if way == "rounded" else not isinstance(layer, nn.Linear)
    assert close(quantized(x), wanted) and not torch.equal(quantized(x), wanted)


@pytest.mark.parametrize("way", QUANTIZERS)
def test_save_and_merge_come_before(tmp_path, way):
    x = example()
    quantized = QUANTIZERS[way](fxrank.factorize(Net().eval(), x, rank=0.3))
    name = "stem" + (".weight" if way == "rounded" else "")
    for what, act in {
        "saving": lambda: fxrank.save(quantized, tmp_path / "q"),
        "merging": lambda: fxrank.merge(quantized),
    }.items():
        text = f"{what} must come before quantizing, which does not keep the numbers of the factors; {name!r} of this Net is quantized."
        with pytest.raises(TypeError, match=re.escape(text)):
            act()
    assert not (tmp_path / "q").exists()


def test_merged_attention_is_guarded_again():
    x = example()
    small = fxrank.factorize(Net().eval(), x, rank=0.3)
    assert type(fxrank.merge(small).attention.out_proj) is NonDynamicallyQuantizableLinear


def test_what_is_quantized_is_named_with_the_reason():
    x = example()
    model = Net().eval()
    model.middle.weight = nn.Parameter(Rounded(model.middle.weight), requires_grad=False)
    small = fxrank.factorize(model, x, rank=0.3)
    reasons = {d.name: d.reason for d in fxrank.plan_of(small).layers if not d.factorized}
    assert reasons["middle"] == "its weight is quantized; factorize before quantizing"
    assert small.qkv.rank == 9


def test_torchao():
    ao = pytest.importorskip("torchao.quantization")
    x = example()
    small = fxrank.factorize(Net().eval(), x, rank=0.3)
    quantized = copy.deepcopy(small)
    ao.quantize_(quantized, ao.Int8WeightOnlyConfig())
    assert close(quantized(x), small(x)) and not torch.equal(quantized(x), small(x))
    with pytest.raises(TypeError, match="saving must come before quantizing"):
        fxrank.save(quantized, "nowhere")
