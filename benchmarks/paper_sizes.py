"""Whether the papers' models have the papers' sizes here, and what their pairs do to a training step.

    python -m benchmarks.paper_sizes

Each model of both papers (`benchmarks.subjects.paper_models`), full-rank and with the papers' ranks: parameters and multiply-adds of one forward
call, counted on the meta device, beside what the papers print and what the reference implementations counted (`tests/data/golden.json`).
Of the ImageNet models then the training step (forward and backward, random images) of the factorized model beside the full-rank one,
steps in turn.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxrank
from benchmarks import record
from benchmarks.subjects.paper_models import ROWS, PaperModel
from fxrank.passes.model.calls import call_arguments
from fxrank.passes.profiling.clock import Stopwatch, compare
from fxrank.plan import Plan
from fxrank.switch.freeze import frozen_names
from fxrank.training.measure import parameter_count

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden.json"
UNITS = {"M": 1e6, "G": 1e9}
SIDE, CLASSES = 224, 1000
"""Of the images that steps are timed on."""


def factorized(row: PaperModel, model: nn.Module, example: Any) -> nn.Module:
    """A copy with pairs where the paper has them."""
    return fxrank.factorize(
        model,
        example,
        row.ratio,
        include=re.compile(f"^(?:{row.layers})$"),
        exclude=re.compile(f"^(?!(?:{row.layers})$)"),
        extra_bn=row.extra_bn,
    )


def on_meta(row: PaperModel) -> tuple[nn.Module, nn.Module, Any]:
    """Full-rank model, factorized one and one call's inputs, none of which takes memory."""
    with torch.device("meta"):
        model, example = row.build(), row.example()
    return model, factorized(row, model, example), example


def call_macs(model: nn.Module, example: Any, part: str = "") -> int:
    """Multiply-adds of all products that one forward call makes, as torch counts them: those of attention too, and those of weights
    that are multiplied out. `part` names a module whose own are wanted.
    """
    args, kwargs = call_arguments(model, example)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(*args, **kwargs)
    within = f"{type(model).__name__}.{part}" if part else "Global"
    return sum(counter.get_flop_counts()[within].values()) // 2


def layer_macs(plan: Plan, part: str = "") -> tuple[int, int]:
    """Multiply-adds of the weight layers, as fxrank's reports count them, full-rank and as planned; of those in `part`."""
    layers = [layer for layer in plan.layers if not part or layer.name.startswith(f"{part}.")]
    return sum(layer.macs for layer in layers), sum(
        layer.macs if layer.pair_macs is None else layer.pair_macs for layer in layers
    )


def as_printed(count: int, figure: str) -> str:
    """A count with the digits and the unit of a figure: 11,173,834 like `"20.0 M"` is `"11.2 M"`, and like one without a unit
    `"11,173,834"`.
    """
    number, _, unit = figure.partition(" ")
    decimals = len(number.partition(".")[2])
    return f"{count / UNITS[unit]:.{decimals}f} {unit}" if unit else f"{count:,}"


def count(row: PaperModel, full: nn.Module, small: nn.Module, example: Any) -> dict[str, Any]:
    """A row of the results without times, as plain data: what was counted of the full-rank model and of the factorized one, whether that is
    what the paper prints, and what the reference counted beyond it.
    """
    plan = fxrank.plan_of(small)
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))["models"]
    counts = []
    for i, (model, macs) in enumerate(zip((full, small), layer_macs(plan, row.part), strict=True)):
        frozen = set(frozen_names(model, row.frozen)) if i else set()
        found: dict[str, Any] = {
            "parameters": parameter_count(model),
            "trainable": sum(p.numel() for name, p in model.named_parameters() if name not in frozen),
            "macs": macs,
            "call_macs": call_macs(model, example, row.part),
            "paper_parameters": row.parameters[i],
            "paper_macs": row.macs[i],
        }
        compared = found["trainable" if row.trainable_only else "parameters"]
        found["as_the_paper"] = as_printed(compared, row.parameters[i]) == row.parameters[i]
        figure = row.macs[i]
        found["macs_as_the_paper"] = (
            None if figure is None else figure in {as_printed(found[k], figure) for k in ("macs", "call_macs")}
        )
        counts.append(found | against(found, row, i, known))
    about = {k: getattr(row, k) for k in ("model", "ranks", "source", "of", "remark", "training")}
    return about | {"pairs": len(plan.R), "full": counts[0], "factorized": counts[1]}


def against(found: Mapping[str, Any], row: PaperModel, i: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the reference counted beyond ours, None where it counted nothing, and whether it is what the row gives a reason for."""
    name = row.reference[i]
    if name is None:
        return {"reference_more": None, "reference_more_macs": None, "explained": None}
    reference = known[name]
    of_macs = reference["macs"] - found["macs"] if "macs" in reference else None
    more = reference["parameters"] - found["parameters"]
    trainable = reference.get("trainable", found["trainable"]) - found["trainable"]
    explained = (more, trainable) == (row.more_parameters[i], 0) and of_macs in (None, row.more_macs[i])
    return {"reference_more": more, "reference_more_macs": of_macs, "explained": explained}


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward and backward in training mode."""
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    return step


def time_steps(
    row: PaperModel, batch: int, budget_s: float, rounds: int, device: torch.device, side: int = SIDE
) -> dict[str, Any]:
    """The milliseconds of a training step, full-rank and factorized, medians, and of their ratio the median and half the distance
    between its quartiles. After `budget_s` seconds no more rounds are begun than it takes until three count.
    """
    torch.manual_seed(0)
    dense = row.build().to(device)
    x = torch.randn(batch, 3, side, side, device=device)
    y = torch.randint(0, CLASSES, (batch,), device=device)
    small = factorized(row, dense, x[:1])
    times = compare([step_of(m, x, y) for m in (dense, small)], Stopwatch(device), rounds, 1000 * budget_s)
    return {"step_ms": times.ms, "ratio": list(times.shares[1]), "how": times.how}


def shown(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of what is printed."""
    full, small = found["full"], found["factorized"]
    step = "-" if "step" not in found else "{:.2f} ± {:.2f}".format(*found["step"]["ratio"])
    return (
        name,
        *(f"{c['parameters']:,}" for c in (full, small)),
        *(f"{c['macs'] / 1e6:,.1f} ({c['call_macs'] / 1e6:,.1f})" for c in (full, small)),
        " ".join(str(c["explained"]) for c in (full, small)),
        step,
    )


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    p.add_argument("--no-timing", dest="timing", action="store_false")
    p.add_argument("--batch", type=int, default=8, help="images of a step (default %(default)s)")
    p.add_argument("--rounds", type=int, default=21, help="of timing at most (default %(default)s)")
    p.add_argument("--budget-s", type=float, default=300.0, help="seconds of timing for a model (default %(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the timing")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    device = torch.device(options.device)
    results: dict[str, dict[str, Any]] = {}
    for name in options.models:
        start = time.perf_counter()
        row = ROWS[name]
        found = count(row, *on_meta(row))
        if options.timing and row.timed:
            found["step"] = time_steps(row, options.batch, options.budget_s, options.rounds, device)
        results[name] = found
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    headers = ("", "parameters", "factorized", "million MACs (of a call)", "factorized", "as the reference", "step")
    print(tabulate([shown(*item) for item in results.items()], headers=headers, disable_numparse=True))
    configuration = {k: v for k, v in vars(options).items() if k != "results"}
    return record.write(
        "paper_sizes", {"configuration": configuration, "results": results}, device=device, folder=options.results
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
