"""Transformers: low-rank training inside `transformers.Trainer`, and factorized models as folders of the usual form.

    trainer = LowRankTrainer(model, args, train_dataset=data, callbacks=[LowRankCallback()])
    trainer.train(resume_from_checkpoint=…)       # before the switch or after it
    save_pretrained(trainer.model, "small"); model = from_pretrained(AutoModelForCausalLM, "small")

The callback alone does everything in a plain `Trainer` but resume after the switch: the trainer loads weights and builds
its optimizer before it calls any callback, and the model must have its pairs by then. `LowRankTrainer`, or the mix-in
for a trainer class of your own, sees to that.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import GENERATION_CONFIG_NAME

from fxrank.integrations.examples import check_factors, example_batch, random_untouched, session_options
from fxrank.loggers import Logger
from fxrank.passes.discovery.selection import Selector
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.calls import Example
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.rewriting.install import pairs_in
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.saving.model_files import PLAN, fill, save
from fxrank.saving.plainfile import read_plain, write_plain
from fxrank.saving.unfilled import built_unfilled
from fxrank.session.session import LowRankSession
from fxrank.session.state import LOW
from fxrank.switch.plan_of import has_plan, plan_of
from fxrank.torch_private.modules import times_written
from fxrank.training.batches import to_device

log = logging.getLogger("fxrank")

SESSION = "lowrank_session.safetensors"
"""The session's state, beside the trainer's own files in a checkpoint."""


class LowRankCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a `Trainer`'s model low-rank while it trains: `Trainer(…, callbacks=[LowRankCallback()])`.

    Attaches when training begins: the trainer's optimizer, its number of update steps, its mixed precision, and a batch
    made beside its loader. Optimizer and scheduler go on through the switch. With the switch the search for the best
    checkpoint begins anew: a full-rank one does not fit the model any more. Every checkpoint gets the session's state,
    and `plan.json` once there is a plan.

    `session` is there from the beginning of training; `plan` at its end, when a `NothingFactorizedWarning` comes if every
    layer was left dense. The switch is also an entry of `trainer.state.log_history`. A model that arrives factorized
    is trained as it is.
    """

    def __init__(
        self,
        policy: Policy | Plan | str | None = None,
        include: Iterable[Selector] | Selector = (),
        exclude: Iterable[Selector] | Selector = (),
        *,
        example_inputs: Example = None,
        seed: int = 0,
        logger: Logger | None = None,
    ) -> None:
        """Options as of `LowRankSession.attach`. `example_inputs` is needed only if the loader can be iterated just once."""
        self._options = session_options(policy, include, exclude, seed, logger)
        self._example = example_inputs
        self.session: LowRankSession | None = None
        self.plan: Plan | None = None
        self._guard: RemovableHandle | None = None
        self._prepared = self._noted = False

    def resume(self, trainer: Trainer, folder: str | os.PathLike[str]) -> None:
        """Bring the trainer's dense model and its optimizer to the form they had in the checkpoint, before the trainer
        loads it. Called by `LowRankTrainerMixin`. Raises `CheckpointError`, `PlanMismatchError`.
        """
        state = _saved_session(folder, trainer.model)
        if state is None:
            return
        if pairs_in(trainer.model):
            raise CheckpointError(
                f"a low-rank run resumes with the dense model that it was started with; this {type(trainer.model).__name__} is factorized already. "
                "Build the model and the trainer anew; model_init= of the trainer builds the model for every run."
            )
        total_steps, steps_per_epoch = state["clock"][1:]
        with random_untouched():
            loader = trainer.get_train_dataloader() if self._example is None else None
        trainer.create_optimizer()
        self._attach(trainer.model, trainer.optimizer, trainer.args, loader, total_steps, steps_per_epoch, state)
        self._prepared = True

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel = None,
        **_: Any,
    ) -> None:
        if isinstance(model, nn.Module) and not pairs_in(model):
            self._guard = model.register_load_state_dict_pre_hook(_refuse_pairs)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel = None,
        optimizer: Any = None,  # the trainer's, or what Accelerate puts around it
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        self._unguard()
        _declare_ties(model)
        if self._prepared:
            assert self.session is not None
            self._prepared = False
            if self.session.clock.total_steps != state.max_steps:
                raise CheckpointError(
                    f"a run resumes with as many steps as it was started with; this one has {state.max_steps}, the saved one "
                    f"{self.session.clock.total_steps}. Set num_train_epochs or max_steps as they were."
                )
            return
        self._leave()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = _saved_session(folder, model) if state.global_step else None
        if saved is not None:
            _check_form(model, saved)
        if pairs_in(model):
            log.warning("the model is factorized already; it is trained as it is")
            return
        steps = state.max_steps
        try:
            batches = len(train_dataloader)
            steps = -(-batches // args.gradient_accumulation_steps)
        except TypeError:  # no length: the whole run is one epoch, as the trainer has it
            pass
        self._attach(model, optimizer, args, train_dataloader, state.max_steps, steps, saved)
        self._note(state, model)

    def _attach(
        self,
        model: PreTrainedModel,
        optimizer: Optimizer,
        args: TrainingArguments,
        loader: Any,
        total_steps: int,
        steps_per_epoch: int,
        state: dict[str, Any] | None,
    ) -> None:
        self._unguard()
        self._leave()
        example = self._example
        if example is None:
            example = to_device(_plain(example_batch(loader)), next(model.parameters()).device)
        self.plan, self._noted = None, state is not None and state["plan"] is not None
        self.session = LowRankSession.attach(
            model,
            optimizer,
            example_inputs=example,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            amp=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            state=state,
            **self._options,
        )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel = None,
        **_: Any,
    ) -> None:
        self._note(state, model)

    def _note(self, state: TrainerState, model: PreTrainedModel) -> None:
        if self._noted or self.session is None or self.session.plan is None or self.session.phase != LOW:
            return
        self._noted, plan = True, self.session.plan
        state.log_history.append(
            {"step": state.global_step, "lowrank_switch_epoch": plan.E, "lowrank_layers": len(plan.R)}
        )
        _declare_ties(model)
        state.best_metric = state.best_model_checkpoint = None
        state.best_global_step = 0

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel = None,
        **_: Any,
    ) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.session is not None:
            self.session.pause()  # in all processes: none that goes on from here knows a call of before
        if not state.is_world_process_zero:
            return
        if not folder.is_dir():
            log.warning("the session's state was not saved: there is no checkpoint %s", folder)
            return
        if self.session is not None:
            write_plain(folder / SESSION, self.session.state_dict())
        _save_plan(model, folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.session is not None:
            self.plan = self.session.finish()

    def _leave(self) -> None:
        """Let go of the session of a run that was broken off, or is over: its optimizer may serve the next one."""
        if self.session is not None:
            self.session.detach()
            self.session = None

    def _unguard(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None


class LowRankTrainerMixin:
    """For a trainer class of your own, `class MyTrainer(LowRankTrainerMixin, Trainer)`: `resume_from_checkpoint` also
    works after the switch, and from checkpoints anywhere, and what `save_model` writes `from_pretrained` of this module
    reads. Needs a `LowRankCallback` among the callbacks.

    A checkpoint that cannot be resumed raises `CheckpointError` or `PlanMismatchError` before weights are loaded.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, LowRankCallback)]  # type: ignore[attr-defined]
        if not callbacks and (Path(resume_from_checkpoint) / SESSION).is_file():
            raise CheckpointError(
                f"a low-rank run resumes with a LowRankCallback among the trainer's callbacks; there is none, and {resume_from_checkpoint} holds a low-rank run. "
                "Pass callbacks=[LowRankCallback(…)] as before."
            )
        for callback in callbacks:
            callback.resume(self, resume_from_checkpoint)
        before = _factor_versions(self.model)  # type: ignore[attr-defined]
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        unread = before.items() & _factor_versions(self.model).items()  # type: ignore[attr-defined]
        if unread:
            raise CheckpointError(
                f"a low-rank run resumes from a checkpoint that holds every factor; Transformers found nothing for {min(unread)[0]!r} in "
                f"{resume_from_checkpoint}: it stores this {type(self.model).__name__} in part, or under other names. "  # type: ignore[attr-defined]
                "Start from weights of fxrank.integrations.huggingface.save_pretrained."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            _save_plan(self.model, output_dir or self.args.output_dir)  # type: ignore[attr-defined]


class LowRankTrainer(LowRankTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` that resumes before and after the switch; see `LowRankTrainerMixin`."""


def save_pretrained(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """`model.save_pretrained` for a factorized model: configuration, weights and `plan.json` in one folder.

    Read it with `from_pretrained` of this module: Transformers' own would build the dense model, find no weights for its
    layers, and leave them random. Raises `ValueError` for a model without a plan.
    """
    plan_of(model)
    model.save_pretrained(path, state_dict={})  # configurations; the weights come from `save`, shared ones once
    save(model, path)


def from_pretrained(cls: Any, path: str | os.PathLike[str]) -> nn.Module:
    """The factorized model in a folder that `save_pretrained` or a `LowRankTrainer` wrote, or in a checkpoint of any
    `Trainer` with `LowRankCallback`; in evaluation mode, with the settings of its `generate`.

    `cls` is a model class or an auto class (`AutoModelForSequenceClassification`). Strict: raises `CheckpointError` for a
    missing or damaged file, `PlanMismatchError` for a plan or weights of another model.
    """
    config = AutoConfig.from_pretrained(path)
    build = getattr(cls, "from_config", None) or cls._from_config
    with random_untouched():
        model: nn.Module = built_unfilled(lambda: build(config))
    fill(model, path)
    if (Path(path) / GENERATION_CONFIG_NAME).is_file():  # the configuration alone gives the default one
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def _saved_session(folder: str | os.PathLike[str], model: nn.Module) -> dict[str, Any] | None:
    """The state in a checkpoint; None where it has none because the model was factorized from the start."""
    path = Path(folder) / SESSION
    if not path.is_file():
        if pairs_in(model):
            return None
        raise CheckpointError(
            f"a low-rank run resumes from a checkpoint that a LowRankCallback wrote; {path} is missing. "
            "Resume with LowRankTrainer, which looks in the very checkpoint, or start afresh."
        )
    state = read_plain(path)
    if not isinstance(state, dict) or not isinstance(state.get("clock"), list) or len(state["clock"]) != 3:
        raise CheckpointError(f"{path} must hold a session's state; it does not. Resume from another checkpoint.")
    return state


def _save_plan(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """`plan.json` of a factorized model beside its weights."""
    if pairs_in(model) and has_plan(model):
        plan_of(model).save(Path(folder) / PLAN)


def _factor_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Names of the factors, each with what changes when weights are loaded into it."""
    pairs = [(path, module) for path, module in model.named_modules() if isinstance(module, FactorPair)]
    return {f"{path}.{n}": (id(p), times_written(p)) for path, pair in pairs for n, p in pair.named_parameters()}


def _declare_ties(model: nn.Module) -> None:
    """Tell `model.save_pretrained`, which writes a shared weight once if its module names it, of the factors that pairs share."""
    first: dict[int, str] = {}
    for path, pair in model.named_modules():
        if isinstance(pair, FactorPair):
            firsts = {n: first.setdefault(id(p), f"{path}.{n}") for n, p in pair.named_parameters()}
            vars(pair)["_tied_weights_keys"] = {n: name for n, name in firsts.items() if name != f"{path}.{n}"}


def _check_form(model: nn.Module, state: dict[str, Any]) -> None:
    """Transformers loads what fits and logs the rest: a checkpoint of the other form leaves layers as they were."""
    forms = ("dense", "factorized")
    saved, now = state["plan"] is not None and bool(Plan.from_json(state["plan"]).R), bool(pairs_in(model))
    if saved != now:
        raise CheckpointError(
            f"a checkpoint from {'after' if saved else 'before'} the switch is for a {forms[saved]} model; this {type(model).__name__} is {forms[now]}. "
            "Resume with LowRankTrainer and a freshly built model."
        )


def _refuse_pairs(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Transformers loads what fits and logs the rest: factors would be left out in silence."""
    check_factors(
        model,
        state,
        "Resume with LowRankTrainer, or read the folder with fxrank.integrations.huggingface.from_pretrained.",
    )


def _plain(batch: Any) -> Any:
    return dict(batch) if hasattr(batch, "keys") else batch


__all__ = ["LowRankCallback", "LowRankTrainer", "LowRankTrainerMixin", "from_pretrained", "save_pretrained"]
