"""What plain int4 or int3 would give at its bytes: the baseline with the linears of its decoder
blocks rounded to integers, in place, in memory. Nothing is written.

Each of them twice: rounded to the nearest, which needs no text, and by GPTQ, calibrated block by
block on what the rounded blocks before give. Bytes are counted with scales and zero points
(`compressor.quantisation.Grid`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration import capture, tokens
from compressor.calibration.capture import States
from compressor.calibration.hidden_states import advance
from compressor.checkpoint import cache
from compressor.checkpoint.dequantised import open_model
from compressor.checkpoint.packed_config import stored_modules
from compressor.errors import CheckpointError, DataError, UsageError, about
from compressor.evaluation.candidate import Candidate, in_blocks, load_model
from compressor.model.language_model import decoder_blocks
from compressor.model.linear import Linear
from compressor.model.skeleton import Skeleton
from compressor.quantisation import Grid, gptq, nearest
from compressor.records.report import versions
from compressor.stats import InputStats, collecting

GRIDS = {"int4": Grid(4), "int3": Grid(3)}
WAYS = ("nearest", "GPTQ")


def split_baselines(
    names: Sequence[str], models: Sequence[str]
) -> tuple[str | None, tuple[str, ...]]:
    """The model among the baselines, and the names of grids among them.

    With grids and no model it is the one that is scored.

    Raises:
        UsageError: two models, or grids of nobody knows which model.
    """
    grids = tuple(dict.fromkeys(name for name in names if name in GRIDS))
    plain = list(dict.fromkeys(name for name in names if name not in GRIDS))
    if len(plain) > 1:
        raise UsageError(
            f"`baseline` names {len(plain)} models, {' and '.join(plain[:2])}; accepted: one, and "
            f"any of {', '.join(GRIDS)}"
        )
    if grids and not plain:
        if len(set(models)) > 1:
            raise UsageError(
                f"`baseline` {grids[0]} is the original, rounded: say which it is with a second "
                "`baseline`"
            )
        plain = list(models[:1])
    return (plain[0] if plain else None), grids


@dataclass(frozen=True)
class Calibration:
    """The text that GPTQ is calibrated on: as of a run, `num_samples` rows of `seq_len` tokens."""

    dataset: str
    text_column: str
    num_samples: int
    seq_len: int
    seed: int


@dataclass(eq=False)
class Rounded(Candidate):
    """The model `original` on the grid `GRIDS[grid]`; its name is what it is called in tables."""

    original: Candidate | None = None
    grid: str = "int4"
    calibration: Calibration | None = None  # GPTQ; rounded to the nearest without
    progress: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        assert self.original
        self.folder, self.reader = self.original.folder, self.original.reader
        if stored_modules(self.reader.config, self.reader.tensors):
            raise UsageError(
                f"`baseline` {self.grid} rounds a plain model, {self.original.name} is compressed: "
                "give the original as a second `baseline`"
            )

    @cached_property
    def digest(self) -> str:
        """Of the original, and of what is done to it."""
        assert self.original
        grid = GRIDS[self.grid]
        return cache.make_key("rounded", self.original.digest, vars(grid), self._calibration_key)

    @cached_property
    def _calibration_key(self) -> str:
        """What the calibration is by content; of text that the model writes, by how it does so."""
        asked = self.calibration
        if asked is None:
            return ""
        if asked.dataset == "self":
            return cache.make_key(vars(asked), self.device, versions())
        return hashlib.sha256(self._calibration_ids().numpy().tobytes()).hexdigest()

    def _calibration_ids(self) -> Tensor:
        """Token ids `[num_samples, seq_len]`. Raises DataError."""
        asked, code = self.calibration, self.trust_remote_code
        assert asked
        shape = {"num_samples": asked.num_samples, "seq_len": asked.seq_len, "seed": asked.seed}
        if asked.dataset == "self":
            ids = tokens.sample_from_model(
                self.folder, **shape, device=self.device, trust_remote_code=code
            )
        else:
            ids = tokens.calibration_rows(
                asked.dataset, self.folder, self.vocab_size, **shape,
                text_column=asked.text_column, trust_remote_code=code,
            )  # fmt: skip
        if ids.shape != (asked.num_samples, asked.seq_len):
            raise DataError(
                f"{asked.dataset} gives {len(ids)} rows to calibrate {self.name} on, "
                f"{asked.num_samples} were asked for"
            )
        return ids

    @cached_property
    def _skeleton(self) -> Skeleton:
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return Skeleton(
            open_model(self.folder), dtype=dtype, trust_remote_code=self.trust_remote_code
        )

    @cached_property
    def model(self) -> Any:
        """The original, rounded at the first use."""
        assert self.original
        code = self.trust_remote_code
        model, _ = load_model(
            self.original.name, device=self.device, dtype=self.dtype, trust_remote_code=code
        )
        ids = self._calibration_ids() if self.calibration else None
        round_blocks(model, self._skeleton, GRIDS[self.grid], ids, self.progress)
        return model

    @cached_property
    def _saved(self) -> int:
        """By how many bytes its linears are smaller than those of the original in 16 or 32 bits."""
        skeleton, grid, saved = self._skeleton, GRIDS[self.grid], 0
        for index in range(len(skeleton.blocks)):
            for linear in skeleton.linears(index):
                stored = skeleton.reader.tensors[linear.tensor]
                dense = stored.nbytes * linear.size // math.prod(stored.shape)
                saved += dense - grid.nbytes(*linear.shape)
        return saved

    @property
    def nbytes(self) -> int:
        """Of all tensors, if they were stored."""
        return self._skeleton.reader.nbytes - self._saved

    @property
    def linear_bytes(self) -> int:
        """Of the weight matrices inside the decoder blocks, if they were stored."""
        return in_blocks(self._skeleton.reader) - self._saved


def rounded_candidates(
    original: Candidate,
    grids: Sequence[str],
    calibration: Calibration,
    progress: Callable[[str, int, int], None],
) -> Iterator[Rounded]:
    """`original` on each of the grids, each way."""
    for grid in grids:
        for way in WAYS:
            name = f"{grid} {way}"
            yield Rounded(
                name, original.device, original.dtype, original.trust_remote_code, original, grid,
                calibration if way == "GPTQ" else None, partial(progress, name),
            )  # fmt: skip


@torch.no_grad()
def round_blocks(
    model: Any,
    skeleton: Skeleton,
    grid: Grid,
    ids: Tensor | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Round the linears of the decoder blocks of `model`, in place.

    Args:
        model: the causal language model of the checkpoint, in memory.
        skeleton: of the same checkpoint; one block of it is in memory at a time.
        grid: of the values.
        ids: calibration `[samples, seq]` of GPTQ; None for the nearest.
        progress: told after each block.

    Raises:
        CheckpointError: the parameters of a block are not those of the skeleton's.
    """
    _, blocks = decoder_blocks(model, model.config)
    device = next(blocks.parameters()).device
    states = None if ids is None else capture.capture(skeleton, ids, device)
    for index, block in enumerate(blocks):
        ours = skeleton.load_block(index, device)
        linears = skeleton.linears(index)
        stats = _observed(ours, linears, states, index) if states else {}
        for linear in linears:
            linear.set(_rounded(linear, linear.read(skeleton.reader).to(device), grid, stats))
        _copy(ours, block)
        if states:
            advance(states.hidden, partial(capture.run, ours, arguments=states.arguments[index]))
        skeleton.free_block(index)
        progress(index + 1, len(blocks))


def _observed(
    block: nn.Module, linears: Sequence[Linear], states: States, index: int
) -> dict[str, InputStats]:
    """Statistics of the inputs of the linears of block `index`, by name."""
    with collecting({linear.name: linear.module for linear in linears}, gram=True) as stats:
        for batch in states.hidden:
            capture.run(block, batch, states.arguments[index])
    return stats


def _rounded(linear: Linear, weight: Tensor, grid: Grid, stats: dict[str, InputStats]) -> Tensor:
    """By GPTQ where its input was seen; an expert that no token reached to the nearest."""
    seen = stats.get(linear.name)
    if seen is None or not seen.tokens:
        return nearest(weight, grid)
    seen.check(linear.name)
    with about(linear.name):
        return gptq(weight, seen, grid)


def _copy(source: nn.Module, target: nn.Module) -> None:
    """The parameters of one block into another that has the same."""
    found = dict(source.named_parameters())
    wanted = dict(target.named_parameters())
    if {name: each.shape for name, each in found.items()} != {
        name: each.shape for name, each in wanted.items()
    }:
        raise CheckpointError(
            f"a block of the model in memory is not that of the checkpoint: "
            f"{min(found.keys() ^ wanted.keys(), default='a shape')} differs; it cannot be rounded"
        )
    for name, parameter in wanted.items():
        parameter.copy_(found[name])
