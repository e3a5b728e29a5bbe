"""The model card: what it says of every stored form, and of reports and scores that are damaged."""

import json

import pytest

from compressor.records.scores import scores_path
from tests.conftest import DEMO

PLAN = """version = 1
[linears]
"*.q_proj" = { keep = "50%" }
"*.k_proj" = { dense = true }
"*" = { pattern = "2:4" }
"""


@pytest.mark.parametrize(
    ("settings", "plan", "said"),
    [
        (
            dict(method="armor", options={"iterations": 1, "finish": 0, "overhead": 0.125}),
            "",
            [
                "packed 2:4 between block-diagonal factors (50.0% zeros in the 2:4 core)",
                "by compress-llm",
                "pip install vllm compress-llm\nvllm serve ",
            ],
        ),
        (
            dict(method="magnitude", pattern="60%"),
            "",
            ["28 linears, dense with zeros in place (60.0% zeros)", "not smaller than"],
        ),
        (
            dict(method="svd", match="0.5"),
            PLAN,
            [
                "24 linears: 4 of low rank (rank 36, 48.3% of their parameters); 20 packed 2:4 "
                "(50.0% zeros)",
                "as its plan.toml says with svd and sparsegpt, its linears matched to the dense "
                "model, by",
                "| method | `svd`. Plain truncated SVD: the nearest weight of a rank, ‖W - U "
                "V‖_F, blind",
                "; `sparsegpt`. SparseGPT: prune column by column",
                "`plan.toml` beside it",
                "| left dense | 5 weights, 4 inside the decoder blocks:",
            ],
        ),
        (
            dict(method="magnitude"),
            'version = 1\n[linears]\n"*.q_proj" = { rank = 8 }\n"*" = { dense = true }\n',
            [
                "4 linears, of low rank (rank 8,",
                "as its plan.toml says with svd_llm, by",
                "| method | `svd_llm`. SVD-LLM",
            ],
        ),
    ],
    ids=["armor", "dense", "mixed", "low rank of a plan"],
)
def test_the_card_of_every_form_says_what_it_leaves(tmp_path, rows, settings, plan, said):
    from compressor.config.recipe import Recipe
    from compressor.publish.files import prepare
    from compressor.run.pipeline import prune

    if plan:
        (tmp_path / "plan.toml").write_text(plan)
    recipe = Recipe(
        str(DEMO),
        dataset=str(rows),
        num_samples=4,
        seq_len=32,
        plan=str(tmp_path / "plan.toml") if plan else "",
        **settings,
    )
    prune(recipe, tmp_path / "out")
    card = str(prepare(tmp_path / "out", "me/it", "", lambda name: (False, None)).card)
    for text in said:
        assert text in card


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(linears=[1]),
        lambda report: report["linears"][0].pop("format"),
        lambda report: report["linears"][0].update(format="lowrank"),
        lambda report: report["totals"].update(ratio="a"),
        lambda report: report["versions"].clear(),
        lambda report: report.update(left_dense=[{"name": "a", "shape": [1]}]),
        lambda report: report.update(input_bytes=-1),
    ],
    ids=range(7),
)
def test_a_damaged_report_is_no_card(out, change):
    from compressor.errors import CheckpointError
    from compressor.publish.files import prepare

    report = json.loads((out / "report.json").read_text())
    change(report)
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match="is no report of this package"):
        prepare(out, "me/it", "", lambda name: (False, None))


@pytest.mark.parametrize(
    "change",
    [
        {"results": 3},
        {"results": {"t": 3}},
        {"config": 3},
        {"config": {}},
        {"n-samples": {"t": 3}},
        {"n-samples": {"t": {"effective": "x", "original": []}}},
        {"versions_of": 3},
        {"baseline": 3},
        {"baseline": {"results": 3}},
        {"baseline": {"results": {"t": 3}}},
    ],
    ids=str,
)
def test_damaged_scores_are_one_line_for_card_and_page(out, change):
    from compressor.errors import CheckpointError
    from compressor.page import read_record
    from compressor.publish.files import prepare

    path = scores_path(out)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"is no record of `compressor\.evaluate`"):
        prepare(out, "me/it", "", lambda name: (False, None))
    with pytest.raises(CheckpointError, match=r"is no record of `compressor\.evaluate`"):
        read_record(out)


def test_a_baseline_without_a_number_is_a_dash(out):
    from compressor.publish.files import prepare

    path = scores_path(out)
    found = json.loads(path.read_text())
    found["baseline"]["results"]["books"]["token_perplexity,none"] = "x"
    path.write_text(json.dumps(found))
    assert "first 7 of 9 samples | – | 121.9 |" in str(
        prepare(out, "me/it", "", lambda name: (False, None)).card
    )
