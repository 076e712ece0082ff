"""Layers → layer stacks: layers of the same kind, weight shape, geometry and input shape take the same time, so one
measurement serves all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fxrank.passes.discovery.layer import Layer


@dataclass(frozen=True)
class Stack:
    """Interchangeable layers, in graph order (Cuttlefish §3.4 calls the repeated blocks of a stage a layer stack)."""

    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        extra = f" +{len(self.layers) - 1}" if len(self.layers) > 1 else ""
        return self.layers[0].name + extra

    @property
    def sample(self) -> Layer:
        return self.layers[0]


def interchangeable(layer: Layer) -> tuple[object, ...]:
    """What layers that take the same time have in common."""
    made = tuple(one.code for one in layer.made)
    return layer.kind, layer.form, layer.weight_shape, layer.geometry, layer.input_shape, layer.dtype, made


def stacks(layers: Sequence[Layer]) -> list[Stack]:
    """Group the layers that can be factorized (no `reason`), stacks in the order of their first layer."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        if layer.reason is None:
            groups.setdefault(interchangeable(layer), []).append(layer)
    return [Stack(tuple(group)) for group in groups.values()]
