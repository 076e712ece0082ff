"""What the training loop asks of a keeper of checkpoints, answered by one that keeps nothing.

The loop deals its batches through a keeper, as only that can deal the same ones again. The one that writes files is
`fxrank.resume.keeper`, which the loop need not know.
"""

from collections.abc import Iterable
from typing import Any

from fxrank.distributed.team import Team
from fxrank.session.session import LowRankSession
from fxrank.training.batches import first_batch
from fxrank.training.optimization import Optimization
from fxrank.training.options import RunOptions
from fxrank.training.run_state import RunState


class Keeper:
    """Deals the batches of one run, and keeps nothing of it. In the order in which the loop calls it."""

    files: tuple[str, ...] = ()
    """The names of what it writes."""
    keeps = False
    """Whether there is something to go on from."""

    def __init__(self, options: RunOptions, team: Team) -> None:
        self.options, self.team = options, team

    def first_batch(self) -> Any:
        """A batch to trace the model with. Raises `TypeError` or `ValueError` for a loader that cannot be iterated again, or
        is empty.
        """
        return first_batch(self.options.loader)

    def read(self) -> dict[str, Any] | None:
        """The state that the session is to go on from; None for a run that begins."""
        return None

    def first_batch_again(self, first: Any) -> Any:
        """What `first_batch` was in the run that is gone on with; `first` in one that begins."""
        return first

    def start(self, state: RunState, optimization: Optimization, session: LowRankSession) -> None:
        """Bring an attached run to where it was."""

    def batches(self, state: RunState) -> Iterable[Any]:
        """The batches of the epoch that were not taken yet."""
        return self.options.loader

    def due(self, step: int, *, switched: bool) -> bool:
        """Whether to write after this step."""
        return False

    def way_back(self) -> str:
        """Where a run that has diverged can go on from: sentences."""
        return "Nothing of this run is kept to go on from: output_dir= and resume=True keep checkpoints."

    def write(self, state: RunState, optimization: Optimization, session: LowRankSession) -> None:
        """Write down where the run is."""
