"""What is out of scope is refused in one line that says what it is; names and numbers that a family
has by design are no damage.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.model.skeleton import Skeleton
from compressor.run.pipeline import prune
from compressor.tools.verify import verify
from tests.families import build

SMALL = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
)
BART = dict(
    vocab_size=128, d_model=64, decoder_layers=2, encoder_layers=2, decoder_ffn_dim=96,
    encoder_ffn_dim=96, decoder_attention_heads=4, encoder_attention_heads=4,
)  # fmt: skip
ZAMBA = dict(
    **{**SMALL, "num_hidden_layers": 6}, attn_layer_period=3, attn_layer_offset=2, n_mamba_heads=2,
    attention_hidden_size=128, attention_head_dim=32, mamba_d_state=8, mamba_dt_rank=8,
    use_mamba_kernels=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("camembert", {**SMALL, "pad_token_id": 1}, "is an encoder"),
        ("bert", SMALL, "is an encoder"),
        ("bart", BART, "is an encoder-decoder"),
        ("zamba", ZAMBA, "shares shared_transf.* between the blocks"),
    ],
)
def test_is_refused_in_one_line(family, settings, said, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    model.save_pretrained(tmp_path)
    if family == "bart":  # a published one is saved with its encoder
        AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=said) as raised:
        Skeleton(Reader(tmp_path))
    assert "\n" not in str(raised.value)


def test_bert_that_decodes_is_in_scope(tmp_path):
    config = AutoConfig.for_model("bert", **SMALL, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert len(Skeleton(Reader(tmp_path)).blocks) == 3


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "deepseek_v4", "hy_v4"])
def test_verify_has_nothing_to_say_of_a_right_output(family, rows, tmp_path):
    folder = build(family, tmp_path / "model", torch.float32)
    recipe = Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32)
    report = prune(recipe, tmp_path / "out")
    assert not verify(tmp_path / "out")["problems"]
    on_disk = Reader(folder).tensors
    alone = [row for row in report.linears if "tensor" not in row.entry]
    assert alone
    assert all(f"{row.name}.weight" in on_disk for row in alone)


def test_verify_sees_an_expert_with_too_few_zeros(rows, tmp_path):
    folder = build("gpt_oss", tmp_path / "model", torch.float32)
    recipe = Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32, format="dense")
    prune(recipe, tmp_path / "out")
    assert not verify(tmp_path / "out")["problems"]
    name = "model.layers.1.mlp.experts.down_proj"
    shard = tmp_path / "out" / Reader(tmp_path / "out").tensors[name].shard
    tensors = load_file(shard)
    tensors[name][2] = 1.0
    save_file(tensors, shard, metadata={"format": "pt"})
    problems = verify(tmp_path / "out")["problems"]
    wrong = [problem for problem in problems if "has 0.0000% zeros" in problem]
    assert len(wrong) == 1
    assert "model.layers.1.mlp.experts.2.down_proj" in wrong[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-q4.gguf", "model-q4.gguf is a GGUF file"),
        ("consolidated.safetensors", "Mistral's own format"),
        ("model-00001-of-00002.safetensors", "a shard without its index"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_another_kind_is_named(name, said, config, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    if config:
        AutoConfig.for_model("bert", **SMALL).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        Reader(tmp_path)
