"""Files from anybody: whatever they hold, the answer is a value or one line of error."""

import json
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compressor.checkpoint.header import read_header
from compressor.checkpoint.packed_config import QUANT_METHOD, packed_modules
from compressor.checkpoint.reader import INDEX, Reader
from compressor.config.read import load, merge
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError, CompressError, UsageError
from compressor.model.architecture import check_sizes
from compressor.tools.import_bitmask import decode
from compressor_kernels.packing import check24, unpack24
from tests.conftest import ROOT
from tests.mutate import join, split

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F4", "X"]) | JSON,
        "shape": st.lists(st.integers(-2, 1 << 62), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-2, 64), min_size=2, max_size=2) | JSON,
    },
)
ENOUGH = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def answer(function, *arguments):
    """What a function returns, or None where it raised an expected error, which must be one
    line.
    """
    try:
        return function(*arguments)
    except CompressError as error:
        line = str(error)
    assert line.isprintable()
    assert len(line) <= 1000
    return None


@given(st.text())
def test_an_error_is_one_line_whatever_it_quotes(text):
    for message in (text * 20, f"\x1b[2J{text}\n\r\u2028"):
        line = str(UsageError(message))
        assert line.isprintable()
        assert len(line) <= 1000


@ENOUGH
@given(st.binary(max_size=200), st.integers(0, (1 << 64) - 1) | st.integers(0, 300))
def test_any_bytes_are_a_header_or_an_error(tmp_path, data, length):
    path = tmp_path / "x.safetensors"
    for content in (data, struct.pack("<Q", length) + data):
        path.write_bytes(content)
        found = answer(read_header, path)
        assert not found or sum(entry.nbytes for entry in found[0].values()) <= len(content)


@ENOUGH
@given(st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=3), st.binary(max_size=64))
def test_any_header_is_true_to_its_file_or_refused(tmp_path, header, data):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    if found := answer(read_header, path):
        entries, metadata = found
        assert all(isinstance(value, str) for value in metadata.values())
        assert all(name.isprintable() for name in entries)
        spans = sorted((entry.start, entry.stop) for entry in entries.values())
        assert [start for start, _ in spans] == [8 + len(text), *(stop for _, stop in spans)][
            : len(spans)
        ]
        assert sum(stop - start for start, stop in spans) == len(data)


@ENOUGH
@given(
    JSON
    | st.fixed_dictionaries(
        {
            "weight_map": st.dictionaries(
                st.text(max_size=8), st.just("a.safetensors") | JSON, max_size=3
            )
        }
    )
)
def test_any_index_stays_in_the_folder(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    reader = answer(Reader, tmp_path)
    assert reader is None or reader.shards == ["a.safetensors"]


@ENOUGH
@given(JSON, st.sampled_from([1, 2, "1", None]), JSON)
def test_any_table_of_modules_is_understood_or_refused(modules, version, other):
    for described in (
        other,
        {"quant_method": QUANT_METHOD, "version": version, "modules": modules},
    ):
        found = answer(packed_modules, {"quantization_config": described})
        assert found is None or all(isinstance(entry["format"], str) for entry in found.values())


WORDS = st.text(max_size=8, alphabet=st.characters(codec="utf-8"))
VALUES = (
    st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | WORDS
    | st.lists(st.text(max_size=3, alphabet="a*"), max_size=2)
)


@ENOUGH
@given(
    st.dictionaries(st.sampled_from(list(Recipe.__dataclass_fields__)) | WORDS, VALUES, max_size=5)
)
def test_any_recipe_is_checked_and_written_as_it_was_read(tmp_path, settings):
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    made = answer(lambda: merge(load(tmp_path / "recipe.toml"), {"model": "m"}, []))
    if made and not made.plan:  # of which the path is resolved, and the copy in an output a name
        (tmp_path / "again.toml").write_text(made.to_toml(), encoding="utf-8")
        assert merge(load(tmp_path / "again.toml"), {}, []) == made


@ENOUGH
@given(st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=2, max_size=2), st.integers(1, 4))
def test_metadata_is_checked_pair_by_pair(words, groups):
    """Duplicated, descending and out-of-order columns are refused; nothing can point outside its
    group of four.
    """
    values, metadata = (
        torch.randn(2, 2 * groups),
        torch.tensor([[word] for word in words], dtype=torch.int16),
    )
    legal = all(
        (word >> 4 * group & 3) < (word >> 4 * group + 2 & 3)
        for word in words
        for group in range(groups)
    )
    assert unpack24(values, metadata).shape == (2, 4 * groups)
    if legal:
        check24(values, metadata)
    else:
        with pytest.raises(
            ValueError,
            match=r"metadata of row \d, group \d does not name two columns in ascending order",
        ):
            check24(values, metadata)


@ENOUGH
@given(st.lists(st.integers(0, 255), min_size=2, max_size=2), st.sampled_from([4, 8]))
def test_bitmasks_are_checked_group_by_group(masks, columns):
    compressed, bitmask = (
        torch.randn(2, columns // 2),
        torch.tensor([[mask] for mask in masks], dtype=torch.uint8),
    )
    if all(
        (mask >> group & 15).bit_count() == 2 for mask in masks for group in range(0, columns, 4)
    ):
        assert int((decode(compressed, bitmask, (2, columns)) != 0).sum()) == columns
    else:
        with pytest.raises(ValueError, match="does not keep two of the columns"):
            decode(compressed, bitmask, (2, columns))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_size": 10**9}, "hidden_size 1000000000; no tensor has a dimension above 128"),
        ({"text_config": {"rope": {"head_dim": 1 << 40}}}, "head_dim 1099511627776"),
        ({"num_experts": [1 << 20]}, "num_experts 1048576"),
        ({"moe_layer_freq": float("inf")}, "moe_layer_freq inf"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        (
            {
                "max_position_embeddings": 10_485_760,
                "rope_theta": 5e8,
                "sliding_window": 131_072,
                "attention_chunk_size": 8192,
                "hidden_size": 64,
                "eos_token_id": 1 << 30,
            },
            None,
        ),
    ],
)
def test_sizes_beyond_every_tensor_are_refused_before_anything_is_built(tiny, config, match):
    reader = Reader(tiny("llama"))
    reader.config = config
    made = SimpleNamespace(get_text_config=lambda **_: SimpleNamespace(num_hidden_layers=2))
    if match:
        with pytest.raises(CheckpointError, match=match):
            check_sizes(reader, made)
    else:
        check_sizes(reader, made)


def test_a_header_that_only_the_library_refuses(tiny, tmp_path):
    shutil.copytree(tiny("gpt2"), tmp_path / "model")
    path = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    header, data = split(path.read_bytes())
    header[min(header)]["more"] = "\ud800"  # half of a character: JSON to Python, none to Rust
    path.write_bytes(join(header, data))
    reader = Reader(tmp_path / "model")
    name = next(name for name, entry in reader.tensors.items() if entry.shard == path.name)
    with pytest.raises(CheckpointError, match="is refused by the safetensors library"):
        reader.read(name)


def test_names_from_files_are_printed_as_they_are(cli, tmp_path):
    """No markup, and no control characters: a tensor cannot colour, clear or crash the terminal."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["[bold]x[/red]"]}))
    for name in ("[/red].weight", "a\x1b[2J.weight"):
        save_file({name: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
        if name.isprintable():
            shown = cli("inspect", tmp_path).stdout
            assert "[bold]x[/red], 1 tensors" in shown
            assert ["[/red]", "4×4", "dense"] in [line.split()[:3] for line in shown.splitlines()]
        else:
            assert (
                "names are up to 500 printable characters"
                in cli("inspect", tmp_path, code=1).stderr
            )


def test_a_short_run_of_the_fuzzer_finds_nothing():
    done = subprocess.run(
        [sys.executable, "tests/fuzz.py", "--cases", "30", "--seconds", "120", "--seed", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " cases in " in done.stdout
