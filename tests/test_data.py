import json

import pytest
import torch

from compressor.calibration.tokens import (
    calibration_rows,
    check_dataset,
    context_length,
    load_tokenizer,
    records,
    sample_from_model,
)
from compressor.errors import DataError

TEXT = (
    "The ship came slowly round the point, and every soul on the quay knew her by the patched "
    "brown sail. " * 40
)


def rows(path, demo_model, **change):
    return calibration_rows(
        str(path), demo_model, 4096, **{"num_samples": 4, "seq_len": 32, "seed": 0, **change}
    )


def test_text_becomes_full_rows_without_padding(demo_model, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{number} {TEXT[:300]}"}) + "\n" for number in range(20))
    )
    ids = rows(path, demo_model)
    assert ids.shape == (4, 32)
    tokenizer = load_tokenizer(demo_model)
    stream = tokenizer.decode(ids.flatten())
    assert "The ship came slowly" in stream
    assert torch.equal(ids, rows(path, demo_model))
    assert not torch.equal(ids, rows(path, demo_model, seed=1))


def test_formats_agree(demo_model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}))
    assert torch.equal(rows(tmp_path / "a.txt", demo_model), rows(tmp_path / "a.jsonl", demo_model))
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [TEXT], "other": [1]}), tmp_path / "a.parquet")
    assert torch.equal(
        rows(tmp_path / "a.parquet", demo_model), rows(tmp_path / "a.txt", demo_model)
    )
    parquet.write_table(arrow.table({"input_ids": [[1, 2, 3, 4]] * 2}), tmp_path / "b.parquet")
    assert (
        rows(tmp_path / "b.parquet", demo_model, num_samples=2, seq_len=3).tolist()
        == [[1, 2, 3]] * 2
    )
    parquet.write_table(arrow.table({"words": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no `text` or `input_ids` column"):
        list(records(str(tmp_path / "c.parquet")))


def test_too_little_text_says_how_much_there_is(demo_model, tmp_path):
    (tmp_path / "a.txt").write_text("A few words.")
    with pytest.raises(DataError, match="gives 0 samples of 32 tokens, 4 were asked for"):
        rows(tmp_path / "a.txt", demo_model)


def test_tokenizer_of_another_model_is_noticed(demo_model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(DataError, match="do not belong together"):
        calibration_rows(str(tmp_path / "a.txt"), demo_model, 100, num_samples=1, seq_len=8, seed=0)


@pytest.mark.parametrize(
    "dataset", ["org/name", "org/name:config:split", "org/name::train", "self"]
)
def test_names_that_may_exist(dataset):
    check_dataset(dataset)


def test_self_is_seeded_and_leaves_the_global_generator_alone(demo_model):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = sample_from_model(demo_model, num_samples=3, seq_len=20, seed=0, device="cpu")
    assert torch.equal(torch.rand(1), expected)
    sample_from_model.cache_clear()
    assert torch.equal(
        first, sample_from_model(demo_model, num_samples=3, seq_len=20, seed=0, device="cpu")
    )
    assert not torch.equal(
        first, sample_from_model(demo_model, num_samples=3, seq_len=20, seed=1, device="cpu")
    )


def test_self_needs_memory(demo_model, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": 1000})())
    with pytest.raises(
        DataError, match=r"'self' needs the whole model in memory .* give a text with `dataset`"
    ):
        sample_from_model(demo_model, num_samples=1, seq_len=9, seed=7, device="cpu")


def test_context_length_of_old_and_new_configs():
    from transformers import AutoConfig

    assert context_length(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    assert context_length(AutoConfig.for_model("llama", max_position_embeddings=99)) == 99
