"""Packed weights on this CPU against torch's dense products: one linear at a time, and decoding;
with one thread, then with all.

    python benchmarks/cpu.py                   everything, in less than eight minutes
    python benchmarks/cpu.py --part linears    … decoding
    python benchmarks/cpu.py --packed DIR      decoding with a packed folder as well

It is `compress bench` over the shapes and threads of docs/kernels.md, with ARMOR's blocks as large
as one eighth more bytes allow.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from compressor.bench import cpu_decode, cpu_linears, cpu_timing
from compressor.bench.kernels import module as example
from compressor_kernels.cpu.build import kernels
from compressor_kernels.linear import ArmorLinear
from compressor_kernels.packing import pack24


def module(op: str, weight: Tensor) -> Any:
    """A prepared linear of the form `op`; ARMOR with at most 12.5 % more."""
    if op != "armor":
        return example(op, weight)
    out, columns = weight.shape
    size = 1 << (out * columns // (8 * (out + columns))).bit_length() - 1
    made = ArmorLinear(columns, out, block_a=size, block_b=size, bias=False, dtype=weight.dtype)
    values, metadata = pack24(weight)
    state = {"weight_values": values, "weight_metadata": metadata}
    for name, features in (("weight_a", out), ("weight_b", columns)):
        blocks = torch.randn(features // size, size, size) / size**0.5
        state[name] = blocks.to(weight.dtype)
    made.load_state_dict(state)
    made.prepare_()
    return made


def linears(seconds: float) -> None:
    """One line for each shape, dtype and number of rows."""
    read = cpu_timing.read_bandwidth()
    print(f"reading memory: {read:.1f} GB/s")
    more = cpu_linears.call_overhead()
    print(f"a call: {more:.1f} us more than F.linear's (64 x 64)", flush=True)
    asked = [(shape, torch.bfloat16, cpu_linears.ROWS) for shape in cpu_linears.SHAPES]
    asked.append((cpu_linears.SHAPES[0], torch.float32, (1, 4)))
    for shape, dtype, rows in asked:
        found = cpu_linears.measure_shape(shape, rows, dtype, read, seconds / len(asked), module)
        for m in rows:
            by_op = {row["op"]: row for row in found if row["rows"] == m}
            sparse = by_op["sparse24"]
            print(
                f"{shape[0]}x{shape[1]} {sparse['dtype']:8} {m} rows:"
                f" torch {by_op['dense']['us_min']:.0f} us; 2:4 {sparse['ratio']:.2f}x"
                f" ({sparse['ratio_to_our_dense']:.2f}x of our dense kernel,"
                f" {sparse['percent_of_read']:.0f} % of the bandwidth),"
                f" ARMOR {by_op['armor']['ratio']:.2f}x,"
                f" low rank {by_op['lowrank']['ratio']:.2f}x,"
                f" by pivots {by_op['pivot']['ratio']:.2f}x",
                flush=True,
            )


def decoding(source: str, tokens: int) -> None:
    """One line for a model, dense and packed."""
    dense, packed = cpu_decode.measure_model(source, tokens)
    memory = packed["peak_gb"] / dense["peak_gb"]
    print(
        f"{source}: {packed['tokens_per_s']} tokens/s packed, {dense['tokens_per_s']} dense:"
        f" {packed['tokens_per_s'] / dense['tokens_per_s']:.2f}x; prefill of"
        f" {cpu_decode.PROMPT}: {dense['prefill_s'] / packed['prefill_s']:.2f}x; peak memory"
        f" {packed['peak_gb']} of {dense['peak_gb']} GB: {memory:.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", "linears", "decoding"), default="all")
    parser.add_argument("--threads", type=int, help="only so many; default: one, then all")
    parser.add_argument("--seconds", type=float, default=200, help="for the linears, about")
    parser.add_argument("--tokens", type=int, default=128, help="to decode")
    parser.add_argument("--packed", help="a packed folder to decode with too")
    asked = parser.parse_args()
    if problem := kernels().problem:
        sys.exit(problem)
    every = torch.get_num_threads()
    counts = [asked.threads] if asked.threads else list(dict.fromkeys((1, every)))
    for threads in counts:
        torch.set_num_threads(threads)
        print(", ".join(f"{name} {value}" for name, value in cpu_timing.environment().items()))
        if asked.part != "decoding":
            linears(asked.seconds / len(counts))
        if asked.part != "linears":
            for source in ("tinyllama", *([asked.packed] if asked.packed else [])):
                decoding(source, asked.tokens)


if __name__ == "__main__":
    main()
