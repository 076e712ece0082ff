"""Every exception that fxrank raises on purpose.

Each message states the rule, the value that broke it, and the fix. A user's wrong argument is a `ValueError` or a
`TypeError`; the classes below exist where a caller may want to catch one kind of trouble apart from the others.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FxrankError(Exception):
    """Base of fxrank's own errors."""


class TraceError(FxrankError, RuntimeError):
    """The model could not be turned into one torch.fx graph. Names the module at fault."""


class RankError(FxrankError, ValueError):
    """A rank outside 1 … full rank of its layer, or not a rank at all."""


class NonFiniteWeightError(FxrankError, ValueError):
    """A weight holds NaN or infinity, so it has no singular values."""


class NothingToFactorizeError(FxrankError, ValueError):
    """No layer of the model can be factorized. The message lists every layer with its reason."""


class PlanMismatchError(FxrankError, ValueError):
    """A plan does not fit the model it is applied to. Names the first mismatch."""


class CheckpointError(FxrankError, ValueError):
    """A checkpoint folder is missing, damaged, foreign, or written by a newer fxrank."""


class CalibrationError(FxrankError, ValueError):
    """Calibration data yield nothing, or activations that are not finite. Names the layer."""


class BudgetError(FxrankError, ValueError):
    """A budget cannot be reached. The message says what can."""


class NothingFactorizedWarning(UserWarning):
    """Every layer is left dense, because of what the layers do, or at the end of a training. The message says why."""


def unknown_name(what: str, found: object, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not in a registry: lists the valid ones, of a long registry only the nearest."""
    names = sorted(valid)
    near = get_close_matches(str(found), names, n=5, cutoff=0.5)
    if len(names) > 24:
        listing = f"one of {len(names)} names" + (f", near it {', '.join(map(repr, near))}" if near else "")
        return ValueError(f"{what} must be {listing}; got {found!r}.")
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{what} must be one of {', '.join(map(repr, names))}; got {found!r}.{hint}")
