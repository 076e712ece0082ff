"""The tables of the papers' models, made from `results/`."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from benchmarks.tables import load

BOTH = ("full", "factorized")


def paper_sizes_table() -> str:
    """Sizes of the papers' models beside the papers' figures and the reference's counts, and what their pairs do to a training step."""
    data = load("paper_sizes")
    results: dict[str, dict[str, Any]] = data["results"]
    rows = [
        (
            f"{r['model']} ({r['source'].partition(' ')[0]}, {r['source'].partition(', ')[2]})",
            r["ranks"],
            " → ".join(_parameters(r[k]) for k in BOTH),
            _printed(r, "paper_parameters", "as_the_paper"),
            _reference(r),
            _macs(r),
            _printed(r, "paper_macs", "macs_as_the_paper"),
            "{:.2f} ± {:.2f}".format(*r["step"]["ratio"]) if "step" in r else "-",
            f"`{r['training']}`" if r["training"] else "-",
        )
        for r in results.values()
    ]
    headers = (
        *("model", "pairs", "parameters", "printed", "the reference's"),
        *("multiply-adds", "printed", "step", "trained on a GPU by"),
    )
    grid = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    reasons: dict[str, list[str]] = {}
    for r in results.values():
        if r["remark"] and r["model"] not in reasons.setdefault(r["remark"], []):
            reasons[r["remark"]].append(r["model"])
    remarks = [f"- {', '.join(models)}: {remark}" for remark, models in reasons.items()]
    return "\n".join([_legend(data), "", grid, *([""] if remarks else []), *remarks])


def _legend(data: Mapping[str, Any]) -> str:
    c, e = data["configuration"], data["environment"]
    timed = [r["step"] for r in data["results"].values() if "step" in r]
    said = (
        "Full-rank → factorized. ≠: ours, with as many digits, is not what the paper prints. The reference's parameters beyond ours, (!) where nothing below explains them. "
        "Multiply-adds of one forward call by the weight layers, and in brackets by all products that it makes."
    )
    if not timed:
        return said
    threads = e["torch_threads"]
    where = e["gpu"] or f"{threads} CPU thread{'s' * (threads > 1)}"
    how = " and ".join(dict.fromkeys(step["how"] for step in timed))
    return (
        f"{said} Step: forward and backward of {c['batch']} images of 224×224 on {where}, torch {e['torch'].partition('+')[0]}, of the full-rank model's, "
        f"median and half the distance between quartiles of interleaved rounds, by {how}."
    )


def _parameters(found: Mapping[str, Any]) -> str:
    frozen = found["trainable"] < found["parameters"]
    return f"{found['parameters']:,}" + (f" ({found['trainable']:,} of them train)" if frozen else "")


def _printed(r: Mapping[str, Any], figure: str, same: str) -> str:
    shown = [f"{'' if r[k][same] else '≠ '}{r[k][figure]}" for k in BOTH if r[k][figure] is not None]
    return " → ".join(shown) or "-"


def _reference(r: Mapping[str, Any]) -> str:
    def one(found: Mapping[str, Any]) -> str:
        more = found["reference_more"]
        if more is None:
            return "-"
        return ("the same" if more == 0 else f"{more:+,}") + ("" if found["explained"] else " (!)")

    return " → ".join(dict.fromkeys(one(r[k]) for k in BOTH))


def _macs(r: Mapping[str, Any]) -> str:
    unit, name = (1e9, "G") if r["full"]["macs"] >= 1e9 else (1e6, "M")

    def one(found: Mapping[str, Any]) -> str:
        layers, call = (f"{found[k] / unit:,.2f}" for k in ("macs", "call_macs"))
        return layers if layers == call else f"{layers} ({call})"

    return f"{' → '.join(one(r[k]) for k in BOTH)} {name} per {r['of']}"
