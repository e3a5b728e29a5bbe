"""How fast a model reads and writes: tokens a second of the prompt, and of what is generated after
it, one sequence at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

PROMPT, WRITTEN = 512, 64  # tokens
_REPEATS = 5


@torch.no_grad()
def measure_speed(
    model: Any, *, limit: int | None = None, prompt: int = PROMPT, written: int = WRITTEN
) -> dict[str, Any]:
    """Medians over a few repeats after one that warms up. `limit` is the model's context, which
    bounds the prompt.

    Returns:
        `prefill_tokens_per_second`, `decode_tokens_per_second`, the two lengths, and the device's
        name.
    """
    prompt = min(prompt, max(1, (limit or prompt + written) - written))
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )

    def read() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def read_and_write() -> None:
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(written):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

    reading = _median(read, model.device)
    writing = max(_median(read_and_write, model.device) - reading, 1e-9)
    name = (
        torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else model.device.type
    )
    return {
        "prefill_tokens_per_second": prompt / reading,
        "decode_tokens_per_second": written / writing,
        "prompt": prompt,
        "written": written,
        "device": name,
    }


def _median(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of `run`, the device's work included."""
    seconds = []
    for _ in range(1 + _REPEATS):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])
