"""The factorization that must change no number, and float64 tensors to see it by."""

import warnings

import torch

import fxrank


def full(model, example, **options):
    """The full-rank factorization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no smaller than the layers, as it must be here
        return fxrank.factorize(model, example, **({"rank": 1.0, "include": "*"} | options))


def trains_as(pair, reference, x, rounding):
    """Output, gradient of the input, and those of both factors and the bias are the dense layer's, to this rounding of numbers of order 1."""

    def close(found, expected):
        size = 1 + float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding * size)

    x = x.requires_grad_()
    out = reference(x)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
    out.backward(upstream)
    found = pair(again := x.detach().requires_grad_())
    found.backward(upstream)
    close(found, out)
    close(again.grad, grad)
    g = pair.unroll(pair, reference.weight.grad)
    size = rounding * (1 + float(g.abs().max()))
    u, v = matrices(pair)
    torch.testing.assert_close(pair.u.weight.grad, pair.fold_u(v.mT @ g), rtol=0, atol=size)
    if pair.v.weight.numel():
        torch.testing.assert_close(pair.v.weight.grad, pair.fold_v(g @ u.mT), rtol=0, atol=size)
    else:
        assert not pair.v.weight.requires_grad  # a wrapper of processes would wait for its gradient
    if reference.bias is not None:
        torch.testing.assert_close(pair.bias.grad, reference.bias.grad, rtol=0, atol=size)


def matrices(pair):
    """`U` and `V`."""
    return pair.unfold_u(pair.u.weight.detach()), pair.unfold_v(pair.v.weight.detach())


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)
