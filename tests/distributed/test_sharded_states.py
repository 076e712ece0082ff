"""Models in shards: gone on with, saved, trained in the one call, and refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from nets import vectors
from shards import STEPS, Net, attach, loop, optimizer_of, shard, wholes
from teams import team
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxrank


def gone_on_with(rank, size, at):
    """A run, and another from its states after `at` steps, by the model's and the optimizer's own state dicts."""
    x, y = vectors(32)
    part = x.double()[rank::size], y[rank::size]

    def started(**options):
        torch.manual_seed(0)
        model = shard(Net().double())
        optimizer = optimizer_of(model, "AdamW")
        return model, optimizer, attach(model, optimizer, part[0], **options)

    model, optimizer, session = started()
    loop(model, optimizer, at, part)
    saved = (
        session.state_dict(),
        {k: v.clone() for k, v in model.state_dict().items()},
        copy.deepcopy(optimizer.state_dict()),
    )
    rest, plan = loop(model, optimizer, STEPS - at, part), session.finish()
    fresh, other, again = started(state=saved[0])
    fresh.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    same = loop(fresh, other, STEPS - at, part) == rest and again.finish() == plan
    expected = wholes(model)
    return same and all(torch.equal(value, expected[name]) for name, value in wholes(fresh).items())


@pytest.mark.parametrize("at", [2, 7])
def test_a_session_goes_on_from_its_state(at):
    assert team(gone_on_with, 2, at) == [True, True]


def saved(rank, size, folder):
    torch.manual_seed(0)
    model, (x, y) = shard(Net()), vectors(32)
    optimizer = optimizer_of(model, "SGD")
    with attach(model, optimizer, x[rank::size]):
        loop(model, optimizer, STEPS, (x[rank::size], y[rank::size]))
    fxrank.save(model, folder)
    dist.barrier()
    plain = fxrank.load(Net(), folder)
    with torch.no_grad():
        return torch.equal(model.eval()(x), plain.eval()(x)), len(fxrank.plan_of(plain).R)


def test_save_gathers_and_the_result_loads_anywhere(tmp_path):
    assert team(saved, 2, tmp_path) == [(True, 8)] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


def in_one_call(rank, size):
    torch.manual_seed(0)
    model, data = shard(Net()), TensorDataset(*vectors(64))
    loader = DataLoader(data, 8, sampler=DistributedSampler(data))
    result = fxrank.auto_lowrank(
        model,
        loader,
        val_loader=loader,
        epochs=4,
        policy=fxrank.Pufferfish(E=2, K=0, ratio=0.25),
        progress=False,
        seed=0,
    )
    return result.plan.R, result.history[-1]["loss"] < result.history[0]["loss"]


def test_the_one_call():
    first, second = team(in_one_call, 2)
    assert first == second and len(first[0]) == 8 and first[1]


# -- what cannot be replaced


def units(rank, size):
    model, (x, y) = Net(), vectors(32)
    fully_shard(model.blocks[0].up)
    nn.utils.parametrizations.weight_norm(model.blocks[1].up)
    shard(model)
    optimizer = optimizer_of(model, "SGD")
    with attach(model, optimizer, x) as session:
        loop(model, optimizer, STEPS, (x, y))
    decisions = {d.name: d for d in session.plan.layers}
    return decisions["blocks.0.up"].reason, decisions["blocks.1.up"].reason, len(session.plan.R)


def test_layers_that_cannot_be_replaced_say_why():
    for found in team(units, 2):
        assert found == (
            "it is a unit of fully_shard by itself; shard the block around it instead",
            "its weight is derived from parameters that are sharded",
            6,
        )


def ignored(rank, size):
    """Weights that no unit holds; of those, and of a unit's own, a plan that asks for them, and a session's state."""
    x, y = vectors(32)
    model = Net()
    shard(model, ignored_params={block.up.weight for block in model.blocks})
    optimizer = optimizer_of(model, "SGD")
    with attach(model, optimizer, x, include="*") as session:
        loop(model, optimizer, STEPS, (x, y))
    reasons = {d.reason for d in session.plan.layers if d.name in ("blocks.0.up", "blocks.1.up")}
    plan, texts = replace(fxrank.plan_of(fxrank.factorize(Net(), x, rank=0.25)), switch_step=2), []
    other = shard(Net())
    other_optimizer = optimizer_of(other, "SGD")
    with attach(other, other_optimizer, x) as whole:
        loop(other, other_optimizer, STEPS, (x, y))
    for make, options in (
        (lambda net: shard(net, ignored_params={net.blocks[0].up.weight}), {"policy": plan}),
        (lambda net: (fully_shard(net.blocks[0].up), shard(net))[1], {"state": whole.state_dict()}),
    ):
        model = make(Net())
        before = [id(p) for p in model.parameters()]
        with pytest.raises(TypeError) as caught:
            attach(model, optimizer_of(model, "SGD"), x, **options)
        texts.append(str(caught.value))
        assert before == [id(p) for p in model.parameters()]
    return len(session.plan.R), reasons, texts


def test_a_weight_that_no_unit_holds_is_left_and_a_plan_that_asks_for_it_is_refused():
    for ranks, reasons, texts in team(ignored, 2):
        lone = "no unit of fully_shard holds its weight; shard a block around it, without ignored_params"
        unit = "it is a unit of fully_shard by itself; shard the block around it instead"
        assert (ranks, reasons) == (8, {lone})
        assert texts == [
            f"the layers of a plan must be ones that this engine lets go; of 'blocks.0.up', {reason}. Change that, or leave it dense in the plan."
            for reason in (lone, unit)
        ]


def sharded_afterwards(rank, size):
    torch.manual_seed(0)
    model, data = Net(), vectors(32)
    optimizer = optimizer_of(model, "SGD")
    session = attach(model, optimizer, data[0])
    shard(model)
    optimizer.param_groups[0]["params"][:] = model.parameters()  # as Accelerate does in prepare()
    texts = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            loop(model, optimizer, STEPS, data)
        texts.append(str(caught.value))
    return texts, session.clock.step


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_is_sharded_after_attaching_is_refused(size):
    text = "shards must be there when a session is attached, which then decides without the whole model; these were made later. Attach after fully_shard."
    assert team(sharded_afterwards, size) == [([text] * 2, 0)] * size


def refused(rank, size):
    (x, _), texts = vectors(32), {}

    def text_of(model, **options):
        before = [id(p) for p in model.parameters()]
        try:
            attach(model, optimizer_of(model, "SGD"), x, **options)
        except (TypeError, fxrank.NonFiniteWeightError) as error:
            assert before == [id(p) for p in model.parameters()]
            return str(error)

    texts["offload"] = text_of(shard(Net(), offload_policy=CPUOffloadPolicy(pin_memory=False)))
    texts["average"] = text_of(shard(Net()), followers=[Net()])
    split = Net()
    mesh = init_device_mesh("cpu", (size,))
    split.head.weight = nn.Parameter(distribute_tensor(split.head.weight.detach(), mesh, [Shard(0)]))
    texts["tensor"] = text_of(split)
    broken = Net()
    with torch.no_grad():
        broken.blocks[1].down.weight[-1, -1] = torch.nan  # in the last process's shard
    texts["nan"] = text_of(shard(broken))
    plan = fxrank.plan_of(fxrank.factorize(Net(), x, rank=0.25))
    model = shard(Net())
    optimizer = optimizer_of(model, "SGD")
    with attach(model, optimizer, x, replace(plan, switch_step=2)) as session:
        loop(model, optimizer, 1, vectors(32))
        with torch.no_grad():
            model.blocks[1].down.weight.mul_(torch.nan)
        before = [id(p) for p in model.parameters()]
        try:
            session.install(plan)
        except fxrank.NonFiniteWeightError as error:
            texts["late"] = str(error)
            assert before == [id(p) for p in model.parameters()] and session.plan is None
        session.plan = plan
    for name, act in (("factorize", lambda: fxrank.factorize(model, x)), ("merge", lambda: fxrank.merge(model))):
        with pytest.raises(TypeError) as caught:
            act()
        texts[name] = str(caught.value)
    return texts


def test_refusals():
    for texts in team(refused, 2):
        assert texts["offload"].startswith(
            "shards must be where they are computed with; these are offloaded to the CPU. Leave out"
        )
        assert texts["average"].startswith(
            "an average is followed through the switch beside a whole model; this one is in shards."
        )
        assert texts["tensor"].startswith(
            "shards must be those of fully_shard alone to be replaced; 'head.weight' is a DTensor of"
        )
        assert texts["factorize"] == texts["merge"]
        assert texts["merge"].startswith("a copy is made of a whole model; 'inlet.weight' of this one lies in shards. ")
        assert "'blocks.1.down'" in texts["nan"] and "'blocks.1.down'" in texts["late"]
