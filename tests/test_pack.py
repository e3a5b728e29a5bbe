"""`compress pack` and `compress import`: foreign 2:4 checkpoints into the packed format,
exactly.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compressor
from compressor.checkpoint.reader import INDEX, Reader
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.run.pipeline import prune
from compressor.tools.import_bitmask import decode, import_bitmask

IDS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))


def dense24(tiny, family, folder):
    """A dense checkpoint with 2:4 zeros in place."""
    prune(Recipe(str(tiny(family)), method="magnitude", format="dense"), folder)
    return folder


def tensors_of(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def score(folder):
    with torch.no_grad():
        return compressor.load(folder)(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_pack_gives_the_bytes_that_prune_packs(cli, tiny, tmp_path, family):
    dense24(tiny, family, tmp_path / "dense")
    prune(Recipe(str(tiny(family)), method="magnitude"), tmp_path / "packed")
    done = json.loads(cli("pack", tmp_path / "dense", "-o", tmp_path / "out", "--json").stdout)
    assert not done["left_dense"]
    for name in [*Reader(tmp_path / "packed").shards, INDEX, "config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "packed" / name
        ).read_bytes(), name
    assert torch.equal(score(tmp_path / "out"), score(tmp_path / "dense"))
    cli("verify", tmp_path / "packed")
    cli("unpack", tmp_path / "out", "-o", tmp_path / "again")
    before, after = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pack_lists_what_does_not_conform(cli, tiny, tmp_path):
    dense24(tiny, "llama", tmp_path / "dense")
    name = "model.layers.1.mlp.up_proj.weight"
    shard = (
        tmp_path
        / "dense"
        / json.loads((tmp_path / "dense" / INDEX).read_text())["weight_map"][name]
    )
    tensors = load_file(shard)
    tensors[name][5, 8:11] = 1.0
    save_file(tensors, shard, metadata={"format": "pt"})
    done = cli("pack", tmp_path / "dense", "-o", tmp_path / "out")
    assert (
        "model.layers.1.mlp.up_proj  [96, 64]  more than two non-zeros in row 5, columns 8..11"
        in done.stderr
    )
    assert "20 linears packed, 1 of the blocks left dense" in done.stderr
    assert torch.equal(tensors_of(tmp_path / "out")[name], tensors[name])
    assert torch.equal(score(tmp_path / "out"), score(tmp_path / "dense"))


def test_pack_refuses_what_it_cannot_improve(cli, tiny, tmp_path):
    assert (
        "holds no 2:4 linear that could be packed: model.layers.0"
        in cli("pack", tiny("llama"), "-o", tmp_path / "out", code=1).stderr
    )
    prune(Recipe(str(tiny("llama")), method="magnitude"), tmp_path / "packed")
    assert (
        "compressed already (compress-llm)"
        in cli("pack", tmp_path / "packed", "-o", tmp_path / "out", code=1).stderr
    )
    assert not (tmp_path / "out").exists()


def literal_bitmask(weight):
    """The retired layout, weight by weight: kept values row by row, and bit c % 8 of byte c // 8
    for each kept column c.
    """
    rows, columns = weight.shape
    compressed, bitmask = [], [[0] * ((columns + 7) // 8) for _ in range(rows)]
    for row in range(rows):
        for group in range(0, columns, 4):
            by_size = sorted(
                range(group, group + 4), key=lambda column: -abs(float(weight[row, column]))
            )
            for column in sorted(by_size[:2]):
                compressed.append(weight[row, column])
                bitmask[row][column // 8] += 2 ** (column % 8)
    return torch.stack(compressed).reshape(rows, columns // 2), torch.tensor(
        bitmask, dtype=torch.uint8
    )


def legacy(folder, into, *, flat=False, outside=()):
    """The checkpoint `folder` as compressed-tensors stored it: bitmask weights for every linear of
    the blocks.
    """
    shutil.copytree(folder, into)
    index = json.loads((into / INDEX).read_text())
    for path in sorted(into.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name in tensors if "proj.weight" in name or name in outside]:
            module, weight = name.removesuffix(".weight"), tensors.pop(name)
            tensors[f"{module}.compressed"], tensors[f"{module}.bitmask"] = literal_bitmask(weight)
            shape = torch.tensor(weight.shape)
            tensors[f"{module}.shape"] = shape if flat else shape.reshape(-1, 1)
            del index["weight_map"][name]
            index["weight_map"] |= {
                f"{module}.{part}": path.name for part in ("compressed", "bitmask", "shape")
            }
        save_file(tensors, path, metadata={"format": "pt"})
    (into / INDEX).write_text(json.dumps(index))
    config = json.loads((into / "config.json").read_text())
    sparsity = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    described = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "sparsity_config": sparsity,
    }
    (into / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    return into


@pytest.mark.parametrize("flat", [False, True])
def test_import_gives_the_exact_dense_weights(cli, tiny, tmp_path, flat):
    dense = dense24(tiny, "llama", tmp_path / "dense")
    cli("import", legacy(dense, tmp_path / "legacy", flat=flat), "-o", tmp_path / "out")
    cli("unpack", tmp_path / "out", "-o", tmp_path / "again")
    before, after = tensors_of(dense), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization_config"]["modules"]) == 21
    assert "sparsity_config" not in json.dumps(config)
    with torch.no_grad():
        assert torch.equal(
            score(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(dense).eval()(IDS).logits
        )


def test_import_writes_a_head_dense(tiny, tmp_path):
    legacy(tiny("llama"), tmp_path / "legacy", outside=("lm_head.weight",))
    assert import_bitmask(tmp_path / "legacy", tmp_path / "out") == (21, 1)
    head = tensors_of(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(
        head,
        decode(*literal_bitmask(tensors_of(tiny("llama"))["lm_head.weight"]), tuple(head.shape)),
    )
    score(tmp_path / "out")


def test_decode_against_the_literal_layout_at_odd_widths():
    for columns in (4, 12, 20, 64):
        weight = torch.randn(5, columns, dtype=torch.float16)
        weight[0, :4] = 0
        compressed, bitmask = literal_bitmask(weight)
        kept = decode(compressed, bitmask, (5, columns))
        assert torch.equal(kept[kept != 0], weight[kept != 0])
        assert (kept.view(5, -1, 4) != 0).sum(-1).max() == 2


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        (
            "bitmask",
            lambda tensor: tensor.fill_(7),
            "bitmask does not keep two of the columns 0..3 of row 0",
        ),
        (
            "bitmask",
            lambda tensor: tensor[:, :-1].contiguous(),
            r"bitmask is U8 \[96, 7\]; .* needs U8 \[96, 8\]",
        ),
        (
            "compressed",
            lambda tensor: tensor.to(torch.int8),
            r"compressed is I8 .* needs F32 or F16 or BF16",
        ),
        (
            "shape",
            lambda tensor: torch.tensor([[1 << 40], [1 << 40]]),
            r"shape \[1099511627776, 1099511627776\]",
        ),
        ("shape", lambda tensor: torch.tensor([[-96], [64]]), r"needs .* \[-96, 32\]"),
        (
            "shape",
            lambda tensor: torch.tensor([96, 64, 1]),
            r"shape is I64 \[3\], two int64 numbers",
        ),
        ("shape", None, "has no tensor model.layers.1.mlp.up_proj.shape"),
    ],
)
def test_damaged_bitmask_checkpoints_are_refused(tiny, tmp_path, part, change, match):
    legacy(tiny("llama"), tmp_path / "legacy")
    name = f"model.layers.1.mlp.up_proj.{part}"
    index = json.loads((tmp_path / "legacy" / INDEX).read_text())
    shard = tmp_path / "legacy" / index["weight_map"][name]
    tensors = load_file(shard)
    old = tensors.pop(name)
    if change:
        tensors[name] = change(old)
    else:
        del index["weight_map"][name]
        (tmp_path / "legacy" / INDEX).write_text(json.dumps(index))
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=match):
        import_bitmask(tmp_path / "legacy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_refuses_other_checkpoints(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="holds no sparse-24-bitmask weights"):
        import_bitmask(tiny("llama"), tmp_path / "out")
    legacy(tiny("llama"), tmp_path / "legacy")
    path = tmp_path / "legacy" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 8}}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised as well"):
        import_bitmask(tmp_path / "legacy", tmp_path / "out")
