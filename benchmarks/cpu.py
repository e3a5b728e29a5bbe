"""Packed weights on this CPU against torch's dense products: one linear at a time, and decoding.

    python benchmarks/cpu.py                   everything, in less than eight minutes
    python benchmarks/cpu.py --part linears    … decoding
    python benchmarks/cpu.py --packed DIR      decoding with a packed folder as well

Times are minima over repetitions in which all candidates take turns, each call on a weight that is
no longer in the cache; ratios are those of minima of one run. Decoding runs in one process for each
model, which take turns too; peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.doctor import _processor
from compressor_kernels.cpu import ops
from compressor_kernels.cpu.build import kernels
from compressor_kernels.linear import ArmorLinear, LowRankLinear, Sparse24Linear

SHAPES = ((2048, 2048), (5632, 2048), (4096, 4096), (4096, 14336))
CACHED = 300_000_000  # bytes that are more than any cache here holds
TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip


def random_positions(out: int, words: int) -> Tensor:
    """Metadata of a 2:4 weight, int16 `[out, words]`: every group names two columns."""
    pairs = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.int16)
    found = torch.zeros(out, words, dtype=torch.int16)
    for nibble in range(4):
        found |= pairs[torch.randint(6, found.shape, dtype=torch.uint8).int()] << 4 * nibble
    return found


def random_packed(out: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A stored 2:4 weight with random values and positions, made without a dense matrix."""
    values = torch.randn(out, columns // 2, dtype=dtype) / columns**0.5
    return {"weight_values": values, "weight_metadata": random_positions(out, -(-columns // 16))}


def module(kind: str, out: int, columns: int, dtype: torch.dtype) -> Any:
    """A prepared linear: 2:4, ARMOR with at most 12.5 % more, or low rank at half the weights."""
    common = {"bias": False, "dtype": dtype}
    if kind == "lowrank":
        rank = out * columns // (2 * (out + columns))
        made: Any = LowRankLinear(columns, out, rank=rank, **common)
        nn.init.normal_(made.weight_u)
        nn.init.normal_(made.weight_v, std=columns**-0.5)
    else:
        state = random_packed(out, columns, dtype)
        if kind == "sparse24":
            made = Sparse24Linear(columns, out, **common)
        else:
            size = 1 << (out * columns // (8 * (out + columns))).bit_length() - 1
            made = ArmorLinear(columns, out, block_a=size, block_b=size, **common)
            for name, features in (("weight_a", out), ("weight_b", columns)):
                state[name] = torch.randn(features // size, size, size, dtype=dtype) / size**0.5
        made.load_state_dict(state)
    made.prepare_()
    return made


def fastest(
    calls: dict[str, list[Callable[[], Any]]], repeats: int, until: float
) -> dict[str, float]:
    """Seconds of the fastest call of each, all taking turns; at least three turns each."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats):
        for name, several in calls.items():
            call = several[turn % len(several)]
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
        if turn >= 2 and time.monotonic() > until:
            break
    return best


def bandwidth() -> float:
    """Bytes a second that are read by a sum far larger than the caches."""
    several = [torch.ones(1 << 24) for _ in range(CACHED >> 26)]
    best = fastest({"read": [numbers.sum for numbers in several]}, 40, float("inf"))
    return several[0].nbytes / best["read"]


@torch.inference_mode()
def measure(shape: tuple[int, int], dtype: torch.dtype, seconds: float, read: float) -> None:
    """One line for each number of rows."""
    out, columns = shape
    dense_bytes = out * columns * dtype.itemsize
    count = max(2, CACHED // (dense_bytes // 2))
    kinds = ("sparse24", "armor", "lowrank")
    made = {kind: [module(kind, out, columns, dtype)] for kind in kinds}
    for several in made.values():
        several += [copy.deepcopy(several[0]) for _ in range(count - 1)]
    dense = [torch.randn(out, columns, dtype=dtype) for _ in range(max(2, count // 2))]
    rows_of_x = (1, 2, 4, 8, 16, 64, 512) if dtype == torch.bfloat16 else (1, 4)
    for rows in rows_of_x:
        x = torch.randn(rows, columns, dtype=dtype)
        calls = {"torch": [partial(linear, x, w) for w in dense]}
        # not the weight that torch has just brought into the cache
        others = dense[len(dense) // 2 :] + dense[: len(dense) // 2]
        calls["twin"] = [partial(ops.dense, x, w, None) for w in others]
        calls |= {kind: [partial(m, x) for m in made[kind]] for kind in kinds}
        share = seconds / len(rows_of_x)
        best = fastest(calls, 400 if rows < 64 else 40, time.monotonic() + share)
        speed = dense_bytes * (0.5 + 0.125 / dtype.itemsize) / best["sparse24"]
        ratio = {name: best["torch"] / one for name, one in best.items()}
        print(
            f"{out}x{columns} {str(dtype)[6:]:8} {rows} rows: torch {best['torch'] * 1e6:.0f} us;"
            f" 2:4 {ratio['sparse24']:.2f}x ({best['twin'] / best['sparse24']:.2f}x of our dense"
            f" kernel, {100 * speed / read:.0f} % of the bandwidth), ARMOR {ratio['armor']:.2f}x,"
            f" low rank {ratio['lowrank']:.2f}x",
            flush=True,
        )


@torch.inference_mode()
def call_cost() -> None:
    """What a call costs beside its arithmetic."""
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    made, weight = module("sparse24", 64, 64, torch.bfloat16), torch.randn(64, 64).bfloat16()
    calls = {"ours": [partial(made, x)], "torch": [partial(linear, x, weight)]}
    best = fastest(calls, 3000, float("inf"))
    print(f"a call: {1e6 * (best['ours'] - best['torch']):.1f} us more than F.linear's (64 x 64)")


def random_model(packed: bool) -> Any:
    """A Llama of TINYLLAMA's shape with random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from compressor.runtime.placement import place

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TINYLLAMA)).to(torch.bfloat16)
    names = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and ".layers." in name
    ]
    for name in names if packed else ():
        old = model.get_submodule(name)
        new = Sparse24Linear(old.in_features, old.out_features, bias=False, dtype=torch.bfloat16)
        new.weight_values.normal_(std=old.in_features**-0.5)  # in place: the peak is that of a load
        new.weight_metadata.copy_(random_positions(*new.weight_metadata.shape))
        model.set_submodule(name, new)
    for name, tensor in list(model.named_parameters()):
        if tensor.is_meta:
            parent, _, leaf = name.rpartition(".")
            filled = torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.02)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(filled, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if packed:
        place(model, {name: name for name in names}, "packed")
    return model.eval()


def serve(what: str) -> None:
    """Decode as the parent asks: tokens in, seconds out, and the peak memory at the end."""
    if what.startswith("random"):
        model = random_model(what.endswith("packed"))
    else:
        import compressor

        runtime, _, folder = what.partition(":")
        model = compressor.load(folder, runtime=runtime)
    decode = Decode(model)
    print(json.dumps(decode.prefill), flush=True)
    for line in sys.stdin:
        print(json.dumps(decode.tokens(int(line))), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


class Decode:
    """Greedy decoding with a static cache."""

    @torch.no_grad()
    def __init__(self, model: Any, prompt: int = 128, room: int = 512) -> None:
        from transformers import StaticCache

        self.model, self.place = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + room)
        ids = torch.arange(prompt)[None] % model.config.vocab_size
        started = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = logits.logits[:, -1:].argmax(-1)
        self.prefill = time.perf_counter() - started

    @torch.no_grad()
    def tokens(self, count: int) -> float:
        """Seconds of the fastest of `count` tokens."""
        best = float("inf")
        for _ in range(count):
            position = torch.tensor([[self.place]])
            started = time.perf_counter()
            logits = self.model(
                input_ids=self.token, position_ids=position, past_key_values=self.cache,
                use_cache=True,
            ).logits  # fmt: skip
            self.token = logits[:, -1:].argmax(-1)
            best, self.place = min(best, time.perf_counter() - started), self.place + 1
        return best


def compare(title: str, dense: str, packed: str, threads: int, seconds: float) -> None:
    """Two processes that decode in turn."""
    both = {}
    for name, what in (("dense", dense), ("packed", packed)):
        command = [sys.executable, __file__, "--serve", what, "--threads", str(threads)]
        both[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        prefill = json.loads(both[name].stdout.readline())
        print(f"{title}, {name}: prefill of 128 tokens {prefill:.2f} s (once, cold)", flush=True)
    best = dict.fromkeys(both, float("inf"))
    until, turns = time.monotonic() + seconds, 0
    while turns < 4 or (time.monotonic() < until and turns < 60):
        turns += 1
        for name, process in both.items():
            process.stdin.write("4\n")
            process.stdin.flush()
            best[name] = min(best[name], json.loads(process.stdout.readline()))
    peak = {name: int(process.communicate()[0]) for name, process in both.items()}
    print(
        f"{title}, {threads} thread(s): {1 / best['packed']:.1f} tokens/s packed,"
        f" {1 / best['dense']:.1f} dense:"
        f" {best['dense'] / best['packed']:.2f}x; peak memory {peak['packed'] / 1e9:.2f} of"
        f" {peak['dense'] / 1e9:.2f} GB: {peak['packed'] / peak['dense']:.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", "linears", "decoding"), default="all")
    parser.add_argument("--threads", type=int, help="only so many; default: one, then all")
    parser.add_argument("--seconds", type=float, default=400, help="to be spent, about")
    parser.add_argument("--packed", help="a packed folder to decode with too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    every = torch.get_num_threads()
    counts = [asked.threads] if asked.threads else list(dict.fromkeys((1, every)))
    torch.set_num_threads(counts[0])
    if asked.serve:
        return serve(asked.serve)
    if problem := kernels().problem:
        sys.exit(problem)
    print(f"{_processor()}, torch {torch.__version__}, Python {platform.python_version()}")
    share = asked.seconds / len(counts) / (2 if asked.part == "all" else 1)
    for threads in counts:
        torch.set_num_threads(threads)
        print(f"-- {threads} thread(s)", flush=True)
        if asked.part != "decoding":
            read = bandwidth()
            print(f"reading memory: {read / 1e9:.1f} GB/s")
            call_cost()
            for shape in SHAPES:
                measure(shape, torch.bfloat16, share / 5, read)
            measure(SHAPES[0], torch.float32, share / 10, read)
        if asked.part != "linears":
            pairs = [("TinyLlama's shape", "random dense", "random packed")]
            if asked.packed:
                pairs.append((asked.packed, f"dense:{asked.packed}", f"packed:{asked.packed}"))
            for title, dense, packed in pairs:
                compare(title, dense, packed, threads, share / 2 / len(pairs))
    return None


if __name__ == "__main__":
    main()
