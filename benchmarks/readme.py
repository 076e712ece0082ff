"""The README's measured tables, made from `results/`; a test compares them with the README.

python -m benchmarks.readme
"""

import json
from typing import Any

from tabulate import tabulate

from benchmarks.record import RESULTS


def load(prefix: str) -> dict[str, Any]:
    """The newest result of that name on a CPU."""
    path = max(RESULTS.glob(f"{prefix}_cpu*.json"), key=lambda p: p.name[-11:])
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def accuracy_table() -> str:
    """CIFAR-10, all methods of one run."""
    data = load("cifar10_resnet20_10ep")
    rows = [
        (
            r["method"],
            f"{100 * r['val_accuracy']:.1f} %",
            f"{r['parameters_after']:,}",
            f"{r['macs_after'] / r['macs_before']:.2f}",
            "-" if r["E"] is None else f"{r['E']:.1f}",
            r["K"],
            f"{100 * r['overhead']:.1f} %",
        )
        for r in data["results"]["runs"]
    ]
    c, e = data["configuration"], data["environment"]
    headers = ("method", "accuracy", "parameters", "MACs", "E", "K", "overhead")
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return (
        f"{c['model']}, CIFAR-10 as JPEG, {c['subset']:,} training images, {c['epochs']} epochs, seed {c['seeds'][0]}, "
        f"{e['cores']}-core CPU, torch {e['torch'].partition('+')[0]}. A short run on a small machine: it shows the mechanism, not the papers' accuracies.\n\n{table}"
    )


def cost_table() -> str:
    """What fxrank itself costs."""
    switch, track, convergence = (
        load("switch_cost")["results"],
        load("rank_tracking")["results"],
        load("convergence")["results"],
    )
    default = "slope, window 25, 0.1 %"
    rows = [
        (
            "rank tracking, warm, against `scipy.linalg.svdvals` per layer",
            f"{track['speedup_median']:.0f}x cheaper",
            ">= 25x",
        ),
        (
            "rank estimates within 1e-3",
            f"{100 * track['within_1e-3']:.1f} %, worst {track['worst_error']:.0e}",
            ">= 99 %, 5e-3",
        ),
        (
            "split at the switch against a full SVD per layer",
            f"{switch['split']['speedup']:.1f}x cheaper, excess error {switch['split']['excess_error']:.0e}",
            ">= 8x, 1e-6",
        ),
        (
            "Frobenius decay, share of a training step",
            f"{100 * switch['frobenius_decay']['share_of_step']:.2f} %",
            "< 0.3 %",
        ),
        ("step time over a handwritten low-rank ResNet-18", f"{switch['handwritten']['step_ratio']:.3f}", "<= 1.02"),
        *(
            (
                f"switch by the default test, digits, {name}",
                f"{100 * found['detectors'][default]['switch_share']:.0f} % of the run",
                "",
            )
            for name, found in convergence.items()
        ),
    ]
    return tabulate(rows, headers=("what", "measured", "target"), tablefmt="github", disable_numparse=True)


def tables() -> str:
    """Both, as they stand in the README."""
    return f"{accuracy_table()}\n\nWhat fxrank itself costs, on ResNet-18 in the CIFAR shape:\n\n{cost_table()}"


if __name__ == "__main__":
    print(tables())
