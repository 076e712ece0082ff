import pytest
import torch
from torch import nn

from fxrank.torch_private.steps import call_first, steps_running


class Twice(torch.optim.SGD):
    """Its step calls its parent's, whose hooks are called as well where an SGD was built before."""

    def step(self, closure=None):
        return super().step(closure)


def built(kind=torch.optim.SGD):
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    return layer, kind(layer.parameters(), lr=0.1)


def test_steps_in_steps_are_counted():
    built()
    _, optimizer = built(Twice)
    _, other = built()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append((steps_running(optimizer), steps_running(other))))
    assert steps_running(optimizer) == 0
    optimizer.step()
    assert seen == [(1, 0), (2, 0)] and steps_running(optimizer) == 0


def test_a_step_that_raises_is_not_counted_later():
    _, optimizer = built()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert steps_running(optimizer) == 0


def test_a_step_that_only_makes_the_state_is_told():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    layer, optimizer = built(torch.optim.AdamW)
    optimizer.zero_grad()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(steps_running(optimizer)))
    get_optimizer_state_dict(layer, optimizer)
    assert seen == [None]


def test_a_hook_registered_later_is_called_first():
    _, optimizer = built()
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append("theirs"))
    call_first(optimizer, optimizer.register_step_post_hook(lambda *_: called.append("ours")))
    optimizer.step()
    assert called == ["ours", "theirs"]
