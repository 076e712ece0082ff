"""The `fxrank` command: demo, train, compress, profile, inspect, report, env, completion."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxrank._version import __version__
from fxrank.auto import PAGE, train_lowrank
from fxrank.cli import compress, outlook, report
from fxrank.cli.data import DATA_HELP, build_loaders
from fxrank.cli.env import described
from fxrank.cli.models import MODEL_HELP, build_model, example_for, on_meta_where_possible
from fxrank.distributed.launch import in_shares, launched
from fxrank.distributed.team import Team
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.errors import FxrankError
from fxrank.passes.model.device import known_device
from fxrank.passes.tracing.trace import trace
from fxrank.plan import Plan
from fxrank.policies.cuttlefish import FULL_SPEED
from fxrank.policies.fixed import POLICIES, as_policy
from fxrank.profiling import profile
from fxrank.training.options import RunOptions

SELECT_HELP = "layer name, glob ('layer4.*'), or regular expression ('re:…'); may be repeated"


def _demo(options: argparse.Namespace) -> None:
    from fxrank.demo import run

    print(
        "Training a small residual CNN on 1,797 real scans of digits: first the full-rank twin, then the same with fxrank."
    )
    demo = run(options.output, epochs=options.epochs, seed=options.seed, progress=not options.quiet)
    print(f"\n{demo.lowrank.report}\n\n{demo}\n")
    print(f"written to {options.output}: " + ", ".join(sorted(p.name for p in Path(options.output).iterdir())))
    print(f"to look at: {Path(options.output) / PAGE}")


def _train(options: argparse.Namespace) -> None:
    model = build_model(options.model, options.classes)
    train, val = build_loaders(options.data, options.batch_size, options.image_size, options.seed)
    with launched() as place:
        if place is not None:
            model = DistributedDataParallel(model.to(place), device_ids=None if place.index is None else [place.index])
            train, val = in_shares(train), in_shares(val)
        team = Team.of(model)
        run = RunOptions.of(
            model,
            train,
            epochs=options.epochs,
            val_loader=val,
            device=place or options.device,
            amp=options.amp,
            policy=Plan.load(options.policy) if options.policy.endswith(".json") else as_policy(options.policy),
            include=options.include,
            exclude=options.exclude,
            seed=options.seed,
            progress=not options.quiet,
            output_dir=options.output,
            resume=options.resume,
            checkpoint_every=options.checkpoint_every,
        )
        result = train_lowrank(run, team)
        if team.is_first:
            print(result.report)


def _profile(options: argparse.Namespace) -> None:
    model = build_model(options.model, options.classes)
    if options.device:
        model = model.to(known_device(options.device))
    measured = profile(
        model,
        example_for(options.model, model, options.input),
        device=options.device,
        probe_ratio=options.probe_ratio,
        speedup_threshold=options.threshold,
        include=options.include,
        exclude=options.exclude,
    )
    print(json.dumps(measured.to_dict(), indent=1) if options.json else measured)
    if options.figure:
        measured.figure(options.figure)
    if options.html:
        measured.save(options.html)


def _inspect(options: argparse.Namespace) -> None:
    spec = options.model or options.spec
    if spec is None:
        raise ValueError(f"inspect needs a model: {MODEL_HELP}.")
    target = outlook.asked(options)

    def build() -> tuple[nn.Module, Any]:
        model = build_model(spec, options.classes)
        return model, example_for(spec, model, options.input)

    model, example = on_meta_where_possible(build)
    graph = trace(model.eval(), example)
    if graph.leaves and not graph.regions:  # only a real run shows what those modules call
        model, example = build()
        graph = trace(model.eval(), example)
    layers = candidates(discover(graph, model), model, include=options.include, exclude=options.exclude)
    if target is not None:
        outlook.show(options, model, layers, *target)
        return
    if options.json:
        names = ("name", "kind", "weight_shape", "full_rank", "break_even_rank", "parameters", "macs", "reason")
        print(json.dumps([{n: getattr(layer, n) for n in names} for layer in layers], indent=1))
        return
    rows = [
        (
            layer.name,
            layer.kind,
            "x".join(map(str, layer.weight_shape)),
            f"{layer.groups} of {layer.full_rank}" if layer.groups > 1 else layer.full_rank,
            f"{layer.break_even_rank:.1f}",
            f"{layer.parameters:,}",
            f"{layer.macs / 1e6:,.1f}",
            layer.reason or "can be factorized",
        )
        for layer in layers
    ]
    headers = ("layer", "kind", "weight", "full rank", "break-even", "parameters", "M MACs", "decision")
    print(tabulate(rows, headers=headers, disable_numparse=True))
    free = [layer for layer in layers if layer.reason is None]
    total = sum(layer.parameters for layer in layers)
    share = sum(layer.parameters for layer in free) / total if total else 0.0
    print(f"{len(free)} of {len(layers)} layers can be factorized, {100 * share:.1f} % of {total:,} weights")
    for path, reason in graph.leaves.items():
        print(f"not in one graph: {path or type(model).__name__}: {reason}")
    for note in graph.notes:
        print(note)


def _completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise ImportError(
            "completion is written by shtab, which is not installed; pip install 'fxrank[completion]'"
        ) from None
    print(shtab.complete(parser(), options.shell))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="fxrank", description="Make a PyTorch model smaller and faster while it trains.")
    top.add_argument("--version", action="version", version=f"fxrank {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "train on embedded data, beside a full-rank twin; about two minutes on two CPU cores")
    _add_demo_options(demo)
    train = command("train", _train, "train a model with auto_lowrank")
    _add_train_options(train)
    smaller = command("compress", compress.run, "factorize a trained model within a budget, without training")
    compress.add_options(smaller)
    seen = command("report", report.run, "write the page of a run to look at, from its folder")
    report.add_options(seen)
    command("env", lambda _: print(described()), "what a report of a fault should say of this machine")
    completion = command("completion", _completion, "print what a shell needs to complete this command and its options")
    completion.add_argument(
        "shell", choices=("bash", "zsh"), help="as in: fxrank completion bash > FILE, then source FILE"
    )
    timing = command("profile", _profile, "time every layer stack, dense and factorized, on this device")
    timing.add_argument(
        "--probe-ratio", type=float, default=0.25, help="rank ratio of the measured pair (default %(default)s)"
    )
    timing.add_argument(
        "--threshold",
        type=float,
        default=FULL_SPEED,
        help="speed-up from which a stack is factorized (default %(default)s)",
    )
    timing.add_argument(
        "--figure", default=None, metavar="FILE", help="draw the stacks under the roofline (PNG or SVG)"
    )
    timing.add_argument("--html", default=None, metavar="FILE", help="write a page: the stacks, and whether pairs pay")

    table = command(
        "inspect", _inspect, "list every layer with what can be done to it, on the meta device, without weights"
    )
    table.add_argument("spec", nargs="?", metavar="MODEL", help=MODEL_HELP)
    outlook.add_options(table)
    for sub in (timing, table, smaller):
        shape = "input shape, batch first, as 32x3x224x224 (default: the model's usual one, batch of 1)"
        sub.add_argument("--input", default=None, help=shape)
        if sub is not smaller:
            sub.add_argument("--json", action="store_true", help="print JSON")
    for sub in (train, timing, table, smaller):
        if sub is not smaller:
            sub.add_argument("--model", required=sub is not table, help=MODEL_HELP)
        sub.add_argument("--classes", type=int, default=None, help="number of classes for torchvision and timm models")
        sub.add_argument("--include", action="append", default=[], help=SELECT_HELP)
        sub.add_argument("--exclude", action="append", default=[], help=SELECT_HELP)
    for sub in (train, timing, smaller):
        sub.add_argument("--device", default=None, help="cpu, cuda, … (train: a GPU if there is one)")
    return top


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--output", default="run/demo", help="folder for report, plan, model and figure (default %(default)s)"
    )
    demo.add_argument("--epochs", type=int, default=30)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--data",
        required=True,
        help=DATA_HELP,
    )
    train.add_argument("--epochs", type=int, default=None, help="default 30")
    train.add_argument("--batch-size", type=int, default=128)
    train.add_argument("--image-size", type=int, default=224, help="for an image folder (default %(default)s)")
    train.add_argument("--amp", choices=("bfloat16", "float16"), default=None)
    train.add_argument(
        "--policy",
        default="cuttlefish",
        help=f"{', '.join(sorted(set(POLICIES) - {'pufferfish'}))}, or a plan.json to repeat",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--output", default="run/train", help="folder for report, plan, model and figure (default %(default)s)"
    )
    train.add_argument(
        "--resume", action="store_true", help="keep a checkpoint in the folder, and go on from the one that is there"
    )
    train.add_argument("--checkpoint-every", type=int, default=None, help="steps, besides every epoch")
    train.add_argument("--quiet", action="store_true", help="no progress bar")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it went well, 2 with one line on standard error if the input was refused, 130 with one if it was
    interrupted, 141 without one if whoever reads what it prints, `head` say, has read enough.
    """
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except (FxrankError, ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        print(f"fxrank {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fxrank {options.command}: interrupted; {_left_behind(options)}", file=sys.stderr)
        return 130
    return 0


def _nobody_reads() -> bool:
    """Whether it is standard output whose reader is gone, and not a pipe of something else; what is left to print is then dropped."""
    try:
        print(flush=True)  # an empty line finds out, before the error is told
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return True
    return False


def _left_behind(options: argparse.Namespace) -> str:
    if options.command == "train" and options.resume:
        return f"the same command goes on from the last checkpoint in {options.output}."
    return "nothing was written." + (" With --resume a run can go on." if options.command == "train" else "")


if __name__ == "__main__":
    sys.exit(main())
