"""The page of a profile: whether pairs pay on a device, before any training."""

from collections.abc import Mapping, Sequence

from fxrank.page import times
from fxrank.page.parts import Data
from fxrank.page.render import Cell, Contents, Section, Tile, render

_HEAD = (
    "layer",
    "kind",
    "weight",
    "full rank",
    "saves below rank",
    "parameters",
    "speed-up",
    "faster up to rank",
    "what it is",
)


def profile_page(profile: Data, title: str = "Will it pay?") -> str:
    """The page, from the plain data of a profile (`Profile.to_dict`). Raises as `render`."""
    stacks, roof = profile["stacks"], profile["roofline"]
    of = {name: stack for stack in stacks for name in stack["names"]}
    return render(
        Contents(
            title=title,
            headline=profile["verdict"],
            notes=[(False, note) for note in profile["notes"]],
            tiles=_tiles(profile),
            sections=[
                Section(
                    "stacks",
                    "Time of each stack of layers",
                    f"One layer of each, dense and as a pair, measured on {profile['device']}, forward and backward. {times.BESIDE_IT}{times.busy(stacks)}",
                    [times.stack_bars(stacks), times.roofline(stacks, roof)],
                )
            ],
            head=_HEAD,
            rows=[_row(layer, of.get(layer["name"]), profile["threshold"]) for layer in profile["layers"]],
            footer=f"fxrank. Measured in {profile['seconds']:.1f} s on {profile['device']}.",
        )
    )


def _tiles(profile: Data) -> list[Tile]:
    outcomes: Sequence[Mapping[str, float]] = profile["outcomes"]
    found = []
    for one in outcomes:
        pairs = f"pairs of {one['share']:g}"
        found += [
            Tile(f"{pairs}: faster", f"{one['faster']} of {one['layers']}", "layers"),
            Tile(f"{pairs}: parameters", f"{one['parameters']:.2f}", "of the model's, with those that are faster"),
            Tile(f"{pairs}: time", f"{one['time']:.2f}", "of what these layers take"),
        ]
    return found


def _row(layer: Data, stack: Data | None, threshold: float) -> tuple[bool, Sequence[Cell]]:
    speedup = None if stack is None else stack["speedup"]
    faster = speedup is not None and speedup > threshold
    if stack is None:
        what = layer["reason"] or "not timed"
    else:
        what = f"a pair of rank {stack['probe_rank']} is {'faster' if faster else 'not faster'}"
    cells = (
        Cell(layer["name"]),
        Cell(layer["kind"]),
        Cell("x".join(map(str, layer["weight_shape"]))),
        Cell.of(layer["full_rank"], "{}"),
        Cell.of(layer["break_even_rank"], "{:.0f}"),
        Cell.of(layer["parameters"], "{:,}"),
        Cell.of(speedup, "{:.2f}x"),
        Cell.of(None if stack is None else stack.get("largest_rank"), "{}"),
        Cell(what),
    )
    return faster, cells
