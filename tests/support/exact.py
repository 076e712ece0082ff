"""The factorization that must change no number, and float64 tensors to see it by."""

import warnings

import torch

import fxrank


def full(model, example, **options):
    """The full-rank factorization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no smaller than the layers, as it must be here
        return fxrank.factorize(model, example, **({"rank": 1.0, "include": "*"} | options))


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)
