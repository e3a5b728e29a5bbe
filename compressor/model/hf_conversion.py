"""Names and layouts on disk against those of transformers' modules: its own conversion machinery,
applied to some of the tensors.

That machinery is not a documented interface: pyproject.toml declares the range of versions it was
tested with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from compressor.errors import CheckpointError

Sources = dict[str, list[tuple[str, str | None]]]
"""Parameter -> the tensors on disk it is made from, each with the pattern of the conversion that it
matched, or None.
"""


def sources(model: Any, names: Iterable[str], quantizer: Any = None) -> Sources:
    """Where the tensors `names` on disk go; one that no parameter of `model` takes is listed under
    the name it would have. A `quantizer` of transformers may change the conversions.
    """
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _steps(model, quantizer)
    state = model.state_dict()
    found: Sources = {}
    for name in names:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and name in state:
            target, pattern = name, None
        found.setdefault(target, []).append((name, pattern))
    return found


def order(model: Any) -> list[str]:
    """The patterns of all conversions; those of one conversion in the order in which it puts their
    tensors together.
    """
    return [pattern for converter in _steps(model)[1] for pattern in converter.source_patterns]


def reordering(model: Any) -> set[str]:
    """The patterns of conversions that do more than put tensors together, take them apart or turn
    them: gate and up that are interleaved on disk.
    """
    from transformers import core_model_loading

    names = ("Transpose", "Concatenate", "MergeModulelist", "Chunk", "SplitModulelist")
    orderly = tuple(getattr(core_model_loading, name) for name in names)
    return {
        pattern
        for converter in _steps(model)[1]
        for pattern in converter.source_patterns
        if not all(isinstance(operation, orderly) for operation in converter.operations)
    }


def targets(model: Any, names: Iterable[str], quantizer: Any = None) -> set[str]:
    """Every parameter that gets something of the tensors `names`, where one tensor is taken apart
    into several too.
    """
    found = sources(model, names, quantizer)
    reached = set(found)
    parts = {
        pattern: converter.target_patterns
        for converter in _steps(model, quantizer)[1]
        for pattern in converter.source_patterns
    }
    for parameter, tensors in found.items():
        for first, *rest in {tuple(parts[p]) for _, p in tensors if p is not None}:
            reached |= {parameter.replace(first, other) for other in rest}
    return reached


def saving_steps(model: Any, stacks: Iterable[str]) -> list[Any]:
    """The conversions that `save_pretrained` has to turn round, given that the parameters `stacks`
    were not loaded through the conversion that makes them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    leaves = tuple({stack.rpartition(".")[2] for stack in stacks})
    used = list(getattr(model, "_weight_conversions", None) or [])
    seen = {tuple(step.source_patterns) for step in used}
    makers = [
        step
        for step in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(step, WeightConverter)
        and tuple(step.source_patterns) not in seen
        and any(target.endswith(leaves) for target in step.target_patterns)
    ]
    return used + makers


def _steps(model: Any, quantizer: Any = None) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model, None, quantizer)
    return [step for step in mapping if isinstance(step, WeightRenaming)], [
        step for step in mapping if isinstance(step, WeightConverter)
    ]


def whole_names(patterns: re.Pattern[str]) -> re.Pattern[str]:
    """The compiled patterns of a conversion, each made to end where a name does, as transformers
    has them from 5.21 on.

    Before, a pattern for `w1.weight` takes `w1.weight_values` too. Later versions are left alone:
    they have patterns that are meant to end within a name.
    """
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) >= Version("5.21"):
        return patterns
    return re.compile(re.sub(r"(?<=\w)\)(?=\|\(\?P<g|$)", r"(?!\\w))", patterns.pattern))


def load(model: Any, tensors: Mapping[str, Any], dtype: torch.dtype, quantizer: Any = None) -> None:
    """Load `tensors` (name on disk -> lazy slice) into the parameters they belong to, in `dtype`,
    or in the one that the family keeps some of them in. A `quantizer` of transformers may change
    the conversions. Raises CheckpointError.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: Any = get_model_conversion_mapping(model, None, quantizer)
    kept: Any = model._get_dtype_plan(dtype)
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(
            model,
            dict(tensors),
            LoadStateDictConfig(
                device_map={"": "cpu"}, dtype=dtype, dtype_plan=kept, weight_mapping=mapping
            ),
            disk_offload_index=None,
        )
    for what, found in (
        ("does not fit", info.mismatched_keys),
        ("cannot be converted", info.conversion_errors),
    ):
        if found:
            raise CheckpointError(
                f"{str(next(iter(found)))[:200]} {what} the {model.config.model_type} model of "
                f"config.json"
            )
    model.tie_weights()  # parameters were replaced, so ties made earlier are gone


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers' own for each block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
