"""Whole decoding on a CPU: prefill, and tokens one after the other with a static cache.

The dense and the packed model live in a process each, which take turns, so that both see the same
machine and the peak memory of each is its own. Times are the fastest of several.

    python -m compressor.bench.cpu_decode MODEL RUNTIME TOKENS THREADS

is such a process: it reads what to do, a line each time, and answers with a number.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from compressor.errors import CompressError

PROMPT = 128  # tokens of the prefill
TURN = 4  # tokens that are decoded in a turn
PREFILLS = 3  # of each, by turns
MODELS = {"dense": "dense", "compressed": "packed"}
"""Name in the results -> runtime."""


def measure_model(source: str, tokens: int) -> list[dict[str, Any]]:
    """A row for the dense model and one for the packed: tokens a second, seconds of the prefill and
    peak memory.

    Args:
        source: a compressed folder, or a name of `model_shapes.MODELS`.
        tokens: that each decodes, at least.

    Raises:
        CompressError: one of the processes ended.
    """
    turns = max(3, -(-tokens // TURN))
    with ExitStack() as stack:
        sides = {
            label: stack.enter_context(_process(source, runtime, TURN * turns))
            for label, runtime in MODELS.items()
        }
        for side in sides.values():
            side.answer()  # it has its model
        prefill = _fastest(sides, "prefill", PREFILLS)
        best = _fastest(sides, "decode", turns)
        peak = {label: side.ask("peak") for label, side in sides.items()}
    return [
        {
            "model": label,
            "batch": 1,
            "prefill_s": round(prefill[label], 3),
            "tokens_per_s": round(1 / best[label], 2),
            "ms_per_step": round(1e3 * best[label], 3),
            "peak_gb": round(peak[label] / 1e9, 3),
        }
        for label in sides
    ]


def _fastest(sides: Mapping[str, _Side], what: str, turns: int) -> dict[str, float]:
    """The least seconds of each side, which do `what` by turns."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(turns):
        for label, side in sides.items():
            best[label] = min(best[label], side.ask(what))
    return best


@contextmanager
def _process(source: str, runtime: str, tokens: int) -> Iterator[_Side]:
    command = [sys.executable, "-m", __name__, source, runtime, str(tokens)]
    command.append(str(torch.get_num_threads()))
    with tempfile.TemporaryFile("w+") as errors:
        side = _Side(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ),
            errors,
        )
        try:
            yield side
        finally:
            side.process.kill()
            side.process.communicate()


class _Side(NamedTuple):
    process: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, what: str) -> float:
        """The seconds of a `prefill`, those of the fastest token of a turn to `decode`, or the
        `peak` memory in bytes.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # what it had to say is read below
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> float:
        """The next number it says. Raises CompressError where it ended."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return float(line)
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines() or [f"exit code {code}"]
        raise CompressError(f"decoding ended before it was measured: {said[-1][:300]}")


class Decoder:
    """Greedy decoding of one sequence with a static cache."""

    @torch.no_grad()
    def __init__(self, model: Any, room: int, prompt: int = PROMPT) -> None:
        from transformers import StaticCache

        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + room)
        self.ids = torch.arange(prompt)[None] % model.config.vocab_size
        self.prefill()

    @torch.no_grad()
    def prefill(self) -> float:
        """The prompt, from the beginning; the seconds it took."""
        self.cache.reset()
        started = time.perf_counter()
        logits = self.model(
            input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self.token, self.place = logits[:, -1:].argmax(-1), self.prompt
        return time.perf_counter() - started

    @torch.no_grad()
    def step(self) -> float:
        """One token more; the seconds it took."""
        position = torch.tensor([[self.place]])
        started = time.perf_counter()
        logits = self.model(
            input_ids=self.token, position_ids=position, past_key_values=self.cache, use_cache=True
        ).logits
        self.token = logits[:, -1:].argmax(-1)
        self.place += 1
        return time.perf_counter() - started


def peak_memory() -> int:
    """Bytes that this process has held at most. On Linux `ru_maxrss` is not that: a process begins
    with what the one that started it had held.
    """
    import resource

    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held * (1 if sys.platform == "darwin" else 1024)


def serve(source: str, runtime: str, tokens: int) -> None:
    """Answer on standard output: 0 once the model is there, then whatever `_Side.ask` asks for."""
    from compressor.bench.model_shapes import MODELS as SHAPES
    from compressor.bench.model_shapes import random_model

    if source in SHAPES:
        model = random_model(source, runtime, torch.device("cpu"))
    else:
        from compressor.runtime.hf_transformers import load

        model = load(source, runtime=runtime)
    decoder = Decoder(model, tokens)
    answers = {
        "prefill": decoder.prefill,
        "decode": lambda: min(decoder.step() for _ in range(TURN)),
        "peak": peak_memory,
    }
    print(0, flush=True)
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
