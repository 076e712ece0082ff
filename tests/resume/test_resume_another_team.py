"""A checkpoint of some processes in as many or in another number: what goes on, what is said, what is refused in all."""

import hashlib
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import batches, mlp
from teams import team
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxrank
from fxrank.resume.grown import read_whole
from fxrank.saving.plainfile import write_plain

SOON = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", ratio=0.25, latest=0.5, epsilon=1e-9, round_to=1)
EPOCHS, STEPS = 4, 5
"""Every second step has a checkpoint, and the switch comes after the tenth."""


class Killed(BaseException):
    pass


class Shaken(torch.utils.data.Dataset):
    """Augmented from a generator of each process's own."""

    def __init__(self, rank):
        generator = torch.Generator().manual_seed(3)
        x, y = torch.randn(60, 12, generator=generator), torch.randint(4, (60,), generator=generator)
        self.points, self.rng = TensorDataset(x, y), np.random.default_rng(rank)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, i):
        x, y = self.points[i]
        return x + float(self.rng.normal()) * 0.01, y


def model_of(kind, rank):
    if kind == "dropout":
        return nn.Sequential(*mlp()[:3], nn.BatchNorm1d(16), nn.Dropout(0.2), *mlp()[3:])
    model = mlp().double() if kind == "double" else mlp()
    if kind == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.bias", "6.bias"])
        with torch.no_grad():
            model[0].bias += rank
    return model


def loader_of(kind, rank, size):
    """The same batches, divided."""
    if kind == "dropout":
        data = Shaken(rank)
        return DataLoader(data, 12 // size, sampler=DistributedSampler(data, size, rank), drop_last=True)
    dtype = torch.float64 if kind == "double" else torch.float32
    return [(x[rank::size].to(dtype), y[rank::size]) for x, y in batches(STEPS, lambda seed: points(seed))]


def points(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 12, generator=generator), torch.randint(4, (12,), generator=generator)


def run(rank, size, folder, die=None, kind="double", **options):
    """One call in this process; with `die`, it ends at as many losses. Plain data about the end."""
    torch.manual_seed(rank)
    model = model_of(kind, rank)
    given = DistributedDataParallel(model) if size > 1 else model
    if kind == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        given.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.Adam(given.parameters(), lr=0.01)
    losses = 0

    def loss_fn(outputs, targets):
        nonlocal losses
        losses += 1
        if losses == die:
            raise Killed
        return F.cross_entropy(outputs, targets)

    loader = loader_of(kind, rank, size)
    defaults = {"epochs": EPOCHS, "val_loader": loader, "policy": SOON}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fxrank.auto_lowrank(
            given,
            options.pop("loader", loader),
            optimizer=optimizer,
            scheduler=lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * STEPS),
            scheduler_per="batch",
            loss_fn=loss_fn,
            device="cpu",
            progress=False,
            output_dir=folder,
            resume=True,
            checkpoint_every=2,
            **(defaults | options),
        )
    state = [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
    parameters = {name: p.detach().tolist() for name, p in model.named_parameters()}
    return {
        "state": hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in state)).hexdigest(),
        "parameters": parameters,
        "plan": result.plan.to_json(),
        "switch": result.plan.switch_step,
        "history": [{k: v for k, v in row.items() if k != "step_ms"} for row in result.history],
        "curves": result.curves,
        "notes": result.report.notes,
    }


def dies(rank, size, folder, die, options):
    with pytest.raises(Killed):
        run(rank, size, folder, die, **options)


def lives(rank, size, folder, options):
    return run(rank, size, folder, **options)


def killed_in(size, folder, die, **options):
    team(dies, size, str(folder), die, options)


def finished_in(size, folder, **options):
    return team(lives, size, str(folder), options)


# -- as many processes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dropout", "ignored"])
def test_what_is_a_process_s_own_comes_back(kind, tmp_path):
    whole = finished_in(2, tmp_path / "whole", kind=kind)
    killed_in(2, tmp_path, 8, kind=kind)
    killed_in(2, tmp_path, 8, kind=kind)
    found = finished_in(2, tmp_path, kind=kind)
    assert found == whole
    assert found[0]["switch"] == 10 and found[0]["notes"] == []
    different = [n for n, p in found[0]["parameters"].items() if p != found[1]["parameters"][n]]
    assert different == (["0.bias", "6.bias"] if kind == "ignored" else [])


def test_a_communication_hook_with_a_memory_is_named(tmp_path):
    killed_in(2, tmp_path, 8, kind="powersgd")
    first, second = finished_in(2, tmp_path, kind="powersgd")
    (note,) = first["notes"]
    assert note.startswith("at step 4 the communication hook powerSGD_hook began anew: a checkpoint does not hold its")
    assert first["parameters"] == second["parameters"]


# -- another number of processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(0, 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("die", [9, 18], ids=["before the switch", "after it"])
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(before, now, die, whole, tmp_path):
    killed_in(before, tmp_path, die)
    saved = read_whole(tmp_path / "checkpoint.safetensors")
    found = finished_in(now, tmp_path)
    assert all(f["state"] == found[0]["state"] for f in found)
    assert all(f["plan"] == found[0]["plan"] for f in found)
    assert found[0]["switch"] == whole["switch"] == 10
    old = [{k: v for k, v in row.items() if k != "step_ms"} for row in saved["history"]]
    assert found[0]["history"][: len(old)] == old
    # Model, optimizer, schedule, place in the epoch and its sums: all but the rounding of one that was never killed.
    for name, value in whole["parameters"].items():
        mine = torch.tensor(found[0]["parameters"][name], dtype=torch.float64)
        torch.testing.assert_close(mine, torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-9)
    for mine, row in zip(found[0]["history"], whole["history"], strict=True):
        # The sums of an epoch are float32.
        assert mine["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert mine["lr"] == row["lr"]
    step = saved["session"]["clock"][0]
    (note,) = found[0]["notes"]
    said = f"at step {step} {now} process{'es' * (now > 1)} went on from a checkpoint of {before}: batches and random"
    assert note.startswith(said) and "losses and weights are not those of an uninterrupted run" in note


@pytest.mark.slow
@pytest.mark.parametrize("now", [1, 3])
def test_the_other_team_is_resumed_exactly(now, tmp_path):
    killed_in(2, tmp_path / "a", 7, kind="dropout")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    straight = finished_in(now, tmp_path / "a", kind="dropout")
    for _ in range(2):
        killed_in(now, tmp_path / "b", 6, kind="dropout")
    assert finished_in(now, tmp_path / "b", kind="dropout") == straight


def random_numbers(rank, size, folder):
    """The dropout of a resumed process, as its first numbers."""
    found = []
    with pytest.raises(Killed):
        run(rank, size, folder, kind="dropout", loader=Spy(rank, size, found))
    return found


class Spy:
    """A loader that notes the random numbers at the first batch that is taken."""

    def __init__(self, rank, size, found):
        self.batches, self.found = loader_of("dropout", rank, size), found

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == 3:  # two were taken before
                self.found += [torch.rand(2).tolist(), np.random.rand(2).tolist()]
                raise Killed
            yield batch

    def __len__(self):
        return len(self.batches)


def test_more_processes_do_not_repeat_each_other_s_random_numbers(tmp_path):
    killed_in(1, tmp_path, 4, kind="dropout")
    found = team(random_numbers, 3, str(tmp_path))
    assert len({json.dumps(f[0]) for f in found}) == len({json.dumps(f[1]) for f in found}) == 3


# -- what is refused, in all processes


def refused(rank, size, folder, odd):
    try:
        if odd == "steps":
            run(rank, size, folder, loader=loader_of("double", rank, size)[:3])
        elif odd == "model of one":
            run(rank, size, folder, kind="single" if rank else "double")
        elif odd == "epochs of one":
            run(rank, size, folder, epochs=EPOCHS + rank)
        else:
            run(rank, size, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


MESSAGES = {
    "steps": (
        1,
        "number of steps an epoch was 5, now it is 3. 2 processes became 1: pass batches of 2/1 the size, so that all "
        "together take the same, or steps_per_epoch=5.",
    ),
    "epochs of one": (2, "its number of epochs was 4, now it is 5. Pass the same, or start afresh"),
    "damage": (2, "is not: "),
    "a process without its part": (
        2,
        "a checkpoint of several processes must hold each one's own; process 1 has no good 'totals'.",
    ),
    "another model in a process": (2, "what is a process's own must be of the model; process 1 has another '0.bias'"),
    "buckets": (2, "buckets must be lists of parameters' names; got [3]."),
}


@pytest.mark.parametrize("odd", MESSAGES)
def test_what_can_not_go_on_is_refused_in_all_processes(odd, tmp_path):
    killed_in(2, tmp_path, 8, kind="ignored" if odd == "another model in a process" else "double")
    path = tmp_path / "checkpoint.safetensors"
    saved = read_whole(path)
    if odd == "damage":
        path.write_bytes(path.read_bytes()[:-9])
    if odd == "a process without its part":
        del saved["others"][0]["totals"]
        write_plain(path, saved)
    if odd == "another model in a process":
        saved["others"][0]["model"]["0.bias"] = torch.zeros(3)
        write_plain(path, saved)
    if odd == "buckets":
        write_plain(path, saved | {"buckets": [3]})
    content = path.read_bytes()
    now, message = MESSAGES[odd]
    for text in team(refused, now, str(tmp_path), odd):
        assert text.startswith("CheckpointError: ") and message in text
    assert path.read_bytes() == content


def test_a_folder_that_can_not_be_written_is_refused_in_all_processes(tmp_path):
    (tmp_path / "file").write_text("")
    texts = team(refused, 2, str(tmp_path / "file" / "run"), "")
    assert texts[0] == texts[1] and texts[0].startswith("NotADirectoryError: ")


def full_disk(rank, size, folder):
    def no_room(*_):
        raise OSError("no space left on device")

    if rank == 0:
        fxrank.resume.keeper.write_plain = no_room
    return refused(rank, size, folder, "")


def test_a_full_disk_ends_all_processes(tmp_path):
    assert team(full_disk, 2, str(tmp_path)) == ["OSError: no space left on device"] * 2


def sharded(rank, size, folder):
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fxrank.resume.same_run import check_whole

    model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (size,)))
    with pytest.raises(TypeError, match=r"holds whole tensors; '0\.weight' is sharded"):
        check_whole(model)
    return True


def test_a_sharded_model_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert team(sharded, 2, str(tmp_path)) == [True, True]
