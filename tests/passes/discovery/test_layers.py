import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates, require_some
from fxrank.passes.tracing.trace import trace


def found(model, x, **options):
    layers = candidates(discover(trace(model, x), model), model, **options)
    return {layer.name: layer for layer in layers}


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.plain = nn.Conv2d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.table = nn.Embedding(10, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.read = nn.Linear(4, 4)
        self.raw = nn.Parameter(torch.randn(4, 4))
        self.unused = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, tokens):
        x = self.up(self.depthwise(self.plain(self.first(x)))).flatten(2)
        x = self.line(x).transpose(1, 2)[:, : tokens.shape[1]] + self.table(tokens)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.recurrent(x)[0]
        x = F.linear(x, self.read.weight) @ self.raw
        return self.head(self.norm(x))


def test_every_layer_is_listed_with_its_reason():
    model = Zoo()
    layers = found(model, (torch.randn(2, 3, 4, 4), torch.zeros(2, 6, dtype=torch.long)))
    reasons = {name: layer.reason for name, layer in layers.items()}
    assert reasons["plain"] is None
    assert reasons["first"] == "first layer of the graph, left dense by default"
    assert reasons["head"] == "last layer of the graph, left dense by default"
    for name in ("up", "line", "recurrent.weight_ih_l0", "attention.in_proj_weight", "read", "raw"):
        assert reasons[name] is None, name
    assert reasons["table"] == "first layer of the graph, left dense by default"
    assert reasons["depthwise"] == "a pair of rank 1 would not save anything: break-even is 0.9"
    assert reasons["unused"] == "the traced call does not reach it"
    matrices = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim >= 2}
    assert set(reasons) == matrices
    assert layers["depthwise"].full_rank == 1
    assert layers["depthwise"].break_even_rank < 1


def test_counts():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 9, 5))
    layers = found(model, torch.randn(2, 3, 10, 10))
    grouped, head = layers["1"], layers["3"]
    assert (grouped.groups, grouped.rows, grouped.cols, grouped.full_rank) == (2, 3, 36, 3)
    assert grouped.parameters == model[1].weight.numel()
    assert grouped.macs == 2 * 6 * 9 * 36
    assert head.macs == 2 * 54 * 5
    pair = fxrank.factorize(model, torch.randn(2, 3, 10, 10), rank={"1": 2}).get_submodule("1")
    assert grouped.pair_parameters(2) == pair.u.weight.numel() + pair.v.weight.numel()
    assert grouped.break_even_rank == 3 * 36 / 39


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.alias = self.a
        self.table = nn.Embedding(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.table.weight
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.b(self.a(self.alias(self.stem(x))))
        return self.head(self.decoder(x) + self.table(torch.zeros(1, dtype=torch.long)))


def test_one_layer_per_unique_weight():
    model = Tied()
    x = torch.randn(2, 4)
    layers = found(model, x)
    assert set(layers) == {"stem", "a", "table", "head"}
    assert layers["a"].paths == ("a", "alias", "b")
    assert len(layers["a"].nodes) == 3
    assert layers["a"].macs == 3 * 2 * 16
    assert layers["table"].kind == "tied embedding"
    assert layers["table"].reason == "first layer of the graph, left dense by default"
    with pytest.warns(UserWarning, match="break-even"):
        small = fxrank.factorize(model, x, rank=1.0)
    assert small.alias is small.a
    assert small.a is not small.b
    assert small.a.u.weight is small.b.u.weight
    assert small.a.v.weight is small.b.v.weight
    assert small.a.bias is not small.b.bias
    assert small.decoder.weight is small.table.weight
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)  # four float32 layers


def test_derived_weights_are_layers_under_the_name_of_their_module():
    model = nn.Sequential(
        nn.Linear(4, 4),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    layers = found(model, torch.randn(2, 4))
    assert list(layers) == ["0", "1", "2", "3"]
    kept = "Linear has no factor pair that keeps what SpectralNorm makes of its weight"
    assert [layers[n].reason for n in ("1", "2")] == [None, kept]
    assert (layers["2"].kind, layers["2"].guarded, layers["2"].supported) == ("linear", True, False)
    assert layers["1"].weight_shape == (4, 4)
    with pytest.warns(FutureWarning, match="weight_norm"):
        model[1] = weight_norm(nn.Linear(4, 4))
    assert found(model, torch.randn(2, 4))["1"].reason is None
    assert parametrize.is_parametrized(model[2])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.middle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x, y):
        z = self.middle(self.left(x) + self.right(y))
        return self.one(z), self.two(z)


def test_first_and_last_are_found_by_position():
    x = torch.randn(2, 4)
    boundary = {n: layer.boundary for n, layer in found(Branches(), (x, x)).items()}
    assert boundary == {"left": "first", "right": "first", "middle": None, "one": "last", "two": "last"}


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 6)),
        nn.Linear(6, 2),
    )


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, {"1", "2.0", "2.2"}),
        ({"include": "*"}, {"0", "1", "2.0", "2.2", "3"}),
        ({"include": ["0"]}, {"0", "1", "2.0", "2.2"}),
        ({"exclude": "2.*"}, {"1"}),
        ({"exclude": re.compile(r"^\d$")}, {"2.0", "2.2"}),
        ({"exclude": "re:0$"}, {"1", "2.2"}),
        ({"exclude": nn.Linear}, {"1", "2.0"}),
        ({"include": "*", "exclude": [nn.Conv2d, "3"]}, {"2.2"}),
    ],
)
def test_selection(options, left):
    layers = found(sequential(), torch.randn(2, 3, 7, 7), **options)
    assert {n for n, layer in layers.items() if layer.reason is None} == left


def test_selection_by_module_and_its_errors():
    model = sequential()
    x = torch.randn(2, 3, 7, 7)
    layers = found(model, x, exclude=model[2])
    assert layers["2.0"].reason == "excluded by the user"
    with pytest.raises(
        ValueError,
        match=re.escape(
            "each selector in exclude must match at least one layer; '2.9' matches none of 5. Nearest names: 2.2, 2.0"
        ),
    ):
        found(model, x, exclude="2.9")
    with pytest.raises(
        TypeError, match="include takes names, globs, regular expressions, module classes or modules; got int"
    ):
        found(model, x, include=[3])


def test_nothing_to_factorize_lists_every_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 1, 1), nn.Linear(4, 2))  # (1, 4) is one channel
    layers = candidates(discover(trace(model, torch.randn(1, 4)), model), model)
    with pytest.raises(fxrank.NothingToFactorizeError) as caught:
        require_some(layers)
    text = str(caught.value)
    assert text.startswith("at least one layer must be factorizable; 0 of 3 are:\n  0 (linear): first layer")
    assert "\n  1 (conv1d): a pair of rank 1 would not save anything: break-even is 0.5\n" in text
    assert "'*' takes everything" in text


def test_no_weight_at_all():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(
        fxrank.NothingToFactorizeError, match=re.escape("0 of 0 are:\n  (no weight matrix at all)\nName layers")
    ):
        require_some(candidates(discover(trace(model, torch.randn(1, 4)), model), model))


class Three(nn.Module):
    """a → b → c; the subclasses do something more with `b`."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Looks(Three):
    """As T5 and CLIP do."""

    def forward(self, x):
        x = self.a(x)
        if isinstance(self.b.weight, torch.Tensor) and self.b.weight.dtype != torch.int8:
            x = x.to(self.b.weight.dtype).to(self.b.weight.device)
        assert self.b.weight.is_contiguous()
        return self.c(self.b(x).view(-1, self.b.weight.shape[0]))


class ReadsAndCalls(Three):
    def forward(self, x):
        return self.c(F.linear(self.b(self.a(x)), self.b.weight))


class CallsThenReads(Three):
    def forward(self, x):
        return self.c(self.a(x) @ self.b.weight + self.b(x))


class Assigns(Three):
    def forward(self, x):
        x = self.b(self.a(x))
        self.b.weight[0] = 0
        return self.c(x)


class Returns(Three):
    def forward(self, x):
        return super().forward(x), self.b.weight


def test_a_weight_that_is_only_looked_at_stays_free():
    model, x = Looks(), torch.randn(2, 4)
    layers = found(model, x)
    assert layers["b"].reason is None
    assert layers["b"].boundary is None
    assert layers["b"].nodes == ("b",)
    small = fxrank.factorize(model, x, rank=1)
    assert small(x).shape == model(x).shape
    assert set(fxrank.plan_of(small).R) == {"b"}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ReadsAndCalls, None),  # products are answered through the factors
        (CallsThenReads, "first layer of the graph, left dense by default"),
        (Assigns, "its numbers are read by setitem, which needs the whole matrix"),
        (Returns, "its numbers are read by output, which needs the whole matrix"),
    ],
)
def test_a_weight_whose_numbers_are_read(model, reason):
    assert found(model(), torch.randn(2, 4))["b"].reason == reason


class UnreachedTable(Three):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.b.weight = self.table.weight


class SecondName(Three):
    def __init__(self):
        super().__init__()
        self.raw = self.b.weight


class OtherGroups(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1)
        self.d, self.c = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1)
        self.d.weight = self.b.weight

    def forward(self, x):
        return self.c(self.d(self.b(self.a(x))))


@pytest.mark.parametrize(
    ("model", "shape", "other"),
    [
        (SecondName, (2, 4), "'raw' (SecondName)"),
        (OtherGroups, (2, 4, 3, 3), "'d' (conv2d)"),
    ],
)
def test_a_weight_that_another_kind_of_owner_shares_is_left_dense(model, shape, other):
    model = model()
    x = torch.randn(shape)
    layer = found(model, x, include="*")["b"]
    assert layer.reason == f"its weight is shared with {other}"
    assert not layer.supported
    with pytest.warns(UserWarning, match="break-even"):
        small = fxrank.factorize(model, x, rank=1.0, include="*")
    assert small.b.weight.shape == model.b.weight.shape
    assert type(small.b) is type(model.b)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)  # float32, two pairs


def test_an_unreached_table_that_shares_the_weight_gets_the_same_factors():
    small = fxrank.factorize(UnreachedTable(), torch.randn(2, 4), rank=1)
    assert small.table.u.weight is small.b.u.weight
    assert small.table.v.weight is small.b.v.weight
    rows = small.table(torch.arange(4))
    torch.testing.assert_close(rows, small.b.dense_layer().weight, rtol=0, atol=1e-6)  # float32, one product


def test_an_unreached_module_that_shares_the_weight_gets_the_same_factors():
    class Twin(Three):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(4, 4)
            self.twin.weight = self.b.weight

    model, x = Twin(), torch.randn(2, 4)
    assert found(model, x)["b"].reason is None
    small = fxrank.factorize(model, x, rank=1)
    assert small.twin.u.weight is small.b.u.weight
    assert small.twin.v.weight is small.b.v.weight
    assert small.twin.bias is not small.b.bias


def test_pairs_are_listed_once_with_their_rank():
    model, x = Three(), torch.randn(2, 4)
    small = fxrank.factorize(model, x, rank=1)
    layers = found(small, x)
    assert list(layers) == ["a", "b", "c"]
    assert layers["b"].reason == "already a factor pair, of rank 1"
    assert layers["b"].weight_shape == (4, 4)
    assert layers["a"].boundary == "first"
    assert layers["c"].boundary == "last"


def test_integer_weights_are_left_alone():
    model = Three()
    model.b.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)
    model.b.bias = None

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner.c(self.inner.b(self.inner.a(x).int()).float())

    layers = found(Halves(), torch.randn(2, 4))
    assert layers["inner.b"].reason.startswith("its weight is int32; only real floating-point weights")


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.table, self.body = nn.Embedding(10, 8), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 10)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.body(self.table(tokens), mask=mask))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_layers_inside_torchs_transformers_are_reached(training):
    model, tokens = Transformer().train(training), torch.randint(10, (2, 5))
    layers = found(model, tokens)
    parts = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    free = [f"body.layers.{i}.{part}" for i in (0, 1) for part in parts]
    assert [n for n, layer in layers.items() if layer.reason is None] == free
    with pytest.warns(UserWarning, match="break-even"):
        small = fxrank.factorize(model, tokens, rank=1.0)
    with torch.no_grad():  # in eval mode torch takes its fused path, which reads the pairs' weights
        torch.testing.assert_close(small.eval()(tokens), model.eval()(tokens), rtol=0, atol=1e-4)  # float32, 20 layers
