"""Two processes, each with half of the data, in DistributedDataParallel. The first decides, and both end with the same model.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.demo import DigitsNet, digits

EPOCHS = 6

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
train, val = digits()
train = train.share(rank, size)  # of a DataLoader: sampler=DistributedSampler(dataset)
model = DistributedDataParallel(DigitsNet(width=16))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * len(train))

result = fxrank.auto_lowrank(
    model,
    train,
    epochs=EPOCHS,
    val_loader=val,
    optimizer=optimizer,
    scheduler=scheduler,
    scheduler_per="batch",
    policy=fxrank.Cuttlefish(objective="size"),
    progress=rank == 0,
)

# The wrapper is still the one that was made above; its parameters are the factors now.
ours = torch.cat([p.detach().flatten() for p in model.parameters()])
theirs = [torch.empty_like(ours) for _ in range(size)]
dist.all_gather(theirs, ours)
if rank == 0:
    print(result.report)
    assert all(torch.equal(ours, other) for other in theirs)
    print(f"all {size} processes have the same {len(ours):,} parameters")
    fxrank.save(model.module, "run/ddp")
dist.destroy_process_group()
