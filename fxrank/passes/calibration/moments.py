"""Means and second moments of the vectors that a layer sees or gives, and how often rows of a table are looked up."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """Of vectors `(groups, size)`, added up over calls in float64: 8 · groups · size² bytes.

    Sums are of what is left after the mean of the first call is taken away, so that a large mean costs no digits.
    """

    def __init__(self, groups: int, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._origin = torch.zeros(groups, size, dtype=torch.float64, device=device)
        self._sum = torch.zeros_like(self._origin)
        self._products = self._origin.new_zeros(groups, size, size)

    def add(self, vectors: Tensor) -> None:
        """Take in vectors `(n, groups, size)`."""
        if not len(vectors):
            return
        vectors = vectors.to(torch.float64)
        if not self.count:
            self._origin = vectors.mean(0)
        by_group = (vectors - self._origin).transpose(0, 1)
        self.count += len(vectors)
        self._sum += by_group.sum(1)
        self._products.baddbmm_(by_group.mT, by_group)

    @property
    def shape(self) -> torch.Size:
        """`(groups, size)` of one vector."""
        return self._sum.shape

    @property
    def device(self) -> torch.device:
        """Where they are added up."""
        return self._sum.device

    @property
    def mean(self) -> Tensor:
        """`(groups, size)`; zeros if nothing was seen."""
        return self._origin + self._sum / max(1, self.count)

    def second(self, *, centred: bool) -> Tensor:
        """`E[(y - ȳ)(y - ȳ)ᵀ]`, or `E[y yᵀ]`, `(groups, size, size)`."""
        off = self._sum / max(1, self.count)
        found = self._products / max(1, self.count) - off[:, :, None] * off[:, None, :]
        if not centred:
            mean = self.mean
            found = found + mean[:, :, None] * mean[:, None, :]
        return found

    @classmethod
    def added(cls, all_of_them: Sequence["Moments"]) -> "Moments":
        """Of the vectors of all of these together."""
        like = all_of_them[0].mean
        found = cls(like.shape[0], like.shape[1], like.device)
        seen = [(m.count, m.mean.to(found.mean), m.second(centred=True).to(found.mean)) for m in all_of_them if m.count]
        if seen:
            found.count = sum(count for count, _, _ in seen)
            found._origin = torch.stack([count * mean for count, mean, _ in seen]).sum(0) / found.count
            for count, mean, second in seen:
                off = mean - found._origin
                found._products += count * (second + off[:, :, None] * off[:, None, :])
        return found

    def is_like(self, other: "Moments") -> bool:
        """Whether they are of the same vectors, up to rounding."""
        mine, its = self.second(centred=False), other.second(centred=False)
        return (
            self.count == other.count and mine.shape == its.shape and torch.allclose(mine, its, rtol=1e-6, atol=1e-12)
        )

    def of_groups(self) -> list[tuple[int, Tensor, Tensor]]:
        """Of each group how many vectors there were, their mean, and their second moments, which are not centred."""
        return [(self.count, *both) for both in zip(self.mean, self.second(centred=False), strict=True)]

    @classmethod
    def joined(cls, of_groups: Sequence[Sequence[tuple[int, Tensor, Tensor]]]) -> "Moments":
        """For each group several others' added up (see `of_groups`). A group counts for as many vectors as it saw; only
        the `second` moments that are not `centred` have a meaning.
        """
        some = next(mean for parts in of_groups for _, mean, _ in parts)
        found = cls(len(of_groups), len(some), some.device)
        found.count = max(sum(count for count, _, _ in parts) for parts in of_groups)
        for group, parts in enumerate(of_groups):
            for count, mean, second in parts:
                found._sum[group] += count * mean
                found._products[group] += count * second
        return found

    def of_parts(self, parts: int) -> "Moments":
        """Of vectors that lie interleaved in these, `parts` of each: moments of all parts together, `(groups, size / parts)`."""
        groups, size = self._sum.shape
        found = Moments(groups, size // parts, self._sum.device)
        found.count = self.count * parts
        mean = self.mean.unflatten(1, (-1, parts))
        found._origin = mean.mean(2)
        second = self.second(centred=True).unflatten(2, (-1, parts)).unflatten(1, (-1, parts))
        off = mean - found._origin[..., None]
        found._products = second.diagonal(dim1=2, dim2=4).sum(-1) + off @ off.mT
        found._products *= self.count
        return found


class Lookups:
    """How often each of so many rows of a table was looked up."""

    shape = torch.Size((1, 1))

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, indices: Tensor) -> None:
        """Take in indices `(n, 1, 1)`."""
        self.counts += torch.bincount(indices.flatten().long(), minlength=len(self.counts))

    @property
    def device(self) -> torch.device:
        """Where they are added up."""
        return self.counts.device

    @property
    def count(self) -> int:
        """How many there were."""
        return int(self.counts.sum())

    @property
    def shares(self) -> Tensor:
        """Of all lookups those of each row, `(rows,)`; zeros if there was none."""
        return self.counts / max(1, self.count)

    @classmethod
    def added(cls, all_of_them: Sequence["Lookups"]) -> "Lookups":
        """All of these together."""
        found = cls(len(all_of_them[0].counts), all_of_them[0].device)
        for lookups in all_of_them:
            found.counts += lookups.counts.to(found.device)
        return found
