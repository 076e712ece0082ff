"""What data say of the layers of a model in files, one block of it after another.

They are gone through twice: for what ranks are chosen by, which is kept, and, when the ranks have been chosen, for the factors. At no time is
more held than one block with the moments of its layers, what the blocks are given (see `blocks`), and the file that is being filled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from fxrank.fitting import Fitting
from fxrank.large.blocks import Feed
from fxrank.large.tails import Tails
from fxrank.passes.calibration.evidence import Evidence, Key, Known, gather
from fxrank.passes.discovery.layer import Layer
from fxrank.plan import LayerDecision, Plan
from fxrank.switch.apply_plan import Factors

SHARED = "its weight is shared by several blocks, or by one and what is outside of them"
OUTSIDE = ""


@dataclass(frozen=True)
class Calibrated:
    """A part of a model: its `path`, `OUTSIDE` for all that is in no block, its `layers` and what is known of them; `part` holds their numbers."""

    path: str
    part: nn.Module
    layers: Sequence[Layer]
    evidence: Evidence

    def decided(self, plan: Plan) -> tuple[list[LayerDecision], Factors]:
        """The plan's decisions about these layers, with what the data say of them, and the factors. What is known is let go."""
        decisions: list[LayerDecision] = []
        factors: Factors = {}
        for layer in self.layers:
            known = self.evidence.known
            mine = {layer.key: known.pop(layer.key)} if layer.key in known else {}
            fitting = Fitting(self.part, replace(self.evidence, known=mine))
            decisions += fitting.fitted(replace(plan, layers=(plan.layer(layer.name),)), [layer]).layers
            factors |= fitting.factors
        return decisions, factors


def for_each_part(feed: Feed, layers: Sequence[Layer], act: Callable[[Calibrated], None]) -> None:
    """Act on each block in turn, with those of the `layers` that are in it and nowhere else, and then on all else. Errors as of `Feed.begin` and
    `gather`. (No iterator: who loops over one holds a part until the next has come.)

    The blocks are fed by the dense ones before them, as `factorize` has it. Fed by the compressed ones, so that later ones may make up for errors
    (SVD-LLM, 2403.07378), they were no better: on a small Llama, trained on characters, losses at 0.8 to 0.4 of the parameters were the same to
    0.0001, at 0.4 greater by 0.0008.
    """
    feed.begin()
    homes: dict[str | None, list[Layer]] = {}
    for layer in layers:
        homes.setdefault(_home(feed, layer), []).append(layer)

    def of_block(path: str, part: nn.Module, mine: list[Layer]) -> int:
        evidence = gather(part, mine, feed.of_part, frozenset())
        feed.advance()
        act(Calibrated(path, part, mine, evidence))
        return evidence.batches

    batches = 0
    for number in range(feed.blocks.count):
        path = feed.blocks.path_of(number)
        batches = of_block(path, feed.part(number), homes.get(path, []))
    mine = homes.get(OUTSIDE, [])
    outside, evidence = feed.outside([layer.name for layer in mine]), Evidence(batches=batches)
    if mine:
        with feed.around(outside) as calls:
            evidence = gather(outside, mine, calls, frozenset())
    blind = {layer.key: SHARED for layer in homes.get(None, [])}
    act(Calibrated(OUTSIDE, outside, mine, replace(evidence, blind=evidence.blind | blind)))


def tails(feed: Feed, layers: Sequence[Layer]) -> Evidence:
    """What ranks are chosen by. Layers may come in several forms."""
    found = Evidence()

    def keep(part: Calibrated) -> None:
        nonlocal found
        known, biased = part.evidence.known, part.evidence.biased
        few = {key: Tails.of(known.pop(key), biased=key[0] in biased) for key in list(known)}
        found = replace(
            part.evidence,
            known=found.known | cast(dict[Key, Known], few),  # in all that is asked of them
            blind=found.blind | part.evidence.blind,
            biased=found.biased | biased,
            notes=found.notes | part.evidence.notes,
        )

    for_each_part(feed, layers, keep)
    return found


def _home(feed: Feed, layer: Layer) -> str | None:
    """The path of the block that a layer is in, `OUTSIDE` for none; None if it is in more than one place."""
    homes = {feed.blocks.part_of(path) for path in layer.paths or (layer.name,)}
    return homes.pop() if len(homes) == 1 else None
