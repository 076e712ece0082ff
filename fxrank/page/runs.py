"""The page of a run, from the plain data of its report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxrank.page import courses, ranks, times
from fxrank.page.graphs import graphs
from fxrank.page.parts import Data
from fxrank.page.render import Cell, Contents, Section, Tile, render

_WARNS = ("NOTHING WAS FACTORIZED", "THE WEIGHTS ARE NOT FINITE")
_EARLIER = (
    "the report is of an earlier fxrank, which kept no curves, stacks, spectra and graph: there are no charts of these"
)
_WANTED = ("plan", "parameters_before", "parameters_after", "seconds", "notes")


def run_page(report: Data, title: str = "fxrank") -> str:
    """The page of a run, from the plain data of its report (`Report.to_dict`, or `report.json` read). What a report of an earlier fxrank does not
    have is left out, and the page says so.

    Raises `ValueError` for data that is no report's, and as `render`.
    """
    missing = [name for name in _WANTED if name not in report]
    if missing or not isinstance(report["plan"], Mapping):
        raise ValueError(
            f"a page is made from a run's report, which has {', '.join(_WANTED)}; this has no {missing[0] if missing else 'plan with layers'}. "
            "Give the report.json of a run's folder."
        )
    whole = bool(report.get("details"))
    report = {**report, "details": _EMPTY | dict(report.get("details") or {})}
    return render(
        Contents(
            title=title,
            headline=headline(report),
            notes=[*_notes(report), *((False, note) for note in ([_uncut(report)] if whole else [_EARLIER]) if note)],
            tiles=_tiles(report),
            sections=_sections(report),
            head=_HEAD,
            rows=[_row(layer) for layer in report["plan"]["layers"]],
            footer=_footer(report),
            graphs=graphs(report),
            more=report["details"]["graph"]["more"],
        )
    )


def headline(report: Data) -> str:
    """What came of the run, in a sentence or two."""
    pairs = sum(layer["rank"] is not None for layer in report["plan"]["layers"])
    if not pairs:
        return f"Nothing was factorized: the model is full-rank ({report['plan']['note']})."
    smaller = report["parameters_before"] / max(1, report["parameters_after"])
    parts = [f"{smaller:.2f} times fewer parameters, by pairs in {pairs} of {len(report['plan']['layers'])} layers"]
    if (speed := report.get("measured_speedup")) is not None:
        parts.append(f"a training step {speed:.2f} times as fast")
    text = "; ".join(parts) + "."
    if (accuracy := report.get("val_accuracy")) is not None:
        text += f" Validation accuracy {accuracy:.2%}."
    return text


_EMPTY: dict[str, Any] = {
    "history": (),
    "steps_per_epoch": 1,
    "curves": None,
    "stacks": (),
    "roofline": None,
    "spectra": {},
    "graph": {"nodes": (), "more": 0},
}


def _sections(report: Data) -> list[Section]:
    cuts, stacks = report["details"]["spectra"], report["details"]["stacks"]
    of = {cut["of"] for cut in cuts.values()}
    chosen = "outputs, on live data: ranks were chosen by it"
    what = chosen if of == {"outputs"} else "weight" if of == {"weight"} else "outputs, or weight"
    return [
        Section("training", "Training", "By epoch; the dashed line is the switch.", courses.training(report)),
        Section(
            "curves",
            "Ranks while it trained full-rank",
            "The stable rank of each layer's weight, over its full rank. When all have settled, the switch is made. A click on a stack shows it alone.",
            [courses.rank_curves(report), courses.rank_heat(report)],
            wide=True,
        ),
        Section(
            "ranks", "Ranks chosen", "Of each layer, beside its full rank.", [ranks.chosen_ranks(report)], wide=True
        ),
        Section(
            "spectra",
            "What was cut",
            f"The share of a layer's {what}, in squares, that a pair leaves out, by its rank, with the rank that was chosen.",
            ranks.spectra(report),
            choice=ranks.CHOICE,
            choices=list(cuts),
        ),
        Section(
            "stacks",
            "Time of each stack of layers",
            "One layer of each, dense and as a pair, measured on the device before the training; a stack that a pair does not make faster stays dense. "
            f"{times.BESIDE_IT}{times.busy(stacks)}",
            [times.stack_bars(stacks), times.roofline(stacks, report["details"]["roofline"])],
        ),
        Section(
            "cost",
            "Where the time went",
            "Of the whole run, fxrank's own work among it.",
            [times.own_cost(report)],
            wide=True,
        ),
    ]


def _notes(report: Data) -> list[tuple[bool, str]]:
    """Warnings first."""
    notes: list[str] = list(report["notes"])
    if not report.get("R") and report["plan"]["policy"] != "FullRank":
        notes.insert(0, "NOTHING WAS FACTORIZED: the model is full-rank; the table says why, layer by layer")
    return sorted(((note.startswith(_WARNS), note) for note in notes), key=lambda one: not one[0])


def _uncut(report: Data) -> str:
    """How many pairs "What was cut" is not shown of, and why; empty where it is of all."""
    left = sum(layer["rank"] is not None for layer in report["plan"]["layers"]) - len(report["details"]["spectra"])
    if not left:
        return ""
    return f"what was cut is not shown of {left} pairs: spectra of weights are taken where that needs little time and memory"


def _tiles(report: Data) -> list[Tile]:
    plan, step = report["plan"], report.get("step_ms", {})
    memory = report.get("memory_bytes", {})
    pairs = sum(layer["rank"] is not None for layer in plan["layers"])
    switch = "-" if report.get("E") is None else f"epoch {report['E']:.3g}"
    predicted, measured = report.get("predicted_speedup"), report.get("measured_speedup")
    return [
        _tile("parameters", report["parameters_before"], report["parameters_after"], "{:,}".format),
        _tile("MACs a call", report.get("macs_before"), report.get("macs_after"), _si),
        _tile("training step", step.get("full-rank"), step.get("low-rank"), "{:.1f} ms".format),
        Tile(
            "speed-up of the step",
            "-" if measured is None else f"{measured:.2f}x",
            "not predicted" if predicted is None else f"predicted {predicted:.2f}x",
        ),
        _tile("training memory", _mib(memory.get("full-rank")), _mib(memory.get("low-rank")), "{:.1f} MiB".format),
        _tile(
            "accuracy at the switch",
            report.get("accuracy_before_switch"),
            report.get("accuracy_after_switch"),
            "{:.2%}".format,
        ),
        Tile("E, the switch", switch, f"of {report['epochs']} epochs" if "epochs" in report else ""),
        Tile("pairs, of layers", f"{pairs} of {len(plan['layers'])}", f"K = {report.get('K', '-')} left at the start"),
        Tile("fxrank's own time", f"{report.get('overhead', 0):.1%}", f"of {report['seconds'].get('total', 0):.1f} s"),
    ]


def _tile(of: str, before: float | None, after: float | None, how: Callable[[float], str]) -> Tile:
    if after is None or before is None:
        known = after if before is None else before
        return Tile(of, "-" if known is None else how(known))
    return Tile(of, how(after), f"before: {how(before)}")


def _si(count: float) -> str:
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {sign}"
    return f"{count:g}"


def _mib(size: float | None) -> float | None:
    return None if size is None else size / 2**20


_HEAD = (
    "layer",
    "kind",
    "weight",
    "full rank",
    "rank",
    "ratio",
    "parameters",
    "as a pair",
    "output error",
    "speed-up",
    "reason",
)


def _row(layer: Data) -> tuple[bool, Sequence[Cell]]:
    rank, full = layer["rank"], layer["full_rank"]
    error = layer.get("output_error")
    cells = (
        Cell(layer["name"]),
        Cell(layer["kind"] if layer["form"] in ("channel", "") else f"{layer['kind']}, {layer['form']}"),
        Cell("x".join(map(str, layer["weight_shape"]))),
        Cell.of(full, "{}"),
        Cell.of(rank, "{}"),
        Cell.of(None if rank is None else rank / full, "{:.2f}"),
        Cell.of(layer["parameters"], "{:,}"),
        Cell.of(layer["pair_parameters"], "{:,}"),
        Cell.of(layer.get("truncation_error") if error is None else error, "{:.3f}"),
        Cell.of(layer["speedup"], "{:.2f}x"),
        Cell(layer["reason"]),
    )
    return rank is not None, cells


def _footer(report: Data) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in report.get("settings", {}).items())
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in report["seconds"].items())
    return f"fxrank. {settings}. Time: {parts}."
