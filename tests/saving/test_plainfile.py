"""Plain data and tensors in a file: all of it comes back, in the same order in memory."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxrank import CheckpointError
from fxrank.saving.plainfile import read_plain, write_plain


def test_everything_comes_back(tmp_path):
    tree = {
        "numbers": [1, -(2**80), 0.1, float("inf"), True, None],
        "pair": ("a", ("b",)),
        3: {None: {}, False: [], 0.5: ()},
        "counter": Counter({4: 2}),
        "unicode": "σ",
    }
    write_plain(tmp_path / "file", tree)
    found = read_plain(tmp_path / "file")
    assert found == tree
    assert repr(found) == repr(tree)
    assert found["counter"][5] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tensors_and_arrays(tmp_path):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    base = torch.arange(24).reshape(2, 3, 4)
    tensors = [base.to(dtype) for dtype in dtypes]
    tensors += [base.float().permute(2, 0, 1), base.float()[:, 1], torch.tensor(2.5), torch.empty(0, 3)]
    tensors += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.nn.Parameter(torch.ones(2))]
    write_plain(tmp_path / "file", tensors)
    for found, tensor in zip(read_plain(tmp_path / "file"), tensors, strict=True):
        assert torch.equal(found, tensor)
        assert found.dtype == tensor.dtype
        assert torch.empty_like(found).stride() == torch.empty_like(tensor).stride()


def test_arrays_do_not_take_each_others_place(tmp_path):
    arrays = [np.full(624, i, dtype=np.uint32) for i in range(20)]
    write_plain(tmp_path / "file", arrays)
    for found, array in zip(read_plain(tmp_path / "file"), arrays, strict=True):
        assert np.array_equal(found, array)
        assert found.dtype == array.dtype


def test_what_is_one_in_memory_is_stored_once(tmp_path):
    tensor = torch.randn(1000)
    write_plain(tmp_path / "one", [tensor])
    write_plain(tmp_path / "three", [tensor, tensor, torch.nn.Parameter(tensor)])
    assert (tmp_path / "three").stat().st_size < (tmp_path / "one").stat().st_size + 500


@pytest.mark.parametrize(
    "strange", [object(), {1}, b"bytes", torch.float32, torch.zeros(2).to_sparse(), {(1,): 2}, np.array([None])]
)
def test_what_is_not_plain_is_named_and_nothing_is_written(strange, tmp_path):
    with pytest.raises(TypeError, match=r"a checkpoint holds numbers, .* its entry \['a'\]\[0\] is or has as a key "):
        write_plain(tmp_path / "file", {"a": [strange]})
    assert not list(tmp_path.iterdir())


def test_a_writing_that_fails_leaves_the_old_file(tmp_path):
    write_plain(tmp_path / "file", [1])
    (tmp_path / "file.partial").mkdir()  # in the way of the writing
    with pytest.raises(OSError, match="directory"):
        write_plain(tmp_path / "file", [2])
    assert read_plain(tmp_path / "file") == [1]


@given(data=st.data())
def test_a_file_damaged_anywhere_is_refused_or_reads_the_same(tmp_path, data):
    tree = {"weights": torch.arange(40.0).reshape(5, 8), "array": np.arange(9.0), "step": 3, "names": ["a", None, 0.5]}
    write_plain(tmp_path / "file", tree)
    whole = (tmp_path / "file").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = bytes([data.draw(st.integers(0, 255))])
    damaged = data.draw(st.sampled_from([whole[:place], whole[:place] + byte + whole[place + 1 :]]))
    (tmp_path / "file").write_bytes(damaged)
    try:
        found = read_plain(tmp_path / "file")
    except CheckpointError:
        assert damaged != whole
    else:
        assert repr(found) == repr(tree)
        assert torch.equal(found["weights"], tree["weights"]) and np.array_equal(found["array"], tree["array"])
