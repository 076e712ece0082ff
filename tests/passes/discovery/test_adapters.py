"""Adapters are left alone: modules and parameters of the shapes that PEFT, loralib and hand-written LoRA have; the real ones are in
the integrations' tests.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.discovery.adapters import ADAPTER


class Wrapping(nn.Module):
    """As PEFT's tuners have it: adapters by name, in dicts that the class lists, beside the layer."""

    adapter_layer_names = ("down", "up")

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base
        self.down = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.up = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.up["default"](self.down["default"](x))


class RawWrapping(nn.Module):
    """The same with parameters, as LoHa and LoKr have them."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b")

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base
        self.hada_w1_a = nn.ParameterDict({"default": nn.Parameter(torch.randn(base.out_features, rank))})
        self.hada_w1_b = nn.ParameterDict({"default": nn.Parameter(torch.randn(rank, base.in_features))})

    def forward(self, x):
        return self.base_layer(x) + x @ self.hada_w1_b["default"].t() @ self.hada_w1_a["default"].t()


class Merging(nn.Linear):
    """As loralib has it: a layer that adds its adapter into its own weight in evaluation mode."""

    def __init__(self, n, rank):
        super().__init__(n, n)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, n)), nn.Parameter(torch.randn(n, rank))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.lora_B @ self.lora_A
            self.merged = not mode
        return self

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.lora_A.t() @ self.lora_B.t()


class ByHand(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base, self.lora_down, self.lora_up = base, nn.Linear(16, rank, bias=False), nn.Linear(rank, 16, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_up(self.lora_down(x))


Encoder = type("PromptEncoder", (nn.Sequential,), {"__module__": "peft.tuners.p_tuning.model"})


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.base = Encoder(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, 16)

    def forward(self, x):
        return self.base(x) + self.encoder(x)


KINDS = {
    "wrapping": (lambda: Wrapping(nn.Linear(16, 16), 6), {"1.base_layer"}),
    "raw": (lambda: RawWrapping(nn.Linear(16, 16), 6), {"1.base_layer"}),
    "merging": (lambda: Merging(16, 6), set()),
    "by hand": (lambda: ByHand(nn.Linear(16, 16), 6), {"1.base"}),
    "prompts": (Prompted, {"1.base"}),
}


def net(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), KINDS[kind][0](), nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_never_squeezed(kind, training):
    model, x = net(kind).train(training), torch.randn(5, 12)
    adapters = {
        n
        for n, p in model.named_parameters()
        if p.ndim > 1 and n[0] == "1" and n[: -len(".weight")] not in KINDS[kind][1]
    }
    small = fxrank.factorize(model, x, rank=0.25, include="*")
    assert set(fxrank.plan_of(small).R) == {"0", "2", "3"} | KINDS[kind][1]
    assert adapters <= {name for name, _ in small.named_parameters()}
    reasons = {d.name: d.reason for d in fxrank.plan_of(small).layers if d.name[0] == "1" and not d.factorized}
    assert len(reasons) == len(adapters) and ADAPTER in reasons.values()
    assert set(reasons.values()) <= {ADAPTER, "the traced call does not reach it"}


def test_who_names_one_is_told():
    with pytest.raises(ValueError, match=r"layer '1\.down\.default' cannot be factorized: it belongs to an adapter"):
        fxrank.factorize(net("wrapping"), torch.randn(5, 12), rank={"1.down.default": 2})


def test_a_plan_that_names_one_is_applied_as_it_stands(monkeypatch):
    """Plans and files of earlier versions may have factorized them."""
    model, x = net("wrapping"), torch.randn(5, 12)
    with monkeypatch.context() as patch:
        patch.setattr(Wrapping, "adapter_layer_names", ())
        plan = fxrank.plan_of(fxrank.factorize(model, x, rank={"1.down.default": 2}))
    assert fxrank.factorize(model, x, plan).get_submodule("1.down.default").rank == 2
