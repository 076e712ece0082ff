"""`fxrank inspect MODEL --target-params 0.8`: what would become of each layer, and what it would take, on paper."""

import argparse
import json
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import nn

from fxrank.large.outlook import TOKENS, Outlook, Rates, outlook
from fxrank.passes.discovery.layer import Layer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of `inspect` alone."""
    about = (
        "show what each layer would become, all pairs with the same share of their layers, and estimate what that takes"
    )
    parser.add_argument("--target-params", type=float, default=None, help=f"share of all parameters to keep: {about}")
    parser.add_argument("--target-macs", type=float, default=None, help="the same for the multiply-adds")


def asked(options: argparse.Namespace) -> tuple[str, float] | None:
    """The target, if there is one. Raises `ValueError` for two, or one out of bounds."""
    given = {of: t for of in ("params", "macs") if (t := getattr(options, f"target_{of}")) is not None}
    if len(given) > 1:
        raise ValueError("ranks are chosen for one target; got --target-params and --target-macs. Leave one out.")
    for of, target in given.items():
        if not 0 < target <= 1:
            raise ValueError(f"--target-{of} is a share in (0, 1]; got {target}. 0.5 halves them.")
        return of, target
    return None


def show(options: argparse.Namespace, model: nn.Module, layers: Sequence[Layer], of: str, target: float) -> None:
    """Print it, as a table with what follows from it, or as JSON."""
    found, rates = outlook(model, layers, of, target), Rates.measured()
    seconds = found.seconds(rates)
    if options.json:
        rows = [
            {
                "name": row.layer.name,
                "rank": row.rank,
                "parameters": row.parameters,
                "macs": row.macs,
                "bytes": row.parameters * _bytes(model, row.layer),
                "moment_bytes": row.moment_bytes,
                "reason": row.layer.reason,
            }
            for row in found.rows
        ]
        totals = {"parameters": found.parameters, "macs": found.macs, "share": found.share, "rounds": found.rounds}
        print(json.dumps({"layers": rows, **totals, "estimated_seconds": seconds}, indent=1))
        return
    lines = [
        (
            row.layer.name,
            "x".join(map(str, row.layer.weight_shape)),
            row.layer.full_rank,
            row.rank or "-",
            f"{row.parameters:,}",
            f"{row.macs / 1e6:,.1f}",
            f"{row.parameters * _bytes(model, row.layer) / 2**20:,.1f}",
            f"{row.moment_bytes / 2**20:,.0f}" if row.moment_bytes else "-",
            row.layer.reason or "pair",
        )
        for row in found.rows
    ]
    headers = ("layer", "weight", "full rank", "rank", "parameters", "M MACs", "MiB", "moments MiB", "decision")
    print(tabulate(lines, headers=headers, disable_numparse=True))
    print(_sentences(found, seconds))


def _sentences(found: Outlook, seconds: dict[str, float]) -> str:
    (before, after), (macs, fewer) = found.parameters, found.macs
    largest = max((row.moment_bytes for row in found.rows), default=0)
    weights = sum(a + b for a, b in (row.split_macs for row in found.rows))
    moments, fit = (
        sum(row.moment_macs for row in found.rows),
        sum(a + b for a, b in (row.fit_macs for row in found.rows)),
    )
    return (
        f"{after:,} of {before:,} parameters ({after / before:.4f}), {fewer / max(1, macs):.4f} of the multiply-adds: every pair has "
        f"{found.share:.4f} of its layer, as no weight was looked at\n"
        f"split by the weights alone: {weights / 1e12:,.1f} T multiply-adds, some {_time(seconds['split'])}\n"
        f"with data: moments of the largest layer take {largest / 2**20:,.0f} MiB, of all {found.rounds} rounds over the batches; adding up those of "
        f"{TOKENS:,} tokens takes {moments / 1e12:,.1f} T multiply-adds, some {_time(seconds['moments'])}, beside the model's own forward passes; the "
        f"split {fit / 1e12:,.1f} T, some {_time(seconds['fit'])}\n"
        f"times are estimates for this device and {torch.get_num_threads()} thread(s): the time of small decompositions, grown with the cube of the size"
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _bytes(model: nn.Module, layer: Layer) -> int:
    """Of one number, as the configuration says it, else as the model was built."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else layer.dtype.itemsize
