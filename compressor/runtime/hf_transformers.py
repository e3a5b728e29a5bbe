"""The transformers plug-in: importing this module makes `from_pretrained` understand compressed
folders.

    import compressor.runtime
    model = AutoModelForCausalLM.from_pretrained("out")

It registers a quantiser that swaps each linear named in config.json for a module holding its packed
form. On a GPU it then computes from the packed weight; without one the weights are unpacked once
after loading and the model runs dense (placement.py). Its state stays the packed one either way.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.checkpoint.packed_config import GUARD, QUANT_METHOD, VERSION, packed_modules
from compressor.checkpoint.reader import Reader, check_sizes
from compressor.errors import CheckpointError, CompressError
from compressor.formats import form_class
from compressor.model.hf_conversion import whole_names
from compressor.runtime import placement
from compressor.runtime.modules import packed_module
from compressor.runtime.packed_experts import PackedExperts, swap_experts

_RUNTIME: ContextVar[str] = ContextVar("runtime", default="auto")  # what `load` was asked for


class CompressedConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder: `modules` maps each packed linear to its
    format.
    """

    def __init__(self, modules: Any = None, version: Any = VERSION, **_: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' own names are an enum, others are text
        self.version = version
        self.modules = packed_modules(
            {
                "quantization_config": {
                    "quant_method": QUANT_METHOD,
                    "version": version,
                    "modules": modules,
                }
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"quant_method": QUANT_METHOD, "version": self.version, "modules": self.modules}


class CompressedQuantizer(HfQuantizer):
    """Swaps modules before loading, unpacks them on the CPU after loading."""

    requires_calibration = True
    quantization_config: CompressedConfig
    paths: dict[str, str]  # module of each packed linear

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the weight files are looked for, in transformers 5.23; the plug-in is here,
        so the guard may go.
        """
        if getattr(config, "transformers_weights", None) == GUARD:
            config.transformers_weights = None
        return config

    update_tp_plan = update_attn_implementation  # its place in transformers 5.17

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:  # type: ignore[override]  # up to 5.20 without the model
        """Patterns that take whole names, and no renaming of `weight_v`: to transformers half a
        weight norm, here a factor.
        """
        kept = [
            step
            for step in weight_conversions
            if not any("weight_v" in name for name in step.source_patterns)
        ]
        for step in kept:
            step.compiled_sources = whole_names(step.compiled_sources)
        return super().update_weight_conversions(kept, *model)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        entries, modules = self.quantization_config.modules, dict(model.named_modules())
        self.paths = {name: name for name in entries if name in modules}
        for name in self.paths:
            setattr(
                model.get_submodule(name.rpartition(".")[0]),
                name.rpartition(".")[2],
                packed_module(name, modules[name], entries[name]),
            )
        stacked = [name for name in entries if name not in modules]
        if stacked:
            self.paths |= swap_experts(
                model, stacked, lambda name, module: packed_module(name, module, entries[name])
            )
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model._compress_runtime = placement.place(model, self.paths, _RUNTIME.get())
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called by `save_pretrained` just before it saves the config, which drops
        `transformers_weights`: put the guard back.
        """
        config = model.config

        def save_once(directory: str | Path, **options: Any) -> None:
            del config.__dict__["save_pretrained"]
            config.save_pretrained(directory, **options)
            path = Path(directory) / "config.json"
            path.write_text(
                json.dumps(
                    {**json.loads(path.read_text()), "transformers_weights": GUARD}, indent=2
                )
                + "\n"
            )

        config.__dict__["save_pretrained"] = save_once
        return None, {}

    def is_serializable(self) -> bool:  # type: ignore[override]  # the base's is declared without a value
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]  # the base's is declared without a value
        """Packed weights are frozen, but thin factors are plain matrices."""
        entries = self.quantization_config.modules.values()
        return any(form_class(entry["format"]).TRAINABLE for entry in entries)

    @property
    def is_qat_trainable(self) -> bool:
        """What transformers' Trainer asks for where no adapter is attached."""
        return self.is_trainable

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        for name, path in self.paths.items():
            module = model.get_submodule(path)
            _unpack(name, module)
            if path == name:
                linear = nn.Linear(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    device="meta",
                )
                linear.weight, linear.bias = (
                    nn.Parameter(module.weight, requires_grad=False),
                    module.bias,
                )
                _replace(model, path, linear, dtype)
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedExperts):
                _replace(model, path, module.dense(), dtype)
        return model


def _replace(model: Any, path: str, module: nn.Module, dtype: torch.dtype | str | None) -> None:
    if dtype is not None:
        module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _unpack(name: str, module: Any) -> None:
    try:
        module.unpack_()
    except ValueError as error:
        raise CheckpointError(f"{name} is damaged: {error}") from None


def runtimes(model: Any) -> dict[str, str]:
    """How each packed linear of a loaded model computes, by name; nothing for a plain model."""
    return dict(getattr(model, "_compress_runtime", {}))


def load(path: str | Path, *, runtime: str = "auto", **options: Any) -> Any:
    """A compressed (or plain) checkpoint as a transformers causal language model, ready to
    generate.

    Args:
        path: folder or Hub id.
        runtime: `packed` computes from the packed weights, `dense` unpacks them, `auto` takes what
            is faster (`runtimes` lists it). On the CPU `auto` is dense, and `packed` unpacks at
            every call.
        options: for `AutoModelForCausalLM.from_pretrained`; `dtype` defaults to the stored one.

    Raises:
        CheckpointError: files that do not hold together, weights that are missing, or packed
            tensors that config.json does not list. Transformers would go on with random weights and
            a warning.
        UsageError: an unknown `runtime`.
    """
    placement.check(runtime)
    options = {"dtype": "auto", **options}
    asked = _RUNTIME.set(runtime)
    try:
        if Path(path).is_dir():
            reader = Reader(Path(path))
            check_sizes(
                reader,
                AutoConfig.from_pretrained(
                    path, trust_remote_code=options.get("trust_remote_code", False)
                ),
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, **options, output_loading_info=True
        )
    except CompressError:
        raise
    except Exception as error:  # transformers raises many kinds on a folder it cannot load
        raise CheckpointError(
            f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    finally:
        _RUNTIME.reset(asked)
    model, info = loaded
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    stray = [name for name in info["unexpected_keys"] if ".weight_" in name]
    for problem, names in (
        ("lacks", set(info["missing_keys"]) - tied),
        ("does not list in config.json", stray),
    ):
        if names:
            raise CheckpointError(
                f"{path} {problem} {min(names)} ({len(names)} tensors in all): its weights cannot "
                f"be trusted"
            )
    return model.eval()


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(CompressedConfig)
    register_quantizer(QUANT_METHOD)(CompressedQuantizer)
