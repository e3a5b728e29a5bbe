"""A forward pass that is made only for what linears of a block read needs no product of the last of
them, nor of others that come later: nothing that is observed comes after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.model.linear import Linear


class Spared:
    """The linears of a block in the order in which its forward calls them.

    Attributes:
        last: the linear that gives zeros instead of a product; None for none.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = {linear.module: linear for linear in linears}
        self._called: list[nn.Module] = []
        self.last: nn.Module | None = None

    def begin(self, *, spare: bool) -> None:
        """Before each pass: with `spare`, the linear that was called last in the pass before is
        not computed, if it was called once.
        """
        called, self._called = self._called, []
        if not spare or self.last is not None or not called:
            return
        if called.count(called[-1]) == 1 and "forward" not in vars(called[-1]):
            self.last = called[-1]
            self.last.forward = partial(_zeros, self._linears[self.last].shape[0])

    def called(self, module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        """A linear is about to compute."""
        if self._called and self._called[-1] is self.last:
            raise CheckpointError(
                f"{self._linears[module].name} is computed after the linear that was the last "
                "before: the calls of its block differ from batch to batch"
            )
        self._called.append(module)


@contextmanager
def sparing_last(linears: Sequence[Linear]) -> Iterator[Spared]:
    """Inside the `with`, passes that begin with `Spared.begin` may do without the product of the
    last of `linears`, which are all that are observed; what leaves the block is then no result.

    A mixture calls its experts in an order that depends on the tokens: where there are experts,
    every product is computed.
    """
    watched = [] if any(linear.experts for linear in linears) else linears
    spared = Spared(watched)
    handles = [linear.module.register_forward_pre_hook(spared.called) for linear in watched]
    try:
        yield spared
    finally:
        for handle in handles:
            handle.remove()
        if spared.last is not None:
            del spared.last.forward


@contextmanager
def not_computed(linears: Sequence[Linear]) -> Iterator[None]:
    """Inside the `with`, these linears give zeros instead of a product."""
    idle = [linear for linear in linears if "forward" not in vars(linear.module)]
    for linear in idle:
        linear.module.forward = partial(_zeros, linear.shape[0])
    try:
        yield
    finally:
        for linear in idle:
            del linear.module.forward


def _zeros(rows: int, x: Tensor) -> Tensor:
    """`[..., in]` -> `[..., rows]`."""
    return x.new_zeros((*x.shape[:-1], rows))
