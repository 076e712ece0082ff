"""Gradient compression: communication hooks of `DistributedDataParallel`, and a group of processes that counts what they send.

Pufferfish is compared with plain averaging, PowerSGD and Signum (Wang et al., MLSys 2021, §4.2, Fig. 4) and with stochastic binary
quantization (App. F, Fig. 7). PowerSGD is torch's own, with its error feedback (Vogels et al. 2019); the others have none, as in
their papers. Signs and quantized numbers go as bits, eight a byte, in one message a bucket. They cannot be summed on the way, so that
each process gathers those of all, as the paper's own implementation does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

Hook = Callable[[Any, dist.GradBucket], Future[Tensor]]  # type: ignore[name-defined]


class CountedGroup(dist.ProcessGroup):
    """The processes of another group, with the bytes that go through it, at the place where they go.

    `sent` are those of the tensors that this process has handed to all-reduces and all-gathers, `received` those of what it got back: of an
    all-reduce as many again, of an all-gather as many from each process. What a backend adds of its own, as a ring its rounds, does not count.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]  # torch's stub has one of its constructors
        self._group = group
        self.sent = self.received = 0

    def allreduce(self, tensors: list[Tensor], *options: Any) -> Any:  # type: ignore[override]  # of three, the one that is called
        """As torch calls it for `all_reduce`."""
        self._count(tensors, tensors)
        return self._group.allreduce(tensors, *options)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *options: Any) -> Any:  # type: ignore[override]
        """As torch calls it for `all_gather`."""
        self._count(inputs, [tensor for gathered in outputs for tensor in gathered])
        return self._group.allgather(outputs, inputs, *options)

    def _count(self, sent: list[Tensor], received: list[Tensor]) -> None:
        self.sent += sum(tensor.nbytes for tensor in sent)
        self.received += sum(tensor.nbytes for tensor in received)


# -- bits


def packed(bits: Tensor) -> Tensor:
    """Booleans `(N,)` as bytes `(⌈N/8⌉,)`, the first in the highest bit, zeros after the last."""
    return torch.from_numpy(numpy.packbits(bits.numpy())) if bits.device.type == "cpu" else _packed(bits)


def unpacked(data: Tensor, count: int) -> Tensor:
    """The first `count` booleans of `packed` bytes."""
    return (
        torch.from_numpy(numpy.unpackbits(data.numpy(), count=count).view(bool))
        if data.device.type == "cpu"
        else _unpacked(data, count)
    )


# The same where the bits are: numpy's are 20 times faster on a CPU.
_PLACES = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def _packed(bits: Tensor) -> Tensor:
    eights = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-(-len(bits) // 8), 8)
    return (eights * _PLACES.to(bits.device)).sum(1, dtype=torch.uint8)


def _unpacked(data: Tensor, count: int) -> Tensor:
    return (data[:, None] & _PLACES.to(data.device)).flatten()[:count].bool()


def _gathered(
    group: dist.ProcessGroup,
    message: Tensor,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    decode: Callable[[list[Tensor]], list[Tensor]],
) -> Future[Tensor]:
    """The bucket when every process has the messages of all, with what `decode` makes of them, a vector for each gradient."""
    messages = [torch.empty_like(message) for _ in range(group.size())]
    work = dist.all_gather(messages, message, group=group, async_op=True)

    def fill(_: Any) -> Tensor:
        for gradient, found in zip(bucket.gradients(), decode(messages), strict=True):
            gradient.copy_(found.view_as(gradient))
        buffer: Tensor = bucket.buffer()
        return buffer

    future: Future[Tensor] = work.get_future().then(fill)
    return future


# -- Signum


class Signum:
    """What `signum_hook` keeps: of each parameter the momentum of this process's own gradients, `m ← β m + (1 - β) g`."""

    def __init__(self, group: dist.ProcessGroup, beta: float = 0.9) -> None:
        self.group, self.beta = group, beta
        self.momenta: dict[Tensor, Tensor] = {}

    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The momentum with this step's gradient in it."""
        if parameter not in self.momenta:
            self.momenta[parameter] = torch.zeros_like(gradient)
        return self.momenta[parameter].lerp_(gradient, 1 - self.beta)


def majority(votes: Tensor) -> Tensor:
    """The sign with more votes, of booleans `(processes, N)`: 1, -1, or 0 for a tie, which an even number of processes can have."""
    return (2 * votes.sum(0, dtype=torch.int16) - len(votes)).sign()


def signum_hook(state: Signum, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """Signum with majority vote (Bernstein et al. 2019, Alg. 1): each process votes with the signs of its momentum, one bit a number, and
    the gradient becomes the sign that won. A momentum of 0 votes up, as a bit has no third value; after a tie the number is 0, and the
    weight stays. The optimizer must be SGD without a momentum of its own, at the rate by which a weight is to move.
    """
    gradients = bucket.gradients()
    momenta = map(state.updated, bucket.parameters(), gradients)
    message = packed(torch.cat([(momentum >= 0).flatten() for momentum in momenta]))
    sizes = [gradient.numel() for gradient in gradients]

    def decode(messages: list[Tensor]) -> list[Tensor]:
        votes = torch.stack([unpacked(found, sum(sizes)) for found in messages])
        return list(majority(votes).to(gradients[0].dtype).split(sizes))

    return _gathered(state.group, message, bucket, decode)


# -- stochastic binary quantization


class BinaryQuantization:
    """What `binary_quantization_hook` keeps: random numbers, of each process its own."""

    def __init__(self, group: dist.ProcessGroup, seed: int = 0) -> None:
        self.group, self.seed = group, seed + group.rank()
        self._generator: torch.Generator | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        """The source of random numbers, on the device of the first gradient."""
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator


def quantized(vector: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(bits (N,), range (2,))` of a vector `(N,)`: each number `x` becomes the vector's maximum (True) with the probability
    `(x - min) / (max - min)`, else its minimum, so that its mean is `x` (Suresh et al. 2017, §2.1).
    """
    low, high = vector.aminmax()
    draws = torch.rand(vector.shape, dtype=vector.dtype, device=vector.device, generator=generator)
    return draws * (high - low) < vector - low, torch.stack([low, high])


def dequantized(bits: Tensor, ranges: Tensor) -> Tensor:
    """The mean over processes `(N,)` of quantized vectors: bits `(processes, N)`, ranges `(processes, 2)`."""
    return torch.where(bits, ranges[:, 1:], ranges[:, :1]).mean(0)


def binary_quantization_hook(state: BinaryQuantization, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """The mean of all processes' gradients by `quantized` numbers, each parameter a vector of its own: one bit a number and two floats
    a parameter. One range for the whole model would send a few bytes less, and lose more.
    """
    gradients = bucket.gradients()
    generator = state.generator(bucket.buffer().device)
    bits, ranges = zip(*[quantized(gradient.flatten(), generator) for gradient in gradients], strict=True)
    extremes = torch.stack(ranges)  # (parameters, 2)
    message = torch.cat([extremes.view(torch.uint8).flatten(), packed(torch.cat(bits))])
    sizes = [len(vector) for vector in bits]

    def decode(messages: list[Tensor]) -> list[Tensor]:
        found = torch.stack([m[: extremes.nbytes].view(extremes.dtype).view_as(extremes) for m in messages])
        chosen = torch.stack([unpacked(m[extremes.nbytes :], sum(sizes)) for m in messages])
        return [dequantized(part, found[:, i]) for i, part in enumerate(chosen.split(sizes, 1))]

    return _gathered(state.group, message, bucket, decode)


# -- by name


@dataclass(frozen=True)
class Compression:
    """One way to average gradients. `make(group)` gives the state and the hook for `register_comm_hook`; `lr` and `momentum` are those
    of the SGD that takes what comes of it.
    """

    make: Callable[[dist.ProcessGroup], tuple[Any, Hook]]
    lr: float = 0.1
    momentum: float = 0.9


def power_sgd(group: dist.ProcessGroup, rank: int, **options: Any) -> tuple[Any, Hook]:
    """torch's PowerSGD with error feedback and a warm start; the two steps before it are plain, as a new reducer needs."""
    state = powerSGD_hook.PowerSGDState(group, rank, start_powerSGD_iter=2, **options)
    return state, powerSGD_hook.powerSGD_hook


COMPRESSIONS: dict[str, Compression] = {
    "SGD": Compression(lambda group: (group, default_hooks.allreduce_hook)),
    "PowerSGD, rank 2": Compression(partial(power_sgd, rank=2)),
    "PowerSGD, rank 4": Compression(partial(power_sgd, rank=4)),
    "Signum": Compression(lambda group: (Signum(group), signum_hook), lr=1e-3, momentum=0.0),
    "binary quantization": Compression(lambda group: (BinaryQuantization(group), binary_quantization_hook), lr=0.01),
}
"""By the names that tables have. The rates of the last two are the best of 0.0003, 0.001 and 0.003, and of 0.01, 0.03 and 0.1, for two processes
and four epochs of 5,000 small images.
"""


def compress(wrapper: DistributedDataParallel, name: str) -> CountedGroup:
    """Let a wrapper average its gradients by one of `COMPRESSIONS`; returns the group that counts what is sent.

    The wrapper must hold all gradients in one bucket (`bucket_cap_mb`): gloo may not keep the order of what is sent for several.
    """
    group = CountedGroup(wrapper.process_group)
    wrapper.register_comm_hook(*COMPRESSIONS[name].make(group))
    return group
