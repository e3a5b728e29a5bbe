"""A dense checkpoint that is 2:4 already, zeros in place, to a packed one: no calibration, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compressor.checkpoint import Reader
from compressor.errors import CheckpointError
from compressor.formats.sparse24 import Sparse24
from compressor.layout import compressed_config
from compressor.model import WEIGHT_DTYPES, Linear, Skeleton
from compressor.report import LeftDense
from compressor.writer import Writer, check_output


@dataclass(frozen=True)
class Packed:
    """What `pack` did: names of the linears packed, and those of the decoder blocks that stayed dense, with reasons."""

    packed: list[str]
    left_dense: list[LeftDense]


def pack(folder: Path, output: Path, *, trust_remote_code: bool = False) -> Packed:
    """Write `output` with every linear of `folder`'s decoder blocks packed that has at most two non-zeros in each group of four.

    Raises:
        CheckpointError: no linear is 2:4, or the checkpoint is packed or quantised already.
    """
    reader = Reader(folder)
    check_output(output, reader)
    skeleton = Skeleton(reader, trust_remote_code=trust_remote_code)
    blocks = [skeleton.linears(index) for index in range(len(skeleton.blocks))]
    done = Packed([], [])
    with Writer(reader, output, {linear.tensor for block in blocks for linear in block}) as writer:
        for block in blocks:
            for linear in block:
                _pack_one(reader, writer, linear, done)
        if not done.packed:
            first = f": {done.left_dense[0].name} has {done.left_dense[0].reason}" if done.left_dense else ""
            raise CheckpointError(f"{folder} holds no 2:4 linear that could be packed{first}")
        modules = {name: {"format": Sparse24.FORMAT} for name in done.packed}
        writer.finish(compressed_config(reader.config, modules), {}, code=trust_remote_code)
    return done


def _pack_one(reader: Reader, writer: Writer, linear: Linear, done: Packed) -> None:
    weight = linear.read(reader)
    try:
        if (stored := reader.tensors[linear.tensor].dtype) not in WEIGHT_DTYPES:
            raise ValueError(f"it is stored as {stored}")
        form = Sparse24.from_dense(weight)
    except ValueError as error:
        done.left_dense.append(LeftDense(linear.name, list(linear.shape), str(error)))
        writer.replace(linear.tensor, {"weight": reader.read(linear.tensor)})
        return
    writer.replace(linear.tensor, form.pack())
    done.packed.append(linear.name)
