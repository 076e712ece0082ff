"""Gradient compression: what each hook makes of the gradients of real groups of processes, and what it sends."""

import itertools
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from teams import team
from test_real_runs import data  # noqa: F401 - a fixture
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import data_parallel
from benchmarks.baselines import gradients
from benchmarks.baselines.gradients import (
    COMPRESSIONS,
    CountedGroup,
    compress,
    dequantized,
    majority,
    packed,
    power_sgd,
    quantized,
    unpacked,
)
from benchmarks.subjects.data import DeviceLoader

STEPS = 5


class Given(nn.Module):
    """Parameters whose gradients are what the model is called with."""

    def __init__(self, *shapes):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, *wanted):
        return sum((w * g).sum() for w, g in zip(self.weights, wanted, strict=True))


def averaged(wrapper, *gradients):
    """What the gradients of this process become."""
    wrapper.zero_grad(set_to_none=True)
    wrapper(*gradients).backward()
    return [w.grad.tolist() for w in wrapper.module.weights]


# -- bits


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back_and_are_eight_a_byte(bits):
    bits = torch.tensor(bits, dtype=torch.bool)
    message = packed(bits)
    assert message.dtype == torch.uint8
    assert len(message) == -(-len(bits) // 8)
    assert torch.equal(unpacked(message, len(bits)), bits)
    # what other devices do, beside numpy's
    assert torch.equal(gradients._packed(bits), message)
    assert torch.equal(gradients._unpacked(message, len(bits)), bits)


def test_the_first_bit_is_the_highest():
    assert packed(torch.tensor([True, *[False] * 6, True, True])).tolist() == [0b10000001, 0b10000000]


# -- Signum

PATTERNS = list(itertools.product([1.0, -1.0], repeat=4))
"""All that four processes can vote."""


def vote(rank, size):
    wrapper = DistributedDataParallel(Given((len(PATTERNS) + 1,)))
    group = compress(wrapper, "Signum")
    mine = torch.tensor([pattern[rank] for pattern in PATTERNS] + [0.0])
    # momenta 0.1, then 0.9 x 0.1 - 0.05 = 0.04, then 0.9 x 0.04 - 0.2 = -0.164, of what was given first
    return [averaged(wrapper, factor * mine)[0] for factor in (1.0, -0.5, -2.0)], (group.sent, group.received)


def test_four_processes_vote_by_the_signs_of_their_momenta():
    found = team(vote, 4)
    won = [(sum(p) > 0) - (sum(p) < 0) for p in PATTERNS]
    assert won.count(0) == 6  # two against two
    for votes, (sent, received) in found:
        assert votes == [[*won, 1], [*won, 1], [*(-w for w in won), 1]]  # a momentum of 0 votes up
        assert (sent, received) == (3 * 3, 3 * 3 * 4)  # 17 bits are 3 bytes


def test_a_tie_is_no_sign():
    votes = torch.tensor([[True, True, False, False], [True, False, True, False]])
    assert majority(votes).tolist() == [1, 0, 0, -1]
    assert majority(votes[:1]).tolist() == [1, 1, -1, -1]


# -- stochastic binary quantization


def test_quantized_numbers_are_the_two_extremes_and_right_in_the_mean():
    vector, draws = torch.tensor([-2.0, -1.9, -0.5, 0.0, 0.3, 1.0, 2.9, 3.0], dtype=torch.float64), 4000
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        bits, extremes = quantized(vector, generator)
        found.append(dequantized(bits[None], extremes[None]))
    found = torch.stack(found)
    assert set(found.flatten().tolist()) == {-2.0, 3.0}
    standard_error = ((vector + 2) * (3 - vector) / draws).sqrt()  # of a number that is -2 or 3, with mean x
    assert ((found.mean(0) - vector).abs() <= 4 * standard_error).all()
    assert (found[:, [0, -1]] == vector[[0, -1]]).all()  # an extreme is never the other
    bits, extremes = quantized(torch.full((3,), 7.0), generator)
    assert dequantized(bits[None], extremes[None]).tolist() == [7.0] * 3


def quantize(rank, size):
    wrapper = DistributedDataParallel(Given((200,), (2, 2)))
    group = compress(wrapper, "binary quantization")
    same = torch.linspace(-1, 1, 200, dtype=torch.float64)
    other = torch.tensor([[4.0, 8.0], [4.0, 8.0]], dtype=torch.float64) + rank
    return averaged(wrapper, same, other), group.sent


def test_processes_draw_apart_and_each_parameter_has_its_own_range():
    (first, sent), (second, _) = team(quantize, 2)
    assert first == second
    values, counts = torch.tensor(first[0]).unique(return_counts=True)
    assert values.tolist() == [-1, 0, 1]  # 0 where the two have drawn differently, a third of the places
    assert 40 < counts[1] < 95
    assert first[1] == [[4.5, 8.5], [4.5, 8.5]]
    assert sent == 26 + 2 * 16  # 204 bits, and two doubles a parameter


# -- PowerSGD


def powers(rank, size, matrix_rank):
    wrapper = DistributedDataParallel(Given((6, 4), (5,)))
    wrapper.register_comm_hook(*power_sgd(dist.group.WORLD, matrix_rank, min_compression_rate=0))
    draw = torch.Generator().manual_seed(rank)
    sides = []
    for _ in range(STEPS):
        mine = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((6, 4), (5,))]
        means = [g.clone() for g in mine]
        for mean in means:
            dist.all_reduce(mean)
        sides.append((averaged(wrapper, *mine), [(mean / size).tolist() for mean in means]))
    return sides


def test_at_full_rank_power_sgd_gives_the_mean_gradient():
    (sides, _), (lossy, _) = team(powers, 2, 4), team(powers, 2, 1)
    for found, wanted in sides:
        for a, b in zip(found, wanted, strict=True):
            # float64, a basis of four columns
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-12)
    found, wanted = lossy[-1]
    assert (torch.tensor(found[0]) - torch.tensor(wanted[0])).abs().max() > 0.1  # at rank 1 it does not


# -- all of them


def trained(rank, size):
    found = {}
    for name, compression in COMPRESSIONS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 10))
        wrapper = DistributedDataParallel(model)
        group = compress(wrapper, name)
        optimizer = torch.optim.SGD(model.parameters(), lr=compression.lr, momentum=compression.momentum)
        draw = torch.Generator().manual_seed(rank)
        steps = [0]
        for _ in range(STEPS):
            optimizer.zero_grad()
            x, y = torch.randn(8, 16, generator=draw), torch.randint(0, 10, (8,), generator=draw)
            F.cross_entropy(wrapper(x), y).backward()
            optimizer.step()
            steps.append(group.sent)
        state = wrapper._comm_hooks[0][1]
        found[name] = {
            "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
            "sent": [b - a for a, b in itertools.pairwise(steps)],
            "factors": sum(
                m.nbytes for d in ("p_memory_dict", "q_memory_dict") for m in getattr(state, d, {}).values()
            ),
        }
    return found


def test_all_processes_hold_the_same_model_and_the_bytes_are_those_of_what_was_sent():
    processes = team(trained, 4)
    count = 16 * 48 + 48 + 48 * 10 + 10
    bits = -(-count // 8)
    for name in COMPRESSIONS:
        ends = [p[name]["parameters"] for p in processes]
        assert all(end == ends[0] for end in ends), name
        assert all(p[name]["sent"] == processes[0][name]["sent"] for p in processes)
    assert len({tuple(processes[0][name]["parameters"]) for name in COMPRESSIONS}) == len(COMPRESSIONS)
    sent = {name: found["sent"] for name, found in processes[0].items()}
    assert sent["SGD"] == [4 * count] * STEPS
    assert sent["Signum"] == [bits] * STEPS
    assert sent["binary quantization"] == [bits + 4 * 2 * 4] * STEPS  # two floats of each of four parameters
    for rank in (2, 4):
        factors = processes[0][f"PowerSGD, rank {rank}"]["factors"]
        assert factors == 4 * rank * (16 + 48 + 48 + 10)
        # the first two steps as they are; then factors of the weights, and the biases
        assert sent[f"PowerSGD, rank {rank}"] == [4 * count] * 2 + [factors + 4 * 58] * 3


class Recording:
    """A group that only remembers."""

    def __init__(self):
        self.sent = []

    def rank(self):
        return 0

    def size(self):
        return 3

    def allreduce(self, tensors, *options):
        self.sent += tensors

    def allgather(self, outputs, inputs, *options):
        self.sent += inputs


def test_what_is_counted_is_what_goes_through():
    inner = Recording()
    group = CountedGroup(inner)
    mine = torch.zeros(5, dtype=torch.uint8)
    dist.all_reduce(torch.zeros(7), group=group)
    dist.all_gather([torch.empty_like(mine) for _ in range(3)], mine, group=group)
    assert [t.nbytes for t in inner.sent] == [28, 5]
    assert (group.sent, group.received) == (33, 28 + 15)


# -- the benchmark


def test_shares_of_a_loader_are_all_of_it_and_alike():
    images = torch.arange(22, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    whole = DeviceLoader(images, torch.arange(22), 8, augment=True, seed=3, drop_last=True)
    shares = [whole.share(part, 4) for part in range(4)]
    labels = [torch.cat([y for _, y in share]).tolist() for share in shares]
    assert [len(share) for share in shares] == [2] * 4
    assert all({y % 4 for y in found} == {part} and len(found) == 4 for part, found in enumerate(labels))
    assert len({tuple(torch.tensor(found).argsort().tolist()) for found in labels}) > 1  # each in an order of its own
    assert [len(y) for _, y in whole] == [8, 8]
    with pytest.raises(ValueError, match="must divide among the processes; got 8 images for 3"):
        whole.share(0, 3)


def joined(rank, size, options):
    torch.manual_seed(0)
    return data_parallel.work(options, torch.device("cpu"))


def in_team(function, arguments, nprocs, start_method):
    size, _, output, options = arguments
    assert (function, size, start_method) == (data_parallel.in_group, nprocs, "spawn")
    torch.save(team(joined, size, options)[0], output)


def test_rows_are_trained_once_and_timed_beside_each_other(data, tmp_path, capsys):  # noqa: F811
    rows = ["full-rank, SGD", "full-rank, Signum", "Pufferfish, SGD"]
    places = {"data": data, "cache": tmp_path / "cache", "ledger": tmp_path / "rows.jsonl", "results": tmp_path}
    sizes = {"processes": 2, "width": 8, "side": 8, "train": 4, "epochs": 2, "batch": 4, "rounds": 3}
    command = [word for name, value in (places | sizes).items() for word in (f"--{name}", str(value))]
    written = json.loads(data_parallel.main([*command, "--rows", *rows[:2]], in_team).read_text())
    assert list(written["results"]["2"]) == rows[:2]
    before = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(before) == 2
    found = json.loads(data_parallel.main([*command, "--rows", *rows], in_team).read_text())["results"]["2"]
    after = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert after[:2] == before
    assert len(after) == 3
    full, signum, low = (found[row] for row in rows)
    assert full["parameters"] == signum["parameters"] > low["parameters"]
    for row in found.values():
        assert row["step_ms_quartiles"][0] <= row["step_ms"] <= row["step_ms_quartiles"][1]
    assert full["of_full_rank"] == 1
    for row in (full, low):
        assert row["bytes_per_step"] == row["received_per_step"] == 4 * row["parameters"]
    assert signum["bytes_per_step"] == -(-full["parameters"] // 8) == signum["received_per_step"] / 2
    assert full["bytes_of_run"] == 2 * full["bytes_per_step"]  # two epochs of one step
    assert low["bytes_of_run"] == full["bytes_per_step"] + low["bytes_per_step"]  # switched between them
    assert low["E"] == 1
    assert "Pufferfish, SGD" in capsys.readouterr().out
