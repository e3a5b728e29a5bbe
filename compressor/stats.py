"""Statistics of the inputs of linears, collected in one pass and shared by linears that read the
same tensor.

q, k and v receive the same tensor object, as do gate and up; grouping hook inputs by identity finds
that without any table of architectures. Mean and centred second moment are merged batch by batch
(Chan et al. 1979): with inputs distributed as N(100, 0.1²) the naive sums give a variance that is 7
% off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import NumericalError
from compressor.text import to_ignore

_RECENT = 8  # inputs kept alive to be recognised; a block with a hundred experts has hundreds
SAMPLE_TOKENS = 1024  # tokens kept to measure the output error of a linear on


class InputStats:
    """Moments of the rows of x, seen so far.

    Attributes:
        tokens: rows seen.
        mean: float64 `[in]`.
        m2: float64 `[in]`, sum over tokens of (x - mean)².
        gram: float32 `[in, in]`, XᵀX summed over tokens; None unless asked for.
        sample: float32 `[<= 1024, in]`, the first tokens seen.
        note: what the report says of them, if anything.
        parts: tokens, mean and variance of every update, where they are asked for: with those of
            other processes they can be merged again in the order of the samples.
    """

    def __init__(
        self,
        in_features: int,
        *,
        gram: bool = False,
        parts: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokens = 0
        self.mean = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.m2 = torch.zeros_like(self.mean)
        self.gram = torch.zeros(in_features, in_features, device=device) if gram else None
        self.parts: list[tuple[int, Tensor, Tensor]] | None = [] if parts else None
        self._sample: list[Tensor] = []
        self.note = ""

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the rows of x, `[..., in]`, any float dtype; the arithmetic is float32 and wider."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self.add_sample(x)
        variance, mean = torch.var_mean(x, dim=0, correction=0)
        if self.parts is not None:
            self.parts.append((len(x), mean, variance))
        self.merge(len(x), mean, variance)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)

    def add_sample(self, x: Tensor) -> None:
        """Keep the rows of x, float32 `[rows, in]`, as far as there is room."""
        kept = sum(len(part) for part in self._sample)
        if kept < SAMPLE_TOKENS:
            self._sample.append(x[: SAMPLE_TOKENS - kept].clone())

    def merge(self, tokens: int, mean: Tensor, variance: Tensor) -> None:
        """Add rows of which only number, mean and variance are known, float32 `[in]` (Chan et al.
        1979).
        """
        total = self.tokens + tokens
        delta = mean.double() - self.mean
        self.m2 += variance.double() * tokens + delta.square() * (self.tokens * tokens / total)
        self.mean += delta * (tokens / total)
        self.tokens = total

    @property
    def norm(self) -> Tensor:
        """‖x_j‖₂ over all tokens, float32 `[in]`."""
        return (self.m2 + self.mean.square() * self.tokens).sqrt().float()

    @property
    def sample(self) -> Tensor:
        """The first tokens seen, float32 `[<= 1024, in]`."""
        return (
            torch.cat(self._sample)
            if self._sample
            else torch.zeros(0, len(self.mean), device=self.mean.device)
        )

    def check(self, name: str) -> None:
        """Raise NumericalError where the linear saw no tokens or anything but finite ones."""
        if not self.tokens:
            raise NumericalError(
                f"{name} saw no tokens during calibration: give more samples or leave it dense "
                f"with {to_ignore(name)}"
            )
        if not bool(torch.isfinite(self.m2).all()):
            raise NumericalError(
                f"the inputs of {name} are not finite (NaN or Inf activations): try "
                f"`dtype='bfloat16'` or `dtype='float32'`"
            )


def output_error(weight: Tensor, compressed: Tensor, stats: InputStats) -> float:
    """Relative squared output error ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on the sampled tokens; weights `[out,
    in]`. The arithmetic is float32, or float64 where outputs overflow that.
    """
    error = _output_error(weight.float(), compressed.float(), stats.sample)
    if math.isfinite(error):
        return error
    return _output_error(weight.double(), compressed.double(), stats.sample.double())


def _output_error(weight: Tensor, compressed: Tensor, x: Tensor) -> float:
    exact = x @ weight.T
    difference = exact - x @ compressed.T
    return (
        difference.double().square().sum() / exact.double().square().sum().clamp_min(1e-300)
    ).item()


@contextmanager
def collecting(
    linears: Mapping[str, nn.Module], *, gram: bool = False, parts: bool = False
) -> Iterator[dict[str, InputStats]]:
    """Hook `linears`; the statistics of what they read in every forward pass inside the `with`
    are in the dictionary at its end, by name.

    Linears that read the same tensor objects share one InputStats: the statistics exist once per
    distinct input.
    """
    stats: dict[str, InputStats] = {}
    readers = _Readers(lambda x: InputStats(x.shape[-1], gram=gram, parts=parts, device=x.device))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: readers.read(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()
    stats |= readers.stats()


class _Group:
    """Linears that have read the same tensors so far.

    Attributes:
        stats: of those tensors, `updates` of them, without `latest`.
        readers: names of the linears.
        origin: the group that its first reader left, and the updates of that; None for a new one.
        latest: a tensor that some of them have read and those in `waiting` have not; it is added
            when all have. One of them may go on to another tensor first, and then they part.
    """

    def __init__(self, stats: InputStats, readers: set[str], origin: _Origin = None) -> None:
        self.stats, self.readers, self.origin = stats, readers, origin
        self.updates = 0
        self.latest: Tensor | None = None
        self.waiting: set[str] = set()

    def read(self, name: str, x: Tensor) -> None:
        """`name` is the first to read `x`."""
        self.latest, self.waiting = x, self.readers - {name}
        self.add_if_all_have_read()

    def add_if_all_have_read(self) -> None:
        """Add `latest` once nobody waits."""
        if self.latest is not None and not self.waiting:
            self.stats.update(self.latest)
            self.latest, self.updates = None, self.updates + 1

    def without_waiting(self) -> _Group:
        """A group of those who have read `latest`; this one is left to those who have not."""
        ahead = _Group(copy.deepcopy(self.stats), self.readers - self.waiting)
        ahead.latest, ahead.updates = self.latest, self.updates
        ahead.add_if_all_have_read()
        self.readers, self.latest, self.waiting = self.waiting, None, set()
        return ahead


_Origin = tuple[_Group, int] | None


class _Readers:
    """Which linears read the same tensors, found while they read them."""

    def __init__(self, new: Callable[[Tensor], InputStats]) -> None:
        self._new = new
        self._of: dict[str, _Group] = {}
        # the latest that began a group, alive so that identity holds
        self._recent: list[tuple[Tensor, _Group]] = []

    def read(self, name: str, x: Tensor) -> None:
        """The linear `name` reads `x`."""
        own = self._of.get(name)
        if own is None or (name in own.waiting and x is not own.latest):
            self._move(name, own, x)
        elif name in own.waiting:
            own.waiting.remove(name)
            own.add_if_all_have_read()
        else:
            own = self._part(own) if own.waiting else own
            own.read(name, x)

    def _move(self, name: str, old: _Group | None, x: Tensor) -> None:
        """Into a group that came from the same one and has read `x` alone since; a new one, if
        there is none.
        """
        origin = (old, old.updates) if old else None
        for number, (tensor, group) in enumerate(self._recent):
            if tensor is x and group.origin == origin and group.updates == 1:
                self._recent.append(self._recent.pop(number))
                group.readers.add(name)
                if group.latest is not None:
                    group.waiting.add(name)
                break
        else:
            group = _Group(copy.deepcopy(old.stats) if old else self._new(x), {name}, origin)
            group.read(name, x)
            self._recent = [*self._recent[1 - _RECENT :], (x, group)]
        self._of[name] = group
        if old:
            old.readers.remove(name)
            old.waiting.remove(name)
            old.add_if_all_have_read()

    def _part(self, group: _Group) -> _Group:
        ahead = group.without_waiting()
        self._of |= dict.fromkeys(ahead.readers, ahead)
        return ahead

    def stats(self) -> dict[str, InputStats]:
        """By name, of all that was read."""
        for group in list(self._of.values()):
            if group.waiting:
                self._part(group)
        return {name: group.stats for name, group in self._of.items()}
