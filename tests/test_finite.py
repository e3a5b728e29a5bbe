"""Numbers that are not finite end a run in one line, or never arise; no finished folder holds one.

What a linear cannot be told from (no inputs but zeros, no gradient) is factored without it.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.config.recipe import Recipe
from compressor.engine import blocks
from compressor.errors import NumericalError
from compressor.formats.dense import Dense
from compressor.records.report import to_json
from compressor.run.pipeline import make_plan, prune

SMALL_ARMOR = {"iterations": 2, "finish": 1, "block_size": 16}
METHODS = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "nowag": {"method": "nowag"},
    "sparsegpt": {"method": "sparsegpt"},
    "armor": {"method": "armor", "options": SMALL_ARMOR},
    "dsnot": {"method": "wanda", "refine": "dsnot"},
    "lsq": {"method": "wanda", "refine": "lsq"},
    "swap": {"method": "wanda", "refine": "swap"},
    "admm": {"method": "wanda", "refine": "admm"},
    "svd": {"method": "svd", "keep": "60%"},
    "welore": {"method": "welore", "keep": "60%"},
    "asvd": {"method": "asvd", "keep": "60%"},
    "svd_llm": {"method": "svd_llm", "keep": "60%"},
    "svd_llm, threshold": {"method": "svd_llm", "keep": "60%", "ranks": "threshold"},
    "fisher": {"method": "fisher", "keep": "60%"},
}
SVDS = ["asvd", "svd_llm", "svd_llm, threshold", "fisher"]


@pytest.fixture
def edited(tiny, tmp_path):
    """A function: family, the end of tensors' names and a function of these -> another folder."""

    def edit(change, *ends, family="llama"):
        folder = shutil.copytree(tiny(family), tmp_path / "model")
        touched = 0
        for shard in folder.glob("*.safetensors"):
            tensors = load_file(shard)
            for name in tensors:
                if name.endswith(ends):
                    tensors[name] = change(tensors[name].clone())
                    touched += 1
            save_file(tensors, shard, metadata={"format": "pt"})
        assert touched == len(ends)
        return folder

    return edit


@pytest.fixture
def recipe(rows):
    def make(model, **settings):
        common = {"dataset": str(rows), "num_samples": 8, "seq_len": 32}
        return Recipe(str(model), **{**common, **settings})

    return make


def poisoned(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


def notes(report, name):
    return [row.note for row in report.linears if row.name.endswith(name)]


def check_finite(folder):
    """No number in the folder is other than finite, in weights or in words."""
    for shard in folder.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name

    def refuse(constant):
        raise AssertionError(constant)

    for path in (folder / "report.json", folder.with_name(f"{folder.name}.report.json")):
        json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "layers.2.post_attention_layernorm.weight"),
        ("gpt2", "ln_f.bias"),
        ("gpt2", "h.2.mlp.c_fc.bias"),
        ("qwen3_moe", "model.norm.weight"),
    ],
)
def test_what_is_copied_is_checked_before_any_work(cli, edited, family, name, value):
    model = edited(poisoned(value), name, family=family)
    said = cli("prune", model, "--method", "magnitude", "--dry-run", "-q", code=1).stderr
    assert said.count("\n") == 1
    assert f"{name} holds {'NaN' if math.isnan(value) else 'Inf'}" in said


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "layers.2.mlp.down_proj.weight"])
def test_a_matrix_is_checked_when_its_block_is_loaded(edited, recipe, tmp_path, name):
    model = edited(poisoned(math.nan), name)
    with pytest.raises(NumericalError, match=f"{name} holds NaN"):
        prune(recipe(model, method="magnitude"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_inputs_that_are_all_zero(edited, recipe, tmp_path, settings):
    model = edited(torch.zeros_like, "layers.1.self_attn.v_proj.weight")
    prune(recipe(model, **settings), tmp_path / "out")
    check_finite(tmp_path / "out")


@pytest.mark.parametrize("case", SVDS)
@pytest.mark.parametrize("end", ["self_attn.v_proj.weight", "input_layernorm.weight"])
def test_a_linear_without_inputs_is_factored_by_its_weight_and_listed(
    edited, recipe, tmp_path, case, end
):
    model = edited(torch.zeros_like, f"layers.1.{end}")
    report = prune(recipe(model, **METHODS[case]), tmp_path / "out")
    name = "o_proj" if "v_proj" in end else "q_proj"
    assert "its inputs are all zero" in "".join(notes(report, f"layers.1.self_attn.{name}"))
    assert not any("zero" in note for note in notes(report, f"layers.0.self_attn.{name}"))
    check_finite(tmp_path / "out")


@pytest.mark.parametrize("tune", [0, 1])
def test_a_linear_that_no_gradient_reaches_is_factored_by_its_inputs_and_listed(
    edited, recipe, tmp_path, tune
):
    """Blocks whose last matrices are zero, as models are made deeper with."""
    ends = ("layers.1.self_attn.o_proj.weight", "layers.1.mlp.down_proj.weight")
    model = edited(torch.zeros_like, *ends)
    report = prune(recipe(model, tune=tune, **METHODS["fisher"]), tmp_path / "out")
    for linear in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"):
        for block in (0, 1, 2):
            said = "".join(notes(report, f"layers.{block}.{linear}"))
            assert ("no gradient of the loss reaches it" in said) == (block == 1), (block, linear)
    check_finite(tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_a_dead_linear_in_other_families(edited, recipe, tmp_path, family):
    end = {"gpt2": "h.1.mlp.c_proj.weight", "qwen3_moe": "layers.1.mlp.experts.2.down_proj.weight"}
    model = edited(torch.zeros_like, end[family], family=family)
    report = prune(recipe(model, **METHODS["fisher"]), tmp_path / "out")
    name = {"gpt2": "h.1.mlp.c_fc", "qwen3_moe": "layers.1.mlp.experts.2.up_proj"}[family]
    assert "no gradient" in "".join(notes(report, name))
    check_finite(tmp_path / "out")


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_what_is_not_finite_is_not_written_whatever_made_it(
    tiny, recipe, tmp_path, monkeypatch, settings
):
    """The place where every weight passes is the last before it is stored."""
    wide = {**settings, "format": "dense"}
    real = blocks._form

    def broken(block, task, weight, stats):
        form = real(block, task, weight, stats)
        if task.linear.name.endswith("1.self_attn.k_proj"):
            return Dense(poisoned(math.inf)(form.dense().clone()))
        return form

    monkeypatch.setattr(blocks, "_form", broken)
    for asked in (settings, wide):
        with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.k_proj: .* not finite"):
            prune(recipe(tiny("llama"), **asked), tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_factors_that_overflow_their_dtype_are_not_written(tiny, recipe, tmp_path):
    asked = recipe(tiny("llama"), method="asvd", keep="60%", options={"alpha": 300.0})
    with pytest.raises(NumericalError, match="what asvd makes of it is not finite"):
        prune(asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_outputs_that_overflow_end_the_run(edited, recipe, tmp_path):
    """The last block: no other would see it."""
    model = edited(lambda weight: weight * 1e37, "layers.2.mlp.down_proj.weight")
    model = edited_again(model, "layers.2.post_attention_layernorm.weight", 1e8)
    with pytest.raises(NumericalError, match=r"what leaves model\.layers\.2 is not finite"):
        prune(recipe(model, method="wanda", ignore=["*down_proj"]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def edited_again(folder, end, factor):
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file(
            {name: t * factor if name.endswith(end) else t for name, t in tensors.items()},
            shard,
            metadata={"format": "pt"},
        )
    return folder


def test_a_report_is_json_whatever_is_in_it():
    found = {"a": [math.nan, {"b": -math.inf}], "c": (1.5, "NaN")}
    assert json.loads(to_json(found)) == {"a": [None, {"b": None}], "c": [1.5, "NaN"]}


# --- dense where a packed form was asked against


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", METHODS["armor"]),
        ("granitemoe", METHODS["armor"]),
        ("gpt2", METHODS["svd"]),
        ("llama", METHODS["fisher"]),
        ("qwen3_moe", {"method": "svd_llm", "keep": "60%"}),
        ("llama", {"method": "svd_llm", "keep": "60%", "tune": 1}),
    ],
)
def test_format_dense_stores_products_in_place(tiny, recipe, tmp_path, family, settings):
    if family == "llama" and "tune" not in settings:  # the product is that of the packed factors
        packed = prune(recipe(tiny(family), **settings), tmp_path / "packed")
        assert any(row.format != "dense" for row in packed.linears)
    report = prune(recipe(tiny(family), format="dense", **settings), tmp_path / "out")
    assert {row.format for row in report.linears} == {"dense"}
    assert report.output_bytes == report.input_bytes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    products = [row for row in report.linears if "its factors are multiplied" in row.note]
    assert products
    assert not any(row.pattern for row in products)


def test_format_dense_is_the_unpacked_packed_folder(cli, tiny, recipe, tmp_path):
    settings = {"method": "svd", "keep": "60%"}
    prune(recipe(tiny("gpt2"), **settings), tmp_path / "packed")
    prune(recipe(tiny("gpt2"), format="dense", **settings), tmp_path / "dense")
    cli("unpack", tmp_path / "packed", "-o", tmp_path / "unpacked")
    for shard in (tmp_path / "unpacked").glob("*.safetensors"):
        expected, found = load_file(shard), load_file(tmp_path / "dense" / shard.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


# --- plans of runs that tune


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "wanda", "dense_fraction": "20%"},
        {"method": "sparsegpt", "refine": "admm", "dense_fraction": "20%"},
        {"method": "wanda", "pattern": "50%", "ratios": "owl"},
        {"method": "svd_llm", "keep": "60%", "ranks": "threshold"},
        {"method": "fisher", "keep": "60%"},
    ],
    ids=str,
)
def test_a_plan_of_a_run_that_tunes_is_the_one_it_takes(tiny, recipe, tmp_path, settings):
    asked = recipe(tiny("llama"), tune=1, **settings)
    measured = make_plan(asked).measured
    assert measured["divergence"] == prune(asked, tmp_path / "out").allocation["divergence"]
