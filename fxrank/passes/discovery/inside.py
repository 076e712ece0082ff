"""The weights of a module that is one node of the graph: attention and recurrent layers read theirs by themselves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from fxrank.passes.discovery.found import Use, done, layer_from, unsupported
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.model.weights import computed_part
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.parameter import RawWeight, form_when_read
from fxrank.passes.pairs.registry import PAIRS, dense_type, forms_of, kept_dense, why_none
from fxrank.torch_private.modules import weight_names

Found = Iterable[tuple[Tensor, Layer]]
COMPUTED = "its layer's weight or bias is computed, as after pruning; make it a parameter first, after pruning with prune.remove"


Names = Mapping[int, Sequence[str]]
"""Every path of each module, by its `id`."""


def inside(module: nn.Module, path: str, node: fx.Node, names: Names) -> Found:
    """Every weight in the module at this path, which the node calls, with what is known of it."""
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module, path, node, names)
    if isinstance(module, nn.RNNBase):
        return _of_recurrent(module, path, node)
    return _of_others(module, path, node)


def _of_attention(module: nn.MultiheadAttention, path: str, node: fx.Node, names: Names) -> Found:
    shape = first_shape(node)
    given: dict[str, Any] = dict(zip(("query", "key", "value"), node.args, strict=False)) | dict(node.kwargs)
    inputs = [given[name].meta["val"] for name in ("query", "key", "value")]
    tokens = [x.numel() // x.shape[-1] for x in inputs]
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("proj_weight"):
            positions = sum(tokens) / 3 if name[0] == "i" else tokens["qkv".index(name[0])]
            yield _raw(module, name, path, Use(node.name, shape, positions=positions))
        elif parameter.ndim >= 2:
            learned = name in ("bias_k", "bias_v")
            reason = "it is a learned key or value, not the matrix of a layer" if learned else COMPUTED
            layer = unsupported(joined(path, name), "parameter", parameter, reason, node.name)
            yield parameter, replace(layer, guarded=not learned)
    if isinstance(module.out_proj, nn.Linear):
        own = joined(path, "out_proj")
        if pairs := forms_of(module.out_proj):
            use = Use(node.name, shape, positions=tokens[0])
            paths = tuple(names.get(id(module.out_proj), [own]))
            weight, layer = layer_from(module.out_proj, own, use, form=next(iter(pairs)), paths=paths)
            yield weight, checked(layer, module.out_proj)
        else:
            yield from inside(module.out_proj, own, node, names)


def _of_recurrent(module: nn.RNNBase, path: str, node: fx.Node) -> Found:
    steps = math.prod(first_shape(node)[:-1])
    for name, parameter in module.named_parameters(recurse=False):
        if name not in weight_names(module) and parameter.ndim >= 2:
            layer = unsupported(joined(path, name), "parameter", parameter, COMPUTED, node.name)
            yield parameter, replace(layer, guarded=True)
        elif parameter.ndim >= 2:
            yield _raw(module, name, path, Use(node.name, (steps, parameter.shape[1]), positions=steps))


def _raw(owner: nn.Module, name: str, path: str, use: Use) -> tuple[Tensor, Layer]:
    return layer_from(
        RawWeight(owner, name), joined(path, name), use, form=form_when_read(owner.get_parameter(name), False)
    )


def _of_others(module: nn.Module, path: str, node: fx.Node) -> Found:
    does_more = isinstance(module, tuple(PAIRS)) and dense_type(module) is None
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and not isinstance(module.get_submodule(name.rpartition(".")[0]), FactorPair):
            own = joined(path, name).removesuffix(".weight")
            computed = dense_type(module) is not None and computed_part(module) is not None
            if computed:
                reason = COMPUTED
            elif parametrize.is_parametrized(module):
                reason = "it is an original of a parametrization that has no factor pair"
            else:
                reason = f"{type(module).__name__} has no factor pair{why_none(module)}"
            layer = unsupported(own, type(module).__name__, parameter, reason, node.name)
            yield parameter, replace(layer, guarded=computed or does_more or parametrize.is_parametrized(module))
    for name, child in module.named_modules():
        if isinstance(child, FactorPair):
            yield child.u.weight, done(joined(path, name), child, node.name)


def checked(layer: Layer, module: nn.Module) -> Layer:
    """The layer that a module is, with a reason if no pair may take the module's place."""
    reason = kept_dense(module) if layer.reason is None else None
    return layer if reason is None else layer.kept_for(reason)


def joined(path: str, name: str) -> str:
    """The path of what has this name inside."""
    return f"{path}.{name}".strip(".")


def first_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of the first input."""
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(source, fx.Node)
    if "val" not in source.meta:  # fx makes the node of a named tuple by itself; its data come first
        source = source.args[0]
        assert isinstance(source, fx.Node)
    value = source.meta["val"]
    if isinstance(value, PackedSequence):
        value = value.data
    assert isinstance(value, Tensor)
    return tuple(value.shape)
