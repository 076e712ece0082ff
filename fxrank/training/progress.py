"""Running sums of an epoch, and the progress bar that shows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxrank.distributed.team import Team
from fxrank.session.session import LowRankSession
from fxrank.session.state import FULL


class Totals:
    """Running sums on the device: nothing is read back before the epoch's end, so the GPU is never waited for."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), device=device)
        self.examples = 0
        self.predictions: int | Tensor = 0

    def add(self, loss: Tensor, examples: int, correct: Tensor | None, predictions: int | Tensor) -> None:
        self.loss += loss.float() * examples
        self.examples += examples
        if correct is not None:
            self.correct += correct
            self.predictions += predictions

    def state_dict(self) -> dict[str, Any]:
        """The four sums."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, from any device."""
        device = self.loss.device
        vars(self).update({n: v.to(device) if isinstance(v, Tensor) else v for n, v in state.items()})

    def means(self, team: Team | None = None) -> tuple[float | None, float | None]:
        """Mean loss (None without an example), and share of correct predictions (None without any), of this process or of a
        whole team.
        """
        if team is None or team.size == 1:
            accuracy = float(self.correct) / float(self.predictions) if self.predictions else None
            return float(self.loss) / self.examples if self.examples else None, accuracy
        numbers = [self.loss, self.correct, torch.tensor(self.examples), torch.as_tensor(self.predictions)]
        sums = torch.stack([n.to(self.loss.device, torch.float64) for n in numbers])
        loss, correct, examples, predictions = team.total(sums).tolist()
        return loss / examples if examples else None, correct / predictions if predictions else None


class Bar:
    """What is shown: the epoch, the phase, loss and accuracy so far, and how many layers have settled."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar

    def say(self, phase: str) -> None:
        """Show a phase at once."""
        self._bar.set_description(phase)

    def advance(self, epoch: int, epochs: int, session: LowRankSession, totals: Totals) -> None:
        self._bar.update()
        if self._bar.disable or self._bar.n % 10:
            return
        loss, accuracy = totals.means()
        settled, watched = session.settled_count
        self._bar.set_description(f"epoch {epoch + 1}/{epochs} {session.phase}", refresh=False)
        shown = ({} if loss is None else {"loss": f"{loss:.3f}"}) | (
            {} if accuracy is None else {"acc": f"{accuracy:.3f}"}
        )
        if session.phase == FULL and watched:
            shown["settled"] = f"{settled}/{watched}"
        self._bar.set_postfix(shown, refresh=False)


@contextmanager
def progress_bar(total: int, done: int, enabled: bool) -> Iterator[Bar]:
    """A bar of `total` steps, of which `done` were made before."""
    with tqdm(total=total, initial=done, disable=not enabled, unit="step", dynamic_ncols=True) as bar:
        yield Bar(bar)
