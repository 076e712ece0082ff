"""What data say of the layers of a model in files, one block of it after another.

They are gone through twice: for what ranks are chosen by, which is kept, and, when the ranks have been chosen, for the factors. At no time is
more held than one block with the moments of its layers, what the blocks are given (see `blocks`), and the file that is being filled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from torch import nn

from fxrank.fitting import Fitting, at_share
from fxrank.large.blocks import Feed, Part
from fxrank.large.tails import Tails
from fxrank.passes.calibration.evidence import Evidence, Key, Known, gather
from fxrank.passes.calibration.processes import alone
from fxrank.passes.discovery.layer import Layer
from fxrank.plan import LayerDecision, Plan
from fxrank.policies.outputs import Outputs
from fxrank.switch.apply_plan import Factors

SHARED = "its weight is shared by several blocks, or by one and what is outside of them"
OUTSIDE = ""


@dataclass(frozen=True)
class Calibrated:
    """A part of a model: its `path`, `OUTSIDE` for all that is in no block, its `layers` and what is known of them; `part` holds their numbers. Of
    a block that is weighed, `weights` (see `policies.outputs`) by what it gives, or why it is `unweighed`.
    """

    path: str
    part: nn.Module
    layers: Sequence[Layer]
    evidence: Evidence
    weights: Mapping[str, float] = field(default_factory=dict)
    unweighed: str = ""

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


def for_each_part(
    feed: Feed, layers: Sequence[Layer], act: Callable[[Calibrated], None], weighed: float | None = None
) -> None:
    """Act on each block in turn, with those of the `layers` that are in it and nowhere else, and then on all else. Errors as of `Feed.begin` and
    `gather`. Where they are `weighed`, it is with pairs of this share of a layer's parameters. (No iterator: who loops over one holds a part until
    the next has come.)

    The blocks are fed by the dense ones before them, as `factorize` has it. Fed by the compressed ones, so that later ones may make up for errors
    (SVD-LLM, 2403.07378), they were no better: on a small Llama, trained on characters, losses at 0.8 to 0.4 of the parameters were the same to
    0.0001, at 0.4 greater by 0.0008.
    """
    feed.begin()
    homes: dict[str | None, list[Layer]] = {}
    for layer in layers:
        homes.setdefault(_home(feed, layer), []).append(layer)

    def of_block(path: str, part: Part, mine: list[Layer]) -> int:
        evidence = gather(part, mine, feed.of_part, frozenset())
        weights, why = ({}, "") if weighed is None else _weights(feed, part, mine, evidence, weighed)
        feed.advance()
        act(Calibrated(path, part, mine, evidence, weights, why))
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


def tails(
    feed: Feed, layers: Sequence[Layer], weighed: float | None = None
) -> tuple[Evidence, dict[str, float], list[str]]:
    """What ranks are chosen by: what layers lose, which may come in several forms, and, `weighed` as of `for_each_part`, what their losses are to
    be multiplied with, if their blocks are to lose little of what they give; the median for layers in no block, and in one that cannot be
    weighed, of which there is a note.

    On MiniLM (SST-2, 82.9 %) with 0.8 and 0.6 of all parameters accuracy is 81.2 and 73.9 % so, 75.5 and 64.8 without, and 83.1 and 77.8 with what
    the whole model gives, as `factorize` has it, for which each pair would have to be carried through all blocks after its own.
    """
    found, weights, notes = Evidence(), dict[str, float](), list[str]()

    def keep(part: Calibrated) -> None:
        nonlocal found
        weights.update(part.weights)
        if part.unweighed:
            notes.append(
                f"layers in {part.path} count with the median weight, as what it gives cannot be compared: {part.unweighed}"
            )
        known, biased = part.evidence.known, part.evidence.biased
        few = {key: Tails.of(known.pop(key), biased=key[0] in biased) for key in list(known)}
        found = replace(
            part.evidence,
            known=found.known | cast(dict[Key, Known], few),  # in all that is asked of them
            blind=found.blind | part.evidence.blind,
            biased=found.biased | biased,
            notes=found.notes | part.evidence.notes,
        )

    for_each_part(feed, layers, keep, weighed)
    middle = sorted(weights.values())[len(weights) // 2] if weights else 1.0
    return found, {layer.name: weights.get(layer.name, middle) for layer in layers}, notes


def _weights(
    feed: Feed, part: Part, layers: Sequence[Layer], evidence: Evidence, share: float
) -> tuple[dict[str, float], str]:
    """And why there are none."""
    outputs = Outputs(part, partial(feed.another, part), feed.of_part, alone, None)
    own = {layer.name: layer for layer in reversed(layers)}  # in its own form, which comes first
    with feed.trying():
        try:
            return outputs.weights(Fitting(part, evidence).alone(at_share(own.values(), share))), ""
        except ValueError as error:
            return {}, str(error)


def _home(feed: Feed, layer: Layer) -> str | None:
    """The path of the block that a layer is in, `OUTSIDE` for none; None if it is in more than one place."""
    homes = {feed.blocks.part_of(path) for path in layer.paths or (layer.name,)}
    return homes.pop() if len(homes) == 1 else None
