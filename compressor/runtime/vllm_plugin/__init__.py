"""The vLLM plug-in: where this package is installed, `vllm serve OUT` understands a compressed
folder.

slicing.py        which part of each stored tensor a rank holds; no engine in it
fused.py          the linears of a checkpoint that are one layer of the engine; no engine in it
linear_method.py  how vLLM loads and computes such a layer
experts.py        the same for the experts of a mixture
config.py         `quantization_config` as vLLM reads it

vLLM calls `register` in each of its processes, whatever the model, so it is light and never fails.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import re

OLDEST = (0, 32)  # of vLLM: its classes for mixtures were others before


def register() -> None:
    """Teach vLLM the packed format. Its entry point `vllm.general_plugins` is this function; it may
    be called more than once.
    """
    log = logging.getLogger("vllm.compress_llm")  # below vLLM's own logger, to be printed as it is
    try:
        import vllm

        numbers = re.match(r"(\d+)\.(\d+)", vllm.__version__)
        if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
            log.warning(
                "compress-llm serves packed checkpoints with vLLM %d.%d or newer, this is %s",
                *OLDEST,
                vllm.__version__,
            )
            return
        from vllm.model_executor.layers.quantization import register_quantization_config

        from compressor.checkpoint.packed_config import QUANT_METHOD
        from compressor.runtime.vllm_plugin.config import CompressConfig

        register_quantization_config(QUANT_METHOD)(CompressConfig)
    except Exception as error:  # an engine must not fail for the sake of a model that is not ours
        reason = " ".join(str(error).split())[:300]
        log.warning("compress-llm cannot serve packed checkpoints with this vLLM: %s", reason)
