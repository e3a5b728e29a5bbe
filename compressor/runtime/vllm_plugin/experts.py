"""Experts of a mixture: stored packed, unpacked into vLLM's dense stacks, which its kernels compute
from. They give the same numbers as elsewhere, but take no less memory than dense ones.

A kernel that computes from packed experts would have packed stacks here in place of the dense ones,
and an `apply` of its own.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

from compressor.errors import CheckpointError
from compressor.runtime.vllm_plugin.fused import DENSE, Entry, fitting, suffixes, unpacked

_STACKS = ("w13", "w2")  # what vLLM calls gate and up in one, and down


class CompressMoEMethod(UnquantizedFusedMoEMethod):
    """The experts of one layer.

    Args:
        moe: vLLM's description of the layer.
        stem: name of the experts' module, which stands before their numbers.
        entries: their packed matrices by name.
    """

    def __init__(self, moe: Any, stem: str, entries: Mapping[str, Entry]) -> None:
        super().__init__(moe)
        self.stem = stem
        self.forms: dict[frozenset[str], list[Entry]] = {}  # by the names of their tensors
        for entry in [*entries.values(), DENSE]:
            known = self.forms.setdefault(frozenset(suffixes(entry)), [])
            if entry not in known:
                known.append(entry)
        self.suffixes = {suffix for form in self.forms for suffix in form}
        self.carrier = min(suffix for suffix in self.suffixes if suffix != "weight")
        self.expected: dict[int, list[str]] = {}  # formats of each expert's matrices in config.json
        for name, entry in entries.items():
            expert = int(name[len(stem) + 1 :].partition(".")[0])
            self.expected.setdefault(expert, []).append(entry["format"])
        self.found: dict[int, list[str]] = {}  # the same, of the matrices that have come
        self.stored: dict[tuple[int, str], dict[str, Tensor]] = {}  # those not complete yet

    @property
    def supports_eplb(self) -> bool:
        """Copies of experts on several ranks were not tried."""
        return False

    def create_weights(self, layer: Any, *args: Any, **attrs: Any) -> None:
        """vLLM's dense stacks, and an empty parameter for each name of a stored tensor.

        Until all is loaded a stack goes by the name of a tensor that is on disk, for vLLM misses a
        parameter of which nothing was loaded.
        """
        super().create_weights(layer, *args, **attrs)
        self.fill = attrs["weight_loader"]
        self.dummy = get_current_vllm_config().load_config.load_format == "dummy"
        for stack in _STACKS:
            dense = layer._parameters.pop(f"{stack}_weight")
            for suffix in self.suffixes:
                empty = nn.Parameter(torch.empty(0), requires_grad=False)
                door: Any = dense if suffix == self.carrier else empty
                door.weight_loader = partial(self.load, layer, suffix)
                layer.register_parameter(f"{stack}_{suffix}", door)

    def load(
        self,
        layer: Any,
        suffix: str,
        param: Any,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Called by vLLM's loader with a tensor of one expert's matrix `shard_id`; tells it whether
        that expert is on this rank.
        """
        here = layer._map_global_expert_id_to_local_expert_id(expert_id) != -1
        if here:
            tensors = self.stored.setdefault((expert_id, shard_id), {})
            tensors[suffix] = loaded_weight
            names = frozenset(tensors)
            # where those of 2:4 are there, those of ARMOR may still come
            if names in self.forms and not any(names < form for form in self.forms):
                self._unpack(layer, expert_id, shard_id)
        return here if return_success else None

    def _unpack(self, layer: Any, expert_id: int, shard_id: str) -> None:
        tensors = self.stored.pop((expert_id, shard_id))
        entries = self.forms.get(frozenset(tensors))
        if entries is None:
            raise CheckpointError(
                f"the checkpoint lacks tensors of {self.stem}.{expert_id}: of its matrix "
                f"{shard_id} it has only {', '.join(sorted(tensors))}"
            )
        stack = "w2" if shard_id == "w2" else "w13"
        dense = getattr(layer, f"{stack}_{self.carrier}")
        try:
            entry = fitting(entries, tensors)  # vLLM does not say which matrix of config.json it is
            weight = unpacked(entry, tensors, dense.dtype).dense()
        except ValueError as error:
            raise CheckpointError(f"{self.stem}.{expert_id} is damaged: {error}") from None
        self.fill(dense, weight, f"{stack}_weight", shard_id=shard_id, expert_id=expert_id)
        self.found.setdefault(expert_id, []).append(entry["format"])

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all matrices have come, each in its form, and leave the stacks to vLLM."""
        if f"{_STACKS[0]}_{self.carrier}" in layer._parameters:
            for expert_id, shard_id in list(self.stored):
                self._unpack(layer, expert_id, shard_id)
            if not self.dummy:
                self._check(layer)
            for stack in _STACKS:
                doors = {s: layer._parameters.pop(f"{stack}_{s}") for s in self.suffixes}
                doors[self.carrier].weight_loader = self.fill
                layer.register_parameter(f"{stack}_weight", doors[self.carrier])
        super().process_weights_after_loading(layer)

    def _check(self, layer: Any) -> None:
        matrices = 3 if layer.moe_config.is_act_and_mul else 2
        for expert, packed in self.expected.items():
            if layer._map_global_expert_id_to_local_expert_id(expert) == -1:
                continue
            due = sorted(packed + [DENSE["format"]] * (matrices - len(packed)))
            found = sorted(self.found.get(expert, []))
            if found != due:
                raise CheckpointError(
                    f"config.json says that the matrices of {self.stem}.{expert} are stored as "
                    f"{', '.join(due)}; in the checkpoint there are {', '.join(found) or 'none'}"
                )
