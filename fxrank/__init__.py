"""fxrank: low-rank factorized training for any PyTorch model, on torch.fx."""

from fxrank._version import __version__
from fxrank.auto import Result, auto_lowrank
from fxrank.diffing import Diff, diff
from fxrank.oneshot import factorize, merge
from fxrank.passes.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    FxrankError,
    NonFiniteWeightError,
    NothingFactorizedWarning,
    NothingToFactorizeError,
    PlanMismatchError,
    RankError,
    TraceError,
)
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.convolution import LowRankConv2d
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.pairs.registry import register_pair
from fxrank.passes.spectra.exact import stable_rank
from fxrank.passes.tracing.trace import trace
from fxrank.plan import Budget, LayerDecision, Plan
from fxrank.policies.base import Policy
from fxrank.policies.cuttlefish import Cuttlefish
from fxrank.policies.fixed import FixedPlan, FullRank, Pufferfish, SpectralInit
from fxrank.profiling import Profile, profile
from fxrank.saving.model_files import load, save
from fxrank.session.session import LowRankSession
from fxrank.switch.plan_of import plan_of
from fxrank.training.report import Report

__all__ = [
    "Budget",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "Cuttlefish",
    "Diff",
    "FactorPair",
    "FixedPlan",
    "FullRank",
    "FxrankError",
    "LayerDecision",
    "LowRankConv2d",
    "LowRankLinear",
    "LowRankSession",
    "NonFiniteWeightError",
    "NothingFactorizedWarning",
    "NothingToFactorizeError",
    "Plan",
    "PlanMismatchError",
    "Policy",
    "Profile",
    "Pufferfish",
    "RankError",
    "Report",
    "Result",
    "SpectralInit",
    "TraceError",
    "__version__",
    "auto_lowrank",
    "diff",
    "factorize",
    "load",
    "merge",
    "plan_of",
    "profile",
    "register_pair",
    "save",
    "stable_rank",
    "trace",
]
