"""The decision table from its ledger: means over seeds, and whether each job meets what a default must."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

Found = Mapping[str, Any]
LIMITS = {"accuracy": 0.003, "bleu": 0.5}
"""How much worse than the full-rank model a row may be; of a perplexity, `RELATIVE` of it."""
RELATIVE = 0.01
HALF, FALL = 0.5, 0.01
"""The most parameters outside of embeddings, and the most accuracy that may be lost at the switch."""


@dataclass(frozen=True)
class Line:
    """What is known of one row of a job: its cells, one a seed, by `metric`, and its steps, once they are timed."""

    name: str
    metric: str
    cells: Sequence[Found]
    steps: Found | None = None

    def values(self, name: str) -> list[float]:
        """A number of the cells that have it."""
        return [cell[name] for cell in self.cells if cell.get(name) is not None]

    def mean(self, name: str) -> float | None:
        """The same, over all seeds."""
        values = self.values(name)
        return statistics.fmean(values) if values else None

    @property
    def scores(self) -> list[float]:
        """By seed."""
        return [cell["scores"][self.metric] for cell in self.cells]

    @property
    def score(self) -> float:
        """Over all seeds."""
        return statistics.fmean(self.scores)

    @property
    def shown(self) -> str:
        """The same, in words, with its spread."""
        return _shown(self.metric, self.scores)

    @property
    def share(self) -> float:
        """Of the parameters outside of the dense model's embeddings; those that pairs save of these count as well."""
        shares = [
            (cell["parameters"] - cell["dense_fixed"]) / (cell["dense_parameters"] - cell["dense_fixed"])
            for cell in self.cells
        ]
        return max(0.0, statistics.fmean(shares))

    @property
    def fall(self) -> float | None:
        """Accuracy lost at the switch, the most of all seeds."""
        falls = [
            cell["accuracy_before_switch"] - cell["accuracy_after_switch"]
            for cell in self.cells
            if cell["accuracy_after_switch"] is not None
        ]
        return max(falls) if falls else None

    @property
    def narrow(self) -> float | None:
        """Its share, if it is a narrower dense model."""
        found: float | None = self.cells[0]["narrow"]
        return found

    def time(self, full: "Line") -> tuple[float, bool] | None:
        """Of the run against the full-rank one: by the steps, timed beside each other, and the tool's own seconds; else by the wall, where
        other cells ran beside it, which is the second number.
        """
        if self.steps is None:
            pairs = zip(self.values("cell_seconds"), full.values("cell_seconds"), strict=False)
            return statistics.fmean(a / b for a, b in pairs), False
        after = self.steps["ratio"][0]
        before = 1.0 if self.narrow is None else after
        late = 0.0 if (E := self.mean("E")) is None else 1 - E / self.cells[0]["epochs"]
        own = [sum(c["seconds"].get(k, 0.0) for k in ("monitor", "profile", "switch")) for c in self.cells]
        whole = [c["seconds"]["total"] - c["seconds"]["evaluation"] for c in full.cells]
        return before * (1 - late) + after * late + statistics.fmean(own) / statistics.fmean(whole), True

    def within(self, full: "Line") -> bool:
        """Whether it is as good as the full-rank model, but for what a row may be worse."""
        if self.metric in LIMITS:
            return self.score >= full.score - LIMITS[self.metric]
        if self.metric == "bits_per_character":
            return self.score <= full.score + math.log2(1 + RELATIVE)
        return self.score <= full.score * (1 + RELATIVE)

    def beats(self, other: "Line") -> bool:
        """Whether it is better than another row."""
        return self.score > other.score if self.metric in LIMITS else self.score < other.score


def lines(cells: Mapping[str, Sequence[Found]], steps: Mapping[str, Found]) -> dict[str, Line]:
    """A job's rows that were trained, by name, with the measure that all of them have: the last, as BLEU comes after perplexity."""
    trained = {row: [c for c in of_row if "refused" not in c] for row, of_row in cells.items()}
    trained = {row: of_row for row, of_row in trained.items() if of_row}
    all_cells = [cell for of_row in trained.values() for cell in of_row]
    if not all_cells:
        return {}
    metric = [m for m in all_cells[0]["scores"] if all(m in cell["scores"] for cell in all_cells)][-1]
    return {row: Line(row, metric, of_row, steps.get(row)) for row, of_row in trained.items()}


def _shown(metric: str, scores: Sequence[float]) -> str:
    factor, digits = (100, 2) if metric == "accuracy" else (1, 4 if metric == "bits_per_character" else 2)
    mean = f"{factor * statistics.fmean(scores):.{digits}f}"
    return mean if len(scores) == 1 else f"{mean} ± {factor * statistics.stdev(scores):.{digits}f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def job_table(cells: Mapping[str, Sequence[Found]], steps: Mapping[str, Found]) -> str:
    """One line a row, in markdown; rows that there are none of below, with why."""
    found = lines(cells, steps)
    full = found.get("full")
    rows = []
    for name, line in found.items():
        first = line.cells[0]
        time = None if full is None else line.time(full)
        tool = [sum(c["seconds"].get(k, 0.0) for k in ("monitor", "profile", "switch")) for c in line.cells]
        before, after = (line.mean(f"accuracy_{when}_switch") for when in ("before", "after"))
        rows.append(
            (
                name,
                _shown(line.metric, line.scores),
                len(line.cells),
                _number(line.mean("validation_loss"), ".4f"),
                f"{statistics.fmean(c['parameters'] / c['dense_parameters'] for c in line.cells):.3f}",
                f"{line.share:.3f}",
                "-"
                if line.narrow is not None
                else f"{statistics.fmean(line.values('macs_after')) / first['macs_before']:.3f}",
                "-" if first["E"] is None else f"{line.mean('E'):.2f}/{first['epochs']}",
                _number(line.mean("K"), ".0f"),
                f"{line.mean('factorized'):.0f}/{first['layers']}",
                "-" if before is None or after is None else f"{100 * before:.2f} → {100 * after:.2f}",
                "-" if line.steps is None else "{:.2f} ± {:.2f}".format(*line.steps["ratio"]),
                "-" if time is None else f"{'' if time[1] else '~'}{time[0]:.2f}",
                f"{statistics.fmean(tool):.1f}",
                f"{line.mean('cell_seconds'):.0f}",
            )
        )
    metric = next(iter(found.values())).metric if found else "metric"
    headers = (
        *(
            "row",
            metric + (" %" if metric == "accuracy" else ""),
            "seeds",
            "loss",
            "parameters",
            "layers'",
            "MACs",
            "E",
        ),
        *("K", "factorized", "accuracy at the switch", "step", "run", "tool s", "cell s"),
    )
    refused = [
        f"- {row}: {cell['refused']}" for row, of_row in cells.items() for cell in of_row[:1] if "refused" in cell
    ]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n".join([table, "", *refused])


def criteria(cells: Mapping[str, Sequence[Found]], steps: Mapping[str, Found]) -> list[str]:
    """What a default must do for this job, and whether a row does it: sentences."""
    found = lines(cells, steps)
    full = found.get("full")
    small = [line for line in found.values() if line.narrow is None and line.share <= HALF + 0.005 and line is not full]
    if full is None or not small:
        return ["not known yet: it takes `full` and a row with at most half of the parameters"]
    best = small[0]
    for line in small[1:]:
        best = line if line.beats(best) else best
    twins = [line for line in found.values() if line.narrow is not None and line.narrow >= best.share - 0.005]
    twin = min(twins, key=lambda line: line.share, default=None)
    fall, time = best.fall, best.time(full)
    said = [
        f"(a) within the limit of full-rank with at most half of the parameters: {_yes(best.within(full))}, "
        f"`{best.name}` {_shown(best.metric, best.scores)} against {_shown(full.metric, full.scores)}, share {best.share:.3f}",
        "(b) better than a narrower model of that size: "
        + (
            "not known yet"
            if twin is None
            else f"{_yes(best.beats(twin))}, `{twin.name}` {_shown(twin.metric, twin.scores)}, share {twin.share:.3f}"
        ),
        f"(c) at most 1 point of accuracy lost at the switch: {'no switch' if fall is None else f'{_yes(fall <= FALL)}, {100 * fall:.2f}'}",
    ]
    if time is not None:
        how = "by timed steps" if time[1] else "by the wall, not quiet"
        said.append(f"(d) time of the run against full-rank: {time[0]:.2f}, {how}")
    return said


def _yes(met: bool) -> str:
    return "yes" if met else "NO"
