"""What is compared in the decision table: one function a row, which says how a job is trained."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.subjects.ideas import Idea, decay_as_dense, scaled_gradients, soft_switch, spectral_decay
from benchmarks.subjects.jobs import Job
from fxrank import Cuttlefish, FullRank, Policy, SpectralInit

TABLES = "*embedding*"


@dataclass(frozen=True)
class Setup:
    """How a job is trained: by a policy, with further arguments of `auto_lowrank`; `narrow` is the share of parameters of a narrower
    dense model instead of the job's own, which has those of the row that it is `like`, if that is given; `tables` takes the embeddings into a target. A `target_params` is a share of the parameters
    outside of embeddings, unless `tables`. `unweighed`: what layers lose counts as it is. `idea`: what else is at work meanwhile.
    """

    policy: Policy
    options: dict[str, Any] = field(default_factory=dict)
    narrow: float | None = None
    tables: bool = False
    like: str | None = field(default=None, repr=False)
    unweighed: bool = field(default=False, repr=False)
    idea: Idea | None = field(default=None, repr=False)


Row = Callable[[Job], Setup | str]
"""A string says why there is no such row for a job."""


def full(job: Job) -> Setup:
    """The dense model."""
    return Setup(FullRank())


def paper(job: Job) -> Setup:
    """The papers' preset for the job, with the layers that they leave out."""
    return Setup(job.paper, {"exclude": job.exclude})


def narrow(share: float) -> Row:
    """A narrower dense model, of no more parameters than a budget leaves."""
    return lambda job: Setup(FullRank(), narrow=share)


def ours(**options: Any) -> Row:
    """`Cuttlefish` with these options."""
    return lambda job: Setup(Cuttlefish(**options))


EARLY: dict[str, Any] = {"earliest": 0.0, "latest": 0.5}
"""When the default's switch was made while these were tried: as soon as the ranks have settled, at half of the run at the latest."""


def early(**options: Any) -> Row:
    """The default of then with these options."""
    return ours(**EARLY, **options)


def spatial(share: float, **options: Any) -> Row:
    """The same under a budget, each kernel as one down and one across."""

    def row(job: Job) -> Setup | str:
        if not job.planar:
            return "no two-dimensional kernels"
        return Setup(Cuttlefish(target_params=share, form="spatial", **EARLY, **options))

    return row


def tables(share: float, **options: Any) -> Row:
    """The same under a budget of all parameters, which takes the embeddings in."""

    def row(job: Job) -> Setup | str:
        if not job.tables:
            return "no embeddings"
        return Setup(Cuttlefish(target_params=share, **EARLY, **options), {"include": TABLES}, tables=True)

    return row


def twin(row: str) -> Row:
    """A narrower dense model with no more parameters than another row has come to."""
    return lambda job: Setup(FullRank(), like=row)


def scaled(**options: Any) -> Row:
    """Ranks by the scaled stable rank, as they were before the outputs decided."""
    return early(rank_metric="scaled_stable_rank", **options)


def with_idea(idea: Idea, **options: Any) -> Row:
    """The default of then, with these options, and an idea from elsewhere."""
    return lambda job: Setup(Cuttlefish(**EARLY, **options), idea=idea)


def start(share: float, **options: Any) -> Row:
    """A budget at E = 0, whatever the ranks do."""
    return lambda job: Setup(SpectralInit(K=0, target_params=share, **options))


ROWS: dict[str, Row] = {
    "full": full,
    "default": ours(),
    "twin": twin("default"),
    "early": early(),
    "early-twin": twin("early"),
    "own-losses": lambda job: Setup(Cuttlefish(**EARLY), unweighed=True),
    "own-losses-twin": twin("own-losses"),
    "no-floor": early(floor=0.0),
    "floor-0.4": early(floor=0.4),
    "no-floor-twin": twin("no-floor"),
    "untimed": early(speedup_threshold=None),
    "scaled": scaled(speedup_threshold=1.5),
    "paper": paper,
    "keep-0.97": early(keep=0.97),
    "keep-0.95": early(keep=0.95),
    "keep-0.99": early(keep=0.99),
    "channel": early(form="channel"),
    "rewarm": early(rewarmup=0.05),
    "late": ours(earliest=0.0, epsilon=1e-9, latest=0.65),
    "late-0.4": ours(earliest=0.0, epsilon=1e-9, latest=0.65, floor=0.4),
    "lr-0.5": early(lr_scale=0.5),
    "lr-2": early(lr_scale=2.0),
    "no-decay": early(frobenius_decay=None),
    "decay-as-dense": with_idea(decay_as_dense, frobenius_decay=None),
    "soft": with_idea(soft_switch(0.1)),
    "scaled-gradients": with_idea(scaled_gradients),
    "spectral-decay": with_idea(spectral_decay(1e-3)),
    "0.5": early(target_params=0.5),
    "0.5-data": early(target_params=0.5, factors="data"),
    "narrow-0.5": narrow(0.5),
    "0.3": early(target_params=0.3),
    "0.3-data": early(target_params=0.3, factors="data"),
    "narrow-0.3": narrow(0.3),
    "scaled-untimed": scaled(speedup_threshold=None),
    "entropy": early(rank_metric="entropy"),
    "prefix": scaled(speedup_threshold=1.5, k_rule="prefix"),
    "0.5-start": start(0.5, factors="data"),
    "0.5-rewarm": early(target_params=0.5, rewarmup=0.05),
    "0.5-lr": early(target_params=0.5, lr_scale=0.5),
    "0.5-spatial": spatial(0.5),
    "0.7-tables": tables(0.7, factors="data"),
    "0.5-tables": tables(0.5),
    "0.3-spatial": spatial(0.3),
    "0.3-tables": tables(0.3),
}
"""Rows by name, in the order in which they are run."""
DECIDING = ("full", "default", "twin")
"""Those that are run with more than one seed."""
