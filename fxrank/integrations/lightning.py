"""Lightning: low-rank training inside `lightning.Trainer`.

    trainer = lightning.Trainer(max_epochs=30, callbacks=[LowRankCallback()])
    trainer.fit(module, loader, ckpt_path=…)      # a checkpoint from before the switch or after it

Lightning loads a model before it tells any callback, and builds the optimizers later still. So the callback looks into
the checkpoint when the module is told (`on_load_checkpoint`), keeps weights from after the switch aside, and gives them
to the module when it has its optimizer and its pairs, just before the optimizer's own state comes. The averages that
Lightning's own callbacks hold have no optimizer: they get their pairs at once, and load as those callbacks like.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.callbacks import Callback

from fxrank.integrations.examples import check_factors, example_batch, random_untouched, session_options
from fxrank.loggers import Logger
from fxrank.passes.discovery.selection import Selector
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.calls import Example
from fxrank.passes.rewriting.install import pairs_in
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.session.session import LowRankSession
from fxrank.switch.apply_plan import apply_plan
from fxrank.training.batches import model_inputs, to_device

AMP = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LowRankCallback(Callback):  # type: ignore[misc]
    """Makes a `LightningModule` low-rank while it trains: `Trainer(…, callbacks=[LowRankCallback()])`.

    Attaches when fitting begins: the module's optimizer, the trainer's number of optimizer steps (gradient accumulation
    counted), its mixed precision, and a batch made beside its loader. Optimizer and scheduler go on through the switch.
    The session's state is in every checkpoint, and `fit`, `validate`, `test` and `predict` take one from before or after
    the switch as `ckpt_path` with a freshly built module. `WeightAveraging` and `StochasticWeightAveraging` go on through
    the switch.

    `session` is there from the beginning of training; `plan` at its end, when a `NothingFactorizedWarning` comes if every
    layer was left dense. A module that arrives factorized is trained as it is. Several callbacks in one trainer watch different
    parts, `module=`, each with a state of its own in the checkpoints.
    """

    def __init__(
        self,
        policy: Policy | Plan | str | None = None,
        include: Iterable[Selector] | Selector = (),
        exclude: Iterable[Selector] | Selector = (),
        *,
        module: str = "",
        optimizer: int | None = None,
        example_inputs: Example = None,
        seed: int = 0,
        logger: Logger | None = None,
    ) -> None:
        """Options as of `LowRankSession.attach`. `module` names the submodule to watch where `forward` of the whole does
        not take a batch; `optimizer` is its optimizer's place in `trainer.optimizers`, None for all of those that hold a
        parameter of it. `example_inputs` is needed for loaders that can be iterated just once, and for several at a time.
        """
        self._options = session_options(policy, include, exclude, seed, logger)
        self._module, self._optimizer, self._example = module, optimizer, example_inputs
        self.session: LowRankSession | None = None
        self.plan: Plan | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """What a checkpoint calls this callback's state, with `module` and `optimizer` where they are given."""
        if not self._module and self._optimizer is None:
            return str(super().state_key)
        return str(self._generate_state_key(module=self._module, optimizer=self._optimizer))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        start = getattr(trainer.strategy, "_start_method", "popen")
        if stage == "fit" and start != "popen":
            raise ValueError(
                f"a low-rank run must be in the process that has the module afterwards; this {type(trainer.strategy).__name__} trains in processes "
                f"of its own ({start}) and hands back the weights that fit the dense module. Run a script with strategy='ddp'."
            )
        watched = {id(m) for m in self.watched(pl_module).modules()}
        for other in _all_in(trainer):
            if other is not self and not watched.isdisjoint(map(id, other.watched(pl_module).modules())):
                raise ValueError(
                    f"several LowRankCallbacks must watch different parts of a module; those of {self.state_key} and {other.state_key} overlap. "
                    "Name disjoint ones with module=, or give one callback all optimizers (optimizer=None)."
                )
        own = pl_module.on_load_checkpoint
        self._saved = None

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            own(checkpoint)
            self._look_into(checkpoint, trainer, pl_module, stage)

        pl_module.on_load_checkpoint = on_load_checkpoint

    def _look_into(self, checkpoint: dict[str, Any], trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        states = checkpoint.get("callbacks", {})
        state = states.get(self.state_key, states.get(type(self).__qualname__, {}))  # fxrank 0.1 had this key for all
        model = self.watched(pl_module)
        self._saved = state.get("session")
        if self._saved is not None and pairs_in(model) and stage == "fit":
            raise CheckpointError(
                f"a low-rank run resumes with the dense module that it was started with; this {type(pl_module).__name__} is factorized already. "
                "Build the module anew."
            )
        begun = (
            checkpoint.get("global_step", 1) > 0
        )  # not so where Lightning's finders of rates and batch sizes begin anew
        if self._saved is None and not pairs_in(model) and stage == "fit" and begun:
            raise CheckpointError(
                f"a low-rank run resumes from a checkpoint that a LowRankCallback has its state in; {trainer.ckpt_path} holds none. Start afresh."
            )
        text = None if self._saved is None else self._saved["plan"]
        plan = None if text is None else Plan.from_json(text)
        if plan is None or not plan.R or pairs_in(model):
            fix = "Build the module anew, and let checkpoints keep the callbacks' states (no save_weights_only)."
            inside = f"{self._module}." if self._module else ""
            stored = checkpoint["state_dict"]
            check_factors(model, [n.removeprefix(inside) for n in stored if n.startswith(inside)], fix)
        elif stage == "fit":
            for average in self._averages(trainer):
                apply_plan(average, plan, split=False)
            pl_module.load_state_dict = _Keeper()
        else:
            apply_plan(model, plan, split=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.session = None
        if not pairs_in(self.watched(pl_module)):
            self._attach(trainer, pl_module)
        self._saved = None
        if self is _all_in(trainer)[-1]:  # all have their pairs
            keeper = vars(pl_module).get("load_state_dict")
            _own_methods(pl_module)
            if isinstance(keeper, _Keeper) and keeper.weights is not None:
                pl_module.load_state_dict(keeper.weights, strict=pl_module.strict_loading)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model, saved = self.watched(pl_module), self._saved
        switched = saved is not None and saved["plan"] is not None and bool(Plan.from_json(saved["plan"]).R)
        trainer.fit_loop.setup_data()  # with the random numbers that takes, as fitting would
        total = trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise ValueError(
                f"a low-rank run must know its length; the trainer's is {total} steps. Set max_epochs or max_steps of the Trainer."
            )
        batches = trainer.num_training_batches
        per_epoch = total if batches == float("inf") else -(-batches // trainer.accumulate_grad_batches)
        example = self._example
        if example is None:
            loader = trainer.train_dataloader
            if isinstance(loader, (dict, list, tuple)):
                raise TypeError(
                    f"a batch is taken beside one loader; the trainer has a {type(loader).__name__} of {len(loader)}. Pass example_inputs=."
                )
            batch = example_batch(loader)
            with random_untouched():  # as the training loop does it
                batch = trainer.precision_plugin.convert_input(batch)
                batch = pl_module._on_before_batch_transfer(batch)  # noqa: SLF001 (Lightning has no public name for it)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            example = model_inputs(model, batch)
        self.plan = None
        self.session = LowRankSession.attach(
            model,
            self._optimizers(trainer.optimizers, model),
            example_inputs=to_device(example, next(model.parameters()).device),
            total_steps=int(total),
            steps_per_epoch=int(per_epoch),
            amp=AMP.get(str(trainer.precision)),
            followers=() if switched else self._averages(trainer),  # those have their pairs
            state=saved,
            **self._options,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.session is not None:
            self.plan = self.session.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _own_methods(pl_module)
        if self.session is not None:
            self.session.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _own_methods(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.session is None else {"session": self.session.state_dict()}

    def _optimizers(self, listed: list[Optimizer], model: nn.Module) -> list[Optimizer]:
        if self._optimizer is not None:
            return [listed[self._optimizer]]
        own = set(model.parameters())
        return [o for o in listed if any(p in own for group in o.param_groups for p in group["params"])] or listed

    def watched(self, pl_module: LightningModule) -> nn.Module:
        """The part of the module that this callback makes low-rank."""
        model: nn.Module = pl_module.get_submodule(self._module)
        return model

    def _averages(self, trainer: Trainer) -> list[nn.Module]:
        """What Lightning's own callbacks hold as an average of the module that is watched."""
        held = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
        return [self.watched(a.module if isinstance(a, AveragedModel) else a) for a in held if isinstance(a, nn.Module)]


class _Keeper:
    """Stands in for `load_state_dict` of a module that lacks pairs yet; of several calls the last one counts."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] | None = None

    def __call__(self, weights: dict[str, Any], *_: Any, **__: Any) -> None:
        self.weights = weights


def _all_in(trainer: Trainer) -> "list[LowRankCallback]":
    return [callback for callback in trainer.callbacks if isinstance(callback, LowRankCallback)]


def _own_methods(pl_module: LightningModule) -> None:
    """Take away what was put over the module's methods for loading."""
    for name in ("on_load_checkpoint", "load_state_dict"):
        pl_module.__dict__.pop(name, None)


__all__ = ["LowRankCallback"]
