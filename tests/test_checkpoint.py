"""The reader believes nothing: each kind of damage gives one line that names file and tensor."""

import json
import os
import shutil
import struct

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.checkpoint.atomic import tensor_bytes
from compressor.checkpoint.download import resolve
from compressor.checkpoint.header import read_header
from compressor.checkpoint.on_disk import DTYPES
from compressor.checkpoint.reader import INDEX, Reader
from compressor.checkpoint.writer import Writer, check_output
from compressor.errors import CheckpointError, OutputError
from tests.mutate import join


@pytest.fixture
def folder(tmp_path, tiny):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    return tmp_path / "model"


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        Reader(folder)
    assert "\n" not in str(caught.value)


def rewrite_header(path, change):
    """Apply `change` to the parsed header of a safetensors file, the data left as it is."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_headers_equal_the_libraries(folder):
    reader = Reader(folder)
    for shard in reader.shards:
        with safe_open(folder / shard, framework="pt") as library:
            ours = {name for name, entry in reader.tensors.items() if entry.shard == shard}
            assert ours == set(library.keys())
            for name in ours:
                tensor = library.get_tensor(name)
                assert reader.tensors[name].shape == tuple(tensor.shape)
                assert reader.tensors[name].nbytes == tensor.nbytes
                assert torch.equal(reader.read(name), tensor)


def test_missing_things(folder, tmp_path):
    refused(tmp_path / "nowhere", "is not a folder")
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json")


def test_pickle_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"no model\.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"only pytorch_model\.bin: pickle files can run code .* convert it")


def test_index_must_stay_in_the_folder_and_tell_the_truth(folder):
    original = json.loads((folder / INDEX).read_text())
    shards = list(original["weight_map"].values())
    name = next(name for name, shard in original["weight_map"].items() if shards.count(shard) > 1)
    for shard, match in [("../evil.safetensors", "plain"), ("/etc/passwd", "plain"),
    ("a/b.safetensors", "plain"), (7, "plain"),
                         ("model-99.safetensors", "not there")]:  # fmt: skip
        (folder / INDEX).write_text(
            json.dumps({**original, "weight_map": {**original["weight_map"], name: shard}})
        )
        refused(folder, match)
    other = next(
        shard for shard in original["weight_map"].values() if shard != original["weight_map"][name]
    )
    (folder / INDEX).write_text(
        json.dumps({**original, "weight_map": {**original["weight_map"], name: other}})
    )
    refused(folder, "but it is not")
    short = {key: value for key, value in original["weight_map"].items() if key != name}
    (folder / INDEX).write_text(json.dumps({**original, "weight_map": short}))
    refused(folder, "in a shard but not in")
    for text, match in [
        ("[]", "JSON object"),
        ("{", "not readable JSON"),
        ("{}", "no weight_map"),
        ("[" * 100_000, "not readable JSON"),
    ]:
        (folder / INDEX).write_text(text)
        refused(folder, match)


def test_lying_headers(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    good = path.read_bytes()

    def damage(change, match):
        path.write_bytes(good)
        rewrite_header(path, change)
        refused(folder, match)

    def first(header):
        return header[next(name for name in header if name != "__metadata__")]

    for data, match in [(good[:-10], "truncated"), (good + b"x", "too long"), (good[:4],
    "header length"), (b"", "header length"),
                        (struct.pack("<Q", 1 << 60) + good[8:], "header length"),
                        (struct.pack("<Q", 20) + b"{" * 200, "malformed")]:  # fmt: skip
        path.write_bytes(data)
        refused(folder, match)
    damage(lambda header: first(header).update(dtype="F1024"), "not understood")
    damage(lambda header: first(header).update(shape=[1 << 40, 1 << 40]), "its header gives")
    damage(lambda header: first(header).update(shape=[-1, 3]), "not understood")
    damage(lambda header: first(header).update(shape=[2.5]), "not understood")
    damage(lambda header: first(header).update(data_offsets=[8, 4]), "its header gives")
    damage(lambda header: first(header).__delitem__("shape"), "malformed header entry")
    damage(lambda header: header.update(__metadata__={"format": 3}), "__metadata__")
    damage(lambda header: [1], "expected a JSON object")


def test_resolve_refuses_what_is_neither_folder_nor_hub_id():
    for model in ("/no/such/folder", "../nothing", "a/b/c", "x y"):
        with pytest.raises(CheckpointError, match="local checkpoint folder or a Hub id"):
            resolve(model)
    with pytest.raises(CheckpointError, match="fetching it from the Hub failed"):
        resolve("nobody/nothing")


def test_writer_keeps_names_order_bytes_and_replaces(folder, tmp_path):
    reader = Reader(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    parts = {
        "weight_values": torch.randn(96, 32),
        "weight_metadata": torch.zeros(96, 4, dtype=torch.int16),
    }
    with Writer(reader, tmp_path / "out", {name}) as writer:
        writer.replace(name, parts)
        writer.finish(reader.config, {"note.txt": "hello"})
    written = Reader(tmp_path / "out")
    assert written.shards == reader.shards
    assert written.metadata == reader.metadata
    for shard in reader.shards:
        before, after = load_file(folder / shard), load_file(tmp_path / "out" / shard)
        if name in before:
            assert all(
                torch.equal(after.pop(f"model.layers.1.mlp.up_proj.{suffix}"), tensor)
                for suffix, tensor in parts.items()
            )
            del before[name]
        else:
            assert (folder / shard).read_bytes()[-64:] == (tmp_path / "out" / shard).read_bytes()[
                -64:
            ]
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == written.nbytes
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*reader.shards, INDEX, "SHA256SUMS", "config.json", "generation_config.json", "note.txt"]
    )


def test_wide_items_come_first_so_that_all_are_aligned(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    save_file(
        {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5)},
        tmp_path / "in" / "model.safetensors",
        metadata={"format": "pt"},
    )
    reader = Reader(tmp_path / "in")
    odd = torch.tensor([1, 2, 3], dtype=torch.int16)
    with Writer(reader, tmp_path / "out", {"a.weight"}) as writer:
        writer.replace("a.weight", {"weight_metadata": odd})
        writer.finish({}, {})
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["a.weight_metadata"], odd)
    assert torch.equal(after["b.weight"], reader.read("b.weight"))


def test_failure_leaves_nothing(folder, tmp_path):
    before = set(tmp_path.iterdir())
    with (
        pytest.raises(RuntimeError),
        Writer(Reader(folder), tmp_path / "new" / "parents" / "out", set()),
    ):
        raise RuntimeError
    assert set(tmp_path.iterdir()) == before


def test_output_is_checked_first(folder, tmp_path, monkeypatch):
    reader = Reader(folder)
    (tmp_path / "file").touch()
    for output, match in [
        (folder, "is the input"),
        (folder / "out", "inside the input"),
        (tmp_path, "exists already"),
        (tmp_path / "file" / "x", "not a folder"),
    ]:
        with pytest.raises(OutputError, match=match):
            check_output(output, reader)
    monkeypatch.setattr(
        "compressor.checkpoint.writer.shutil.disk_usage",
        lambda path: shutil._ntuple_diskusage(10, 5, 5),
    )
    with pytest.raises(OutputError, match=r"may need .* 5 free"):
        check_output(tmp_path / "out", reader)
    monkeypatch.setattr("compressor.checkpoint.writer.os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="may write to"):
        check_output(tmp_path / "out", reader)


def test_header_reader_survives_any_flip(folder):
    """Every single-byte change of a header is either read to the same bytes' worth of tensors or
    refused as a CheckpointError.
    """
    path = sorted(folder.glob("*.safetensors"))[0]
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    for position in range(0, 8 + length, 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x15]) + good[position + 1 :])
        try:
            entries, _ = read_header(path)
        except CheckpointError:
            continue
        assert sum(entry.nbytes for entry in entries.values()) == len(good) - 8 - length


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_by_its_place_is_what_the_library_reads(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    real = getattr(torch, DTYPES[dtype])
    tensors = {}
    for number, shape in enumerate([(), (5,), (0, 3), (4, 0), (6, 3), (3, 2, 4)]):
        raw = torch.randint(0, 2, (*shape, real.itemsize), dtype=torch.uint8, generator=generator)
        tensors[f"t{number}"] = raw.view(real).view(shape)
    tensors["odd"] = torch.ones(3, dtype=torch.uint8)  # what follows it begins anywhere
    header, data = {}, b""
    for name in ("odd", *sorted(set(tensors) - {"odd"})):
        part = bytes(tensor_bytes(tensors[name]))
        offsets = [len(data), len(data) + len(part)]
        named = "U8" if name == "odd" else dtype
        header[name] = {
            "dtype": named, "shape": list(tensors[name].shape), "data_offsets": offsets
        }  # fmt: skip
        data += part
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(join(header, data))
    reader = Reader(tmp_path)
    with reader.opened() as lazy:
        for name, tensor in tensors.items():
            for index in (..., 0, slice(1, 3), slice(2, None), slice(3, 1)):
                if index is not ... and (not tensor.dim() or 0 in tensor.shape):
                    continue
                found, own = lazy(name)[index], reader.on_disk(name)[index]
                assert own.dtype == found.dtype
                assert own.shape == found.shape
                assert bytes(tensor_bytes(own)) == bytes(tensor_bytes(found))
            assert bytes(tensor_bytes(reader.read(name))) == bytes(tensor_bytes(tensor))


def test_a_shard_is_opened_once_for_all_that_is_read_of_it(tiny, monkeypatch):
    """The library reads the whole header at each opening: of a mixture that would be quadratic."""
    reader, opened, real = Reader(tiny("qwen3_moe")), [], safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda path, **more: opened.append(path) or real(path, **more)
    )
    for name in reader.tensors:
        reader.read(name)
    assert len(opened) == len(reader.shards) < len(reader.tensors)


def test_a_file_that_became_shorter_is_named(tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    reader = Reader(tmp_path / "model")
    name, entry = max(reader.tensors.items(), key=lambda item: item[1].stop)
    reader.read(name)
    os.truncate(tmp_path / "model" / entry.shard, entry.stop - 1)
    with pytest.raises(OutputError, match=f"{entry.shard} became shorter while it was read"):
        reader.read(name)
