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


def check_logger(given: object) -> None:
    """Raise `TypeError` for what is neither a `Logger` nor None."""
    if given is not None and (isinstance(given, type) or not isinstance(given, Logger)):
        what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(
            f"a logger has log(step, values) and event(step, text); got {what}. Pass TensorBoardLogger(…) or WandbLogger(…) of "
            "fxrank.integrations.loggers, or an object of your own with both."
        )
