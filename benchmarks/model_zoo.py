"""How much of real models fxrank reaches, and whether its rewrites are exact there.

    python -m benchmarks.model_zoo                          # one of each, numbers checked on real tensors
    python -m benchmarks.model_zoo --source timm --all      # every registered timm name, on the meta device
    python -m benchmarks.model_zoo --name swin_t --name gpt2

Per model: traced whole or in regions, layers found, share of the factorizable parameters reached (in the graph, in
regions, not at all, with reasons), parameters and multiply-adds before and after at a quarter of full rank, and the
difference of outputs and gradients between the model and its full-rank factorization.

Factorizable: weights that a layer multiplies with (linear, convolution, attention, recurrent, embedding, expert, raw
operands of products), depthwise convolutions excepted. Position tables and tokens, which are added, do not count.
`verified_trace_s` is the first trace with its check at another batch size, which is two forwards of the model,
`trace_s` the second without it, in seconds.
"""

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxrank
from benchmarks import record
from benchmarks.subjects import zoo
from fxrank.cli.models import on_meta_where_possible
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.model.calls import call_arguments
from fxrank.passes.tracing.compare import largest_difference, output_difference
from fxrank.passes.tracing.trace import TracedModule, trace
from fxrank.policies.ranks import ratio_rank

RATIO = 0.25
DOUBLE_MACS = 8_000_000_000
"""Models with more multiply-adds a call are checked in float32 and evaluation mode only: two cores have their limits."""


def factorizable(layer: Layer) -> bool:
    """Whether the weight counts: see the module's text."""
    depthwise = layer.kind.startswith("conv") and layer.groups > 1 and layer.groups == layer.groups * layer.rows
    return layer.kind != "table" and not depthwise and "learned key" not in (layer.reason or "")


def study(entry: zoo.Entry, *, meta: bool, max_parameters: int) -> dict[str, Any]:
    """Everything about one model, plain data. A model over `max_parameters` is studied on the meta device."""
    start = time.perf_counter()

    def build() -> tuple[nn.Module, Any]:
        return entry.build(), entry.example()

    torch.manual_seed(0)
    model, example = on_meta_where_possible(build) if meta and not zoo.needs_data(entry.name) else build()
    total = sum(p.numel() for p in model.parameters())
    large = total > max_parameters
    if large and not zoo.needs_data(entry.name):
        model, example = model.to("meta"), pytree.tree_map_only(Tensor, lambda t: t.to("meta"), example)
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not parameter.any():
            # A head that starts at zero would make any two outputs equal.
            nn.init.normal_(parameter, std=0.02)
    row: dict[str, Any] = {"source": entry.source, "name": entry.name, "parameters": total}
    began = time.perf_counter()
    graph = trace(model, example)
    row["verified_trace_s"] = round(time.perf_counter() - began, 3)
    began = time.perf_counter()
    trace(model, example, verify=False)
    row["trace_s"] = round(time.perf_counter() - began, 3)
    layers = discover(graph, model)
    row |= _reach(graph, layers) | _sizes(model, layers)
    if not large and next(model.parameters()).device.type != "meta":
        # What a detector returns is chosen by comparing scores, and changes with the last digit: its parts are compared.
        parts = [*_innermost(graph)] if zoo.needs_data(entry.name) else []
        row |= _differences(model, example, parts, double=row["macs"] <= DOUBLE_MACS)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _reach(graph: TracedModule, layers: Sequence[Layer]) -> dict[str, Any]:
    counted = [layer for layer in layers if factorizable(layer)]
    total = sum(layer.parameters for layer in counted)
    reached = [layer for layer in counted if layer.supported]
    inside = sum(a.parameters for a in reached if any(a.name.startswith(f"{path}.") for path in graph.regions))
    share = sum(layer.parameters for layer in reached) / total if total else 1.0
    return {
        "whole": graph.whole,
        "graphs": len({id(g) for g in graph.graphs.values()}),
        "regions": len(graph.regions),
        "leaves": graph.leaves,
        "notes": graph.notes,
        "layers": len(layers),
        "factorizable": total,
        "in_graph": share - inside / total if total else 1.0,
        "in_regions": inside / total if total else 0.0,
        "unreached": {a.name: a.reason for a in counted if not a.supported},
        "share": share,
    }


def _sizes(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Any]:
    """Parameters and multiply-adds at a quarter of full rank, first and last layer and embeddings left dense."""
    free = [layer for layer in candidates(layers, model) if layer.reason is None]
    pairs = [(layer, ratio_rank(layer.full_rank, RATIO)) for layer in free]
    pairs = [(layer, rank) for layer, rank in pairs if rank < layer.break_even_rank]
    macs = sum(layer.macs for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    return {
        "parameters_after": total - sum(a.parameters - a.pair_parameters(r) for a, r in pairs),
        "macs": macs,
        "macs_after": macs - sum(a.macs - a.pair_macs(r) for a, r in pairs),
        "factorized": len(pairs),
    }


def _differences(model: nn.Module, example: Any, parts: Sequence[str], double: bool) -> dict[str, Any]:
    """Largest relative difference to the full-rank factorization: outputs in float32, outputs and gradients in float64;
    of `parts`, if there are any, in place of the model's own outputs.
    """

    def difference(small: nn.Module, example: Any) -> float:
        return part_difference(model, small, example, parts) if parts else output_difference(model, small, example)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # full-rank pairs are larger than the layers, as they must be here
        small = fxrank.factorize(model.eval(), example, rank=1.0, include="*")
        found: dict[str, Any] = {"float32": difference(small, example)}
        del small
        if not double:
            return found
        model, example = _to_double(model), pytree.tree_map_only(Tensor, _double, example)
        try:
            small = fxrank.factorize(model, example, rank=1.0, include="*")
            found["float64"] = difference(small, example)
        except Exception as error:  # an operation without double precision (grouped matrix products)
            return found | {"float64": None, "note64": f"{type(error).__name__}: {str(error)[:80]}"}
        try:
            model.train(), small.train()
            found["float64_train"] = difference(small, example)
            found["gradients"] = _gradient_difference(model, small, example)
        except Exception as error:  # detectors need targets to train
            found["note_train"] = f"{type(error).__name__}: {str(error)[:80]}"
    return found


def _innermost(graph: TracedModule, prefix: str = "") -> Iterator[str]:
    for path, region in graph.regions.items():
        here = f"{prefix}.{path}".lstrip(".")
        yield from _innermost(region, here) if region.regions else [here]


def part_difference(model: nn.Module, small: nn.Module, example: Any, paths: Sequence[str]) -> float:
    """Largest relative difference over modules of two models, each on the inputs of its first call in the first model."""
    calls: dict[str, Any] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: calls.setdefault(path, (args, kwargs)) and None, with_kwargs=True
        )
        for path in paths
    ]
    with torch.no_grad():
        args, kwargs = call_arguments(model, example)
        model(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return max(
            largest_difference(model.get_submodule(p)(*a, **k), small.get_submodule(p)(*a, **k))
            for p, (a, k) in calls.items()
        )


def _to_double(model: nn.Module) -> nn.Module:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.double()
    return model


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _gradient_difference(model: nn.Module, small: nn.Module, example: Any) -> float | None:
    """Largest difference of the gradients of the inputs and of all parameters that both have, relative to the largest
    gradient, in training mode; None if nothing could be compared.
    """
    gradients = []
    for net in (model, small):
        torch.manual_seed(0)
        inputs = pytree.tree_map_only(
            Tensor, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), example
        )
        args, kwargs = call_arguments(net, inputs)
        outputs = [o for o in tensors_in(net(*args, **kwargs)) if o.is_floating_point() and o.requires_grad]
        if not outputs:
            return None
        torch.manual_seed(1)
        torch.stack([(o * torch.randn_like(o)).sum() for o in outputs]).sum().backward()
        found = {f"input {i}": x.grad for i, x in enumerate(pytree.tree_leaves(inputs)) if isinstance(x, Tensor)}
        found |= {name: p.grad for name, p in net.named_parameters()}
        gradients.append({name.replace(".v.bias", ".bias"): g for name, g in found.items() if g is not None})
    common = gradients[0].keys() & gradients[1].keys()
    if not common:
        return None
    largest = max(float(gradients[0][name].abs().max()) for name in common)
    worst = max(float((gradients[0][name] - gradients[1][name]).abs().max()) for name in common)
    return worst / largest if largest else worst


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of containers and of objects, caches say."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from tensors_in(list(vars(leaf).values()))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that count, over all models that gave a result."""
    good = [r for r in rows if "error" not in r]
    checked = {
        k: [r[k] for r in good if r.get(k) is not None] for k in ("float32", "float64", "float64_train", "gradients")
    }
    return {
        "models": len(rows),
        "errors": [r["name"] for r in rows if "error" in r],
        "whole": sum(r["whole"] for r in good),
        "two_graphs": sum(r["graphs"] == 2 for r in good),
        "share_mean": statistics.fmean(r["share"] for r in good),
        "share_least": min(r["share"] for r in good),
        "below_95": [r["name"] for r in good if r["share"] < 0.95],
        "trace_s_median": statistics.median(r["trace_s"] for r in good),
        "verified_trace_s_median": statistics.median(r["verified_trace_s"] for r in good),
        "checked": {k: len(v) for k, v in checked.items()},
        "worst": {k: max(v, default=None) for k, v in checked.items()},
    }


def main() -> None:
    """Study the models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", choices=sorted(zoo.SOURCES), default=None)
    parser.add_argument("--name", action="append", default=None)
    parser.add_argument("--all", action="store_true", help="every registered timm name")
    parser.add_argument("--meta", action="store_true", help="shapes only; the default with --all")
    parser.add_argument("--max-parameters", type=int, default=60_000_000, help="larger models are studied on meta")
    parser.add_argument("--output", default=None, help="folder for the JSON (default benchmarks/results)")
    options = parser.parse_args()
    sources = tuple(options.source or ("torchvision", "timm", "hf", "misc"))
    rows: list[dict[str, Any]] = []
    for entry in zoo.entries(sources, options.all):
        if options.name and entry.name not in options.name:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = study(entry, meta=options.meta or options.all, max_parameters=options.max_parameters)
        except Exception as error:
            text = str(error).partition("\n")[0][:200]
            row = {"source": entry.source, "name": entry.name, "error": f"{type(error).__name__}: {text}"}
        rows.append(row)
        print(_line(row), flush=True)
        gc.collect()
    found = summary(rows)
    print(tabulate([(k, v) for k, v in found.items()]))
    name = "model_zoo" + ("_all" if options.all else "") + (f"_{sources[0]}" if len(sources) == 1 else "")
    if not options.name or options.output:
        if options.name:  # some models again: their rows take the places of the old ones
            rows, found = _updated(name, rows, options.output)
        asked = {k: v for k, v in vars(options).items() if k != "output"}
        content = {"configuration": asked, "summary": found, "results": rows}
        path = record.write(name, content, device=torch.device("cpu"), folder=options.output)
        print(f"written: {path}")


def _updated(name: str, rows: list[dict[str, Any]], folder: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    before = max(Path(folder).glob(f"{name}_cpu*.json"), default=None)
    if before is not None:
        new = {row["name"]: row for row in rows}
        old = json.loads(before.read_text(encoding="utf-8"))["results"]
        rows = [new.pop(row["name"], row) for row in old] + list(new.values())
    return rows, summary(rows)


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['source']:12} {row['name']:42} {row['error']}"
    shown = "whole" if row["whole"] else f"{row['regions']} regions"
    checks = " ".join(
        f"{row[k]:.0e}" if row.get(k) is not None else "-" for k in ("float32", "float64", "float64_train", "gradients")
    )
    missing = "; ".join(f"{n}: {r}" for n, r in list(row["unreached"].items())[:2])
    return (
        f"{row['source']:12} {row['name']:42} {shown:10} {row['layers']:4} layers {100 * row['share']:5.1f} % "
        f"{row['parameters'] / 1e6:7.2f} M -> {row['parameters_after'] / 1e6:7.2f} M {row['trace_s']:6.2f} s {checks} {missing}"
    )


if __name__ == "__main__":
    main()
