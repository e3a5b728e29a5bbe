"""What the first block of each kind computed once it was compressed, kept until the end of the run:
the output has to compute the same, loaded as `from_pretrained` loads it.

Kept is the first batch, beside the work state, so that a run that goes on has it too. A run without
calibration calls no block; of its output the headers are compared alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from compressor.calibration.capture import States, run
from compressor.calibration.hidden_states import Batch
from compressor.checkpoint.atomic import write_file
from compressor.checkpoint.reader import Reader
from compressor.engine.plan import Plan
from compressor.errors import CheckpointError
from compressor.model.kinds import first_of_each_kind

_MOST = 8  # blocks
_SHARE = 0.03  # of the tokens may differ: a router decides anew where two experts are alike


@dataclass(frozen=True)
class Witness:
    """Of one run.

    Args:
        plan: what the run does.
        work: the folder of its work state.
    """

    plan: Plan
    work: Path

    @cached_property
    def blocks(self) -> list[int]:
        """The first block of each kind."""
        skeleton = self.plan.skeleton
        return first_of_each_kind(skeleton.blocks, skeleton.config)[:_MOST]

    def saw(self, index: int, entering: Batch, leaving: Tensor) -> None:
        """Keep what entered and left the compressed block `index`, if it is a first of its kind."""
        if index not in self.blocks:
            return
        kept = {"entering": entering.hidden, "leaving": leaving}
        kept |= {json.dumps(key): tensor for key, tensor in entering.handed.items()}
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
        write_file(self._file(index), save({name: t.clone() for name, t in own.items()}))

    def check(self, folder: Path, states: States | None, device: torch.device) -> None:
        """Hold the finished output in `folder` against what was kept, one block in memory.

        Raises:
            CheckpointError: it would not load, or computes something else.
        """
        from compressor.runtime.one_block import PackedBlocks  # makes transformers know the format

        skeleton = self.plan.skeleton
        packed = PackedBlocks(
            Reader(folder),
            skeleton.config,
            skeleton.path,
            skeleton.dtype,
            trust_remote_code=skeleton.trust_remote_code,
        )
        for index in self.blocks if states else ():
            if not self._file(index).is_file():
                continue
            batch, exact = self._kept(index, device)
            assert states
            block = packed.load(index, device)
            _take_mode(block, skeleton.blocks[index], index)
            found = run(block, batch, states.arguments[index])
            packed.free(index)
            if not _alike(found.hidden, exact, batch.hidden, self._near(index)):
                raise CheckpointError(
                    f"{skeleton.path}.{index} computes something else, loaded from the finished "
                    f"output, than when it was compressed; nothing was left behind. This is a "
                    f"fault of this package with a {skeleton.config.model_type} model: please "
                    f"report it"
                )

    def _near(self, index: int) -> float:
        """The relative error of a block's own part of its output that rounding explains."""
        reader = self.plan.reader
        stored = {reader.tensors[task.linear.tensor].dtype for task in self.plan.tasks[index]}
        return 1e-3 if stored <= {"F32"} and self.plan.skeleton.dtype == torch.float32 else 5e-2

    def _file(self, index: int) -> Path:
        return self.work / f"witness-{index:05}.safetensors"

    def _kept(self, index: int, device: torch.device) -> tuple[Batch, Tensor]:
        kept = {name: t.to(device) for name, t in load_file(self._file(index)).items()}
        entering, leaving = kept.pop("entering"), kept.pop("leaving")
        handed = {tuple(json.loads(key)): tensor for key, tensor in kept.items()}
        return Batch(0, entering, handed), leaving


def _take_mode(block: Any, other: Any, index: int) -> None:
    """Have a block attend as the other does: BigBird's model switches its blocks to full attention
    when it is called on a short text, and the blocks that were loaded are called by themselves.
    """
    mode = getattr(other, "attention_type", None)
    if mode != getattr(block, "attention_type", None):
        block.set_attention_type(mode, layer_idx=index)


def _alike(found: Tensor, exact: Tensor, entering: Tensor, near: float) -> bool:
    """Whether nearly all tokens have the same outputs, but for rounding: that of what the block
    adds, and that of what it adds to.
    """
    if found.shape != exact.shape:
        return False
    found, exact, entering = (t.double().flatten(0, -2) for t in (found, exact, entering))
    added = (exact - entering).norm(dim=-1) if exact.shape == entering.shape else exact.norm(dim=-1)
    allowed = near * added + near / 16 * exact.norm(dim=-1)
    different = ~((found - exact).norm(dim=-1) <= allowed)  # NaN too
    return different.double().mean().item() <= _SHARE
