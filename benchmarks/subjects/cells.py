"""One cell of the decision table: a job trained as one row says; and afterwards the steps of what came out, timed beside each other."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.real_runs import measured, trained
from benchmarks.subjects.allocations import unweighed
from benchmarks.subjects.jobs import Job, fixed, narrower, size, target
from benchmarks.subjects.rows import Setup
from benchmarks.subjects.tasks import Task
from fxrank.passes.errors import BudgetError
from fxrank.passes.profiling.clock import Stopwatch, compare
from fxrank.plan import LayerDecision, Plan
from fxrank.switch.apply_plan import apply_plan
from fxrank.training.batches import run_batch

CPU = torch.device("cpu")
ROUNDS, ROUNDS_MS = 21, 120_000.0
"""Of timing, and when no more are begun."""


def train(job: Job, setup: Setup, seed: int, data: Path, cache: Path | None) -> dict[str, Any]:
    """Train a cell, as plain data; `refused` says of a budget that nothing keeps to it."""
    started, worked = time.perf_counter(), time.process_time()
    task = job.task(data, cache)
    dense = task.build(seed)
    model = dense if setup.narrow is None else narrower(job, task, setup.narrow, seed)
    about = {"data": task.data, "dense_parameters": size(dense), "dense_fixed": fixed(job, dense)}
    if model is None:
        return about | {"refused": f"no size of the model has {setup.narrow:g} of the parameters"}
    steps = job.epochs * len(task.loaders(seed)[0])  # type: ignore[arg-type]
    idea = nullcontext({}) if setup.idea is None else setup.idea(model, steps)
    try:
        with unweighed() if setup.unweighed else nullcontext(), idea as options:
            run = trained(task, model, job.epochs, seed, CPU, **_arguments(job, setup, dense), **options)
    except BudgetError as error:
        return about | {"refused": str(error)}
    found = measured(task, run, task.loaders(seed), CPU)
    for known in ("plan", "history", "policy", "memory_bytes", "R"):
        found.pop(known)
    notes = [*found.pop("notes")]
    scores = {task.metric: found.pop(task.metric)}
    if job.score is not None:
        scored = job.score(run.model, data)
        if isinstance(scored, str):
            notes.append(scored)
        else:
            scores[scored[0]] = scored[1]
    plan = run.plan
    return (
        about
        | {"scores": scores, "parameters": size(run.model), "epochs": job.epochs}
        | found
        | {"notes": notes, "layers": len(plan.layers), "factorized": len(plan.R), "plan": plan_data(plan)}
        | {"kept": {d.name: d.reason for d in plan.layers if not d.factorized and setup.narrow is None}}
        | {"narrow": setup.narrow, "curve": [row["val_loss"] for row in run.history]}
        | {"cell_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
        | {"load": round(os.getloadavg()[0], 2)}
    )


def _arguments(job: Job, setup: Setup, dense: nn.Module) -> dict[str, Any]:
    policy = setup.policy
    if not setup.tables and policy.target_params is not None:
        policy = replace(policy, target_params=target(job, policy.target_params, dense))
    own: dict[str, Any] = {"optimizer": None} if job.bare else {}
    return own | setup.options | {"policy": policy}


_PLAIN = asdict(LayerDecision("", "", (), 0, None, ""))


def plan_data(plan: Plan) -> list[dict[str, Any]]:
    """The pairs of a plan, without what is as usual."""
    needless = ("reason", "macs", "pair_macs", "stable_rank", "xi")
    return [
        {k: v for k, v in asdict(d).items() if k not in needless and v != _PLAIN[k]}
        for d in plan.layers
        if d.factorized
    ]


def with_pairs(model: nn.Module, entries: Sequence[Mapping[str, Any]]) -> nn.Module:
    """The model with the pairs of `plan_data`, of its own weights."""
    layers = tuple(
        # no bias can be gained without the data that it was fitted on
        LayerDecision(**_PLAIN | dict(entry) | {"weight_shape": tuple(entry["weight_shape"]), "gains_bias": False})
        for entry in entries
    )
    apply_plan(model, Plan("", layers))
    return model


def time_steps(
    job: Job, plans: Mapping[str, Mapping[str, Any]], data: Path, cache: Path | None, rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """Quartiles of the milliseconds of a training step, and of their ratio to the dense model's, of the models that rows have come to,
    with fresh weights, steps in turn. `plans` are cells' findings by row.
    """
    task = job.task(data, cache)
    batch = next(iter(task.loaders(0)[0]))
    models = {"": task.build(0)}
    for name, found in plans.items():
        narrow = found.get("narrow")
        made = task.build(0) if narrow is None else narrower(job, task, narrow, 0)
        assert made is not None, name
        models[name] = with_pairs(made, found["plan"]) if found["plan"] else made
    times = compare([_step(task, model, batch) for model in models.values()], Stopwatch(CPU), rounds, ROUNDS_MS)
    return {
        name: {"step_ms": ms, "dense_step_ms": times.ms[0], "ratio": list(share), "how": times.how}
        for name, ms, share in list(zip(models, times.ms, times.shares, strict=True))[1:]
    }


def _step(task: Task, model: nn.Module, batch: Any) -> Callable[[], None]:
    optimizer = task.optimizer(model.train())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run_batch(model, batch, task.loss_fn).loss.backward()
        optimizer.step()

    return step
