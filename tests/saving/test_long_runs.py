"""What grows with a run is packed as a whole and not entry by entry: a run of many short epochs writes it each time."""

import gc
import sys

import pytest
import torch

from fxrank.saving.plainfile import pack, unpack


def calls(act):
    count = 0

    def note(frame, event, _):
        nonlocal count
        count += event == "call"

    gc.disable()  # what it calls is not counted
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def row(epoch):
    return {"epoch": epoch, "phase": "low-rank", "loss": 0.5, "lr": 0.1, "val_loss": None, "stable_ranks": {"a": 1.5}}


@pytest.mark.parametrize(
    ("tree", "most"),
    [
        ({"curve": [0.5] * 10_000}, 20),
        ({"state": (3, tuple(range(10_000)), None)}, 20),
        ({"times": {str(i): i for i in range(10_000)}}, 20),
        ({"history": [row(i) for i in range(1000)]}, 7 * 1000),
    ],
    ids=["list", "tuple", "dict", "rows"],
)
def test_long_plain_data_takes_few_calls(tree, most):
    assert calls(lambda: pack(tree)) <= most
    assert unpack(*pack(tree)) == tree


def test_numbers_of_other_types_among_plain_ones_are_plain_too():
    import numpy as np

    tree = [1.0, np.float64(2.5), {"a": np.int64(3), "b": [np.float32(0.5)]}, torch.ones(2)]
    found = unpack(*pack(tree))
    assert found[:3] == [1.0, 2.5, {"a": 3, "b": [0.5]}] and type(found[1]) is float and found[3].tolist() == [1, 1]
