"""Where rank curves and events go while a model trains."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Logger(Protocol):
    """What `auto_lowrank` and `LowRankSession.attach` take as `logger=`; see `fxrank.integrations.loggers`.

    In a distributed run only the first process logs.
    """

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name after `step` optimizer steps: `stable_rank/LAYER` at every sample, `rank/LAYER` at the switch."""

    def event(self, step: int, text: str) -> None:
        """A line of text: the switch, with its reason."""
