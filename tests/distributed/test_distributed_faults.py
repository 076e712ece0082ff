"""Several processes that do not fit together, or of which one fails: all are told so, none waits for another."""

import hashlib
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import UNTIMED, mlp, vectors
from teams import team
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.distributed.ddp import ignored_paths

PUFFERFISH = fxrank.Pufferfish(E=2, K=0, ratio=0.25)
STEPS = 6


class Around(nn.Module):
    """A whole that the watched model is a part of, with a branch that no call takes."""

    def __init__(self, net):
        super().__init__()
        self.net, self.unused = net, nn.Linear(3, 3)

    def forward(self, x):
        return self.net(x)


def attach(model, optimizer, policy=PUFFERFISH, **options):
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=vectors()[0], total_steps=STEPS, steps_per_epoch=1, policy=policy, **options
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, optimizer, rank=0, size=1, steps=STEPS):
    x, y = vectors(32)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::size]), y[rank::size]).backward()
        optimizer.step()


def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def failure(act):
    """What `act` raises, in words."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def attached_before_the_group(rank, size, store):
    dist.barrier()  # a process that leaves while another still connects breaks the connection
    dist.destroy_process_group()
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    wrapper, before = DistributedDataParallel(model), digest(model)
    return failure(lambda: train(wrapper, optimizer, rank, size)), session.phase, before == digest(model)


def test_a_session_from_before_the_group_is_told_at_its_first_step(tmp_path):
    text = (
        "RuntimeError: a switch must be the same in all processes, which the session learns when it is attached; there was no process group "
        "then, and there is one of 2 now. Attach after init_process_group()."
    )
    assert team(attached_before_the_group, 2, str(tmp_path / "store")) == [(text, "full-rank", True)] * 2


WRAPPINGS = {
    "plain": DistributedDataParallel,
    "compiled": lambda net: DistributedDataParallel(torch.compile(net, backend="eager")),
    "part": lambda net: DistributedDataParallel(Around(net), find_unused_parameters=True),
}


def wrapped_afterwards(rank, size):
    ends = {}
    for name, wrap in WRAPPINGS.items():
        model = mlp()
        optimizer = sgd(model)
        session = attach(model, optimizer)
        train(wrap(model), optimizer, rank, size)
        ends[name] = session.phase, session.notes, digest(model)
    return ends


def test_a_wrapper_made_after_attaching_is_found():
    first, second = team(wrapped_afterwards, 2)
    assert first == second
    assert {name: end[:2] for name, end in first.items()} == dict.fromkeys(WRAPPINGS, ("low-rank", []))


def wrapped_again(rank, size):
    """A wrapper made anew after attaching, and a second whole with the same layers and a wrapper of its own."""
    model = mlp()
    optimizer, wrapper = sgd(model), DistributedDataParallel(model)
    again = attach(wrapper, optimizer)
    train(wrapper, optimizer, rank, size, steps=1)
    wrapper = DistributedDataParallel(model)
    train(wrapper, optimizer, rank, size, steps=STEPS - 1)
    torch.manual_seed(0)
    shared = mlp()
    wholes = [nn.Sequential(shared, nn.Linear(4, 4)) for _ in range(2)]
    wrappers = [DistributedDataParallel(whole) for whole in wholes]
    both = sgd(nn.ModuleList(wholes))
    session = attach(wrappers[0], both)
    for step in range(STEPS):
        train(wrappers[step % 2], both, rank, size, steps=1)
    return again.phase, digest(model), session.phase, [digest(whole) for whole in wholes]


def test_every_wrapper_of_a_replaced_weight_goes_on():
    first, second = team(wrapped_again, 2)
    assert first == second
    assert (first[0], first[2]) == ("low-rank", "low-rank")
    assert first[1] == team(wrapped_afterwards, 2)[0]["plain"][2]


def wrapped_in_a_group_of_one(rank, size):
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer)
    train(DistributedDataParallel(model), optimizer)
    return session.phase, digest(model)


def test_a_group_of_one_is_wrapped_afterwards_too():
    assert team(wrapped_in_a_group_of_one, 1) == [("low-rank", alone(0))]


def wrapped_too_late(rank, size):
    failures = []
    for ignored, seed in (([], rank), (["2.weight"], 0)):
        model = mlp(seed)
        optimizer = sgd(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attach(model, optimizer)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        wrapper = DistributedDataParallel(model)
        failures.append(failure(lambda: train(wrapper, optimizer, rank, size)))  # noqa: B023
    return failures


def test_a_later_wrapper_that_does_not_suit_is_refused():
    rule = "RuntimeError: a DistributedDataParallel made after the session was attached must suit it; "
    for alone, ignoring in team(wrapped_too_late, 2):
        assert alone == rule + "it is for 2 processes, the session for 1. Attach after wrapping the model."
        assert ignoring == rule + "it ignores '2'. Attach after wrapping the model."


def replicated(rank, size):
    from torch.distributed._composable.replicate import replicate

    model = mlp()
    optimizer = sgd(replicate(model))
    session = attach(model, optimizer)  # its wrapper comes with the first forward
    late = failure(lambda: train(model, optimizer, rank, size))
    return late, failure(lambda: attach(model, optimizer)), session.phase


def test_a_wrapper_of_parameters_alone_is_refused():
    text = (
        "TypeError: DistributedDataParallel must hold the model to take its new parameters; one of replicate() holds a list of 8 of the old ones. "
        "Wrap the model in DistributedDataParallel, or shard it with fully_shard."
    )
    assert team(replicated, 2) == [(text, text, "full-rank")] * 2


def without_a_wrapper(rank, size, seeds):
    model = mlp(seeds[rank])
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = attach(model, optimizer)
        train(model, optimizer)
    said = [str(w.message) for w in caught if w.category is UserWarning and "process" in str(w.message)]
    missing = [str(w.message) for w in caught if "average the gradients" in str(w.message)]
    return said, missing, session.notes, session.phase, session.team.size, digest(model)


def alone(seed):
    model = mlp(seed)
    optimizer = sgd(model)
    attach(model, optimizer)
    train(model, optimizer)
    return digest(model)


def test_who_has_a_model_of_his_own_trains_it_alone():
    for rank, (said, missing, notes, phase, size, end) in enumerate(team(without_a_wrapper, 2, (0, 1))):
        assert said == [
            "processes that train one model must start with the same parameters; those of these 2 differ, so each is taken to train a model of "
            "its own. If it is one model, wrap it in DistributedDataParallel, or broadcast it, before attaching."
        ]
        assert (missing, notes, phase, size, end) == ([], [], "low-rank", 1, alone(rank))


def test_who_averages_by_hand_is_warned():
    for said, missing, notes, phase, size, _ in team(without_a_wrapper, 2, (0, 0)):
        assert (
            missing
            == notes
            == ["no DistributedDataParallel holds the model: average the gradients of its factors yourself"]
        )
        assert (said, phase, size) == ([], "low-rank", 2)


def with_an_ignored_weight(rank, size):
    whole = Around(mlp())
    ignored = ["net.2.weight"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, ignored)
    wrapper = DistributedDataParallel(whole, find_unused_parameters=True)
    optimizer = sgd(whole)
    session = attach(whole.net, optimizer)
    train(wrapper, optimizer, rank, size)
    reasons = {d.name: d.reason for d in session.finish().layers if d.name == "2"}
    x = vectors()[0]
    asking = failure(lambda: attach(whole.net, optimizer, fxrank.plan_of(fxrank.factorize(mlp(), x, {"2": 4}))))
    compiled = Around(mlp())
    compiled.net = torch.compile(compiled.net, backend="eager")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(compiled, ["net._orig_mod.2.weight"])
    assert ignored_paths(DistributedDataParallel(compiled), compiled) == {"net", "net.2", "net.2.weight"}
    return (
        asking,
        session.plan.R,
        reasons,
        digest(whole.net[2]),
        digest(whole.net[4]),
        sorted(ignored_paths(wrapper, whole)),
    )


def test_a_weight_that_is_not_averaged_stays_so():
    (asked, *first), (also_asked, *second) = team(with_an_ignored_weight, 2)
    reason = "DistributedDataParallel was told to ignore its parameters, and would average those of a pair"
    assert asked == also_asked
    assert asked == (
        f"TypeError: the layers of a plan must be ones that this engine lets go; of '2', {reason}. Change that, or leave it dense in the plan."
    )
    assert first[:2] == second[:2] == [{"4": 4}, {"2": reason}]
    assert first[2] != second[2] and first[3] == second[3]
    assert first[4] == ["net", "net.2", "net.2.weight"]


def joined(rank, size, policy):
    wrapper = DistributedDataParallel(mlp())
    optimizer = sgd(wrapper)
    session = attach(wrapper, optimizer, policy)
    with wrapper.join():
        inside = failure(lambda: train(wrapper, optimizer, steps=STEPS))
    if policy != PUFFERFISH:
        return inside
    train(wrapper, optimizer, rank, size)
    with wrapper.join():  # all is decided: uneven ends are torch's again
        train(wrapper, optimizer, rank, size, steps=1 + rank)
    return inside, session.phase, digest(wrapper)


def test_joining_is_refused_until_the_switch():
    first, second = team(joined, 2, PUFFERFISH)
    assert first == second
    assert first[:2] == (
        "RuntimeError: all processes must take part in the rank samples and the switch; inside DistributedDataParallel.join() some may have left. "
        "Give all equally many batches (DistributedSampler, drop_last) until the switch is made, and join() after it.",
        "low-rank",
    )
    assert team(joined, 2, fxrank.FullRank()) == ["nothing was raised"] * 2


class OddError(Exception):
    """One that pickles, and cannot be read again."""

    def __init__(self, what, value):
        super().__init__(f"{what} {value}")


@dataclass(frozen=True, kw_only=True)
class Failing(fxrank.Pufferfish):
    def decide(self, scene):
        raise OddError("ranks of", 3)


class FullDisk:
    """A logger, and a listener, that fails."""

    def log(self, step, values):
        raise OSError("the disk is full")

    event = __call__ = log


def failing_in_one(rank, size, where):
    wrapper = DistributedDataParallel(mlp())
    optimizer = sgd(wrapper)
    policy = {"policy": Failing(E=2), "logger of samples": UNTIMED}.get(where, PUFFERFISH)
    fails = FullDisk() if rank == (1 if where == "listener" else 0) else None
    options = {"logger" if where.startswith("logger") else "listener": fails} if where != "policy" else {}
    return failure(lambda: (attach(wrapper, optimizer, policy, **options), train(wrapper, optimizer, rank, size)))


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        ("policy", ["OddError: ranks of 3", "RuntimeError: OddError: ranks of 3"]),
        ("logger", ["OSError: the disk is full"] * 2),
        ("logger of samples", ["OSError: the disk is full"] * 2),
        ("listener", ["OSError: the disk is full"] * 2),
    ],
)
def test_what_one_process_raises_all_raise(where, texts):
    assert team(failing_in_one, 2, where) == texts


def attached_apart(rank, size):
    wrapper = DistributedDataParallel(mlp())
    optimizer, x = sgd(wrapper), vectors()[0]
    said = [
        failure(lambda: attach(wrapper, optimizer, state={"version": 2} if rank == 0 else None)),
        failure(
            lambda: fxrank.LowRankSession.attach(wrapper, optimizer, example_inputs=x, total_steps=STEPS - 2 * rank)
        ),
        failure(lambda: fxrank.auto_lowrank(wrapper, [vectors()] * (2 + rank), epochs=3, progress=False)),
    ]
    average = mlp()
    session = attach(wrapper, optimizer, followers=[average] if rank == 0 else [])
    with torch.no_grad():
        average[4].weight.fill_(torch.inf)
    before = digest(wrapper)
    said.append(failure(lambda: session.install(fxrank.plan_of(fxrank.factorize(mlp(), x)))))
    return said, before == digest(wrapper)


def test_processes_that_would_part_are_told_before():
    first, second = team(attached_apart, 2)
    assert first == second
    rule = "ValueError: all processes must attach with the same {}, so that they decide in the same step; got {} in the first and {} in process 1."
    assert first[0][0].startswith(rule.format("state", "one", "none"))
    assert first[0][1].startswith(rule.format("total_steps", 6, 4))
    assert first[0][2].startswith(rule.format("total_steps", 6, 9))
    assert first[0][3].startswith(
        "NonFiniteWeightError: weights must be finite to have singular values; '4 of an average'"
    )
    assert first[1]


def accumulated(rank, size):
    """Four small batches in a step, the first three without synchronising, but in torch's own first iteration."""
    ends = []
    x, y = vectors(32)
    x, y = x.double()[rank::size], y[rank::size]
    for static in (False, True):
        wrapper = DistributedDataParallel(mlp().double(), static_graph=static)
        optimizer = sgd(wrapper)
        session = fxrank.LowRankSession.attach(
            wrapper, optimizer, example_inputs=x, total_steps=STEPS, steps_per_epoch=1, policy=PUFFERFISH
        )
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(4):
                wrapper.require_backward_grad_sync = step == 0 or part == 3
                F.cross_entropy(wrapper(x[part::4]), y[part::4]).div(4).backward()
                assert wrapper.require_backward_grad_sync == (step == 0 or part == 3)
            optimizer.step()
        ends.append((session.phase, torch.cat([p.detach().flatten() for p in wrapper.parameters()])))
        left = len(wrapper._forward_hooks) + len(wrapper._forward_pre_hooks)
    (_, plain), (phase, recorded) = ends
    return phase, left, float((plain - recorded).abs().max()), digest(wrapper)


def test_a_static_graph_goes_on_accumulating():
    first, second = team(accumulated, 2)
    assert first == second
    phase, left, worst, _ = first
    assert (phase, left) == ("low-rank", 0)
    assert worst < 1e-12  # float64; gradients are averaged in another order
