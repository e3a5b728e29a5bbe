"""How vLLM loads and computes a layer of linears of which some are packed."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)

from compressor.errors import CheckpointError
from compressor.formats import form_class
from compressor.runtime.placement import asked_by_environment
from compressor.runtime.vllm_plugin.fused import DENSE, Entry, Part, allocate, suffixes
from compressor.runtime.vllm_plugin.slicing import Share, obstacle
from compressor_kernels.layouts import kernel_layout

logger = init_logger(f"vllm.{__name__}")

_QKV = ("q", "k", "v", "index_q", "index_k")  # what vLLM calls the parts of an attention's input
_INDICES = {"weight_metadata": torch.int16, "weight_pivots": torch.int32}


class CompressLinearMethod(LinearMethodBase):
    """One layer of vLLM; `entries` are the linears of the checkpoint that it is made of, by name,
    in its order.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self.suffixes = dict.fromkeys(s for entry in entries.values() for s in suffixes(entry))
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Take the memory for this rank's share. For vLLM to load into, the layer has an empty
        parameter of the name of each stored tensor.
        """
        device = torch.empty(0).device  # vLLM makes a model under the device that it runs on
        shards = _shards(layer, self.entries)
        local = (sum(output_partition_sizes), input_size_per_partition)
        packed = _runs_packed(params_dtype, device)
        parts = [
            Part(name, entry, share, _held_packed(name, entry, share, packed, layer))
            for (name, entry), share in zip(
                self.entries.items(), _shares(layer, shards, *local, input_size), strict=True
            )
        ]
        layer.compress_parts = dict(zip(shards, parts, strict=True))
        layer.compress_segments = allocate(parts, params_dtype, device)
        layer.compress_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        for suffix in self.suffixes:
            dtype = _INDICES.get(suffix, params_dtype)
            door: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            door.weight_loader = partial(_load, layer, suffix)
            layer.register_parameter(suffix, door)

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything has come, and put what computes in place of what was loaded."""
        if hasattr(layer, "compress_modules"):
            return
        if not layer.compress_dummy:
            for part in layer.compress_parts.values():
                part.check()
        for suffix in self.suffixes:
            delattr(layer, suffix)
        modules = [one.module(", ".join(self.entries)) for one in layer.compress_segments]
        alone = [segment.entry for segment in layer.compress_segments] == [DENSE]
        del layer.compress_segments, layer.compress_parts
        if alone:  # vLLM goes on as if the weight had never been packed
            layer.weight, layer.compress_modules = modules[0].weight, None
            self.dense.process_weights_after_loading(layer)
            return
        layer.compress_modules = nn.ModuleList(modules)
        for module in modules:
            if isinstance(module, nn.Linear):
                self.dense.process_weights_after_loading(module)
            else:
                module.prepare_()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[tokens, in]` -> `[tokens, out]` of this rank. The bias is the layer's own, which vLLM
        gives to one rank alone where the outputs of all are added up.
        """
        if layer.compress_modules is None:
            return self.dense.apply(layer, x, bias)
        outputs = [
            self.dense.apply(module, x) if isinstance(module, nn.Linear) else module(x)
            for module in layer.compress_modules
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias


def _load(
    layer: Any, suffix: str, param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None
) -> None:
    """Called by vLLM's loader with a tensor of the checkpoint; the shard says of which linear."""
    parts: dict[Any, Part] = layer.compress_parts
    if loaded_shard_id not in parts:
        names = ", ".join(part.name for part in parts.values())
        raise CheckpointError(f"{_unknown(names)}: it loads a part {loaded_shard_id!r}")
    parts[loaded_shard_id].load(suffix, loaded_weight)


def _runs_packed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether linears compute from packed weights. By itself a CPU unpacks them: vLLM's own
    products of dense weights are fast there. Raises UsageError where the environment asks for
    something unknown.
    """
    runtime = asked_by_environment()
    if runtime != "auto":
        return runtime == "packed"
    probe = torch.empty(1, 8, dtype=dtype, device=device)
    runs = device.type != "cpu" and kernel_layout(probe) is not None
    how = "compute from packed weights" if runs else "are unpacked to dense weights"
    logger.info_once("packed linears on %s in %s %s", device.type, dtype, how)
    return runs


def _held_packed(name: str, entry: Entry, share: Share, packed: bool, layer: Any) -> bool:
    """Whether a linear stays as it is stored. Thin factors do anywhere, forms with zeros where
    kernels run; but not where a border between ranks goes through a block.
    """
    if entry == DENSE or (not packed and form_class(entry["format"]).SPARSE):
        return False
    reason = obstacle(entry, share)
    if reason and layer.tp_rank == 0:
        logger.warning("%s is unpacked to a dense weight on each rank: %s", name, reason)
    return not reason


def _shards(layer: Any, entries: Mapping[str, Entry]) -> list[Any]:
    """What vLLM's loader calls each of the linears that the layer is made of."""
    count = len(entries)
    if count == 1:
        return [None]
    pieces = len(getattr(layer, "output_sizes", ()))
    if isinstance(layer, QKVParallelLinear) and count == pieces:
        return list(_QKV[:count])
    if isinstance(layer, MergedColumnParallelLinear) and count <= pieces:
        several = pieces - count + 1  # of Qwen 3.5's two linears the first is three of four pieces
        return [0 if several == 1 else tuple(range(several)), *range(several, pieces)]
    raise CheckpointError(_unknown(", ".join(entries)))


def _unknown(names: str) -> str:
    return (
        f"compress-llm does not know how this vLLM fuses {names}; `compress unpack` makes a plain "
        "checkpoint of the folder"
    )


def _shares(layer: Any, shards: list[Any], rows: int, columns: int, inputs: int) -> list[Share]:
    """What this rank holds of each linear of the layer. vLLM's own loader says so: it is given
    indices in place of weights.

    Args:
        rows, columns: of the layer's weight on this rank; `inputs` are those of all ranks.
    """
    everything = torch.arange(inputs, device="cpu")
    span = everything if columns == inputs else _probe(layer, everything[None], (1, columns), 1)[0]
    start = int(span[0])
    if not torch.equal(span, everything[start : start + columns]):
        raise CheckpointError(_unknown(layer.prefix))
    shares, position, outputs = [], 0, torch.arange(layer.output_size, device="cpu")
    for shard in shards:
        filled = _probe(layer, outputs, (rows,), 0, *(() if shard is None else (shard,)))
        places = (filled >= 0).nonzero().flatten()
        whole = rows == layer.output_size and torch.equal(filled[places], outputs[: len(places)])
        shares.append(Share(filled[places], start, start + columns, inputs, whole))
        position += len(places)
        if int(places[-1]) != position - 1 or int(places[0]) != position - len(places):
            raise CheckpointError(_unknown(layer.prefix))
    if position != rows:
        raise CheckpointError(_unknown(layer.prefix))
    return shares


def _probe(layer: Any, index: Tensor, shape: tuple[int, ...], dim: int, *shard: Any) -> Tensor:
    """A tensor of `shape`, -1 where the layer's loader puts nothing of `index` into it."""
    probe = nn.Parameter(torch.full(shape, -1, device="cpu"), requires_grad=False)
    setattr(probe, ("output_dim", "input_dim")[dim], dim)
    layer.weight_loader(probe, index, *shard)
    return probe.detach()
