"""Sparsity patterns: which weights of a matrix are kept.

    "2:4"   n:m — n of every m consecutive weights of a row (along `in`) are KEPT; "1:4" therefore
            has 75 % zeros
    "50%"   unstructured — that fraction of the weights of every row is zero, rounded down; "0.5"
            means the same

A plan of many linears says for each an exact number of zeros instead (`Pattern.exact`); no text
stands for it.

Masks are bool, True = kept. Ties are broken by position: of equal scores the lower column is pruned
first, on every device.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from compressor.errors import UsageError
from compressor.text import to_ignore

if TYPE_CHECKING:
    from torch import Tensor

_ACCEPTED = (
    "accepted: n:m with 0 < n < m (n of every m weights are kept) such as 2:4, or a sparsity "
    "between 0 and 1 such as 50%"
)
_CHUNK = (
    1 << 22
)  # elements scored at once: bounds the int64 indices of a sort to 32 MB, whatever the matrix


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern. `sparsity` is exact; `n` and `m` are 0 when the pattern is unstructured.

    With `zeros` it is one for a matrix of one size: so many of its weights are zero, no more and no
    fewer.
    """

    sparsity: Fraction
    n: int = 0
    m: int = 0
    zeros: int | None = None

    @classmethod
    def exact(cls, zeros: int, weights: int) -> Pattern:
        """`zeros` of the `weights` of a matrix are pruned, spread evenly over its rows."""
        assert 0 <= zeros <= weights, (zeros, weights)
        return cls(Fraction(zeros, max(weights, 1)), zeros=zeros)

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse `"2:4"`, `"50%"` or `"0.5"`.

        Raises:
            UsageError: the text is neither form, or out of range.
        """
        text = text.strip()
        if group := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text, re.ASCII):
            n, m = int(group[1]), int(group[2])
            if not 0 < n < m:
                raise UsageError(f"pattern {text!r} keeps {n} of every {m} weights; {_ACCEPTED}")
            return cls(Fraction(m - n, m), n, m)
        sparsity = _fraction(text)
        if sparsity is None:
            raise UsageError(f"pattern {text!r} is not understood; {_ACCEPTED}")
        if not 0 < sparsity < 1:
            raise UsageError(
                f"pattern {text!r} asks for a sparsity of {float(sparsity):g}; {_ACCEPTED}"
            )
        return cls(sparsity)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{float(self.sparsity * 100):g}%"

    @property
    def fits_2_4(self) -> bool:
        """True where every legal matrix has at most two non-zeros in each aligned group of four."""
        if not self.m:
            return False
        if self.m % 4 == 0:
            return self.n <= 2
        return 4 % self.m == 0 and self.n * (4 // self.m) <= 2

    def part(self, start: int, stop: int, whole: int) -> Pattern:
        """The pattern of the rows, or the columns, `start:stop` of a matrix of `whole` rows, or
        columns.

        The parts of a matrix have the zeros of the whole between them; only exact patterns differ
        from part to part.
        """
        if self.zeros is None:
            return self
        stop = min(stop, whole)
        return replace(self, zeros=self.zeros * stop // whole - self.zeros * start // whole)

    def divides(self, in_features: int) -> bool:
        """Whether a row of so many weights can be split into groups of m."""
        return not self.m or in_features % self.m == 0

    def check_width(self, name: str, in_features: int, *others: str) -> None:
        """Raise UsageError where a row of `in_features` weights of the linear `name` cannot be
        split into groups of m; `others` are linears of which that is true too.
        """
        if not self.divides(in_features):
            raise UsageError(
                f"in_features {in_features} of {name} is not a multiple of {self.m} (pattern "
                f"{self}); choose another pattern or leave it dense with "
                f"{to_ignore(name, *others)}"
            )

    def mask(self, score: Tensor) -> Tensor:
        """Keep the highest scores of every row.

        Args:
            score: `[rows, columns]`, any float dtype, finite; higher = keep.

        Returns:
            bool `[rows, columns]`, True = kept: n of every m for n:m, `columns - floor(columns *
            sparsity)` of every row otherwise; for an exact pattern rows differ by one weight at
            most.
        """
        import torch

        rows, columns = score.shape
        step = max(1, _CHUNK // columns)
        parts = [
            self.part(start, start + step, rows)._mask_rows(score[start : start + step])
            for start in range(0, rows, step)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def mask_matrix(self, score: Tensor) -> Tensor:
        """As `mask`, but a sparsity is met over the whole matrix instead of in every row."""
        return self.mask(score) if self.m else self.mask(score.reshape(1, -1)).reshape(score.shape)

    def _mask_rows(self, score: Tensor) -> Tensor:
        import torch

        rows, columns = score.shape
        if self.m:
            return _keep_groups(score.reshape(-1, self.m), self.n).reshape(rows, columns)
        if self.zeros is None:
            return _keep_rows(score, math.floor(columns * self.sparsity))
        return keep_counts(score, torch.tensor(_spread(self.zeros, rows), device=score.device))

    def is_legal(self, weight: Tensor) -> bool:
        """True where no group of m consecutive weights has more than n non-zeros (always, if
        unstructured).
        """
        if not self.m:
            return True
        return bool(((weight != 0).reshape(-1, self.m).sum(-1) <= self.n).all())


def parse_fraction(name: str, text: str) -> Fraction:
    """Option `name`, such as `"10%"` or `"0.1"`. Raises UsageError where it is no number between 0
    and 1.
    """
    fraction = _fraction(text.strip())
    if fraction is None or not 0 < fraction < 1:
        raise UsageError(f"{name} is {text!r}; accepted: a fraction between 0 and 1 such as 10%")
    return fraction


def _fraction(text: str) -> Fraction | None:
    """The number in `"50%"` or `"0.5"`, None for any other text."""
    number = re.fullmatch(r"([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))(%?)", text, re.ASCII)
    return Fraction(number[1]) / (100 if number[2] else 1) if number else None


def _keep_groups(score: Tensor, n: int) -> Tensor:
    """Mask of the n largest of each short row; of equal scores the lower column is pruned first."""
    import torch

    if (n, score.shape[1]) == (2, 4):
        return _keep_two_of_four(score)
    order = torch.argsort(score, dim=-1, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(
        -1, order[:, : score.shape[1] - n], False
    )


def _keep_two_of_four(score: Tensor) -> Tensor:
    """As `_keep_groups` for `[groups, 4]`, by comparing each pair: kept is what beats two of the
    other three at least; of two equal ones the higher column does.
    """
    import torch

    a, b, c, d = score.T.contiguous().unbind()
    ab, ac, ad, bc, bd, cd = a > b, a > c, a > d, b > c, b > d, c > d
    wins = ((ab, ac, ad), (~ab, bc, bd), (~ac, ~bc, cd), (~ad, ~bd, ~cd))
    return torch.stack([(x & y) | (z & (x | y)) for x, y, z in wins], -1)


def keep_counts(score: Tensor, zeros: Tensor) -> Tensor:
    """Mask without the `zeros[r]` smallest of row r, int64 `[rows]`, by a sort; same rule for
    ties.
    """
    import torch

    quota = zeros[:, None]
    threshold = score.sort(dim=1).values.gather(1, (quota - 1).clamp_min(0))
    threshold = torch.where(quota > 0, threshold, -torch.inf)
    return _keep_above(score, threshold, quota)


def _spread(zeros: int, rows: int) -> list[int]:
    """`zeros` over `rows`: the same in each, and one more in evenly spaced ones."""
    return [
        stop - start for start, stop in pairwise(zeros * row // rows for row in range(rows + 1))
    ]


def _keep_rows(score: Tensor, pruned: int) -> Tensor:
    """Mask without the `pruned` smallest of each row, by selection rather than by a sort; same rule
    for ties.
    """
    import torch

    if not pruned:
        return torch.ones_like(score, dtype=torch.bool)
    return _keep_above(score, score.kthvalue(pruned, dim=1, keepdim=True).values, pruned)


def _keep_above(score: Tensor, threshold: Tensor, pruned: Tensor | int) -> Tensor:
    """Mask without what is below the threshold of its row, and without as many equal to it as makes
    `pruned`, the first ones.
    """
    import torch

    below, tied = score < threshold, score == threshold
    quota = pruned - below.sum(1, keepdim=True)
    return ~(below | (tied & (tied.cumsum(1, dtype=torch.int32) <= quota)))
