"""Validation that yields nothing: refused where it is known before the training, None where it is not; never a loss of 0."""

import math
import re

import pytest
import torch
from autos import run
from nets import SOON, batches, mlp, settings_of, snapshot, vectors
from torch.utils.data import DataLoader, TensorDataset

from fxrank.distributed.team import Team
from fxrank.training.batches import check_validation
from fxrank.training.progress import Totals

NOTE = "val_loader yielded nothing in epoch "


class Spent(list):
    """Yields its batches in the first passes alone, and knows no length."""

    def __init__(self, *batches, passes):
        super().__init__(*batches)
        self.left = passes

    __len__ = None

    def __iter__(self):
        self.left -= 1
        return list.__iter__(self) if self.left >= 0 else iter(())


@pytest.mark.parametrize(
    ("loader", "error", "found"),
    [
        ([], ValueError, "at least one batch; it is empty (length 0)"),
        ((), ValueError, "at least one batch; it is empty (length 0)"),
        (DataLoader(TensorDataset(*vectors(3)), 8, drop_last=True), ValueError, "at least one batch; it is empty"),
        ((batch for batch in batches()), TypeError, "again for every epoch; got a one-pass generator."),
        (iter(batches()), TypeError, "again for every epoch; got a one-pass list_iterator."),
        (map(tuple, batches()), TypeError, "again for every epoch; got a one-pass map."),
        (3, TypeError, "again for every epoch; got int. Pass a DataLoader or a list of batches."),
    ],
    ids=["list", "tuple", "drop_last", "generator", "iterator", "map", "number"],
)
def test_refused_before_the_training(loader, error, found):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, settings, random = snapshot(model), settings_of(optimizer), torch.get_rng_state()
    with pytest.raises(error, match=re.escape(found)):
        run(model, val_loader=loader, optimizer=optimizer, seed=None)
    assert (snapshot(model), settings_of(optimizer)) == (before, settings)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_data_set_that_is_asked_by_number_is_a_loader_too():
    class ByNumber:
        def __getitem__(self, index):
            return batches()[index]

    assert all(row["val_loss"] > 0 for row in run(mlp(), val_loader=ByNumber()).history)


class OneOf(Team):
    """A team of two in one process: what the other one's loader has is known."""

    def __init__(self, other):
        super().__init__(mlp())
        self.other = other

    def gather(self, value):
        return [value, self.other]


def test_one_processs_share_may_be_empty():
    check_validation([], OneOf(other=1))
    check_validation([], OneOf(other=None))
    with pytest.raises(ValueError, match="it is empty"):
        check_validation([], OneOf(other=0))


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_an_evaluation_without_data_has_no_loss(passes):
    """The passes: epoch 0, before and after the switch in epoch 1, epochs 1 to 3."""
    result = run(mlp(), val_loader=Spent(batches(), passes=passes))
    empty = [row for row in result.history if row["val_loss"] is None]
    assert len(empty) == {0: 4, 1: 3, 4: 2}[passes]
    assert all(row["val_loss"] is None or row["val_loss"] > 0.1 for row in result.history)
    assert all(row["val_accuracy"] is None for row in empty)
    assert [note.startswith(NOTE) for note in result.report.notes].count(True) == 1
    assert result.report.val_loss is None and "validation loss" not in result.report.summary().replace(
        "no validation", ""
    )


def test_a_plateau_is_not_stepped_by_another_loss():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    result = run(model, optimizer=optimizer, scheduler=scheduler, val_loader=Spent(batches(), passes=1))
    assert scheduler.best == result.history[0]["val_loss"] and scheduler.last_epoch == 1
    assert [row["lr"] for row in result.history] == [0.1] * 4


def test_sums_of_nothing_have_no_mean():
    totals = Totals(torch.device("cpu"))
    assert totals.means() == (None, None)
    totals.add(torch.tensor(2.0), 4, None, 0)
    assert totals.means() == (2.0, None)
    totals = Totals(torch.device("cpu"))
    totals.add(torch.tensor(math.nan), 0, None, 0)  # a batch without an example
    assert totals.means() == (None, None)


@pytest.mark.parametrize("policy", ["full-rank", SOON], ids=["dense", "low-rank"])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loader_that_raises_leaves_every_module_in_its_mode(where, policy):
    class Failing(list):
        def __iter__(self):
            self.passes = getattr(self, "passes", 0) + 1
            if self.passes == 4:  # after the switch
                raise OSError("the disk is gone")
            return super().__iter__()

    model = mlp().train()
    model[1].eval()
    model[4].eval()
    loaders = {"training": (Failing(batches()), batches()), "validation": (batches(), Failing(batches()))}
    train, val = loaders[where]
    with pytest.raises(OSError, match="the disk is gone"):
        run(model, train, val_loader=val, policy=policy)
    kept = {name: module.training for name, module in model.named_modules()}
    assert [name for name, training in kept.items() if not training and "." not in name] == ["1", "4"]
    assert all(kept[name] == kept[name.partition(".")[0]] for name in kept if "." in name)
    assert (policy is SOON) == hasattr(model[4], "u")
