"""Tables of the decision ledger: the default beside the dense model and a narrower one, and what was tried beside it."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tabulate import tabulate

from benchmarks.decisions import Book
from benchmarks.record import RESULTS
from benchmarks.subjects import jobs
from benchmarks.subjects.verdicts import HALF, Found, Line, lines

JOBS = {
    "wide-digits": "five-layer perceptron, 512 wide, digits (two arguments alone)",
    "resnet20-cifar10": "ResNet-20, CIFAR-10 at 16x16",
    "resnet18-cifar10": "ResNet-18, 16 wide, CIFAR-10 at 16x16",
    "vit-cifar10": "ViT (4 blocks), CIFAR-10 at 16x16",
    "char-transformer": "character Transformer, tinyshakespeare",
    "lstm-wikitext2": "2-layer LSTM, WikiText-2",
    "multi30k": "encoder-decoder Transformer, Multi30k",
    "minilm-sst2": "MiniLM-L6, pretrained, SST-2",
}
SHORT = {
    "wide-digits": "wide perceptron, digits",
    "resnet20-cifar10": "ResNet-20, CIFAR-10",
    "resnet18-cifar10": "ResNet-18, CIFAR-10",
    "vit-cifar10": "ViT, CIFAR-10",
    "char-transformer": "character Transformer",
    "lstm-wikitext2": "LSTM, WikiText-2",
    "multi30k": "translation, Multi30k",
    "minilm-sst2": "MiniLM, SST-2",
}
TRIED = {
    "default": "settled ranks wait for 0.65 of the run (the default since)",
    "late": "the switch at 0.65 of the run, whatever the ranks",
    "late-0.4": "the same, and a floor of 0.4",
    "own-losses": "layers' losses as they are, not weighed",
    "no-floor": "no floor",
    "floor-0.4": "a floor of 0.4",
    "keep-0.97": "keep 0.97",
    "keep-0.95": "keep 0.95",
    "channel": "channel pairs alone",
    "untimed": "no timing: every layer that saves",
    "no-decay": "no Frobenius decay",
    "decay-as-dense": "the product decays as the dense weight did",
    "rewarm": "the rate warmed up again",
    "lr-0.5": "half the rate after the switch",
    "lr-2": "twice the rate after the switch",
    "soft": "a soft switch",
    "scaled-gradients": "gradients scaled by the other factor",
    "spectral-decay": "spectral decay before the switch",
    "scaled": "ranks by the scaled stable rank",
    "entropy": "ranks by the entropy rank",
    "0.5-start": "a target of 0.5 at E = 0",
    "0.5-data": "a target of 0.5",
    "0.3-data": "a target of 0.3",
    "0.3": "a target of 0.3, by weights",
}
OWN = ("monitor", "profile", "switch")
"""What of a run's seconds is fxrank's own."""
UNITS = {
    "accuracy": "accuracy, %",
    "bits_per_character": "bits a character",
    "perplexity": "perplexity",
    "bleu": "BLEU",
}


ELSEWHERE = " \\*"
"""Marks a comparison of cells that were not all trained on one kind of processor: some networks come to other numbers on another, from the same seed."""


def _mark(*cells: Sequence[Found]) -> str:
    processors = {cell["environment"]["cpu"] for some in cells for cell in some}
    return ELSEWHERE if len(processors) > 1 else ""


def elsewhere_line() -> str:
    """What the mark means."""
    return f"{ELSEWHERE.strip()} not all trained on one kind of processor: some networks come to other numbers on another, from the same seed."


class Beside(NamedTuple):
    """The default of a job, the dense model and the narrower one, if there is one, and whether the default is better on the seeds that both have."""

    job: str
    full: Line
    default: Line
    twin: Line | None
    beats_twin: bool

    @property
    def start(self) -> list[str]:
        """What every table says of them first."""
        scores = [UNITS[self.full.metric], self.full.shown, self.default.shown]
        if self.twin is None:
            return [*scores, "-"]
        seeds = len(self.twin.cells)
        alike = seeds == len(self.default.cells)
        return [*scores, self.twin.shown if alike else f"{self.twin.shown} ({seeds} seed{'s' * (seeds > 1)})"]

    @property
    def mark(self) -> str:
        """`ELSEWHERE` if its cells are of several processors."""
        return _mark(self.full.cells, self.default.cells, *([] if self.twin is None else [self.twin.cells]))

    @property
    def twins_step(self) -> str:
        """Of the dense model's step, what the narrower one's takes."""
        return "-" if self.twin is None or self.twin.steps is None else f"{self.twin.steps['ratio'][0]:.2f}"

    @property
    def own_time(self) -> str:
        """What fxrank itself took of the run, over all seeds."""
        of_runs = [sum(c["seconds"].get(k, 0.0) for k in OWN) / c["seconds"]["total"] for c in self.default.cells]
        return f"{100 * statistics.fmean(of_runs):.0f} %"


def beside() -> Iterator[Beside]:
    """Each job of which there are the dense model and the default."""
    book = _book()
    for job in JOBS:
        cells, steps = book.of_job(job)
        found = lines({row: cells[row] for row in ("full", "default", "twin") if row in cells}, steps)
        if not {"full", "default"} <= found.keys():
            continue
        default, twin, beats = found["default"], found.get("twin"), False
        if twin is not None:
            same = _of_seeds(cells["default"], twin.cells)
            beats = Line("default", default.metric, same).beats(twin)
        yield Beside(job, found["full"], default, twin, beats)


def _of_seeds(cells: Sequence[Found], others: Sequence[Found]) -> list[Found]:
    seeds = {cell["seed"] for cell in others}
    return [cell for cell in cells if cell["seed"] in seeds]


def default_table() -> str:
    """The default beside the dense model, and a narrower one of its size."""
    rows = []
    for b in beside():
        before, after = (b.default.mean(f"accuracy_{when}_switch") for when in ("before", "after"))
        rows.append(
            (
                JOBS[b.job] + b.mark,
                *b.start,
                f"{b.default.share:.2f}",
                "-" if b.default.steps is None else "{:.2f} ± {:.2f}".format(*b.default.steps["ratio"]),
                b.twins_step,
                f"{100 * before:.1f} → {100 * after:.1f}" if before and after and b.default.mean("factorized") else "-",
                b.own_time,
                len(b.default.cells),
            )
        )
    headers = (
        *("job", "in", "full-rank", "fxrank", "narrower", "parameters", "step", "narrower's"),
        *("accuracy at the switch", "fxrank itself", "seeds"),
    )
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def wins_table() -> str:
    """The same in a narrow table: a share and a score for each."""
    rows = []
    for b in beside():
        step = "-" if b.default.steps is None else f"{b.default.steps['ratio'][0]:.2f}"
        rows.append((SHORT[b.job] + b.mark, *b.start, f"{b.default.share:.2f}", step, b.twins_step))
    headers = ("job", "in", "full-rank", "fxrank", "narrower", "parameters", "step", "narrower's")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def states() -> str:
    """Of fxrank's files, in which the default's cells were trained."""
    count = len({cell["code"] for b in beside() for cell in b.default.cells})
    return f"{count} state{'s' * (count > 1)}"


def verdict() -> str:
    """Where the default wins and where it loses, in sentences."""
    good = "As good as full-rank (within 0.3 points, 0.5 BLEU or 1 % of perplexity)"
    said: dict[str, list[str]] = defaultdict(list)
    for b in beside():
        what = SHORT[b.job].partition(",")[0]
        if not b.default.mean("factorized"):
            said["dense"].append(what)
            continue
        small = "half" if b.default.share <= HALF else "more"
        said[small if b.default.within(b.full) else "worse"].append(what)
        if b.twin is not None:
            said["better" if b.beats_twin else "not better"].append(what)
    sentences = {
        "half": f"- {good} with at most half of the parameters: {{}}.",
        "more": f"- {good} with more: {{}}.",
        "worse": "- Worse than that: {}.",
        "dense": "- Left dense, as no pair is faster: {}.",
        "better": "- Better than the narrower model, on the seeds of both: {}.",
        "not better": "- Not better than it: {}.",
    }
    return "\n".join(text.format(", ".join(said[key])) for key, text in sentences.items() if said[key])


def tried_table() -> str:
    """What was tried beside what was the default then, by job, on the seeds of both."""
    rows = []
    for name in JOBS:
        cells, steps = _book().of_job(name)
        for row, what in TRIED.items():
            if row in cells and {"full", "early"} <= cells.keys():
                alike = _of_seeds(cells[row], cells["early"])
                same = _of_seeds(cells["early"], alike)
                found = lines({"full": cells["full"], "early": same, row: alike}, steps) if alike else {}
                if not found:
                    continue
                line, early = found[row], found["early"]
                rows.append(
                    (
                        what,
                        SHORT[name] + _mark(alike, same),
                        UNITS[line.metric],
                        line.shown,
                        f"{line.share:.2f}",
                        early.shown,
                        f"{early.share:.2f}",
                        len(line.cells),
                    )
                )
    order = list(TRIED.values())
    rows.sort(key=lambda r: order.index(str(r[0])))
    headers = ("tried", "job", "in", "it", "parameters", "beside", "parameters", "seeds")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _book() -> Book:
    path = max(RESULTS.glob("decisions_cpu*.jsonl"), key=lambda p: p.name[-12:])
    return Book(path, jobs.JOBS)


def with_tables_line() -> str:
    """The pretrained model with its table of words among the layers."""
    cells, _ = _book().of_job("minilm-sst2")
    full, small = cells["full"][0], cells["0.7-tables"][0]
    return (
        f"Of MiniLM's parameters {100 * full['dense_fixed'] / full['dense_parameters']:.0f} % are tables, which a pair makes smaller and not faster, so that the default leaves them. Asked for, by "
        '`policy=Cuttlefish(target_params=0.7, factors="data"), include="*embedding*"`, it has '
        f"{full['parameters'] / small['parameters']:.2f} times fewer parameters, tables counted, at {100 * small['scores']['accuracy']:.2f} % "
        f"(full-rank {100 * full['scores']['accuracy']:.2f} %, one seed, 872 sentences)."
    )
