"""Tables of the decision ledger: the default beside the dense model and a narrower one, and what was tried beside it."""

from tabulate import tabulate

from benchmarks.decisions import Book
from benchmarks.record import RESULTS
from benchmarks.subjects import jobs
from benchmarks.subjects.verdicts import HALF, Line, lines

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
UNITS = {
    "accuracy": "accuracy, %",
    "bits_per_character": "bits a character",
    "perplexity": "perplexity",
    "bleu": "BLEU",
}


def default_table() -> str:
    """The default beside the dense model, and a narrower one of its size."""
    book = _book()
    rows = []
    for name, what in JOBS.items():
        cells, steps = book.of_job(name)
        found = lines({row: cells[row] for row in ("full", "default", "twin") if row in cells}, steps)
        if not {"full", "default"} <= found.keys():
            continue
        full, default, twin = found["full"], found["default"], found.get("twin")
        before, after = (default.mean(f"accuracy_{when}_switch") for when in ("before", "after"))
        rows.append(
            (
                what,
                UNITS[full.metric],
                full.shown,
                default.shown,
                "-" if twin is None else _beside(twin, default),
                f"{default.share:.2f}",
                "-" if default.steps is None else "{:.2f} ± {:.2f}".format(*default.steps["ratio"]),
                "-" if twin is None else _step(twin),
                f"{100 * before:.1f} → {100 * after:.1f}" if before and after and default.mean("factorized") else "-",
                len(default.cells),
            )
        )
    headers = (
        *("job", "in", "full-rank", "fxrank", "narrower", "parameters", "step", "narrower's"),
        *("accuracy at the switch", "seeds"),
    )
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def wins_table() -> str:
    """The same in a narrow table: a share and a score for each."""
    rows = []
    for name, what in SHORT.items():
        cells, steps = _book().of_job(name)
        found = lines({row: cells[row] for row in ("full", "default", "twin") if row in cells}, steps)
        full, default, twin = found["full"], found["default"], found.get("twin")
        rows.append(
            (
                what,
                UNITS[full.metric],
                full.shown,
                default.shown,
                "-" if twin is None else _beside(twin, default),
                f"{default.share:.2f}",
                _step(default),
                "-" if twin is None else _step(twin),
            )
        )
    headers = ("job", "in", "full-rank", "fxrank", "narrower", "parameters", "step", "narrower's")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def verdict() -> str:
    """Where the default wins and where it loses, in sentences."""
    good = "As good as full-rank (within 0.3 points, 0.5 BLEU or 1 % of perplexity)"
    said: dict[str, list[str]] = {
        f"{good} with at most half of the parameters": [],
        f"{good} with more": [],
        "Worse than that": [],
        "Better than the narrower model": [],
        "not better": [],
        "Left dense, as no pair is faster": [],
    }
    half, more, worse, better, not_better, dense = said.values()
    for name in JOBS:
        cells, steps = _book().of_job(name)
        found = lines({row: cells[row] for row in ("full", "default", "twin") if row in cells}, steps)
        full, default, twin = found["full"], found["default"], found.get("twin")
        what = SHORT[name].partition(",")[0]
        if not default.mean("factorized"):
            dense.append(what)
            continue
        (worse if not default.within(full) else half if default.share <= HALF else more).append(what)
        if twin is not None:
            (better if default.beats(twin) else not_better).append(what)
    texts = {what: f"{what}: {', '.join(names)}" for what, names in said.items() if names}
    beside = "; ".join(text for what, text in texts.items() if "etter" in what)
    apart = [text for what, text in texts.items() if "etter" not in what]
    return "\n".join(f"- {text}." for text in [*apart, beside])


def tried_table() -> str:
    """What was tried beside the default, by job."""
    rows = []
    for name in JOBS:
        cells, steps = _book().of_job(name)
        for row, what in TRIED.items():
            if row in cells and "full" in cells:
                seeds = {cell["seed"] for cell in cells[row]}
                same = [cell for cell in cells["default"] if cell["seed"] in seeds]
                found = lines({"full": cells["full"], "default": same, row: cells[row]}, steps)
                line, default = found[row], found["default"]
                rows.append(
                    (
                        what,
                        SHORT[name],
                        UNITS[line.metric],
                        line.shown,
                        f"{line.share:.2f}",
                        default.shown,
                        f"{default.share:.2f}",
                        len(line.cells),
                    )
                )
    order = list(TRIED.values())
    rows.sort(key=lambda r: order.index(str(r[0])))
    headers = ("tried", "job", "in", "it", "parameters", "default", "parameters", "seeds")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _beside(line: Line, other: Line) -> str:
    """Its score, with the number of seeds where that is not the other's."""
    seeds = len(line.cells)
    return line.shown if seeds == len(other.cells) else f"{line.shown} ({seeds} seed{'s' * (seeds > 1)})"


def _step(line: Line) -> str:
    return "-" if line.steps is None else f"{line.steps['ratio'][0]:.2f}"


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
