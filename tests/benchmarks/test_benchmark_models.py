"""The benchmark's models: sizes to the digit, shapes, layer order, and the names that `build` takes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.subjects.models import build, handwritten_lowrank_resnet18, resnet18, resnet20, vgg19_bn
from fxrank.training.measure import parameter_count

# Parameters of the models of the papers' reference implementations, built and counted from their own code.
RESNET18 = 11_173_962
RESNET18_100_CLASSES = 11_220_132
RESNET18_WITHOUT_STEM_BN = 11_173_834  # Pufferfish's own ResNet-18, as its paper says
VGG19 = 20_035_018
VGG19_100_CLASSES = 20_081_188
VGG19_THREE_LINEAR = 20_560_330  # Pufferfish's own VGG-19, as its paper says
# Not from the papers: 269,722 of He et al.'s ResNet-20 with free shortcuts, and two 1×1 convolutions with BatchNorm.
RESNET20 = 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)

RANKS = (53, 93, 128, 61, 224, 107, 89, 164, 308, 493, 188, 340)
HANDWRITTEN = 8_066_058  # the reference's adaptive low-rank ResNet-18 at RANKS, without extra BatchNorm


@pytest.mark.parametrize(
    ("model", "parameters", "classes"),
    [
        pytest.param(resnet18, RESNET18, 10, id="resnet18"),
        pytest.param(lambda: resnet18(100), RESNET18_100_CLASSES, 100, id="resnet18-100"),
        pytest.param(lambda: resnet18(stem_bn=False), RESNET18_WITHOUT_STEM_BN, 10, id="resnet18-no-stem-bn"),
        pytest.param(vgg19_bn, VGG19, 10, id="vgg19_bn"),
        pytest.param(lambda: vgg19_bn(100), VGG19_100_CLASSES, 100, id="vgg19_bn-100"),
        pytest.param(lambda: vgg19_bn(hidden_layers=2), VGG19_THREE_LINEAR, 10, id="vgg19_bn-hidden"),
        pytest.param(resnet20, RESNET20, 10, id="resnet20"),
        pytest.param(lambda: handwritten_lowrank_resnet18(RANKS), HANDWRITTEN, 10, id="handwritten"),
    ],
)
def test_size_and_output_shape(model: Callable[[], nn.Module], parameters: int, classes: int) -> None:
    net = model()
    assert parameter_count(net) == parameters
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, classes)


def test_resnet20_widens() -> None:
    assert resnet20(width=32).get_parameter("conv1.weight").shape == (32, 3, 3, 3)
    assert resnet20(width=32).get_parameter("linear.weight").shape == (10, 128)


def called(model: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers in the order of the call."""
    order: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(torch.randn(2, 3, 32, 32))
    return order


def test_resnet_calls_its_layers_in_order_and_the_shortcut_after_the_residual_branch() -> None:
    expected = ["conv1"]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            expected += [f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"]
            expected += [f"layer{stage}.{block}.shortcut.0"] if stage > 1 and block == 0 else []
    assert called(resnet18()) == [*expected, "linear"]


def test_vgg_calls_its_layers_in_order() -> None:
    convolutions = [f"conv{i}" for i in range(1, 17)]
    assert called(vgg19_bn(hidden_layers=2)) == [*convolutions, "hidden.0", "hidden.1", "classifier"]


def test_handwritten_ranks_go_to_their_layers_in_forward_order() -> None:
    net = handwritten_lowrank_resnet18(RANKS)
    names = [f"layer{s}.{b}.conv{c}" for s in (2, 3, 4) for b in (0, 1) for c in (1, 2)]
    for name, rank in zip(names, RANKS, strict=True):
        assert net.get_parameter(f"{name}_u.weight").shape[0] == rank
        assert net.get_parameter(f"{name}_v.weight").shape[1:] == (rank, 1, 1)


@pytest.mark.parametrize("count", [0, 11, 13])
def test_handwritten_needs_twelve_ranks(count: int) -> None:
    with pytest.raises(ValueError, match=rf"12 convolutions of stages 2-4; got {count}\."):
        handwritten_lowrank_resnet18([8] * count)


@pytest.mark.parametrize("name", ["resnet18", "vgg19_bn", "resnet20"])
def test_build_own_models(name: str) -> None:
    assert build(name, 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("package", "name"), [("torchvision", "resnet18"), ("timm", "resnet10t")])
def test_build_models_of_other_packages(package: str, name: str) -> None:
    pytest.importorskip(package)
    assert build(f"{package}:{name}", 7)(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_build_lists_the_valid_names() -> None:
    with pytest.raises(
        ValueError, match=r"torchvision:NAME, timm:NAME.*'resnet18', 'resnet20', .*'vit_tiny'; got 'nope'"
    ):
        build("nope")
    with pytest.raises(ValueError, match="Did you mean 'resnet18'"):
        build("resnet1")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_build_refuses_an_unknown_model_of_a_package(package: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(ValueError, match=rf"{package} model must be .*; got 'nope'"):
        build(f"{package}:nope")
