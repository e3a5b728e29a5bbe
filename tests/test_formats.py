"""The table of stored forms: what each says of headers and entries is what its tensors and its
module are, and a form added as CONTRIBUTING says works everywhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from compressor.errors import CheckpointError
from compressor.formats import FORMATS, Spec, form_class
from compressor.formats.armor import Armor
from compressor.formats.headers import check_headers, packed_headers, unlisted
from compressor.formats.lowrank import LowRank
from compressor.formats.pivot import Pivot
from compressor.pattern import Pattern
from compressor_kernels.packing import pack24
from tests.conftest import ROOT

OUT, IN = 24, 32
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
each_form = pytest.mark.parametrize("name", FORMATS)


def weight24(dtype=torch.bfloat16):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    return weight * Pattern.parse("2:4").mask(weight.float().abs())


def example(name, dtype=torch.bfloat16):
    """A form of this name with a weight `[24, 32]`; ARMOR's and thin factors are random."""
    weight, generator = weight24(dtype), torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if name == "armor":
        return Armor(*pack24(weight), random(3, 8, 8), random(2, 16, 16))
    if name == "lowrank":
        return LowRank(random(OUT, 5), random(5, IN))
    if name == "pivot":
        pivots = torch.tensor([0, 3, 4, 11, OUT - 1], dtype=torch.int32)
        return Pivot(random(5, IN), random(OUT - 5, 5), pivots)
    return FORMATS[name].from_dense(weight)


def headers(tensors):
    return {key: Spec(NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}


@each_form
def test_the_name_is_that_of_the_file(name):
    assert name == FORMATS[name].FORMAT
    assert FORMATS[name].__module__ == f"compressor.formats.{name}"
    assert form_class(name) is FORMATS[name]


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_headers_tell_the_weight_and_the_weight_tells_headers(name, dtype):
    form = example(name, dtype)
    stored = headers(form.pack())
    assert tuple(stored) == form.SUFFIXES
    dense = Spec(form.dense_dtype(form.entry, stored), form.dense_shape(stored))
    assert dense == Spec(NAMES[dtype], tuple(form.dense().shape))
    assert form.stored_specs(form.entry, dense) == stored
    assert form.entry["format"] == name
    form.check_entry(form.entry, (OUT, IN))
    assert check_headers("a", form.entry, stored) == Spec(NAMES[dtype], (OUT, IN))
    assert name == "dense" or packed_headers(
        {f"a.{key}": spec for key, spec in stored.items()} | {"a.bias": Spec("BF16", (OUT,))}
    ) == {"a": stored}


@each_form
def test_the_state_of_the_module_is_the_stored_tensors(name):
    form = example(name, torch.float32)
    module = form.module(form.entry, IN, OUT, bias=False, dtype=torch.float32, device="cpu")
    assert headers(module.state_dict()) == headers(form.pack())
    module.load_state_dict(form.pack())
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(module(x), x @ form.dense().T, rtol=1e-4, atol=1e-3)


@each_form
def test_forms_come_apart_and_together_again(name):
    form = example(name)
    again = type(form).unpack(form.entry, form.pack())
    again.check_canonical()
    assert torch.equal(again.dense(), form.dense())
    rebuilt = type(form).from_factors(**form.factors())
    assert all(torch.equal(rebuilt.pack()[key], value) for key, value in form.pack().items())
    wide = {key: value.float() for key, value in form.factors().items()}
    torch.testing.assert_close(form.product(**wide), form.dense().float(), rtol=2**-8, atol=2**-8)


@each_form
def test_numbers_and_zeros_are_counted(name):
    form = example(name)
    assert form.parameters(form.entry, (OUT, IN)) == sum(
        factor.numel() for factor in form.factors().values() if factor.is_floating_point()
    )
    assert (form.sparsity > 0) == form.SPARSE
    assert bool(form.TRAINABLE) != form.SPARSE


@pytest.mark.parametrize(
    ("name", "row", "label", "told"),
    [
        ("dense", {}, "dense", "dense with zeros in place (50.0% zeros)"),
        ("sparse24", {}, "sparse24", "packed 2:4 (50.0% zeros)"),
        (
            "armor",
            {},
            "armor",
            "packed 2:4 between block-diagonal factors (50.0% zeros in the 2:4 core)",
        ),
        (
            "lowrank",
            {"entry": {"format": "lowrank", "rank": 4}},
            "lowrank 4",
            "of low rank (rank 4, 50.0% of their parameters)",
        ),
    ],
)
def test_people_are_told(name, row, label, told):
    row = {"shape": [16, 16], "sparsity": 0.5, "entry": {"format": name}, **row}
    assert FORMATS[name].label(row["entry"]) == label
    assert FORMATS[name].told([row, row]) == told


def test_a_range_of_ranks_is_told():
    rows = [{"shape": [16, 16], "entry": {"format": "lowrank", "rank": rank}} for rank in (6, 2)]
    assert LowRank.told(rows) == "of low rank (ranks 2 to 6, 50.0% of their parameters)"


PAIR = {"weight_values": Spec("BF16", (24, 16)), "weight_metadata": Spec("I16", (24, 2))}
BLOCKS = {"weight_a": Spec("BF16", (3, 8, 8)), "weight_b": Spec("BF16", (2, 16, 16))}


@pytest.mark.parametrize(
    ("entry", "change", "match"),
    [
        ({"format": "sparse25"}, {}, "unknown format 'sparse25'; this version knows dense, sparse"),
        (
            {"format": "sparse24"},
            {"weight_metadata": None},
            "config.json names the packed linear 'a', but its tensors are not there",
        ),
        (
            {"format": "sparse24"},
            {"weight_values": Spec("BF16", (24, 16, 1))},
            r"a.weight_values has shape \[24, 16, 1\], a matrix is expected",
        ),
        (
            {"format": "sparse24"},
            {"weight_metadata": Spec("I16", (24, 3))},
            r"a.weight_metadata is I16 \[24, 3\], I16 \[24, 2\] is expected",
        ),
        (
            {"format": "sparse24"},
            {"weight_metadata": Spec("I32", (24, 2))},
            r"a.weight_metadata is I32 \[24, 2\], I16 \[24, 2\] is expected",
        ),
        ({"format": "sparse24"}, BLOCKS, "a.weight_a does not belong to the format sparse24"),
        (
            {"format": "armor", "block_a": 8, "block_b": 5},
            BLOCKS,
            "config.json gives a wrappers of {'block_a': 8, 'block_b': 5}, which do not divide",
        ),
        ({"format": "armor"}, BLOCKS, "config.json gives a wrappers of {'block_a': None"),
        (
            {"format": "armor", "block_a": 4, "block_b": 16},
            BLOCKS,
            r"a.weight_a is BF16 \[3, 8, 8\], BF16 \[6, 4, 4\] is expected",
        ),
        (
            {"format": "lowrank", "rank": "5"},
            {"weight_u": Spec("BF16", (24, 5)), "weight_v": Spec("BF16", (5, 32))},
            r"config.json gives a the rank 5, its weight is \[24, 32\]",
        ),
    ],
)
def test_headers_that_do_not_belong_are_one_line(entry, change, match):
    stored = {suffix: spec for suffix, spec in (PAIR | change).items() if spec}
    with pytest.raises(CheckpointError, match=match) as error:
        check_headers("a", entry, stored)
    assert "\n" not in str(error.value)


def test_tensors_that_are_not_listed_are_found():
    names = [
        "a.weight_values",
        "a.weight",
        "b.weight_v",
        "rnn.weight_ih_l0",
        "c.bias",
        "d.weight_a",
    ]
    assert unlisted(names, {"a": {"format": "sparse24"}}) == ["b.weight_v", "d.weight_a"]


def test_the_table_is_light():
    code = "import compressor.formats.headers, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# The section "Add a stored form" of CONTRIBUTING.md, carried out.


def section(title):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the packages with the form that CONTRIBUTING adds."""
    home, text = tmp_path_factory.mktemp("extended"), section("Add a stored form")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "compressor", home / "compressor", ignore=ignore)
    shutil.copytree(
        ROOT / "kernels" / "compressor_kernels",
        home / "kernels" / "compressor_kernels",
        ignore=ignore,
    )
    files = [block.partition("\n") for block in blocks(text, "python")]
    assert [path for path, _, _ in files if not path.startswith("# ")] == []
    for path, _, code in files:
        assert not (home / path.removeprefix("# ")).exists()
        (home / path.removeprefix("# ")).write_text(code)
    table = home / "compressor" / "formats" / "__init__.py"
    for block in blocks(text, "diff"):
        before, after = block.splitlines()
        assert (before[0], after[0]) == (" ", "+")
        assert table.read_text().count(f"{before[1:]}\n") == 1
        table.write_text(
            table.read_text().replace(f"{before[1:]}\n", f"{before[1:]}\n{after[1:]}\n")
        )
    assert (len(files), len(blocks(text, "diff"))) == (2, 2)
    return home


def run(home, code, *arguments):
    path = os.pathsep.join(map(str, (home, home / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_form_of_contributing_works(extended, tiny, tmp_path):
    from compressor.config.recipe import Recipe
    from compressor.run.pipeline import prune

    example = (
        "import sys\nfrom pathlib import Path\n" + blocks(section("Add a stored form"), "py")[0]
    )
    prune(Recipe(str(tiny("llama")), method="magnitude", format="dense"), tmp_path / "sparse")
    run(
        extended,
        f"{example}\npack_int8(*map(Path, sys.argv[1:]))",
        tmp_path / "sparse",
        tmp_path / "out",
    )
    main = "from compressor.cli import main; main()"
    shown = json.loads(run(extended, main, "inspect", tmp_path / "out", "--json"))
    rows = [row for row in shown["linears"] if row["format"] == "sparse24_int8"]
    assert len(rows) == 21
    for row in rows:
        out, into = row["shape"]
        assert row["bytes"] == out * into // 2 + 2 * out * -(-into // 16) + 2 * out
        assert row["dense_bytes"] == 2 * out * into
    assert "is sound" in run(extended, main, "verify", tmp_path / "out")
    run(extended, main, "unpack", tmp_path / "out", "-o", tmp_path / "dense")
    logits = (
        "import sys, torch, compressor\n"
        "ids = torch.arange(3, 19)[None]\n"
        "print(compressor.load(sys.argv[1], dtype=torch.float32)(ids).logits.flatten().tolist())"
    )
    packed, dense, sparse = (
        torch.tensor(json.loads(run(extended, logits, tmp_path / folder)))
        for folder in ("out", "dense", "sparse")
    )
    torch.testing.assert_close(packed, dense, rtol=0, atol=0.02 * dense.abs().max().item())
    assert 0 < (packed - sparse).norm() < 0.05 * sparse.norm()
