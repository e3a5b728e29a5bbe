"""The blocks of a packed folder as `from_pretrained` makes them, one in memory at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from compressor.checkpoint.packed_config import packed_modules
from compressor.checkpoint.reader import Reader
from compressor.model import hf_conversion
from compressor.model.language_model import on_meta
from compressor.runtime import placement
from compressor.runtime.completeness import check_files
from compressor.runtime.hf_transformers import CompressedConfig, CompressedQuantizer, swap_linears


class PackedBlocks:
    """The model of a packed (or dense) folder on the meta device, its packed modules in place.

    Args:
        reader: of the folder.
        config: of transformers, of the dense model.
        path: of the blocks in it, such as `model.layers`.
        dtype: what it computes in.
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        CheckpointError: the folder lacks a weight of the model, or holds packed tensors that are
            not what its config says.
    """

    def __init__(
        self,
        reader: Reader,
        config: Any,
        path: str,
        dtype: torch.dtype,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._reader, self._path, self._dtype = reader, path, dtype
        architectures = reader.config.get("architectures") or ()
        self._model = on_meta(copy.deepcopy(config), dtype, trust_remote_code, architectures)
        modules = packed_modules(reader.config)
        self._quantizer = CompressedQuantizer(CompressedConfig(modules))
        self._paths = swap_linears(self._model, modules, self._quantizer)
        files = [reader.folder / shard for shard in reader.shards]
        check_files(self._model, self._paths, files, self._quantizer)
        self._sources = hf_conversion.sources(self._model, reader.tensors, self._quantizer)

    def load(self, index: int, device: torch.device) -> nn.Module:
        """Block `index` with its weights, on `device`, in the layouts that a loader chooses."""
        prefix = f"{self._path}.{index}."
        names = [
            name
            for parameter, found in self._sources.items()
            if parameter.startswith(prefix)
            for name, _ in found
        ]
        with self._reader.opened() as lazy:
            tensors = {name: lazy(name) for name in names}
            hf_conversion.load(self._model, tensors, self._dtype, self._quantizer)
        block = self._model.get_submodule(prefix[:-1]).to(device)
        own = {name: path for name, path in self._paths.items() if path.startswith(prefix)}
        placement.place(self._model, own, "auto")
        return block

    def free(self, index: int) -> None:
        """Return the memory of a block; it cannot be loaded again."""
        blocks = self._model.get_submodule(self._path)
        blocks[index] = nn.Identity()
