"""A model decoded on the kernels writes the text that the reference writes: the first block of the
demo's model, to be quick.
"""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressor
from compressor.config.recipe import Recipe
from compressor.run.pipeline import prune
from compressor.runtime import runtimes
from compressor_kernels import backend
from tests.conftest import DEMO

PROMPT = torch.tensor([[0, 310, 77, 1042]])


@pytest.mark.parametrize("method", ["magnitude", "armor"])
def test_greedy_text(method, tmp_path, monkeypatch):
    settings = (
        dict(options={"iterations": 2}, num_samples=2, seq_len=32, dataset="self")
        if method == "armor"
        else {}
    )
    AutoModelForCausalLM.from_pretrained(DEMO, num_hidden_layers=1).save_pretrained(
        tmp_path / "dense"
    )
    prune(Recipe(str(tmp_path / "dense"), method=method, **settings), tmp_path / "out")
    reference = compressor.load(tmp_path / "out")
    assert all(how.endswith("too small to gain on a CPU") for how in runtimes(reference).values())
    model = compressor.load(tmp_path / "out", runtime="packed")
    listed = runtimes(model)
    assert all(how.startswith("packed") for how in listed.values())
    if method == "magnitude":
        assert (
            listed["model.layers.0.self_attn.q_proj"]
            == "packed; one launch for q_proj, k_proj, v_proj"
        )
        assert listed["model.layers.0.mlp.down_proj"] == "packed"
    launched = []
    plain = backend.runs
    monkeypatch.setattr(
        "compressor_kernels.backend.runs", lambda x: launched.append(x.shape) or plain(x)
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        greedy = dict(
            max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        expected = reference.generate(PROMPT, **greedy)
        assert not launched
        written = model.generate(PROMPT, **greedy)
    assert launched
    assert torch.equal(written.sequences, expected.sequences)
    ours, theirs = torch.stack(written.logits).float(), torch.stack(expected.logits).float()
    assert (theirs - ours).norm() <= 0.03 * theirs.norm()
