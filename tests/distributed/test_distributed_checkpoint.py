"""`torch.distributed.checkpoint`: states before and after the switch, of one process, of copies and of shards."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from nets import SOON, mlp, vectors
from teams import team
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxrank

STEPS = 10
WRAPPINGS = {"copies": DistributedDataParallel, "shards": fully_shard}


def attach(model, optimizer, x, **options):
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=STEPS, steps_per_epoch=1, policy=SOON, **options
    )


def train(model, optimizer, steps, x, y):
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_asking_for_a_state_that_is_not_there_is_no_step(momentum):
    """Torch makes the state by a step with zeros: once, or each time where the optimizer keeps none."""
    ends = []
    for asked in (False, True):
        model, (x, y) = mlp(), vectors()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        with attach(model, optimizer, x) as session:
            for step in range(STEPS):
                if asked:
                    get_state_dict(model, optimizer)
                assert session.clock.step == step
                train(model, optimizer, 1, x, y)
        ends.append((session.plan, session.scene.monitor.curves, [p.tolist() for p in model.parameters()]))
    assert ends[0] == ends[1]


def gone_on_with(rank, size, folder):
    """A run, and another from its files after some steps."""
    x, y = (part[rank::size] for part in vectors(16))
    found = {}
    for name, wrap in WRAPPINGS.items():
        for at in (2, 7):
            model = wrap(mlp())
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            session = attach(model, optimizer, x)
            train(model, optimizer, at, x, y)
            path, state = folder / f"{name}{at}", session.state_dict()
            dcp.save(
                dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=path
            )
            train(model, optimizer, STEPS - at, x, y)
            fresh = wrap(mlp(1))
            other = torch.optim.AdamW(fresh.parameters(), lr=0.01)
            again = attach(fresh, other, x, state=state)
            states = dict(zip(("model", "optimizer"), get_state_dict(fresh, other), strict=True))
            dcp.load(states, checkpoint_id=path)
            set_state_dict(fresh, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
            train(fresh, other, STEPS - at, x, y)
            whole, same = (
                get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)) for net in (model, fresh)
            )
            alike = whole.keys() == same.keys() and all(torch.equal(value, same[key]) for key, value in whole.items())
            found[name, at] = alike, session.finish() == again.finish(), session.phase
    return found


def test_a_run_goes_on_from_its_files(tmp_path):
    expected = {(name, at): (True, True, "low-rank") for name in WRAPPINGS for at in (2, 7)}
    assert team(gone_on_with, 2, tmp_path) == [expected] * 2


def loaded(rank, size, folder):
    x, y = (part[rank::size] for part in vectors(16))
    ends = {}
    for unused in (False, True):  # where gradients that do not come are no error, copies would drift apart
        model = DistributedDataParallel(mlp(1), find_unused_parameters=unused)
        fxrank.load(model, folder)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, x, y)
        ends[unused] = [p.tolist() for p in model.parameters()]
    shards = fully_shard(mlp(1))
    names = [name for name, _ in shards.named_parameters()]
    with pytest.raises(TypeError) as caught:
        fxrank.load(shards, folder)
    return ends, str(caught.value), names == [name for name, _ in shards.named_parameters()]


def test_a_saved_model_is_loaded_into_a_wrapper_and_not_into_shards(tmp_path):
    fxrank.save(fxrank.factorize(mlp(), vectors()[0]), tmp_path)
    first, second = team(loaded, 2, tmp_path)
    assert first == second
    text = "a file is loaded into a whole model; this FSDPSequential is in shards. Load it into a freshly built one, and shard that."
    assert first[1:] == (text, True)
