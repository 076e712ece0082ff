"""LSTM and GRU with gates that are products.

The fused kernels take dense weights only. On a GPU, and for narrow layers, that is the faster way all the same: they
get the product, built once a call. A wide layer on a CPU spends its time in the products, not in the calls: there the
time steps are run one by one, each gate through its factors (Pufferfish §2.2), all input products of a layer at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxrank.passes.pairs.reading.factored_weight import in_torchscript_trace

WIDE = 512
"""Hidden size from which stepping through the factors is taken on a CPU. Measured on two cores, batch 20, 35 steps, rank a
quarter, forward and backward: 1.6 times as fast as the dense kernel at 1500, 0.8 times at 300.
"""


def steps(device: torch.device, hidden: int) -> bool:
    """Whether a layer of this hidden size is run step by step. Not in a graph for use elsewhere: it would have as many steps
    as the example, and no others.
    """
    if torch.compiler.is_exporting() or in_torchscript_trace():
        return False
    return device.type == "cpu" and hidden >= WIDE


def lstm(*args: Any) -> Any:
    """What `torch.lstm` returns, `(output, h_n, c_n)`, or `NotImplemented` where the fused kernel is the better way.

    Both signatures: padded, `(input, (h_0, c_0), weights, …)`, and packed, `(data, batch_sizes, (h_0, c_0), weights, …)`.
    """
    packed = isinstance(args[1], Tensor)
    states = args[2] if packed else args[1]
    return _run(args, packed, list(states), _lstm_cell)


def gru(*args: Any) -> Any:
    """What `torch.gru` returns, `(output, h_n)`, or `NotImplemented`; see `lstm`."""
    packed = isinstance(args[2], Tensor)
    state = args[2] if packed else args[1]
    return _run(args, packed, [state], _gru_cell)


def step_by_step(kernel: Any, *args: Any) -> Any:
    """What the `kernel`, `torch.lstm` or one of its like, returns, each product a `F.linear` of its own, whatever the size."""
    packed = isinstance(args[1 if kernel is torch.lstm else 2], Tensor)
    states = args[2] if packed else args[1]
    cells = {torch.lstm: _lstm_cell, torch.gru: _gru_cell, torch.rnn_tanh: _tanh_cell, torch.rnn_relu: _relu_cell}
    return _stepped(args, packed, list(states) if kernel is torch.lstm else [states], cells[kernel])


def _run(args: tuple[Any, ...], packed: bool, states: list[Tensor], cell: Any) -> Any:
    return _stepped(args, packed, states, cell) if steps(args[0].device, states[-1].shape[-1]) else NotImplemented


def _stepped(args: tuple[Any, ...], packed: bool, states: list[Tensor], cell: Any) -> Any:
    x = args[0]
    weights, has_biases, layers, dropout, train, both_ways = args[3 if packed else 2 :][:6]
    batch_first = not packed and args[8]
    if packed:
        sizes = args[1].tolist()
    else:
        x = x.transpose(0, 1) if batch_first else x
        sizes = [x.shape[1]] * x.shape[0]
        x = x.flatten(0, 1)
    directions = 2 if both_ways else 1
    per = len(weights) // (layers * directions)
    finals: list[list[Tensor]] = []
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            i = layer * directions + direction
            out, final = _direction(
                x, weights[i * per : (i + 1) * per], has_biases, [s[i] for s in states], sizes, bool(direction), cell
            )
            outs.append(out)
            finals.append(final)
        x = outs[0] if directions == 1 else torch.cat(outs, -1)
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout)
    if not packed:
        x = x.unflatten(0, (len(sizes), -1))
        x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(column) for column in zip(*finals, strict=True)))


def _direction(
    x: Tensor,
    weights: Sequence[Any],
    has_biases: bool,
    states: list[Tensor],
    sizes: Sequence[int],
    reverse: bool,
    cell: Any,
) -> tuple[Tensor, list[Tensor]]:
    """One direction of one layer: outputs in the order of `x`, and the final states. At each step the first `n` sequences
    are at work, the others have ended, or have not begun.
    """
    w_ih, w_hh, *rest = weights
    b_ih, b_hh, *rest = rest if has_biases else (None, None, *rest)
    project = rest[0] if rest else None
    inputs = F.linear(x, w_ih, b_ih).split(list(sizes))
    outputs: list[Tensor] = [x] * len(sizes)
    order = range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes))
    for t in order:
        n = sizes[t]
        now = [s[:n] for s in states]
        new = cell(inputs[t], F.linear(now[0], w_hh, b_hh), now)
        if project is not None:
            new[0] = F.linear(new[0], project)
        outputs[t] = new[0]
        states = new if n == len(states[0]) else [torch.cat([a, s[n:]]) for a, s in zip(new, states, strict=True)]
    return torch.cat(outputs), states


def _lstm_cell(from_input: Tensor, from_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (from_input + from_hidden).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def _gru_cell(from_input: Tensor, from_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    r_in, z_in, n_in = from_input.chunk(3, -1)
    r_hid, z_hid, n_hid = from_hidden.chunk(3, -1)
    z = torch.sigmoid(z_in + z_hid)
    n = torch.tanh(n_in + torch.sigmoid(r_in + r_hid) * n_hid)
    return [n + z * (states[0] - n)]


def _tanh_cell(from_input: Tensor, from_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(from_input + from_hidden)]


def _relu_cell(from_input: Tensor, from_hidden: Tensor, states: list[Tensor]) -> list[Tensor]:
    return [torch.relu(from_input + from_hidden)]
