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

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.rewriting.driver import Pass, Refused
from fxrank.passes.tracing.fake_values import value_after
from fxrank.torch_private.modules import own_children


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
        if node.op == "get_attr":
            return self._rewrite_read(gm, node, target)
        if node.op != "call_module" or target not in self.pairs:
            return False
        pair = self.pairs[target]
        if gm.get_submodule(target) is not pair:
            gm.set_submodule(target, pair)
        value: fx.Node | None = None
        children = [name for name in pair.children_in_order if own_children(pair).get(name) is not None]
        with gm.graph.inserting_before(node):
            for name in children:
                args, kwargs = ((value,), {}) if value is not None else (node.args, node.kwargs)
                value = gm.graph.call_module(f"{target}.{name}", args, kwargs)
                value.meta = dict(node.meta)
                if name != children[-1]:
                    values = fx.node.map_arg((args, kwargs), lambda n: n.meta.get("val"))
                    value.meta["val"] = value_after(pair.get_submodule(name), *values)
        assert value is not None
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
        return True

    def _rewrite_read(self, gm: fx.GraphModule, node: fx.Node, target: str) -> bool:
        """A weight that is read: `F.linear(x, W, b)` and `x @ W` become two products; other uses go through the pair
        itself, which multiplies as well.
        """
        path = target if target in self.pairs else target.removesuffix(".weight")
        pair = self.pairs.get(path)
        if pair is None:
            return False
        graph = gm.graph
        for user in list(node.users):
            linear = user.target is F.linear and user.args[1:2] == (node,)
            matmul = (
                user.target in (operator.matmul, torch.matmul) and user.args[1] is node and user.args[0] is not node
            )
            product = user.target
            if not callable(product) or not pair.splits_products or not (linear or matmul):
                continue
            with graph.inserting_before(user):
                u, v = (graph.get_attr(f"{path}.{name}.weight") for name in "uv")
                if linear:
                    middle = graph.call_function(F.linear, (user.args[0], u))
                    out = graph.call_function(F.linear, (middle, v, *user.args[2:]), dict(user.kwargs))
                else:
                    middle = graph.call_function(product, (user.args[0], v))
                    out = graph.call_function(product, (middle, u))
            for factor, weight in ((u, pair.u.weight), (v, pair.v.weight)):
                factor.meta["val"] = weight
            out.meta, middle.meta = dict(user.meta), dict(user.meta)
            middle.meta["val"] = user.meta["val"].new_empty((*user.meta["val"].shape[:-1], pair.rank))
            user.replace_all_uses_with(out)
            graph.erase_node(user)
        if node.users and target != path:  # `self.qkv.weight` is no parameter now, but an attribute of the pair
            with graph.inserting_before(node):
                weight = graph.call_function(getattr, (graph.get_attr(path), "weight"))
            weight.meta = dict(node.meta)
            node.replace_all_uses_with(weight)
        if not node.users:
            graph.erase_node(node)
        return True


@dataclass(frozen=True)
class Merge(Pass):
    """The way back: `u`, (`norm`,) `v` of one pair become one call of the dense layer. `dense` maps pair paths to
    the layers that take their place.
    """

    dense: Mapping[str, nn.Module] = field(default_factory=dict)

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> bool | Refused:
        path, _, child = str(node.target).rpartition(".")
        pair = gm.get_submodule(path) if node.op == "call_module" and path in self.dense else None
        if not isinstance(pair, FactorPair) or child != pair.children_in_order[-1]:
            return False
        chain = [node]
        while str(chain[-1].target) != f"{path}.{pair.children_in_order[0]}":
            (before,) = chain[-1].all_input_nodes
            if len(before.users) > 1:
                return Refused(f"{before.name}, between the factors of {path!r}, is used elsewhere too")
            chain.append(before)
        with gm.graph.inserting_before(node):
            # The module is set at the end of the walk's business with this path: another call of the pair may still name its children.
            merged = gm.graph.call_module(path, chain[-1].args, chain[-1].kwargs)
        merged.meta = dict(node.meta)
        node.replace_all_uses_with(merged)
        for old in chain:
            gm.graph.erase_node(old)
        if not any(str(n.target).rpartition(".")[0] == path and n.op == "call_module" for n in gm.graph.nodes):
            gm.set_submodule(path, self.dense[path])
        return True
