"""Multimodal checkpoints: the text model's blocks are compressed, everything else is copied, and
the result loads as a language model and as the multimodal one.
"""

from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

import compressor.runtime
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.run.pipeline import prune
from compressor.tools.unpack import unpack
from compressor.tools.verify import verify
from tests.causal_types import causal_types
from tests.family_trial import logits, tried
from tests.wrappers import REFUSED, UNBUILT, build_wrapper, wrapper, wrapper_types

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def score(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def tensors_of(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen3_5"])
def test_text_is_compressed_and_the_rest_copied(family, rows, tmp_path):
    folder = build_wrapper(family, tmp_path / "model")
    recipe = Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32)
    report = prune(recipe, tmp_path / "out")
    assert any("is multimodal" in note and "text alone" in note for note in report.notes)
    source, packed = tensors_of(folder), tensors_of(tmp_path / "out")
    compressed = {f"{row.name}.weight" for row in report.linears}
    assert compressed < source.keys()
    assert all(fnmatchcase(name, "*language_model*.layers.*") for name in compressed)
    untouched = source.keys() - compressed
    assert any("vision" in name or "visual" in name for name in untouched)
    assert all(torch.equal(source[name], packed[name]) for name in untouched)
    assert not verify(tmp_path / "out")["problems"]

    unpack(tmp_path / "out", tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")
    assert dense.keys() == source.keys()
    assert all((dense[name] == 0).float().mean() >= 0.5 for name in compressed)
    exact = score(AutoModelForImageTextToText.from_pretrained(tmp_path / "dense"))
    wrapper, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(score(wrapper), exact)
    assert torch.equal(score(compressor.runtime.load(tmp_path / "out")), exact)


@pytest.mark.slow
@pytest.mark.parametrize("kind", wrapper_types())
def test_every_type_works_or_is_refused_in_one_line(kind, tmp_path):
    trial = tried(kind, tmp_path, wrapper)
    if kind in UNBUILT:
        assert trial.result == "not built"
        return
    assert trial.result == ("refused" if kind in REFUSED else "works"), trial.line
    if kind in REFUSED:
        assert REFUSED[kind] in trial.line
        return
    exact = logits(AutoModelForMultimodalLM.from_pretrained(tmp_path / "dense"))
    autos = [AutoModelForMultimodalLM, AutoModelForCausalLM]
    for auto in autos if _loads_as_text(kind, tmp_path / "dense") else autos[:1]:
        model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"]
        assert (logits(model) - exact).abs().max() <= 1e-4 * exact.abs().max()


def _loads_as_text(kind, folder):
    """Whether transformers has a causal class for the type that finds its weights; Emu3's does not
    know the names that the multimodal one saves.
    """
    if kind not in causal_types():
        return False
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] or kind == "emu3"
    return not info["missing_keys"]


def test_a_model_that_wants_an_image_is_refused_in_one_line(rows, tmp_path):
    folder = build_wrapper("kosmos-2", tmp_path / "model")
    recipe = Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32)
    with pytest.raises(CheckpointError, match=r"does not compute on text alone \(You have"):
        prune(recipe, tmp_path / "out")


def test_either_name_is_accepted(rows, tmp_path):
    folder = build_wrapper("gemma3", tmp_path / "model")
    for number, glob in enumerate(
        ("language_model.model.layers.0.*", "model.language_model.layers.0.*")
    ):
        recipe = Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32, ignore=[glob])
        report = prune(recipe, tmp_path / f"out{number}")
        ignored = {left.name for left in report.left_dense if left.reason == f"--ignore {glob}"}
        assert "language_model.model.layers.0.self_attn.q_proj" in ignored
