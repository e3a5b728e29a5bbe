"""What the linears that are stored as two thin factors share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compressor_kernels import backend
from compressor_kernels.cpu import ops as cpu_ops
from compressor_kernels.layouts import InTiles
from compressor_kernels.sparse24 import new_semaphore
from compressor_kernels.stored_linear import StoredLinear


class ThinLinear(StoredLinear):
    """A linear of a rank, whose factors are parameters that train like those of two linears.

    Attributes:
        rank: rows of `weight_v` `[rank, in]`.
        semaphore: of the kernels that split K on a GPU; None elsewhere.
        cpu_kernels: whether those of the CPU compute.
    """

    weight_v: nn.Parameter
    semaphore: Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.register_buffer("semaphore", None, persistent=False)
        self.cpu_kernels = False

    def kernels_run(self) -> bool:
        """Whether the kernels for thin products run."""
        return backend.runs(self.weight_v) or InTiles.runs_on(self.weight_v)

    def prepare_(self) -> None:
        """Let the kernels of its device compute, where there are any; on a GPU they split K with a
        semaphore.
        """
        v = self.weight_v
        self.cpu_kernels = not backend.runs(v) and InTiles.runs_on(v)
        if backend.runs(v):
            self.semaphore = new_semaphore(max(self.out_features, self.rank), v.device)

    def on_cpu_kernels(self, x: Tensor) -> bool:
        """Whether those of the CPU compute from x."""
        return self.cpu_kernels and x.device.type == "cpu" and x.dtype in cpu_ops.DTYPES

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of a PackedLinear: another process has to load the kernels for itself."""
        super().__setstate__(state)
        self.cpu_kernels = self.cpu_kernels and InTiles.usable()

    def freeze_(self) -> None:
        """Nothing to do: the factors train. Nor for `unpack_`: two thin products are faster than
        the dense one anywhere.
        """
