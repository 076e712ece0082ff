"""Graph + ranks → factor pairs, in the graph and in the module tree.

    before                                             after
    conv = self.layer1_0_conv1(x)                      u = self.layer1_0_conv1_u(x)
                                                       v = self.layer1_0_conv1_v(u)

Why it is sound: a Linear or a convolution is linear in its weight's unrolled matrix `W`, a full-rank pair has `V U
= W` up to rounding, and convolution with `U` then a pointwise `V` is convolution with `V U` (the pointwise layer
mixes channels at each position, so it commutes with stride, padding and dilation). Truncated to rank `r` the
weight's spectral error is `σ_{r+1}` (Eckart-Young), the least possible. Cost: one leading eigendecomposition of the
short side per layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxrank.passes.base import Pass, Refused
from fxrank.passes.factors import FactorPair


@dataclass(frozen=True)
class Factorize(Pass):
    """Show the pairs in a graph: each call of a dense layer becomes calls of its pair's `u`, (`norm`) and `v`.

    `pairs` maps module paths, as the graph's nodes name them, to the pairs that take their place. The graph's
    module tree gets the pair at the layer's own path, so both views share parameters. Exact at full rank, a
    truncation with a known error below.
    """

    pairs: Mapping[str, FactorPair] = field(default_factory=dict)

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> bool | Refused:
        target = str(node.target)
        if node.op != "call_module" or target not in self.pairs:
            return False
        pair = self.pairs[target]
        gm.set_submodule(target, pair)
        value: fx.Node | None = None
        with gm.graph.inserting_before(node):
            for name in ("u", "norm", "v"):
                if getattr(pair, name) is None:
                    continue
                args, kwargs = ((value,), {}) if value is not None else (node.args, node.kwargs)
                value = gm.graph.call_module(f"{target}.{name}", args, kwargs)
                value.meta = dict(node.meta)
                if name != "v":
                    value.meta["val"] = _middle(node, pair)
        assert value is not None
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
        return True


@dataclass(frozen=True)
class Merge(Pass):
    """The way back: `u`, (`norm`,) `v` of one pair become one call of the dense layer. `dense` maps pair paths to
    the layers that take their place.
    """

    dense: Mapping[str, nn.Module] = field(default_factory=dict)

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> bool | Refused:
        path, _, child = str(node.target).rpartition(".")
        if node.op != "call_module" or child != "v" or path not in self.dense:
            return False
        first = node.args[0]
        chain = [node]
        while isinstance(first, fx.Node) and str(first.target).rpartition(".")[0] == path:
            if len(first.users) > 1:
                return Refused(f"{first.name}, between the factors of {path!r}, is used elsewhere too")
            chain.append(first)
            first = first.args[0]
        with gm.graph.inserting_before(node):
            # The module is set at the end of the walk's business with this path: another call of the pair may still name its children.
            merged = gm.graph.call_module(path, (first,))
        merged.meta = dict(node.meta)
        node.replace_all_uses_with(merged)
        for old in chain:
            gm.graph.erase_node(old)
        if not any(str(n.target).rpartition(".")[0] == path and n.op == "call_module" for n in gm.graph.nodes):
            gm.set_submodule(path, self.dense[path])
        return True


def install(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[str]:
    """Put each module in the place of the one with that `id`, at every path where it is registered. Returns the
    paths.

    A replacement of the model itself is impossible: raises `ValueError`. Other modules, their hooks and parameters
    are untouched.
    """
    if id(model) in replacements:
        raise ValueError(
            "the layer to replace must sit inside the model; the model is itself that layer "
            f"({type(model).__name__}). Wrap it: torch.nn.Sequential(model)."
        )
    done = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replacements:
            model.set_submodule(path, replacements[id(module)])
            done.append(path)
    return done


def pairs_in(model: nn.Module) -> dict[str, FactorPair]:
    """Every factor pair of a model, by its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FactorPair)}


def _middle(node: fx.Node, pair: FactorPair) -> torch.Tensor:
    """The value between the factors: the layer's output with `groups · r` channels, at the place of the output
    channels.
    """
    out = node.meta["val"]
    width = pair.u.weight.shape[0]
    assert isinstance(out, torch.Tensor) and isinstance(width, int)
    channel = out.ndim - 1 if pair.kind == "linear" else out.ndim - 3
    return out.new_empty([width if i == channel else size for i, size in enumerate(out.shape)])


def paths_of(model: nn.Module, modules: Iterable[nn.Module]) -> dict[int, str]:
    """First path of each of the modules, by `id`."""
    wanted = {id(m) for m in modules}
    return {id(m): path for path, m in model.named_modules() if id(m) in wanted}
