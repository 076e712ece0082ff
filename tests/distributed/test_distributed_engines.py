"""Engines that hold a model's parameters in pieces of their own: refused with a way out, which works."""

import importlib
import os
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import mlp, vectors
from teams import team
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.distributed.team import Team
from fxrank.switch.optimizer import optimizers_of


def refused(rank, size, engine):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = model
    if engine == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        given = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    if engine == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel

        given = model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [id(p) for p in model.parameters()]
    try:
        fxrank.LowRankSession.attach(given, optimizer, example_inputs=torch.randn(4, 12), total_steps=9)
    except TypeError as error:
        return str(error), before == [id(p) for p in model.parameters()]
    return "not refused", False


def sharded_result(rank, size):
    """The way out: a model from `factorize`, sharded afterwards. Its parameters after three steps, put together."""
    from torch.distributed.fsdp import fully_shard

    x, y = (part[rank::size] for part in vectors(32))
    model = fxrank.factorize(mlp().double(), x.double(), rank=0.25)
    for module in (model[2], model[4]):
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (size,)))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    return {n: p.full_tensor().tolist() for n, p in model.named_parameters()}


def test_a_factorized_model_is_sharded_like_any_other():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = team(sharded_result, 2)
    assert found[0] == found[1]
    x, y = vectors(32)
    model = fxrank.factorize(mlp().double(), x.double(), rank=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    for name, value in model.named_parameters():
        whole = torch.tensor(found[0][name], dtype=torch.float64)
        torch.testing.assert_close(whole, value.detach(), rtol=0, atol=1e-10)  # float64, sums in another order


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ("zero", "ZeroRedundancyOptimizer fixes which process owns which parameter when it is built"),
        (
            "fsdp",
            "a weight must be a parameter of its own to be factorized; 'the model' is FSDP1, which flattens them. Shard",
        ),
    ],
)
def test_engines_that_hold_pieces_are_refused_with_a_way_out(engine, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for message, untouched in team(refused, 2, engine):
            assert message.startswith(text)
            assert untouched


def test_engines_that_are_known_by_name():
    class DeepSpeedEngine(nn.Module):
        pass

    flat = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    around = type("AcceleratedOptimizer", (), {"optimizer": flat})()
    with pytest.raises(TypeError, match=re.escape("DeepSpeed keeps flat copies of the parameters")):
        Team.of(DeepSpeedEngine())
    for optimizer in (flat, around):
        with pytest.raises(
            TypeError, match=re.escape("so they cannot be swapped; got its DeepSpeedZeroOptimizer. Use a torch")
        ):
            optimizers_of(optimizer, mlp())


def started_by_deepspeed(rank, size, stage):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    deepspeed = importlib.import_module("deepspeed")
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, flat, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    texts = []
    for given in ((engine, optimizer), (engine, flat), (engine.module, flat)):
        with pytest.raises(TypeError) as error:
            fxrank.LowRankSession.attach(*given, example_inputs=vectors()[0], total_steps=4)
        texts.append(str(error.value))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_itself_is_refused(stage):
    """Where it is installed: it builds a part of its own first, which takes a minute."""
    pytest.importorskip("deepspeed")
    for texts in team(started_by_deepspeed, 2, stage, timeout=600):
        assert all(text.startswith("DeepSpeed keeps flat copies of the parameters") for text in texts)
