"""Models that are built without memory, and given it when they are small."""

import threading
import warnings

import pytest
import torch
from torch import nn

import fxrank
from fxrank.saving.model_files import fill
from fxrank.saving.unfilled import built_unfilled, give_memory, unfilled


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.table, self.mix, self.rnn = nn.Embedding(20, width), nn.Linear(width, width), nn.LSTM(width, width)
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, 20, bias=False)
        self.head.weight = self.table.weight
        self.mix.bias.mark = "mine"
        self.mix.bias.requires_grad_(False)
        self.register_buffer("angles", torch.arange(float(width)), persistent=False)

    def forward(self, tokens):
        x = self.mix(self.table(tokens)) * self.angles.cos()
        return self.head(self.norm(self.rnn(x)[0].transpose(1, 2)).transpose(1, 2))


TOKENS = torch.arange(12).reshape(2, 6)


def test_parameters_have_no_memory_and_buffers_have_their_numbers():
    with unfilled():
        net = Net()
        with torch.device("cpu"):
            asked = torch.empty(2)
    assert all(p.is_meta for p in net.parameters())
    assert net.head.weight is net.table.weight
    assert net.mix.bias.mark == "mine"
    assert not net.mix.bias.requires_grad
    assert torch.equal(net.angles, torch.arange(16.0))
    assert torch.equal(net.norm.running_var, torch.ones(16))
    assert not asked.is_meta
    real = Net()
    assert not any(p.is_meta for p in real.parameters())
    assert [(n, p.shape, p.dtype) for n, p in net.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in real.named_parameters()
    ]


def test_another_thread_and_what_comes_after_an_error_are_built_as_ever():
    built = []

    def fails():
        with unfilled():
            other = threading.Thread(target=lambda: built.append(Net()))
            other.start()
            other.join()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    built.append(Net())
    assert len(built) == 2
    assert not any(p.is_meta for net in built for p in net.parameters())


class Computes(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.scale = float(self.mix.weight.sum())


class FilledLater(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.register_buffer("angles", torch.empty(4), persistent=False)
        self.angles.fill_(2.0)


@pytest.mark.parametrize("build", [Computes, FilledLater])
def test_a_model_that_needs_its_numbers_has_them(build):
    assert not any(t.is_meta for t in built_unfilled(build).state_dict().values())
    assert built_unfilled(Net).mix.weight.is_meta


def test_memory_comes_back_with_what_is_shared():
    with unfilled():
        net = Net()
    give_memory(net)
    assert not any(t.is_meta for t in net.state_dict().values())
    assert net.head.weight is net.table.weight
    assert net.mix.bias.mark == "mine"
    assert not net.mix.bias.requires_grad
    net.load_state_dict(Net().state_dict())
    assert net(TOKENS).isfinite().all()  # the kernel of recurrent layers has a list of its own


def test_a_small_model_is_read_into_one_without_memory(tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks of so small a model save nothing
        small = fxrank.factorize(net, TOKENS, {"mix": 3, "table": 4})
    fxrank.save(small, tmp_path)
    with unfilled():
        empty = Net()
    with pytest.raises(
        ValueError, match=r"a model to load into must have memory; 'table.weight' is on the meta device"
    ):
        fxrank.load(empty, tmp_path)
    back = fill(empty, tmp_path).eval()
    assert back is empty
    assert torch.equal(back(TOKENS), small(TOKENS))
    assert fxrank.plan_of(back) == fxrank.plan_of(small)
    assert back.head.v.weight is back.table.v.weight or back.head.u.weight is back.table.v.weight


def allocated(call):
    """Bytes that torch's CPU allocator gave out during a call, all of them together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())


def test_a_folder_of_transformers_is_read_without_the_memory_of_the_dense_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    from fxrank.integrations.huggingface import from_pretrained, save_pretrained

    sizes = {"vocab_size": 32, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    dense = sum(p.numel() * p.element_size() for p in llama.parameters())
    small = fxrank.factorize(llama, {"input_ids": TOKENS}, 4)
    save_pretrained(small, tmp_path)
    held = sum(p.numel() * p.element_size() for p in small.parameters())
    assert held < dense / 8
    found = []
    used = allocated(lambda: found.append(from_pretrained(transformers.AutoModelForCausalLM, tmp_path)))
    assert held < used < dense / 2  # the model, its file, the checks of it; before, the dense one beside them
    with torch.no_grad():
        assert torch.equal(found[0](TOKENS).logits, small(TOKENS).logits)
    assert found[0].dtype == llama.dtype
    before = allocated(lambda: type(llama)(llama.config))
    assert before >= dense  # so that the count is one
