"""What a folder lacks is never made up, in whatever way it is loaded; `load` takes what
`from_pretrained` takes.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

import compressor
import compressor.runtime
from compressor.errors import CheckpointError
from tests.packed_folders import FORMS, edit_config, make_packed, tensors_of

IDS = torch.arange(4, 28)[None]
FAMILIES = ("llama", "gpt2", "qwen3_moe", "phi3")


@pytest.fixture(scope="session")
def packed(tiny, tmp_path_factory):
    """A function: family -> a packed folder of it, in every form."""
    made = {}

    def make(family):
        if family not in made:
            at = tmp_path_factory.mktemp("weights") / "packed"
            made[family] = make_packed(tiny(family), at, FORMS["mixed"])
        return made[family]

    return make


@pytest.fixture
def folder(packed, tmp_path):
    """A function: family -> a copy of its packed folder, to be damaged."""

    def copy(family):
        return shutil.copytree(packed(family), tmp_path / family)

    return copy


def disk(folder, **options):
    config = AutoConfig.from_pretrained(folder)
    first = {"gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.h")}
    names = first.get(
        config.model_type,
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers"),
    )
    places = dict.fromkeys((*names, "lm_head"), "cpu") | {names[-1]: "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder.parent / "offload", **options
    )


def from_state(folder, **options):
    config = AutoConfig.from_pretrained(folder)
    state = tensors_of(folder)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    return kind.from_pretrained(None, config=config, state_dict=state, **options)


WAYS = {
    "load": compressor.load,
    "plug-in": AutoModelForCausalLM.from_pretrained,
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder, device_map="auto"),
    "disk": disk,
    "base": AutoModel.from_pretrained,
    "state": from_state,
    "any size": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, ignore_mismatched_sizes=True
    ),
}
OF_ALL = [way for way in WAYS if way != "state"]  # those that see files


def drop(folder, name):
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            del tensors[name]
            save_file(tensors, path, metadata={"format": "pt"})
            index = folder / "model.safetensors.index.json"
            if index.is_file():
                held = json.loads(index.read_text())
                del held["weight_map"][name]
                index.write_text(json.dumps(held))
            return
    raise AssertionError(f"{name} is not there")


def first_of(folder, form):
    modules = compressor.runtime.hf_transformers.packed_modules(
        AutoConfig.from_pretrained(folder).to_dict()
    )
    return next(name for name, entry in modules.items() if entry["format"] == form)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_folders_load_in_every_way(family, way, packed):
    WAYS[way](packed(family))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "base"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
def test_a_missing_head_is_not_made_up(family, way, folder):
    damaged = folder(family)
    drop(damaged, "lm_head.weight")
    edit_config(damaged, lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        WAYS[way](damaged)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "base"])
def test_a_head_that_the_config_no_longer_ties_is_not_made_up(way, folder):
    damaged = folder("gpt2")  # tied: it has no tensor of its own
    edit_config(damaged, lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        WAYS[way](damaged)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["norm", "embedding", "sparse24", "armor", "lowrank", "pivot"])
def test_a_missing_tensor_is_not_made_up(family, kind, way, folder):
    damaged = folder(family)
    if kind in ("norm", "embedding"):
        plain = {
            "norm": "transformer.ln_f.weight" if family == "gpt2" else "model.norm.weight",
            "embedding": "transformer.wte.weight"
            if family == "gpt2"
            else "model.embed_tokens.weight",
        }[kind]
        drop(damaged, plain)
        match = plain.partition(".")[2].replace(".", r"\.")  # a base model has it without
        if (family, kind) == ("gpt2", "embedding"):
            match += r"|lacks lm_head\.weight"  # which is tied to it
    else:
        suffix = {"sparse24": "metadata", "armor": "b", "lowrank": "v", "pivot": "c"}[kind]
        name = first_of(damaged, kind)
        drop(damaged, f"{name}.weight_{suffix}")
        match = f"weight_{suffix}"
    with pytest.raises(CheckpointError, match=match):
        WAYS[way](damaged)


@pytest.mark.parametrize("way", OF_ALL)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("sparse24", None),
        ("armor", None),
        ("lowrank", None),
        ("pivot", None),
        ("sparse24", {"format": "lowrank", "rank": 4}),
        ("sparse24", {"format": "armor", "block_a": 8, "block_b": 8}),
        ("armor", {"format": "sparse24"}),
        ("armor", {"block_a": 4}),
        ("lowrank", {"rank": 8}),
        ("lowrank", {"format": "pivot"}),
        ("pivot", {"rank": 3}),
        ("pivot", {"format": "lowrank"}),
        ("lowrank", {"format": "sparse24"}),
        ("sparse24", {"transposed": "turned"}),
    ],
)
def test_a_wrong_table_of_modules_is_refused(family, form, change, way, folder):
    damaged = folder(family)
    name = first_of(damaged, form)

    def edit(config):
        modules = config["quantization_config"]["modules"]
        if change is None:
            del modules[name]
        elif "transposed" in change:
            modules[name]["transposed"] = not modules[name].get("transposed", False)
        else:
            modules[name].update(change)

    edit_config(damaged, edit)
    with pytest.raises(CheckpointError):
        WAYS[way](damaged)


@pytest.mark.parametrize("way", OF_ALL)
@pytest.mark.parametrize(("form", "suffix"), [("sparse24", "metadata"), ("lowrank", "u")])
def test_packed_tensors_of_another_type_are_refused(form, suffix, way, folder):
    damaged = folder("llama")
    name = f"{first_of(damaged, form)}.weight_{suffix}"
    for path in damaged.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = tensors[name].to(torch.int32)
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        WAYS[way](damaged)


def test_eval_refuses_a_missing_head(folder, cli, tmp_path):
    damaged = folder("gpt2")
    edit_config(damaged, lambda config: config.update(tie_word_embeddings=False))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [3, 4, 5, 6, 7, 8]}\n')
    done = cli("eval", damaged, "--dataset", rows, "--no-cache", code=1)
    assert "lacks lm_head.weight" in done.stderr


def test_a_pipeline_is_refused_too(folder):
    damaged = folder("llama")
    drop(damaged, "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"lacks model\.norm"):
        pipeline("text-generation", model=str(damaged))


@pytest.mark.parametrize("family", FAMILIES)
def test_load_takes_what_from_pretrained_takes(family, packed, tmp_path):
    folder = packed(family)
    with torch.no_grad():
        expected = compressor.load(folder)(IDS).logits
        assert torch.equal(compressor.load(folder, quantization_config=None)(IDS).logits, expected)
        inside = shutil.copytree(folder, tmp_path / "all" / "inside").parent
        assert torch.equal(compressor.load(inside, subfolder="inside")(IDS).logits, expected)
        model, info = compressor.load(folder, output_loading_info=True)
        assert torch.equal(model(IDS).logits, expected)
        assert not info["missing_keys"]
        model.save_pretrained(tmp_path / "other", variant="other")
        assert torch.equal(
            compressor.load(tmp_path / "other", variant="other")(IDS).logits, expected
        )
        config = AutoConfig.from_pretrained(folder)
        assert torch.equal(compressor.load(folder, config=config)(IDS).logits, expected)
        wide = compressor.load(folder, torch_dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_a_plain_folder_without_its_head_is_refused_by_load(tiny, tmp_path):
    plain = shutil.copytree(tiny("gpt2"), tmp_path / "plain")
    edit_config(plain, lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        compressor.load(plain)
