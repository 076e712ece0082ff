"""The benchmark's own models, in the CIFAR shape of the papers, by name."""

import importlib
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fxrank.cli.models import build_model
from fxrank.passes.errors import unknown_name


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut (He et al. 2016): `(N, m, h, w)` to `(N, n, h/stride, w/stride)`."""

    def __init__(self, m: int, n: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(m, n, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n)
        self.conv2 = nn.Conv2d(n, n, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n)
        self.shortcut = _shortcut(m, n, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch first, then the shortcut."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def _shortcut(m: int, n: int, stride: int) -> nn.Module:
    if stride == 1 and m == n:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(m, n, 1, stride, bias=False), nn.BatchNorm2d(n))


class ResNet(nn.Module):
    """A CIFAR ResNet of basic blocks: 3×3 stem without pooling, stages that halve the image, mean over positions, one Linear."""

    def __init__(self, widths: Sequence[int], depth: int, classes: int, stem_bn: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0]) if stem_bn else nn.Identity()
        before = widths[0]
        self.stages = len(widths)
        for i, width in enumerate(widths):
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            blocks = [BasicBlock(before if j == 0 else width, width, stride) for j, stride in enumerate(strides)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            before = width
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, 32, 32)` to `(N, classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def resnet18(num_classes: int = 10, stem_bn: bool = True) -> ResNet:
    """ResNet-18 for 32×32 images. Pufferfish's own has no BatchNorm after the stem (`stem_bn=False`)."""
    return ResNet((64, 128, 256, 512), 2, num_classes, stem_bn)


def resnet20(num_classes: int = 10, width: int = 16) -> ResNet:
    """ResNet-20 (He et al. 2016, §4.2), with projection shortcuts."""
    return ResNet((width, 2 * width, 4 * width), 3, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    """ResNet-56 (He et al. 2016, §4.2), with projection shortcuts."""
    return ResNet((16, 32, 64), 9, num_classes)


VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)
"""Output channels of each convolution; 0 is a 2×2 max-pooling."""


class VGG(nn.Module):
    """VGG with BatchNorm for images that its poolings leave one pixel of (Simonyan & Zisserman 2015, Table 1)."""

    def __init__(self, plan: Sequence[int], classes: int, hidden_layers: int = 0) -> None:
        super().__init__()
        before, number = 3, 0
        self.order: list[str | None] = []
        for width in plan:
            if width == 0:
                self.order.append(None)
                continue
            number += 1
            self.add_module(f"conv{number}", nn.Conv2d(before, width, 3, 1, 1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(width))
            self.order.append(str(number))
            before = width
        self.hidden = nn.ModuleList(nn.Linear(before, before) for _ in range(hidden_layers))
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, 32, 32)`, with five poolings, to `(N, classes)`."""
        for number in self.order:
            if number is None:
                x = F.max_pool2d(x, 2)
            else:
                x = F.relu(self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x)))
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        out: Tensor = self.classifier(x)
        return out


def vgg11_bn(num_classes: int = 10) -> VGG:
    """VGG-11-BN: one Linear after the convolutions."""
    return VGG(VGG11, num_classes)


def vgg19_bn(num_classes: int = 10, hidden_layers: int = 0) -> VGG:
    """VGG-19-BN: one Linear after the convolutions (Cuttlefish), or two 512×512 layers before it (Pufferfish, `hidden_layers=2`)."""
    return VGG(VGG19, num_classes, hidden_layers)


class HandwrittenBlock(nn.Module):
    """A basic block whose two convolutions are written as pairs by hand, as a person would."""

    def __init__(self, m: int, n: int, stride: int, ranks: Sequence[int]) -> None:
        super().__init__()
        self.conv1_u = nn.Conv2d(m, ranks[0], 3, stride, 1, bias=False)
        self.conv1_v = nn.Conv2d(ranks[0], n, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n)
        self.conv2_u = nn.Conv2d(n, ranks[1], 3, 1, 1, bias=False)
        self.conv2_v = nn.Conv2d(ranks[1], n, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n)
        self.shortcut = _shortcut(m, n, stride)

    def forward(self, x: Tensor) -> Tensor:
        """As `BasicBlock.forward`."""
        y = F.relu(self.bn1(self.conv1_v(self.conv1_u(x))))
        y = self.bn2(self.conv2_v(self.conv2_u(y)))
        return F.relu(y + self.shortcut(x))


def handwritten_lowrank_resnet18(ranks: Sequence[int], num_classes: int = 10) -> ResNet:
    """ResNet-18 with the 12 convolutions of stages 2-4 as handwritten pairs; `ranks` in forward order."""
    if len(ranks) != 12:
        raise ValueError(f"ranks must name the 12 convolutions of stages 2-4; got {len(ranks)}.")
    model = resnet18(num_classes)
    m, index = 64, 0
    for i, n in enumerate((128, 256, 512)):
        blocks = []
        for j in range(2):
            blocks.append(HandwrittenBlock(m, n, 2 if j == 0 else 1, ranks[index : index + 2]))
            m, index = n, index + 2
        model.set_submodule(f"layer{i + 2}", nn.Sequential(*blocks))
    return model


def vit_tiny(num_classes: int = 10) -> nn.Module:
    """timm's ViT-tiny, half as deep, with patches of 4×4 for 32×32 images."""
    sizes = {"img_size": 32, "patch_size": 4, "num_classes": num_classes, "depth": 6}
    model: nn.Module = importlib.import_module("timm").create_model("vit_tiny_patch16_224", **sizes)
    return model


ZOO: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg11_bn": vgg11_bn,
    "vgg19_bn": vgg19_bn,
    "vit_tiny": vit_tiny,
}


def build(name: str, num_classes: int = 10) -> nn.Module:
    """A model by name: one of `ZOO`, `torchvision:NAME` or `timm:NAME`. `ValueError` lists the valid names."""
    if name in ZOO:
        return ZOO[name](num_classes)
    if ":" not in name:
        raise unknown_name("model (or torchvision:NAME, timm:NAME)", name, ZOO)
    return build_model(name, num_classes)
