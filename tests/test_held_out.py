"""Samples beside the calibration that nothing is fitted to, and the errors on them."""

import json
from dataclasses import replace

import pytest
import torch

from compressor.calibration import tokens
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import UsageError
from compressor.run import pipeline
from compressor.run.check import plan_run
from tests.test_distributed import in_processes
from tests.test_resume import contents, stop_after

FITTED = {
    "wanda": {"method": "wanda"},
    "admm": {"method": "sparsegpt", "refine": "admm"},
    "tuned": {"method": "sparsegpt", "tune": 1},
    "ratios": {"method": "sparsegpt", "pattern": "50%", "ratios": "owl"},
    "dense fraction": {"method": "wanda", "dense_fraction": "10%"},
    "lowrank": {"method": "fisher", "keep": "60%"},
    "experts": {"method": "sparsegpt", "family": "mixtral"},
}


@pytest.fixture(autouse=True)
def batches_of_two_rows(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)


@pytest.fixture
def recipe(tiny, rows):
    def make(case, **more):
        settings = {"num_samples": 6, "seq_len": 32, "held_out": "25%", **FITTED[case], **more}
        return Recipe(
            str(tiny(settings.pop("family", "llama"))), **{"dataset": str(rows), **settings}
        )

    return make


def tensors(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def test_they_come_after_the_calibration_which_is_the_same_without_them(demo_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th of them was the {n * n}th." for n in range(400)))
    asked = {"num_samples": 5, "seq_len": 64, "seed": 0}
    for dataset in (text, "self"):

        def rows(further, dataset=dataset):
            if dataset == "self":
                return tokens.sample_from_model(demo_model, device="cpu", further=further, **asked)
            return tokens.calibration_rows(str(dataset), demo_model, 4096, further=further, **asked)

        assert len(rows(0)) == 5
        assert len(rows(3)) == 8
        assert torch.equal(rows(3)[:5], rows(0))
    assert 5 < len(tokens.calibration_rows(str(text), demo_model, 4096, further=900, **asked)) < 900


def test_a_text_that_has_no_more_holds_nothing_out(recipe, tmp_path):
    asked = recipe("wanda", num_samples=8)
    report = pipeline.prune(asked, tmp_path / "out")
    assert all(row.held_out_error is None for row in report.linears)
    assert all(row.error for row in report.linears)
    report = pipeline.prune(replace(asked, num_samples=7), tmp_path / "one")  # of two
    assert all(row.held_out_error for row in report.linears)


@pytest.mark.parametrize("case", FITTED)
def test_nothing_is_fitted_to_them(case, recipe, rows, tmp_path):
    """Other rows in their place: the same weights, other errors."""
    lines = rows.read_text().splitlines()
    other = [json.dumps({"input_ids": torch.arange(3 + i, 35 + i).tolist()}) for i in range(2)]
    (tmp_path / "other.jsonl").write_text("\n".join([*lines[:6], *other]))
    one = pipeline.prune(recipe(case), tmp_path / "one")
    two = pipeline.prune(recipe(case, dataset=str(tmp_path / "other.jsonl")), tmp_path / "two")
    fewer = pipeline.prune(recipe(case, held_out="0"), tmp_path / "fewer")
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two") == tensors(tmp_path / "fewer")
    assert one.calibration_tokens == two.calibration_tokens == fewer.calibration_tokens == 6 * 32
    assert [row.error for row in one.linears] == [row.error for row in fewer.linears]
    assert all(row.held_out_error is None for row in fewer.linears)
    pairs = [
        (row.held_out_error, twin.held_out_error)
        for row, twin in zip(one.linears, two.linears, strict=True)
        if row.held_out_error and twin.held_out_error  # experts that they reach
    ]
    assert len(pairs) > len(one.linears) / 2
    assert all(ours != theirs for ours, theirs in pairs)


@torch.no_grad()
def test_the_error_is_that_of_the_outputs_on_them(recipe, rows, tmp_path):
    """Against a forward pass of transformers, for what block 0 reads first."""
    from transformers import AutoModelForCausalLM

    report = pipeline.prune(recipe("admm", dtype="float32", format="dense"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(report.recipe["model"], dtype=torch.float32)
    ids = torch.tensor([json.loads(line)["input_ids"] for line in rows.read_text().splitlines()])
    block = model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(ids[6:])).flatten(0, 1)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(block.self_attn, name).weight
        full = f"model.layers.0.self_attn.{name}"
        pruned = Reader(tmp_path / "out").read(f"{full}.weight").float()
        expected = (x @ (weight - pruned).T).square().sum() / (x @ weight.T).square().sum()
        (row,) = [row for row in report.linears if row.name == full]
        assert row.held_out_error == pytest.approx(expected.item(), rel=1e-4)
        assert row.held_out_error > row.error  # fitted to the others


@pytest.mark.parametrize("case", ["admm", "tuned"])
def test_a_run_that_was_cut_off_goes_on_with_them(case, recipe, tmp_path):
    whole = pipeline.prune(recipe(case), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe(case), tmp_path / "out", progress=stop_after(2))
    report = pipeline.prune(recipe(case), tmp_path / "out")
    assert report.run["resumed_at_block"] == 2
    assert report.linears == whole.linears
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_they_rest_on_disk_where_there_is_no_room(recipe, tmp_path, monkeypatch):
    pipeline.prune(recipe("admm"), tmp_path / "plain")
    counted = []

    def choose(plan, tokens, device, limit, folder, *_):
        counted.append(tokens)
        return folder

    monkeypatch.setattr(pipeline, "choose_home", choose)
    pipeline.prune(recipe("admm"), tmp_path / "out")
    assert counted == [8 * 32]  # those that are held out among them
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.parametrize("case", ["wanda", "admm", "lowrank", "experts"])
def test_two_processes_report_the_errors_of_one(case, recipe, tmp_path):
    job = recipe(case)
    codes, said = in_processes(2, lambda rank: pipeline.prune(job, tmp_path / "two"))
    assert codes == [0, 0], said
    pipeline.prune(job, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("share", ["100%", "-10%", "a tenth"])
def test_what_is_no_part_is_refused(share, recipe, tmp_path):
    with pytest.raises(UsageError, match=r"held_out is .*; accepted: a fraction"):
        pipeline.prune(recipe("wanda", held_out=share), tmp_path / "out")


def test_the_table_and_the_page_show_them(cli, recipe, tmp_path):
    asked = recipe("wanda")
    shown = cli(
        "prune", asked.model, "-o", tmp_path / "out", "--dataset", asked.dataset,
        "--num-samples", 6, "--seq-len", 32, "--held-out", "25%",
    ).stdout  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cli("report", tmp_path / "out")
    page = (tmp_path / "out.report.html").read_text()
    assert "held-out" in shown
    assert "held-out" in page
    for row in report["linears"]:
        assert f"{row['held_out_error']:.4f}" in shown


def test_no_more_is_held_out_than_is_looked_at(recipe):
    asked = {"seq_len": 64, "held_out": "50%"}
    plan = plan_run(recipe("wanda", **asked), None)
    assert [plan.further(samples) for samples in (4, 16, 31, 32, 34, 512)] == [2, 8, 16, 16, 16, 16]
    assert plan_run(recipe("experts", **asked), None).further(512) == 256
