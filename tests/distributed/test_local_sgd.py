"""Post-local SGD on gloo: torch's hook, averager and optimizer around another one."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import mlp, vectors
from teams import team
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

import fxrank

STEPS = 10


def averaged_now_and_then(rank, size):
    """Gradients of each process's own from the third step on, and the parameters averaged in every second one."""
    ends = []
    for loaded in (None, False, True):
        torch.manual_seed(0)
        wrapper = DistributedDataParallel(mlp())
        state = post_localSGD_hook.PostLocalSGDState(None, dist.new_subgroups(1)[0], start_localSGD_iter=2)
        wrapper.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
        local = torch.optim.SGD(wrapper.parameters(), lr=0.05, momentum=0.9)
        optimizer = PostLocalSGDOptimizer(local, PeriodicModelAverager(period=2, warmup_steps=2))
        if loaded:
            optimizer.load_state_dict(optimizer.state_dict())
        x, y = (part[rank::size] for part in vectors(32))
        session = fxrank.LowRankSession.attach(
            wrapper,
            local if loaded is None else optimizer,
            example_inputs=x,
            total_steps=STEPS,
            steps_per_epoch=1,
            policy=fxrank.Pufferfish(E=4, K=0, ratio=0.25),
        )
        for _ in range(STEPS - 1):  # the last average is in step 9
            optimizer.zero_grad()
            F.cross_entropy(wrapper(x), y).backward()
            optimizer.step()
        ends.append((session.finish().R, session.notes, [p.tolist() for p in wrapper.parameters()]))
    return ends


def test_parameters_averaged_now_and_then_go_on_so():
    first, second = team(averaged_now_and_then, 2)
    assert first == second == [({"2": 4, "4": 4}, [], first[0][2])] * 3
