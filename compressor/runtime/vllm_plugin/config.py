"""`quantization_config` of a compressed folder, as vLLM reads it."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from compressor.checkpoint.packed_config import QUANT_METHOD, packed_modules, shared_tensors
from compressor.errors import CheckpointError
from compressor.runtime.placement import asked_by_environment
from compressor.runtime.vllm_plugin.fused import DENSE

logger = init_logger(f"vllm.{__name__}")

_TRACKED = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "dummy")


class CompressConfig(QuantizationConfig):
    """Which linears are packed, and how. vLLM makes it from config.json and pickles it into each of
    its processes.
    """

    def __init__(self, modules: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules = modules

    def get_name(self) -> str:
        """As in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What a model may compute in."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: what vLLM needs. Where our kernels do not run, weights are unpacked."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressConfig:
        """Raises CheckpointError where the table is malformed or of a newer version, or lists
        matrices of experts that are together in one tensor of the dense checkpoint: vLLM has a way
        of its own to load each such family.
        """
        modules = packed_modules({"quantization_config": config})
        if shared := shared_tensors(modules):
            raise CheckpointError(
                f"{next(iter(shared))} holds all experts of a block, and packed they cannot be "
                f"served by vLLM: serve what `compress unpack` makes of the checkpoint"
            )
        return cls(modules)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Note in the model's config how its linears compute: vLLM keeps compiled graphs under a
        hash of that config, and takes them up again.
        """
        if hf_config is not None:
            hf_config.compress_runtime = asked_by_environment()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Name the linears as vLLM does."""
        # To transformers, whose renamings the list shares with the loader, `weight_v` is half a
        # weight norm; here it is a factor.
        renamings = hf_to_vllm_mapper.orig_to_new_renaming
        renamings[:] = [
            step for step in renamings if not any("weight_v" in one for one in step.source_patterns)
        ]
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM holds and computes the layer `prefix`; None leaves it to vLLM."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase

        if isinstance(layer, LinearBase):
            return self._linear(prefix)
        return self._experts(layer, prefix) if isinstance(layer, RoutedExperts) else None

    def _linear(self, prefix: str) -> Any:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from compressor.runtime.vllm_plugin.linear_method import CompressLinearMethod

        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{leaf}".lstrip(".") for leaf in leaves]
        entries = {name: self.modules.get(name, DENSE) for name in names}
        if all(entry == DENSE for entry in entries.values()):
            return UnquantizedLinearMethod()
        _track_weights()
        return CompressLinearMethod(entries)

    def _experts(self, layer: Any, prefix: str) -> Any:
        from compressor.runtime.vllm_plugin.experts import CompressMoEMethod

        stem = prefix.removesuffix(".routed_experts")
        own = {name: entry for name, entry in self.modules.items() if name.startswith(f"{stem}.")}
        if not own:
            return None
        _track_weights()
        return CompressMoEMethod(layer.moe_config, stem, own)


def _track_weights() -> None:
    """Have vLLM refuse a checkpoint that lacks a tensor; by itself it does so for plain models
    only, and serves what happens to be in memory.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_format = str(get_current_vllm_config().load_config.load_format)
    if load_format not in _TRACKED:
        logger.warning_once(
            "with the load format %s only missing tensors of packed linears are noticed",
            load_format,
        )
    load = DefaultModelLoader.load_weights
    if hasattr(load, "tracks_compressed"):
        return

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        if model_config.quantization == QUANT_METHOD and self.enable_weights_track is None:
            self.enable_weights_track = True
        load(self, model, model_config)

    load_weights.tracks_compressed = True  # type: ignore[attr-defined]
    DefaultModelLoader.load_weights = load_weights
