"""Statistics of the inputs of linears, collected in one pass and shared by linears that read the
same tensor.

q, k and v receive the same tensor object, as do gate and up; grouping hook inputs by identity finds
that without any table of architectures. Mean and centred second moment are merged batch by batch
(Chan et al. 1979): with inputs distributed as N(100, 0.1²) the naive sums give a variance that is 7
% off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.errors import NumericalError

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
        held_out: float32 `[<= 1024, in]`, the first tokens of other samples, which nothing is
            fitted to; None where there are none.
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
        self.held_out: Tensor | None = None
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
                f"with `ignore={name!r}`"
            )
        if not bool(torch.isfinite(self.m2).all()):
            raise NumericalError(
                f"the inputs of {name} are not finite (NaN or Inf activations): try "
                f"`dtype='bfloat16'` or `dtype='float32'`"
            )


def output_error(weight: Tensor, compressed: Tensor, stats: InputStats) -> float:
    """`error_on` the sampled tokens."""
    return error_on(stats.sample, weight, compressed)


def error_on(x: Tensor, weight: Tensor, compressed: Tensor) -> float:
    """Relative squared output error ‖x(W - Ŵ)ᵀ‖² / ‖xWᵀ‖² on inputs x, float32 `[tokens, in]`;
    weights `[out, in]`. The arithmetic is float32, or float64 where outputs overflow that.
    """
    error = _output_error(weight.float(), compressed.float(), x)
    if math.isfinite(error):
        return error
    return _output_error(weight.double(), compressed.double(), x.double())


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
    """Hook `linears` and yield their statistics, filled by every forward pass run inside the
    `with`.

    Linears that receive the same tensor object share one InputStats: the statistics exist once per
        distinct input.
    """
    stats: dict[str, InputStats] = {}
    seen: list[
        tuple[Tensor, InputStats]
    ] = []  # the latest inputs of this forward pass, alive so that identity holds
    called: set[str] = set()

    def hook(name: str):
        def observe(_module: nn.Module, args: tuple) -> None:
            x = args[0]
            if name in called:  # a new forward pass has begun
                seen.clear()
                called.clear()
            called.add(name)
            for number, (tensor, shared) in enumerate(seen):
                if tensor is x and stats.setdefault(name, shared) is shared:
                    seen.append(seen.pop(number))
                    return
            own = stats.setdefault(
                name, InputStats(x.shape[-1], gram=gram, parts=parts, device=x.device)
            )
            own.update(x)
            seen[:] = [*seen[1 - _RECENT :], (x, own)]

        return observe

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()
