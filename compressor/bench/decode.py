"""End to end: greedy decoding with a static cache, the whole step of a token captured in one CUDA
graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

BATCHES = (1, 4, 16)
ROUND = 16  # tokens that are timed together


class Decoder:
    """Prompt, cache and the step that writes one token for each sequence of a batch."""

    def __init__(self, model: Any, batch: int, prompt: int, tokens: int) -> None:
        from transformers import StaticCache

        device = model.device
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + tokens)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator).to(
            device
        )
        self.position = torch.full((batch, 1), prompt, device=device)
        logits = model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1:].argmax(-1)

    def step(self) -> None:
        """One token more; everything stays in place, so that a graph can repeat it."""
        logits = self.model(
            input_ids=self.token,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def capture(self) -> Callable[[], None]:
        """The step as a CUDA graph; three steps are taken on the way."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


@torch.no_grad()
def measure_model(
    model: Any, label: str, batches: tuple[int, ...] = BATCHES, prompt: int = 32, tokens: int = 128
) -> list[dict]:
    """A row for each batch size: tokens a second over all sequences, and the peak memory since the
    model was there.
    """
    rows = []
    for batch in batches:
        torch.cuda.reset_peak_memory_stats()
        decoder = Decoder(model, batch, prompt, tokens + 8)
        step, note = decoder.step, ""
        try:
            step = decoder.capture()
        # some op of the model does not allow it: what users see without graphs is measured
        except RuntimeError as error:
            decoder = Decoder(model, batch, prompt, tokens + 8)
            step, note = decoder.step, f"not captured: {str(error).splitlines()[0]}"
        seconds = []
        for _ in range(tokens // ROUND):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(ROUND):
                step()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / ROUND)
        rows.append({
            "model": label, "batch": batch,
            "tokens_per_s": round(batch / statistics.median(seconds), 1),
            "ms_per_step": round(1e3 * statistics.median(seconds), 3),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            **({"note": note} if note else {}),
        })  # fmt: skip
        del decoder, step
    return rows
