"""How a run tells what it has done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from compressor.records.report import BlockRow

Losses = tuple[float, float]


class Progress(Protocol):
    """Told after each step: its name, how many are done of how many, and what is finished: a
    block's row, or a linear's name and the losses that its method started from and arrived at.
    """

    def __call__(
        self,
        step: str,
        done: int,
        total: int,
        block: BlockRow | None = None,
        linear: str = "",
        losses: Losses | None = None,
    ) -> None:
        """Called after each step."""
        ...


def silent(*_: Any, **__: Any) -> None:
    """A Progress that says nothing."""
