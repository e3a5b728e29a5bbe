"""The transformers plug-in: importing this module makes `from_pretrained` understand compressed
folders.

    import compressor.runtime
    model = AutoModelForCausalLM.from_pretrained("out")

It registers a quantiser that swaps each linear named in config.json for a module holding its packed
form. On a GPU it then computes from the packed weight; without one the weights are unpacked once
after loading and the model runs dense (placement.py). Its state stays the packed one either way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from threading import RLock
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor.checkpoint.dequantised import DequantisedReader, open_model
from compressor.checkpoint.packed_config import (
    AT,
    GUARD,
    QUANT_METHOD,
    TENSOR,
    TRANSPOSED,
    VERSION,
    packed_modules,
    place_of,
)
from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError, CompressError, UsageError
from compressor.formats import form_class
from compressor.model import hf_conversion
from compressor.model.architecture import check_sizes
from compressor.model.hf_conversion import whole_names
from compressor.model.language_model import named_class, on_meta, wrapper_class
from compressor.model.whole import load_dequantised
from compressor.runtime import guard, placement
from compressor.runtime.completeness import check_files, check_loaded
from compressor.runtime.dequantize import make_plain
from compressor.runtime.modules import packed_module
from compressor.runtime.packed_experts import swap_experts

_RUNTIME: ContextVar[str] = ContextVar("runtime", default="auto")  # what `load` was asked for

# transformers replaces methods of its classes while it loads a model: of two at once, one puts back
# what the other put there, and no later model of the process has its weights tied
_LOADING = RLock()


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

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dictionary: transformers asks so of the config of a model that is handed to
        `from_pretrained`.
        """
        return self.to_dict().get(key, default)


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
            del config.transformers_weights
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

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> Any:
        self.paths = swap_linears(model, self.quantization_config.modules, self)
        self.from_files = checkpoint_files is not None
        if checkpoint_files is not None:
            check_files(model, self.paths, [Path(file) for file in checkpoint_files], self)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if not self.from_files:
            check_loaded(model)
        model._compress_runtime = placement.place(model, self.paths, _RUNTIME.get())
        return model

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
        """Whether the Trainer of transformers, which alone asks for it, may train the model.

        Raises:
            UsageError: it may not. Transformers would recommend adapters, which peft does not
                attach to packed linears.
        """
        if not self.is_trainable:
            raise UsageError(
                "packed 2:4 weights are frozen: call model.dequantize() and train that, whole or "
                "with adapters; or train the factors of a model made by compress lowrank"
            )
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """The plain model, in place: see `dequantize.make_plain`."""
        wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        known = isinstance(wanted, torch.dtype) and wanted.is_floating_point
        if wanted is not None and not known:
            raise UsageError(
                f"dtype is {dtype!r}; accepted: a floating dtype of torch, or its name"
            )
        make_plain(model, wanted if isinstance(wanted, torch.dtype) else None)
        self.remove_quantization_config(model)
        for module in model.modules():  # some families look whether their config has it
            if config := vars(module).get("config"):
                vars(config).pop("_is_quantized", None)
        vars(model).pop("_compress_runtime", None)
        return model


def swap_linears(
    model: Any, entries: Mapping[str, Mapping[str, Any]], quantizer: Any
) -> dict[str, str]:
    """Put an empty packed module in the place of every linear that `entries` lists.

    Args:
        model: on the meta device.
        entries: name on disk of each packed linear -> how it is stored.
        quantizer: of transformers; it changes how names are converted.

    Returns:
        The path of each packed linear's module in this model. A class without the head, say, has
        shorter ones than the one that was saved.

    Raises:
        CheckpointError: names that this model does not have, or entries that cannot be of it.
    """
    modules = dict(model.named_modules())

    def make(name: str, module: Any, turned: bool | None) -> Any:
        packed: Any = packed_module(name, module, entries[name])
        if turned is not None and turned != (entries[name].get(TRANSPOSED) is True):
            stored = "[in, out]" if turned else "[out, in]"
            raise CheckpointError(
                f"config.json is wrong about {name}: a {model.config.model_type} model has it as "
                f"{stored}"
            )
        packed.__dict__["entry"] = entries[name]  # for `dequantize`
        return packed

    paths, stacked = {}, []
    places = {name: place_of(entry) for name, entry in entries.items()}
    shared = {name: place for name, place in places.items() if TENSOR in place}
    names = [f"{name}.weight" for name in entries if name not in shared]
    for parameter, tensors in hf_conversion.sources(model, names, quantizer).items():
        path, found = (
            parameter.removesuffix(".weight"),
            [t.removesuffix(".weight") for t, _ in tensors],
        )
        if path not in modules or len(found) > 1:
            stacked += found
            continue
        parent, _, leaf = path.rpartition(".")
        packed = make(found[0], modules[path], isinstance(modules[path], Conv1D))
        packed.__dict__["original"] = modules[path]  # no submodule: `dequantize` fills it again
        setattr(model.get_submodule(parent), leaf, packed)
        paths[found[0]] = path
    dense = {place[TENSOR] for place in shared.values()}
    stacks = hf_conversion.sources(model, dense, quantizer)
    stack_of = {tensor: stack for stack, tensors in stacks.items() for tensor, _ in tensors}
    by_path = {}
    for name, place in shared.items():
        inside, _, stack = stack_of[place[TENSOR]].rpartition(".")
        by_path[f"{inside}.{place[AT]}.{stack}"] = name
    return paths | swap_experts(model, stacked, by_path, make) if stacked or shared else paths


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
    if "torch_dtype" in options:  # its older name
        options["dtype"] = options.pop("torch_dtype")
    told = options.pop("output_loading_info", False)
    options = {"dtype": "auto", **options}
    if options.get("quantization_config", ...) is None:
        del options["quantization_config"]  # no wish; transformers would drop the folder's own
    asked = _RUNTIME.set(runtime)
    try:
        reader = _checked(Path(path) / (options.get("subfolder") or ""), options)
        loaded: Any
        with _LOADING:
            if isinstance(reader, DequantisedReader):
                loaded = load_dequantised(reader, **options, output_loading_info=True)
            else:
                loaded = _auto_class(path, options, reader).from_pretrained(
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
    if missing := info["missing_keys"]:
        raise CheckpointError(
            f"{path} lacks {min(missing)} ({len(missing)} tensors in all): its weights cannot be "
            f"trusted"
        )
    if stray := [name for name in info["unexpected_keys"] if ".weight_" in name]:
        raise CheckpointError(
            f"{path} does not list in config.json {min(stray)} ({len(stray)} tensors in all): its "
            f"weights cannot be trusted"
        )
    return (model.eval(), info) if told else model.eval()


def _auto_class(path: str | Path, options: Mapping[str, Any], reader: Reader | None) -> Any:
    """What loads a checkpoint as a language model: the multimodal class where its family has no
    other, or none that knows the names of its weights.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = ("trust_remote_code", "revision", "subfolder", "token", "cache_dir")
    asked = {name: options[name] for name in named if name in options}
    config = options.get("config") or AutoConfig.from_pretrained(path, **asked)
    kind = getattr(config, "model_type", None)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    if causal and not (reader and _unknown_names(reader, config)):
        return AutoModelForCausalLM
    for auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        known = getattr(transformers, auto, None)
        if known is not None and type(config) in known._model_mapping:
            return known
    return named_class(config, config.architectures or ()) or AutoModelForCausalLM


def _unknown_names(reader: Reader, config: Any) -> bool:
    """Whether the causal class of a multimodal family does not find its embeddings in the
    checkpoint, which was saved by the multimodal one (Emu3).
    """
    wrapper = wrapper_class(config, config.architectures or ())
    mapping = AutoModelForCausalLM._model_mapping
    if wrapper is None or (type(config) in mapping and mapping[type(config)] is wrapper):
        return False
    model = on_meta(copy.deepcopy(config), torch.float32, False)
    embeddings = model.get_input_embeddings()
    names = {f"{name}.weight" for name, module in model.named_modules() if module is embeddings}
    shape = tuple(embeddings.weight.shape)
    alike = [name for name, entry in reader.tensors.items() if entry.shape == shape]
    return not names & hf_conversion.sources(model, alike).keys()


def _checked(folder: Path, options: Mapping[str, Any]) -> Reader | None:
    """The checkpoint of a local folder. Raises CheckpointError where its config.json is not of its
    weights.
    """
    if not folder.is_dir() or options.get("variant") or options.get("config"):
        return None
    reader, code = open_model(folder), options.get("trust_remote_code", False)
    check_sizes(reader, AutoConfig.from_pretrained(folder, trust_remote_code=code))
    return reader


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(CompressedConfig)
    register_quantizer(QUANT_METHOD)(CompressedQuantizer)
    guard.keep()
