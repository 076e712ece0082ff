"""What a policy may look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.profiling.timing import Profiler, StackProfile
from fxrank.policies.monitor import RankMonitor
from fxrank.switch.apply_plan import Factors


@dataclass(frozen=True)
class Clock:
    """Where the training is: `step` optimizer steps made of `total_steps`, `steps_per_epoch` of them an epoch."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch


@dataclass
class Scene:
    """What a policy may look at. `profiles` are by layer name; `profiler` measures more when asked, None if timing
    is off.
    """

    model: nn.Module
    layers: list[Layer]
    profiles: dict[str, StackProfile] = field(default_factory=dict)
    profiler: Profiler | None = None
    monitor: RankMonitor | None = None
    factors: Factors = field(default_factory=dict)
    """Factors of the layers decided on, so that the switch needs no second decomposition."""
    outputs: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Where the policy chooses ranks by them (`Policy.keeps`), spectra of what layers give on live data, `(groups, full_rank)`
    descending, by the layers' keys.
    """
    chosen: dict[str, tuple[Layer, int]] = field(default_factory=dict)
    """And the pairs with which the model keeps as much of its outputs as the policy asks for, by name: a layer in its form, and the rank."""
    asked: str = ""
    """What is kept with them, in words."""

    def watched(self, kept: Mapping[str, str]) -> frozenset[str]:
        """Layers whose ranks decide the switch: those that may still be factorized, given the policy's `kept`."""
        return frozenset(layer.name for layer in self.layers if layer.reason is None and layer.name not in kept)
