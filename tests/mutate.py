"""Damage to checkpoint folders: what a careless download, a broken disk or an enemy would hand us.
All of it seeded.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 63, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62,
    1 << 63, -(1 << 63), 10**30,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", " ", "0", "x" * 5000, "../../escape",
    "/tmp/escape", "~/escape",
    "a/b.safetensors", "model.safetensors", "..", "\u0000", "line\nbreak", "\x1b[31mred", "[/red]",
    "\ud800", "é😀",
    "{0.__class__}", "%s%n", "${HOME}", "__import__('os')",
    "float16", "int8", "sparse24", "armor", "compress-llm", "gptq", "llama", "qwen3_moe",
    "gpt2", "eager", [], {}, [[]], [0], [-1], [1 << 40, 1 << 40], {"": None},
    {"format": "sparse24"}, ["x"] * 300,
    {"quant_method": "compress-llm"},
]  # fmt: skip


def nodes(value: Any) -> list[tuple[Any, ...]]:
    """Paths of all inner values of a JSON document, however deep."""
    found: list[tuple[Any, ...]] = []
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:
        path, outer = waiting.pop()
        items = (
            outer.items()
            if isinstance(outer, dict)
            else enumerate(outer)
            if isinstance(outer, list)
            else ()
        )
        for key, inner in items:
            found.append((*path, key))
            waiting.append(((*path, key), inner))
    return found


def mutate_json(random: Random, value: Any) -> str:
    """Change, delete, rename, swap or add one to three values; returns the name of the last one
    touched.
    """
    touched = "root"
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        paths = nodes(value)
        if not paths:
            break
        *outer, key = random.choice(paths)
        parent = value
        for step in outer:
            parent = parent[step]
        touched = ".".join(map(str, [*outer, key]))
        action = random.choice(
            ["replace"] * 6 + ["nudge"] * 3 + ["delete", "rename", "swap", "add"]
        )
        if action == "replace":
            parent[key] = random.choice(NASTY)
        elif (
            action == "nudge"
            and isinstance(parent[key], int | float)
            and not isinstance(parent[key], bool)
        ):
            parent[key] = random.choice(
                [
                    parent[key] + 1,
                    parent[key] - 1,
                    parent[key] * 2,
                    -parent[key],
                    parent[key] * 10**6,
                ]
            )
        elif action == "delete":
            del parent[key]
        elif isinstance(parent, dict) and action == "rename":
            parent[random.choice([name for name in NASTY if isinstance(name, str)])] = parent.pop(
                key
            )
        elif action == "swap":
            *outer, other = random.choice(paths)
            source = value
            try:
                for step in outer:
                    source = source[step]
                parent[key] = source[other]
            except (KeyError, IndexError, TypeError):
                parent[key] = None
        elif isinstance(parent, dict):
            parent[f"{key}2"] = random.choice(NASTY)
    return touched


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Flip, cut, insert or repeat."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 8])):
        at = random.randrange(len(data) + 1)
        action = random.randrange(5)
        if action == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif action == 1:
            del data[at : at + random.choice([1, 8, 500])]
        elif action == 2:
            data[at:at] = random.choice(
                [
                    b"\x00",
                    b"[" * 3000,
                    b'{"a":' * 2000,
                    b"\xff\xfe",
                    b"9" * 5000,
                    b'"',
                    b"NaN",
                    b"1e999",
                ]
            )
        elif action == 3:
            data[at:at] = data[at : at + 64]
        else:
            data = data[:at]
    return bytes(data)


def _mutate_text(random: Random, path: Path) -> str:
    """Damage a JSON file, in its structure or in its bytes."""
    if random.random() < 0.85:
        value = json.loads(path.read_text())
        touched = mutate_json(random, value)
        path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        return touched
    path.write_bytes(mutate_bytes(random, path.read_bytes()))
    return "bytes"


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file with this header, whatever it says."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _mutate_shard(random: Random, path: Path) -> str:
    """Damage a header's structure, its bytes, its length, or the file's size."""
    data = path.read_bytes()
    action = random.random()
    if action < 0.7:
        header, body = split(data)
        touched = mutate_json(random, header)
        path.write_bytes(join(header, body))
        return f"header {touched}"
    if action < 0.8:
        length = struct.unpack("<Q", data[:8])[0]
        path.write_bytes(mutate_bytes(random, data[: 8 + length]) + data[8 + length :])
        return "header bytes"
    if action < 0.9:
        path.write_bytes(
            struct.pack("<Q", random.choice([0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])) + data[8:]
        )
        return "header length"
    path.write_bytes(data[: random.randrange(len(data))])
    return "cut"


def _mutate_tensors(random: Random, path: Path) -> str:
    """Leave the file well-formed and lie in it: metadata words, values, dtypes of the same width,
    shapes, exchanged tensors.
    """
    header, body = split(path.read_bytes())
    names = [
        name
        for name in header
        if name != "__metadata__"
        and header[name]["data_offsets"][1] > header[name]["data_offsets"][0]
    ]
    special = [
        name
        for name in names
        if name.endswith(("weight_metadata", "bitmask", "shape", "weight_a", "weight_b"))
    ]
    name = random.choice(special if special and random.random() < 0.7 else names)
    entry = header[name]
    start, stop = entry["data_offsets"]
    data = bytearray(body)
    action = random.randrange(5)
    if action == 0:  # random bytes
        for _ in range(random.choice([1, 2, 50])):
            data[random.randrange(start, stop)] = random.randrange(256)
    elif action == 1:  # constant bytes: 0 repeats an index, 0xff is out of order and NaN
        data[start:stop] = bytes([random.choice([0, 0xFF, 0x7F, 0x44, 0xEE])]) * (stop - start)
    elif action == 2:
        entry["dtype"] = random.choice(
            ["F16", "BF16", "I16", "U16"]
            if entry["dtype"] in ("F16", "BF16", "I16")
            else ["U8", "I8", "BOOL"]
        )
        width = 2 if entry["dtype"] in ("F16", "BF16", "I16", "U16") else 1
        entry["shape"] = [(stop - start) // width] if random.random() < 0.3 else entry["shape"]
    elif action == 3:
        entry["shape"] = random.choice(
            [entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1]]
        )
    else:
        other = random.choice(names)
        header[name], header[other] = header[other], header[name]
    path.write_bytes(join(header, bytes(data)))
    return f"tensor {name}"


def damage(random: Random, folder: Path) -> str:
    """Damage one or two files of a checkpoint folder; returns a description."""
    said = []
    for _ in range(random.choice([1, 1, 1, 2])):
        shards = sorted(folder.glob("*.safetensors"))
        texts = sorted(path for path in folder.glob("*.json"))
        config = folder / "config.json"
        action = random.random()
        try:
            path = random.choice(shards)
            if action < 0.3:
                said.append(f"config.json: {_mutate_text(random, config)}")
            elif action < 0.45:
                path = random.choice(texts)
                said.append(f"{path.name}: {_mutate_text(random, path)}")
            elif action < 0.7:
                said.append(f"{path.name}: {_mutate_shard(random, path)}")
            elif action < 0.95:
                said.append(f"{path.name}: {_mutate_tensors(random, path)}")
            else:
                path = random.choice([*shards, *texts])
                path.unlink()
                said.append(f"{path.name}: gone")
        except (OSError, ValueError, KeyError, IndexError, TypeError, struct.error):
            pass  # the first damage left nothing to damage
    return "; ".join(said) or "none"


RECIPE: dict[str, Any] = {
    "method": "magnitude", "pattern": "2:4", "format": "packed", "dataset": "self",
    "num_samples": 2, "seq_len": 8, "seed": 0,
    "dtype": "auto", "ignore": ["*q_proj"], "options": {}, "refine": "", "tune": 0,
    "refine_options": {}, "revision": "",
}  # fmt: skip


def damaged_recipe(random: Random) -> bytes:
    """A recipe file that is wrong somewhere."""
    import tomli_w

    value = json.loads(json.dumps(RECIPE))
    mutate_json(random, value)
    value.pop("model", None)
    if isinstance(value.get("tune"), int):
        value["tune"] = min(
            value["tune"], 2
        )  # a thousand epochs may be asked for, and take as long as they do
    try:
        text = tomli_w.dumps(
            {key: inner for key, inner in value.items() if inner is not None}
        ).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        text = b"pattern = 24\n"
    return mutate_bytes(random, text) if random.random() < 0.3 else text
