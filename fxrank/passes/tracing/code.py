"""The Python code of graphs whose modules have names that Python keeps for itself (`class`, `in`, `global`), which fx would write
as attributes.

It knows torch's inside; tried on torch 2.8.0 and 2.14.1.
"""

import keyword

from torch import fx
from torch.fx.graph import CodeGen

from fxrank.passes.tracing.one_thread import with_globals


def _attribute(base: str, target: str) -> str:
    for name in target.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
    return base


class _AnyName(CodeGen):
    _gen_python_code = with_globals(CodeGen._gen_python_code, _format_target=_attribute)


def write_any_name(graph: fx.Graph) -> None:
    """Let the graph's code be written so that it can be read."""
    names = {name for node in graph.nodes if isinstance(node.target, str) for name in node.target.split(".")}
    if any(keyword.iskeyword(name) or '"' in name or "\\" in name for name in names):
        graph.set_codegen(_AnyName())
