"""Every causal model type of the installed transformers works whole, or says in one line why not.

`python -m benchmarks.families` writes the table of docs/families.md from the same trials.
"""

import pytest

from tests.causal_types import causal_types
from tests.family_trial import tried

CORE = [
    "gemma3n_text",
    "gemma4_text",
    "deepseek_v4",
    "glm_moe_dsa",
    "zaya",
    "hy_v4",
    "qwen4_exp_text",
    "llama",
    "gemma3_text",
    "deepseek_v3",
    "granitemoe",
    "qwen3_next",
    "mamba",
    "jamba",
    "nemotron_h",
    "kimi_linear",
    "recurrent_gemma",
    "mpt",
    "camembert",
    "emu3",
]
"""These work, in every run of the tests."""

REST = [pytest.param(kind, marks=pytest.mark.slow) for kind in causal_types() if kind not in CORE]


@pytest.mark.parametrize("kind", [*CORE, *REST])
def test_a_type_works_whole_or_is_refused_in_one_line(kind, tmp_path):
    trial = tried(kind, tmp_path)
    assert trial.result in ("works", "refused", "not built"), f"{trial.result}: {trial.line}"
    assert "\n" not in trial.line
    if kind in CORE:
        assert trial.result == "works", trial.line
        assert trial.linears


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("bart", "attend to what another model gives"),
        ("hrm_text", "goes through its blocks more than once: model.L_module.layers holds 4"),
        ("jetmoe", r"leave them dense with `ignore='model.layers.\*.mlp.input_linear.weight'` and"),
        ("reformer", "returns a ReformerOutput from its blocks"),
        ("xlnet", "config.json says attn_type 'bi'"),
        ("zamba2", "shares .* between the blocks model.layers.2 and model.layers.5"),
    ],
)
def test_what_is_out_of_scope_is_said(kind, line, tmp_path):
    import re

    trial = tried(kind, tmp_path)
    assert trial.result == "refused"
    assert re.search(line, trial.line), trial.line
