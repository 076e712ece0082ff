"""The baselines by name, with their defaults."""

from benchmarks.baselines.base import Baseline
from benchmarks.baselines.early_bird import EarlyBird
from benchmarks.baselines.grasp import GraSP
from benchmarks.baselines.imp import IMP
from benchmarks.baselines.lc import LC
from benchmarks.baselines.xnor import XNOR

BASELINES: dict[str, Baseline] = {
    "imp": IMP(),
    "grasp": GraSP(),
    "early-bird": EarlyBird(),
    "xnor": XNOR(),
    "lc": LC(),
}
"""IMP, GraSP and LC take any model with Linear or convolutional layers, EB Train one with BatchNorms, XNOR-Net a convolutional one."""
