"""The measured tables of the README and the docs, made from `results/`."""

import json
from collections.abc import Callable
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
    switch, track, convergence, memory = (
        load(name)["results"] for name in ("switch_cost", "rank_tracking", "convergence", "switch_memory")
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
        (
            "memory for the switch by weights, of the factors, their state and one layer",
            " ".join(f"{r['share_of_limit']:.2f}" for name, r in memory.items() if name.endswith("by weights")),
            "<= 1",
        ),
        (
            "memory for the switch by outputs, of the model's weights",
            " ".join(f"{r['share_of_weights']:.2f}" for name, r in memory.items() if name.endswith("by outputs")),
            "",
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


def zoo_table() -> str:
    """How much of the model zoo is reached, and how exactly."""
    rows = []
    for source, what in (
        ("torchvision", "torchvision, all of `list_models()`"),
        ("timm", "timm, one of each module and 19 well-known"),
        ("hf", "transformers, tiny configurations"),
        ("misc", "users' own kinds"),
    ):
        found = load(f"model_zoo_{source}")["summary"]
        worst = found["worst"]
        rows.append(
            (
                what,
                f"{found['models'] - len(found['errors'])} of {found['models']}",
                found["whole"],
                f"{100 * found['share_mean']:.2f} %, {100 * found['share_least']:.1f} %",
                f"{worst['float32']:.0e} ({found['checked']['float32']})",
                f"{max(worst['float64'], worst['float64_train']):.0e} ({found['checked']['float64_train']})",
                f"{worst['gradients']:.0e}",
                f"{found['trace_s_median']:.2f} s, {found['verified_trace_s_median']:.2f} s",
            )
        )
    headers = (
        "models",
        "with a result",
        "in one graph",
        "weights reached: mean, least",
        "float32 (models)",
        "float64 (models)",
        "gradients",
        "trace, median: alone, verified",
    )
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


RUNS = {
    "vit_cifar10": "ViT-tiny (6 blocks), CIFAR-10",
    "minilm_sst2": "MiniLM-L6, pretrained, SST-2",
    "char_transformer": "character Transformer, tinyshakespeare",
    "lstm_wikitext2": "2-layer LSTM, WikiText-2",
    "multi30k": "encoder-decoder Transformer, Multi30k",
}


def runs_table() -> str:
    """Five real jobs, each beside its full-rank twin."""
    rows = []
    for name, what in RUNS.items():
        data = load(f"run_{name}")
        c, full, low = data["configuration"], data["results"]["full_rank"], data["results"]["low_rank"]
        metric = c["metric"]
        form = "{:.1%}" if metric == "accuracy" else "{:.3f}" if metric == "bits_per_character" else "{:.1f}"
        rows.append(
            (
                what,
                metric.replace("_", " "),
                form.format(full[metric]),
                form.format(low[metric]),
                f"{low['parameters_before']:,}",
                f"{low['parameters_after']:,}",
                f"{low['macs_after'] / low['macs_before']:.2f}",
                "-" if low["E"] is None else f"{low['E']:.1f} of {c['epochs']}",
                f"{len(low['R'])} of {len(low['plan'])}",
            )
        )
    headers = ("job", "metric", "full-rank", "low-rank", "parameters", "after", "MACs", "E", "layers")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def parallel_table() -> str:
    """What several processes send, how long a step takes them and, where they were trained, what they came to."""
    rows = [
        (
            f"{size} processes, {name}",
            f"{r['bytes_per_step'] / 1e6:.3g} MB",
            f"{r['of_full_rank']:.2f}",
            *([f"{r['parameters']:,}", f"{100 * r['accuracy']:.2f}"] if "accuracy" in r else []),
        )
        for size, found in load("data_parallel")["results"].items()
        for name, r in found.items()
    ]
    headers = ("ResNet-18, gradients averaged by", "sent per step", "step time", "parameters", "accuracy, %")
    return tabulate(rows, headers=headers[: len(rows[0])], tablefmt="github", disable_numparse=True)


def compiled_table() -> str:
    """Step times of compiled models, and what the switch compiles."""
    variants = ("full-rank, compiled", "low-rank, eager", "low-rank, compiled")
    rows = []
    for name, what in (("resnet18", "ResNet-18"), ("vit_tiny", "ViT-tiny (6 blocks)")):
        found = load("compiled")["results"][name]
        for phase, title in (("train", "training step"), ("eval", "evaluation")):
            times = [f"{found[phase][variant]['of_full_rank_eager']:.2f}" for variant in variants]
            s, differs = found["switch"], found["difference"]["float64_gradients"]
            once = (
                f"{s['graphs_by_the_switch']} ({s['graph_breaks']})",
                f"{s['compile_s_by_the_switch']:.0f} s after {s['compile_s_before']:.0f} s",
                f"{differs:.0e}",
            )
            rows.append((f"{what}, {title}", *times, *(once if phase == "train" else ("", "", ""))))
    headers = ("time", *variants, "graphs by the switch (breaks)", "compilation by the switch", "float64 gradients")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def faults_table() -> str:
    """What was done to training runs, and what was lost."""
    rows = [
        (f"{what}: {', '.join(r['named'])}" if r["named"] else what, r["tried"], r["lost"], r["skipped"])
        for what, r in load("faults")["results"].items()
    ]
    headers = ("done to training runs", "tried", "lost", "skipped")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def oneshot_table(model: str, kept: Callable[[dict[str, Any]], bool] = lambda row: True) -> str:
    """What is left of a trained network within a share of its parameters, by way, of the rows that are `kept`."""
    data = load(f"oneshot_{model}")
    (_, *found), budgets = data["results"], sorted(data["configuration"]["budgets"], reverse=True)
    timed = any("forward" in r for r in found)
    ways: dict[tuple[str, ...], dict[float, list[str]]] = {}
    for r in found:
        if "failed" not in r and kept(r):
            shown = [" / ".join("-" if k not in r else f"{100 * r[k]:.1f}" for k in ("raw", "batchnorm", "healed"))]
            if timed:
                shown.append("{:.2f} ({:.2f}-{:.2f})".format(*r["forward"]) if "forward" in r else "-")
            ways.setdefault((r["tool"], r["form"], r["factors"], r["ranks"]), {})[r["budget"]] = shown
    none = ["-"] * (1 + timed)
    rows = [[*way, *(cell for b in budgets for cell in by.get(b, none))] for way, by in ways.items()]
    headers = ["tool", "form", "factors from", "ranks"]
    headers += [column for b in budgets for column in (f"{b:g} of the parameters", *(["time"] if timed else []))]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def oneshot_images() -> str:
    """The trained networks that tell images apart."""
    data, vgg, vit = load("oneshot_resnet56"), load("oneshot_vgg11_bn"), load("oneshot_vit_tiny")
    c = data["configuration"]
    tested = "{:.1f} % of {:,} test images before"
    some = ("chosen", "own losses")

    def before(found: dict[str, Any]) -> str:
        return tested.format(100 * found["results"][0]["raw"], found["configuration"]["test_subset"])

    refused = sorted({r["tool"] for r in vit["results"] if "failed" in r})
    return (
        f"A trained ResNet-56 (CIFAR-10 as JPEG, {c['subset']:,} training images, {before(data)}), made smaller in one call, {c['calibration']} images for calibration: accuracy "
        f"without training / with BatchNorm measured again on 2,000 images / after {c['steps']} steps of 64 images, in percent, one seed; time of a forward call, of the dense "
        f"model's, on {data['environment']['torch_threads']} thread, median and quartiles of interleaved calls. Other tools through their own calls, the largest setting that fits. "
        f"On a network as narrow as this pairs save memory and hardly time; pruning and Tucker decompositions save more of it:\n\n{oneshot_table('resnet56')}\n\n"
        f"The same for a VGG-11 with BatchNorm ({before(vgg)}), not timed; with factors from data by the layers' own losses only:\n\n"
        f"{oneshot_table('vgg11_bn', lambda r: r['tool'] != 'fxrank' or r['ranks'] in some)}\n\n"
        f"And for a ViT of 6 blocks ({before(vit)}; the steps of training make the dense one worse too, {100 * vit['results'][0]['healed']:.1f} %), not timed. It has no BatchNorm. "
        f"Of the other tools none gives a smaller model that computes ({', '.join(refused)}):\n\n{oneshot_table('vit_tiny', lambda r: r['tool'] == 'fxrank')}"
    )


def oneshot_texts() -> str:
    """The trained Transformers for text."""
    minilm, char = load("oneshot_minilm_sst2"), load("oneshot_char_transformer")
    (dense, *found), steps = char["results"], minilm["configuration"]["steps"]
    narrow = [r for r in found if r["way"] == "narrower"]
    said = " and ".join(f"{r['raw']:.3f} at {r['budget']:g}" for r in narrow)
    return (
        f"A MiniLM-L6, fine-tuned on SST-2 ({100 * minilm['results'][0]['raw']:.1f} %), by share of all its parameters, without training / after {steps} steps. "
        "At 0.8 and 0.6 ranks that are chosen by what the whole model loses keep most, and by what the layers lose themselves inner layers keep less than with one ratio for all; at 0.9 all ways lie close together. "
        f'"all" has the tables among the layers (`include="*"`):\n\n{text_table(minilm, "{:.1%}")}\n\n'
        f"A character Transformer (tinyshakespeare, {dense['raw']:.3f} bits a character; {dense['healed']:.3f} after the same {steps} steps, which make it worse). A narrower dense model, trained as long as this one "
        f"was, has {said} of the parameters. The steps take more from pairs in the gauge form, which `auto` has here, than from plain ones:\n\n{text_table(char, '{:.3f}')}"
    )


def text_table(data: dict[str, Any], form: str) -> str:
    """Of a Transformer, a line a way and a column a budget."""
    _, *found = data["results"]
    budgets = sorted({r["budget"] for r in found}, reverse=True)
    ways: dict[tuple[str, ...], dict[float, str]] = {}
    for r in found:
        if "raw" in r and r["way"] == "pairs":
            way = tuple(r[k] for k in ("layers", "form", "factors", "ranks"))
            ways.setdefault(way, {})[r["budget"]] = f"{form.format(r['raw'])} / {form.format(r['healed'])}".replace(
                "%", ""
            )
    rows = [[*way, *(by.get(b, "-") for b in budgets)] for way, by in ways.items()]
    headers = ["layers", "form", "factors from", "ranks", *(f"{b:g} of the parameters" for b in budgets)]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def random_models_line() -> str:
    """What became of the random models."""
    r = load("random_models")["results"]
    pairs, dense = sum(r["factorized"].values()), sum(r["dense"].values())
    return (
        f"Random models (attention, recurrent, ties, parametrizations, raw products, containers, code that asks what its parts are), each factorized, merged, saved and loaded: "
        f"{r['passed']:,} of {r['models']:,} hold all that must hold (exact at full rank in both modes and at other batch sizes, gradients, the bound at lower ranks, the original untouched); "
        f"{pairs:,} weights got pairs, {dense:,} stayed dense with a reason."
    )
