"""What stays dense unless it is asked for, and patterns that leave what cannot be compressed."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.config.recipe import Recipe
from compressor.errors import CompressError, UsageError
from compressor.run.pipeline import prune
from compressor.text import to_ignore
from tests.families import CORE, build


@pytest.fixture
def narrow(tmp_path):
    """A llama whose keys and values have 4 rows of 64 columns."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 4}
    config = AutoConfig.for_model("llama", vocab_size=128, **{**CORE["llama"], **heads})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def left(report):
    return {row.name: row.reason for row in report.left_dense if ".layers." in row.name}


def test_small_projections_stay_dense_unless_asked_for(narrow, rows, tmp_path):
    settings = {"dataset": str(rows), "num_samples": 8, "seq_len": 32}
    report = prune(Recipe(str(narrow), **settings), tmp_path / "out")
    small = [f"model.layers.{n}.self_attn.{name}_proj" for n in range(3) for name in "kv"]
    assert left(report) == dict.fromkeys(small, "fewer than 128 rows")
    report = prune(Recipe(str(narrow), **settings, min_rows=4), tmp_path / "fewer")
    assert not left(report)
    everything = prune(Recipe(str(narrow), **settings, min_rows=0), tmp_path / "all")
    assert {row.name for row in everything.linears} > set(small)


def test_a_pattern_for_small_projections_is_one_that_matches(narrow, rows, tmp_path):
    recipe = Recipe(str(narrow), dataset=str(rows), num_samples=8, seq_len=32, ignore=["*.k_proj"])
    reasons = left(prune(recipe, tmp_path / "out"))
    assert reasons["model.layers.0.self_attn.k_proj"] == "--ignore *.k_proj"
    assert reasons["model.layers.0.self_attn.v_proj"] == "fewer than 128 rows"


def test_fewer_rows_than_none_is_refused():
    with pytest.raises(UsageError, match="`min_rows` is -1; accepted: 0 or more"):
        Recipe("model", min_rows=-1)


def test_step_sizes_stay_dense(rows, tmp_path):
    folder = build("jamba", tmp_path / "model", torch.float32)
    recipe = Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32, min_rows=0)
    reasons = left(prune(recipe, tmp_path / "out"))
    assert reasons["model.layers.0.mamba.dt_proj.weight"] == "a step size"


def test_what_to_ignore_is_said_for_all_blocks_and_experts_at_once():
    names = ["model.layers.0.mlp.experts.3.up", "model.layers.1.mlp.experts.0.up", "h.0.attn"]
    assert to_ignore(*names) == (
        "`ignore='model.layers.*.mlp.experts.*.up'` and `ignore='h.*.attn'`"
    )


def test_a_width_that_the_pattern_does_not_divide_is_hinted_at_once(narrow, rows, tmp_path):
    settings = {"dataset": str(rows), "num_samples": 8, "seq_len": 32, "pattern": "20:40"}
    with pytest.raises(CompressError, match="not a multiple of 40") as error:
        prune(Recipe(str(narrow), **settings), tmp_path / "out")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert f"`ignore='model.layers.*.{name}'`" in str(error.value)
