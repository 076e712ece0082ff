"""Accelerate's wrapped optimizer, timm's training script, and loggers."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from nets import SOON, ConvNet, images, mlp, train, vectors
from torch import nn

import fxrank
from fxrank.integrations.examples import example_batch
from fxrank.integrations.loggers import Logger, TensorBoardLogger, WandbLogger
from fxrank.wrappers import unwrapped


def attach(model, optimizer, x, steps=10, **options):
    return fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=steps, policy=SOON, **options)


# -- Accelerate


def test_an_accelerated_loop_with_accumulation_and_clipping():
    accelerate = pytest.importorskip("accelerate")

    def run(accelerated):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        x, y = vectors()
        if not accelerated:
            session = attach(model, optimizer, x)
            for _ in range(10):
                for _ in range(2):
                    (F.cross_entropy(model(x), y) / 2).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            return model, session
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, wrapped, scheduler = accelerator.prepare(model, optimizer, scheduler)
        session = attach(accelerator.unwrap_model(model), wrapped, x)
        assert session.optimizers == (optimizer,)
        for _ in range(20):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        return accelerator.unwrap_model(model), session

    plain, plain_session = run(False)
    model, session = run(True)
    assert session.clock.step == 10
    assert session.plan == plain_session.plan
    assert session.plan.switch_step == 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_mixed_precision_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        net = nn.Sequential(mlp(), nn.ReLU())  # its parts are called under the whole's autocast
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        x, y = vectors()
        forward = model.forward
        session = attach(accelerator.unwrap_model(model), optimizer, x, amp=torch.bfloat16)
        assert model.forward is forward
        for _ in range(10):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        assert session.finish().R == {"0.2": 4, "0.4": 4}
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("stop", [3, 8], ids=["before", "after"])
def test_accelerates_own_checkpoints_resume_before_and_after_the_switch(tmp_path, stop):
    """The session's state first: `load_state` reads the weights before anything that is registered with it."""
    accelerate = pytest.importorskip("accelerate")

    def start(seed):
        accelerator, model = accelerate.Accelerator(cpu=True), mlp(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        session = attach(accelerator.unwrap_model(model), optimizer, vectors()[0])
        accelerator.register_for_checkpointing(session)
        return accelerator, model, optimizer, scheduler, session

    def go_on(accelerator, model, optimizer, scheduler, session, until):
        x, y = vectors()
        while session.clock.step < until:
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    whole = start(0)
    go_on(*whole, stop)
    whole[0].save_state(str(tmp_path / "state"))
    torch.save(whole[-1].state_dict(), tmp_path / "session.pt")
    go_on(*whole, 10)
    again = start(1)
    again[-1].load_state_dict(torch.load(tmp_path / "session.pt", weights_only=True))
    again[0].load_state(str(tmp_path / "state"))
    go_on(*again, 10)
    assert again[-1].plan == whole[-1].plan
    state = again[1].state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole[1].state_dict().items())


def test_only_wrappers_are_unwrapped():
    inner = torch.optim.SGD(mlp().parameters(), lr=0.1)
    assert unwrapped(inner) is inner
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    other.optimizer = inner  # a companion, not what it wraps: its groups are its own
    assert unwrapped(other) is other


# -- timm


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "nadamw"])
def test_timms_script(name):
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=4, warmup_epochs=1, updates_per_epoch=3, step_on_epochs=False
    )
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    session = attach(model, optimizer, x, steps=epochs * 3, steps_per_epoch=3)
    rates, update = [], 0
    for epoch in range(epochs):
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            update += 1
            scheduler.step_update(num_updates=update)
            rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    assert session.finish().R
    assert session.phase == "low-rank"
    groups = timm.create_model("test_vit", num_classes=4, img_size=32)
    dense = create_optimizer_v2(groups, opt=name, lr=0.01, weight_decay=0.05)
    alone, _ = create_scheduler_v2(
        dense, sched="cosine", num_epochs=4, warmup_epochs=1, updates_per_epoch=3, step_on_epochs=False
    )
    expected = []
    for update in range(1, epochs * 3 + 1):
        alone.step_update(num_updates=update)
        expected.append(dense.param_groups[0]["lr"])
    assert rates == expected
    assert [g["weight_decay"] for g in optimizer.param_groups] == [g["weight_decay"] for g in dense.param_groups]


def test_a_merged_model_is_a_checkpoint_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4).eval()
    x = torch.randn(2, 3, 160, 160)
    small = fxrank.factorize(model, x, rank=0.25)
    merged = fxrank.merge(small)
    torch.save(merged.state_dict(), tmp_path / "merged.pth")
    back = timm.create_model("test_vit", num_classes=4, checkpoint_path=str(tmp_path / "merged.pth")).eval()
    assert type(back) is type(model)
    assert torch.equal(back(x), merged(x))
    # the pairs themselves load in place, into the architecture that was factorized
    fxrank.save(small, tmp_path / "pairs")
    pairs = fxrank.load(timm.create_model("test_vit", num_classes=4).eval(), tmp_path / "pairs")
    assert torch.equal(pairs(x), small(x))


# -- loggers


def test_a_tensorboard_logger(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    assert isinstance(logger, Logger)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = attach(model, optimizer, vectors()[0], logger=logger)
    train(model, optimizer, 10)
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = events.Scalars("stable_rank/2")
    assert [p.step for p in points] == session.scene.monitor.steps
    # stored in float32
    assert [p.value for p in points] == pytest.approx(session.scene.monitor.curves["2"], rel=1e-6)
    assert [(p.step, p.value) for p in events.Scalars("rank/2")] == [(5, 4.0)]
    [told] = events.Tensors("fxrank/text_summary")
    assert told.step == 5
    assert told.tensor_proto.string_val[0].decode() == f"2 of 4 layers factorized ({session.plan.note})"


def test_a_writer_of_the_users_stays_open(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        logger = TensorBoardLogger(writer=writer)
        logger.event(0, "begun")
        logger.close()
        assert writer.file_writer is not None
    with pytest.raises(ValueError, match=r"got folder=None, writer=None\. Pass one of them"):
        TensorBoardLogger()


def test_a_wandb_logger(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ValueError, match="needs a run; there is none"):
        WandbLogger()
    with wandb.init(dir=str(tmp_path), mode="offline") as run:
        logger = WandbLogger()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = attach(model, optimizer, vectors()[0], logger=logger)
        train(model, optimizer, 10)
        assert run.summary["fxrank/events"] == [f"step 5: 2 of 4 layers factorized ({session.plan.note})"]
        assert run.summary["rank/2"] == 4.0
        assert run.summary["fxrank/step"] == 5


@pytest.mark.parametrize(
    ("given", "found"),
    [("runs", "str"), (TensorBoardLogger, "the class TensorBoardLogger"), (print, "builtin_function")],
)
def test_what_is_no_logger_is_named(given, found):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=rf"a logger has log\(step, values\) and event\(step, text\); got {found}"):
        attach(model, optimizer, vectors()[0], logger=given)
    assert not optimizer._optimizer_step_post_hooks


def test_auto_lowrank_logs():
    class Kept:
        def __init__(self):
            self.rows, self.events = [], []

        def log(self, step, values):
            self.rows.append((step, values))

        def event(self, step, text):
            self.events.append((step, text))

    kept = Kept()
    result = fxrank.auto_lowrank(
        ConvNet(), [images()], epochs=10, policy=SOON, logger=kept, progress=False, device="cpu"
    )
    ranks = [(step, values) for step, values in kept.rows if "stable_rank/conv2" in values]
    assert [step for step, _ in ranks] == result.curves["steps"]
    assert [values["stable_rank/conv2"] for _, values in ranks] == result.curves["conv2"]
    assert kept.rows[-1] == (5, {"rank/conv2": 2.0, "rank/conv3": 4.0})
    assert [step for step, _ in kept.events] == [5]


# -- the example batch, and what is imported


class Counted(torch.utils.data.IterableDataset):
    """0, 1, 2 …, 9, each pass from the start."""

    def __iter__(self):
        return iter(range(10))


def test_a_batch_is_taken_beside_the_loader():
    noise = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.arange(10.0))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    state = generator.get_state()
    assert example_batch(loader)[0].tolist() == [0, 1, 2, 3]
    chosen = torch.utils.data.DataLoader(data, batch_sampler=[[7, 2], [1]])
    assert example_batch(chosen)[0].tolist() == [7, 2]
    assert example_batch(torch.utils.data.DataLoader(data, batch_size=None))[0].tolist() == 0
    assert example_batch(torch.utils.data.DataLoader(Counted(), batch_size=3)).tolist() == [0, 1, 2]
    assert example_batch(["a", "b"]) == "a"
    assert torch.equal(noise, torch.get_rng_state())
    assert torch.equal(state, generator.get_state())
    with pytest.raises(TypeError, match=r"one-pass generator\. Pass example_inputs="):
        example_batch(x for x in range(3))
    with pytest.raises(ValueError, match="must yield at least one batch; it is empty"):
        example_batch([])


def test_importing_fxrank_imports_no_framework():
    code = (
        "import sys, fxrank; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'transformers', 'accelerate', 'lightning', 'timm', 'tensorboard', 'wandb'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
