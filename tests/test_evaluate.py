import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.evaluate import METRIC, evaluate, perplexity, table


def test_perplexity_is_the_definition(demo_model):
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    rows = [torch.randint(3, 4096, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 40, 17)]
    losses = []
    for row in rows:
        with torch.no_grad():
            probability = model(row[None]).logits[0].double().softmax(-1)
        losses += [-math.log(probability[place, token]) for place, token in enumerate(row[1:].tolist())]
    assert perplexity(model, rows) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_text_is_joined_and_cut_into_windows(demo_model, tmp_path):
    text = "It was a bright cold day in spring, and the clocks of the old town were striking. " * 30
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in (text[:500], text[500:])))
    found = evaluate(str(demo_model), datasets=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], seq_len=64)
    from compressor.data import load_tokenizer

    for name, whole in (("a", text), ("b", text[:500] + "\n\n" + text[500:])):
        tokens = len(load_tokenizer(demo_model)(whole)["input_ids"])
        assert found["n-samples"][name]["effective"] == tokens // 64
        assert 1 < found["results"][name][METRIC] < 4096


def test_self_is_reproducible_and_easier_for_its_author(demo_model):
    first = evaluate(str(demo_model), datasets=["self"], num_samples=2, seq_len=64, dtype="float32")
    again = evaluate(str(demo_model), datasets=["self"], num_samples=2, seq_len=64, dtype="float32")
    assert first["results"] == again["results"]


def test_tasks_run_offline_through_lm_eval(demo_model, tmp_path):
    pytest.importorskip("lm_eval")
    questions = [
        {"question": f"The {animal} is", "choices": [" an animal", " zzz qqq"], "label": 0} for animal in ("dog", "cat", "cow")
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "local.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    found = evaluate(str(demo_model), tasks=["local_choice"], include_path=tmp_path)
    assert found["results"]["local_choice"]["acc,none"] == 1.0
    assert {"results", "configs", "versions", "n-samples", "config", "lm_eval_version"} <= set(found)
    json.dumps(found, default=str)
    assert "local_choice acc ↑" in table({"model": found})


def test_table_marks_what_is_missing():
    def result(**values):
        return {"results": {"text": values}, "config": {"model_bytes": 10**6}, "higher_is_better": {}}

    lines = table({"a/x": result(**{METRIC: 12.345}), "b/y": result(**{"acc,none": 0.5, "acc_stderr,none": 0.1})}).splitlines()
    assert lines[0].split("|")[2].strip() == "x"
    assert [cell.strip() for cell in lines[3].split("|")[1:4]] == ["text token perplexity ↑", "12.35", "-"]
    assert len(lines) == 5
