"""A dense checkpoint that is 2:4 already, zeros in place, to a packed one: no calibration, block by
block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.packed_config import compressed_config, module_entry
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.writer import Writer, check_output
from compressor.errors import CheckpointError
from compressor.formats import Form
from compressor.formats.sparse24 import Sparse24
from compressor.model.experts import only_stacks
from compressor.model.linear import WEIGHT_DTYPES, Linear
from compressor.model.skeleton import Skeleton
from compressor.records.report import LeftDense


@dataclass(frozen=True)
class Packed:
    """What `pack` did: the linears packed, with their entries, and what stayed dense in the decoder
    blocks, with reasons.
    """

    packed: dict[str, dict[str, Any]]
    left_dense: list[LeftDense]


def pack(
    folder: Path,
    output: Path,
    *,
    form: type[Form] = Sparse24,
    trust_remote_code: bool = False,
) -> Packed:
    """Write `output` with every linear of `folder`'s decoder blocks stored as `form` that can be:
    for the packed 2:4 forms, those that have at most two non-zeros in each group of four.

    Raises:
        CheckpointError: no linear is 2:4, or the checkpoint is packed or quantised already.
    """
    reader = Reader(folder)
    check_output(output, reader)
    skeleton = Skeleton(reader, trust_remote_code=trust_remote_code)
    blocks = [skeleton.linears(index) for index in range(len(skeleton.blocks))]
    done = Packed({}, [])
    with Writer(
        reader,
        output,
        {linear.tensor for block in blocks for linear in block if _alone(reader, linear)},
    ) as writer:
        for index, block in enumerate(blocks):
            _pack_block(reader, writer, block, form, done)
            done.left_dense.extend(
                LeftDense(name, list(shape), reason)
                for name, shape, reason in skeleton.others(index)
            )
        if not done.packed:
            first = (
                f": {done.left_dense[0].name} has {done.left_dense[0].reason}"
                if done.left_dense
                else ""
            )
            raise CheckpointError(f"{folder} holds no 2:4 linear that could be packed{first}")
        writer.finish(compressed_config(reader.config, done.packed), {}, code=trust_remote_code)
    return done


def _pack_block(
    reader: Reader, writer: Writer, block: list[Linear], kind: type[Form], done: Packed
) -> None:
    forms = {linear.name: _form(reader, linear, kind) for linear in block}
    mixed = {linear.experts for linear in block if isinstance(forms[linear.name], str)} - {""}
    for linear in block:
        form = forms.pop(linear.name)
        if linear.experts in mixed and not isinstance(form, str):
            form = "other experts beside it that are not 2:4"
        if not isinstance(form, str):
            writer.replace(linear.tensor, form.pack())
            done.packed[linear.name] = module_entry(form.entry, linear.place)
            continue
        done.left_dense.append(LeftDense(linear.name, list(linear.shape), form))
        if _alone(reader, linear):
            writer.replace(linear.tensor, {"weight": reader.read(linear.tensor)})


def _alone(reader: Reader, linear: Linear) -> bool:
    """Whether a linear has a float tensor of its own: others are copied as they are."""
    return linear.at is None and reader.tensors[linear.tensor].dtype in WEIGHT_DTYPES


def _form(reader: Reader, linear: Linear, kind: type[Form]) -> Form | str:
    """The packed weight, or what it has that keeps it from being packed."""
    if not _alone(reader, linear):
        return (
            "all experts in one tensor"
            if linear.at is not None
            else f"values of type {reader.tensors[linear.tensor].dtype}"
        )
    if linear.experts and not only_stacks(linear.module.owner):
        return "experts with biases"
    try:
        return kind.from_dense(linear.read(reader))
    except ValueError as error:
        return str(error)
