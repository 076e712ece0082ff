"""What a pass is, and the one driver that runs it.

A pass is a frozen dataclass; its fields are its options. It looks at one node at a time and answers: nothing to do
here, not possible because …, or the replacement. The driver walks, lints, recompiles, and *measures* whether the
graph changed.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from fxrank.passes.tracing.trace import TracedModule


class PassResult(NamedTuple):
    """`graph_module` and `modified` as torch's own `PassManager` expects them, and per refused node its reason."""

    graph_module: fx.GraphModule
    modified: bool
    refused: dict[str, str]


@dataclass(frozen=True)
class Refused:
    """A rewrite's answer where it would apply but must not."""

    reason: str


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of one graph, in place. `exact` says whether outputs are preserved up to rounding."""

    exact: bool = field(default=True, init=False)

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> bool | Refused:
        """Rewrite at `node`. True if something was put in its place, False if the node is none of this pass's
        business.
        """

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Walk each graph once, then lint and recompile. Outputs, shapes and the modules' parameters outside the
        rewritten sites are untouched.
        """
        refused: dict[str, str] = {}
        changed = False
        for graph in gm.each_graph() if isinstance(gm, TracedModule) else [gm.graph]:
            before = _shape_of(gm)
            for node in list(graph.nodes):
                answer = self.rewrite(gm, node)
                if isinstance(answer, Refused):
                    refused[node.name] = answer.reason
            graph.lint()
            gm.recompile()
            changed = changed or _shape_of(gm) != before
        return PassResult(gm, changed, refused)


def _shape_of(gm: fx.GraphModule) -> list[tuple[str, str, str, int | None]]:
    """What a rewrite can change: the nodes, their arguments, and the module objects they call."""
    return [
        (
            n.op,
            str(n.target),
            f"{n.args} {n.kwargs}",
            id(gm.get_submodule(str(n.target))) if n.op == "call_module" else None,
        )
        for n in gm.graph.nodes
    ]
