"""What other tools make of a trained network within a share of its parameters, each through its own public calls, nothing trained.

Each function in `PEERS` takes `(model, images, share, score)`: a convolutional network in evaluation mode, a batch `(N, 3, h, w)`, the share
of its parameters that may be left, and a function from a model to its accuracy on calibration data, for the one that asks for it. It returns
a model of its own. A tool that is not installed raises `ModuleNotFoundError`. Where a tool has one ratio and no budget, it is the largest that fits.

    pip install aimet-torch==2.42.0 torch-pruning==1.6.1 tensorly-torch==0.5.0 fasterai==0.4.1
"""

import copy
import importlib
from collections.abc import Callable
from decimal import Decimal

from torch import Tensor, nn

Score = Callable[[nn.Module], float]
Peer = Callable[[nn.Module, Tensor, float, Score], nn.Module]


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def largest(make: Callable[[float], nn.Module], limit: float, steps: int = 9) -> nn.Module:
    """The model of the largest setting in (0, 1), of these bisections, that has at most `limit` parameters."""
    low, high, found = 0.0, 1.0, None
    for _ in range(steps):
        ratio = (low + high) / 2
        model = make(ratio)
        if size(model) <= limit:
            low, found = ratio, model
        else:
            high = ratio
    if found is None:
        raise ValueError(f"no setting leaves at most {limit:.0f} parameters.")
    return found


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Of kernels larger than 1×1, without the first."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return dict(found[1:])


def aimet(model: nn.Module, images: Tensor, share: float, score: Score) -> nn.Module:
    """AIMET's spatial SVD, one compression ratio for all layers."""
    defs = importlib.import_module("aimet_torch.defs")

    def make(ratio: float) -> nn.Module:
        own = copy.deepcopy(model)
        pairs = [defs.ModuleCompRatioPair(layer, Decimal(ratio)) for layer in convolutions(own).values()]
        kind = defs.SpatialSvdParameters
        return _aimet(own, images, score, kind(kind.Mode.manual, kind.ManualModeParams(pairs)))

    return largest(make, share * size(model))


def aimet_search(model: nn.Module, images: Tensor, share: float, score: Score) -> nn.Module:
    """AIMET's spatial SVD, ratios by its own search on the calibration data; its target is the share of the convolutions' parameters."""
    defs, common = (importlib.import_module(f"aimet_torch.{name}") for name in ("defs", "common.defs"))
    own = copy.deepcopy(model)
    first = next(m for m in own.modules() if isinstance(m, nn.Conv2d))
    kind = defs.SpatialSvdParameters
    chosen = common.GreedySelectionParameters(target_comp_ratio=Decimal(share), num_comp_ratio_candidates=10)
    return _aimet(own, images, score, kind(kind.Mode.auto, kind.AutoModeParams(chosen, modules_to_ignore=[first])))


def _aimet(model: nn.Module, images: Tensor, score: Score, parameters: object) -> nn.Module:
    compress, common = (importlib.import_module(f"aimet_torch.{name}") for name in ("compress", "common.defs"))
    small: nn.Module = compress.ModelCompressor.compress_model(
        model,
        eval_callback=lambda other, iterations, use_cuda=False: score(other),
        eval_iterations=1,
        input_shape=(1, *images.shape[1:]),
        compress_scheme=common.CompressionScheme.spatial_svd,
        cost_metric=common.CostMetric.memory,
        parameters=parameters,
    )[0]
    return small


def torch_pruning(model: nn.Module, images: Tensor, share: float, score: Score) -> nn.Module:
    """Torch-Pruning: channels of least magnitude in their group, ranked over all layers."""
    tp = importlib.import_module("torch_pruning")

    def make(ratio: float) -> nn.Module:
        own = copy.deepcopy(model)
        last = [m for m in own.modules() if isinstance(m, nn.Linear)][-1:]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.BasePruner(
            own,
            images[:1],
            importance=importance,
            pruning_ratio=1 - ratio,
            ignored_layers=last,
            global_pruning=True,
            max_pruning_ratio=0.95,
        ).step()
        return own

    return largest(make, share * size(model))


def tensorly_tucker(model: nn.Module, images: Tensor, share: float, score: Score) -> nn.Module:
    """tensorly-torch's factorized convolutions (Tucker), one share for all layers."""
    tltorch = importlib.import_module("tltorch")

    def make(ratio: float) -> nn.Module:
        own = copy.deepcopy(model)
        for name, layer in convolutions(own).items():
            other = tltorch.FactorizedConv.from_conv(
                layer, rank=ratio, factorization="tucker", implementation="factorized"
            )
            own.set_submodule(name, other)
        return own

    return largest(make, share * size(model), steps=6)


def fasterai_svd(model: nn.Module, images: Tensor, share: float, score: Score) -> nn.Module:
    """fasterai's channel SVD, one share of the rank for all layers."""
    return _fasterai(model, share, "svd")


def fasterai_tucker(model: nn.Module, images: Tensor, share: float, score: Score) -> nn.Module:
    """fasterai's partial Tucker decomposition, one share of the ranks for all layers."""
    return _fasterai(model, share, "tucker")


def _fasterai(model: nn.Module, share: float, method: str) -> nn.Module:
    decomposer = importlib.import_module("fasterai.misc.conv_decomposer").Conv_Decomposer()
    names = list(convolutions(model))
    return largest(
        lambda ratio: decomposer.decompose(model, 1 - ratio, method=method, layers=names), share * size(model)
    )


PEERS: dict[str, Peer] = {
    "AIMET spatial SVD": aimet,
    "AIMET spatial SVD, its search": aimet_search,
    "Torch-Pruning": torch_pruning,
    "tensorly-torch Tucker": tensorly_tucker,
    "fasterai SVD": fasterai_svd,
    "fasterai Tucker": fasterai_tucker,
}
