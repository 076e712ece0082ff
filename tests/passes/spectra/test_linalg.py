"""Small matrices are decomposed in one thread, large ones in as many as there are; what comes out is torch's."""

import pytest
import torch

from fxrank.passes.spectra import linalg

NAMES = ("eigh", "eigvalsh", "qr", "svd", "svdvals")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_torch_gives(name):
    root = torch.randn(3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = root @ root.mT
    ours, theirs = getattr(linalg, name)(square), getattr(torch.linalg, name)(square)
    for one, other in zip(ours, theirs, strict=True) if isinstance(theirs, tuple) else [(ours, theirs)]:
        assert torch.equal(one, other)
    assert torch.equal(linalg.solve(square, root, left=False), torch.linalg.solve(square, root, left=False))


def threads_in(shape, fails=False):
    """Of a decomposition of a matrix of that shape, which is not made."""
    seen = []

    def decompose(matrices, *others, **options):
        seen.append(torch.get_num_threads())
        if fails:
            raise torch.linalg.LinAlgError("it did not converge")

    call = linalg._sparing(decompose)
    if fails:
        with pytest.raises(torch.linalg.LinAlgError):
            call(torch.empty(shape))
    else:
        call(torch.empty(shape))
    return seen


@pytest.mark.parametrize(
    ("shape", "threads"), [((512, 512), 1), ((7, 4096, 256), 1), ((1024, 512), 1), ((1024, 513), 2), ((768, 768), 2)]
)
def test_small_ones_take_one_thread(two_threads, shape, threads):
    assert threads_in(shape) == [threads]
    assert torch.get_num_threads() == 2


def test_threads_are_there_again_after_an_error(two_threads):
    assert threads_in((8, 8), fails=True) == [1]
    assert torch.get_num_threads() == 2
