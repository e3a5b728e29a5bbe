"""A folder is read as transformers reads it; what is written holds what belongs, and loads."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compressor.checkpoint.manifest import NAME, manifest
from compressor.checkpoint.reader import INDEX, SINGLE, Reader
from compressor.checkpoint.side_files import is_side_file, left_files, side_files
from compressor.errors import CheckpointError
from compressor.tools.verify import verify

FAMILIES = ["llama", "gpt2", "qwen3_moe", "phi3"]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.fixture
def model(demo_model, tmp_path):
    """A copy of the demo's model, to be changed."""
    shutil.copytree(demo_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def prune(cli, tmp_path):
    def run(folder, *more, code=0, name="out"):
        done = cli(
            "prune", folder, "-o", tmp_path / name, "--method", "magnitude", *more, code=code
        )
        return tmp_path / name, done

    return run


def seal(folder):
    """Make the manifest anew, so that only what looks deeper can tell."""
    from compressor.checkpoint.atomic import sha256
    from compressor.checkpoint.side_files import names

    hashes = {name: sha256(folder / name) for name in names(folder) if name != NAME}
    (folder / NAME).write_text(manifest(hashes))


# --- two sets of weights


def two_sets(tiny, tmp_path, family, single_last):
    """One model in a single file and another, with each tensor doubled, in shards."""
    folder = tmp_path / "both"
    shutil.copytree(tiny(family), folder)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    doubled = {name: tensor * 2 for name, tensor in tensors.items()}
    save_file(doubled, folder / SINGLE, metadata={"format": "pt"})
    if single_last:  # `save_pretrained` of transformers takes earlier shards away, not the index
        for path in folder.glob("model-*-of-*.safetensors"):
            path.unlink()
    return folder


@pytest.mark.parametrize("single_last", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_two_sets_of_weights_that_of_transformers_is_taken(
    tiny, cli, prune, tmp_path, family, single_last
):
    folder = two_sets(tiny, tmp_path, family, single_last)
    reader = Reader(folder)
    assert reader.shards == [SINGLE]
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    out, done = prune(folder, "--format", "dense")
    assert f"two sets of weights: {SINGLE} is used, as transformers does, {INDEX}" in done.stderr
    assert sorted(path.name for path in out.glob("model*")) == [SINGLE]
    pruned = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in pruned.items():  # magnitude pruning leaves what it keeps as it was
        assert torch.equal(tensor, torch.where(tensor == 0, 0, loaded[name]))
    for command in (["inspect", folder], ["prune", folder, "--dry-run", "--method", "magnitude"]):
        assert "two sets of weights" in cli(*command).stderr
    found = json.loads(cli("inspect", folder, "--json").stdout)
    assert [shard["name"] for shard in found["shards"]] == [SINGLE]
    assert len(found["notes"]) == 1


def test_one_set_needs_no_note(tiny, model):
    assert not Reader(tiny("llama")).notes
    assert not Reader(model).notes
    (model / "pytorch_model.bin").write_bytes(b"")
    (model / "consolidated.safetensors").write_bytes(b"")
    assert Reader(model).shards == [SINGLE]


def test_weights_of_another_name_are_refused(model):
    config = json.loads((model / "config.json").read_text())
    for name in ("other.safetensors", "other.safetensors.index.json"):
        text = json.dumps({**config, "transformers_weights": name})
        (model / "config.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"names its weights by transformers_weights .*rename"
        ):
            Reader(model)


def test_adapters_are_named(model, prune, tmp_path):
    shutil.copytree(model, tmp_path / "adapter")
    (model / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, model / "adapter_model.safetensors")
    out, done = prune(model)
    assert "adapter_model.safetensors is not applied" in done.stderr
    assert "not known to belong: adapter_config.json, adapter_model.safetensors" in done.stderr
    assert not list(out.glob("adapter*"))
    for name in ("config.json", SINGLE):
        (model / name).unlink()
        with pytest.raises(CheckpointError, match=r"adapter without its model: .*merge_and_unload"):
            Reader(model)


# --- what goes along


def test_files_of_every_tokenizer_of_transformers_belong():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    found = set()
    for pair in TOKENIZER_MAPPING.values():
        for kind in pair if isinstance(pair, tuple) else (pair,):
            with suppress(ImportError, AttributeError):  # one that needs a library that is not here
                found |= set(kind.vocab_files_names.values())
    assert len(found) > 10
    assert not [name for name in found if not is_side_file(name, code=False)]


def test_what_belongs_goes_along_and_the_rest_is_named(model, prune, tmp_path):
    belongs = {
        "added_tokens.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "tokenizer.model.v3": "x",
        "qwen.tiktoken": "x",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE.txt": "free",
        "notice": "so it is",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "preprocessor_config.json": "{}",
    }
    left = {
        "adapter_config.json": "{}",
        "pytorch_model.bin.index.json": "{}",
        "trainer_state.json": "{}",
        "optimizer.pt": "x",
        "notes.txt": "x",
        "modeling_own.py": "x",
        "onnx/model.onnx": "x",
        "additional_chat_templates/notes.md": "x",
    }
    for name, text in (belongs | left).items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    out, done = prune(model)
    for name, text in belongs.items():
        assert (out / name).read_text() == text
        assert f"  {name}\n" in (out / NAME).read_text()
    assert not [name for name in left if (out / name).exists()]
    files = sorted({*left} - {"onnx/model.onnx"})
    assert left_files(model, [SINGLE], code=False) == [*files, "onnx/"]
    assert "adapter_config.json, additional_chat_templates/notes.md" in done.stderr
    assert "and 3 more" in done.stderr
    assert json.loads((out / "report.json").read_text())["notes"]
    assert str(model) not in json.dumps(json.loads((out / "report.json").read_text())["notes"])
    assert not verify(out)["problems"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_chat_template("tool") == "{{ tools }}"
    (out / "additional_chat_templates" / "tool.jinja").write_text("other")
    (out / "additional_chat_templates" / "added.jinja").write_text("x")
    problems = verify(out)["problems"]
    assert any(
        "additional_chat_templates/tool.jinja has changed" in problem for problem in problems
    )
    assert any("additional_chat_templates/added.jinja is not in" in problem for problem in problems)


def test_every_command_that_makes_a_folder_takes_the_templates_along(model, cli, prune, tmp_path):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (model / "training_args.bin").write_bytes(b"x")
    out, _ = prune(model, "-q")
    dense, _ = prune(model, "-q", "--format", "dense", name="dense")
    cli("unpack", out, "-o", tmp_path / "unpacked")
    (dense / "training_args.bin").write_bytes(b"x")
    said = cli("pack", dense, "-o", tmp_path / "packed").stderr
    assert "not known to belong: training_args.bin" in said
    for folder in (out, dense, tmp_path / "unpacked", tmp_path / "packed"):
        assert (folder / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"


def test_a_run_that_was_cut_off_while_it_copied_goes_on(model, prune, tmp_path, monkeypatch):
    from compressor.checkpoint.writer import manifest as sums

    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    whole, _ = prune(model, "-q", name="whole")
    with monkeypatch.context() as broken:

        def full(hashes):
            raise OSError(28, "No space left on device")

        broken.setattr(sums, "manifest", full)
        prune(model, "-q", code=1)
    (tmp_path / ".out.partial" / "folder" / "additional_chat_templates").mkdir()
    out, _ = prune(model, "-q")
    assert (out / NAME).read_text() == (whole / NAME).read_text()


# --- pointers of git-lfs


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "config.json"])
def test_a_pointer_in_place_of_a_file_is_named(model, prune, name):
    (model / name).write_text(POINTER)
    _, done = prune(model, "-q", code=1)
    assert f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`" in done.stderr


def test_pointers_of_shards_and_indices_are_named(tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    shard = Reader(tmp_path / "model").shards[1]
    for name in (shard, INDEX):
        (tmp_path / "model" / name).write_text(POINTER)
        with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer"):
            Reader(tmp_path / "model")


# --- verify loads what it calls sound


@pytest.fixture(scope="module")
def finished(demo_model, tmp_path_factory):
    """A function: name in `FORMS` -> a finished folder, made once."""
    from compressor.config.recipe import Recipe
    from compressor.run.pipeline import prune

    folders = {}

    def make(form):
        if form not in folders:
            folders[form] = tmp_path_factory.mktemp("finished") / "out"
            prune(Recipe(str(demo_model), **FORMS[form]), folders[form])
        return folders[form]

    return make


@pytest.fixture
def made(finished, tmp_path):
    """A function: name in `FORMS` -> a copy of the finished folder, to be changed."""

    def copy(form="sparse24"):
        return Path(shutil.copytree(finished(form), tmp_path / "out"))

    return copy


FORMS: dict[str, dict] = {
    "sparse24": {"method": "magnitude"},
    "dense": {"method": "magnitude", "format": "dense"},
    "pivot": {"method": "svd", "keep": "60%"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("adapter_config.json", "{}", "adapter_config.json does not belong"),
        ("pytorch_model.bin.index.json", "{}", "index.json does not belong to the checkpoint"),
        (INDEX, "{}", "index.json does not belong to the checkpoint"),
        ("tokenizer.json", "{}", "the tokenizer cannot be loaded"),
        ("tokenizer.json", "{", "tokenizer.json is not readable JSON"),
        ("generation_config.json", "[]", "generation_config.json cannot be loaded"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not readable UTF-8 text"),
        ("tokenizer.json", POINTER, "tokenizer.json is a git-lfs pointer"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_verify_loads_what_a_loader_would_look_at(made, form, name, text, match):
    out = made(form)
    assert not verify(out)["problems"]
    (out / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    seal(out)
    assert any(match in problem for problem in verify(out)["problems"]), verify(out)["problems"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "nobody_knows"}, "architecture 'nobody_knows' cannot be used"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors of a llama model, lm_head.weight"),
        ({"num_attention_heads": 3}, "architecture 'llama' cannot be used"),
        ({"dtype": "int8"}, "config.json has dtype int8, in which no model computes"),
        ({"num_key_value_heads": 2}, "this config.json"),
        ({"intermediate_size": 100}, "this config.json"),
        ({"num_hidden_layers": 5}, "lacks"),
    ],
    ids=str,
)
def test_verify_makes_the_model_of_the_config(made, form, change, match):
    out = made(form)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    seal(out)
    assert any(match in problem for problem in verify(out)["problems"]), verify(out)["problems"]


@pytest.mark.parametrize("form", ["sparse24", "pivot"])
def test_a_config_saved_by_plain_transformers_is_found_and_mended(made, form):
    import compressor.runtime  # noqa: F401  # the plug-in: what mends it

    out = made(form)
    code = (
        f"from transformers import AutoConfig; at = {str(out)!r}\n"
        "AutoConfig.from_pretrained(at).save_pretrained(at)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    seal(out)
    (problem,) = verify(out)["problems"]
    assert "config.json has lost `transformers_weights`" in problem
    AutoConfig.from_pretrained(out).save_pretrained(out)
    seal(out)
    assert not verify(out)["problems"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_of_every_family_is_sound(tiny, prune, cli, family):
    out, _ = prune(tiny(family), "-q")
    assert "is sound" in cli("verify", out).stdout
    cli("unpack", out, "-o", out.with_name("dense"))
    assert not verify(out.with_name("dense"))["problems"]


def test_code_that_comes_along_is_run_only_if_asked_for(made, cli):
    out = made()
    (out / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
    )
    (out / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n"
        "from .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (out / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    seal(out)
    assert "needs Python code that it brings along" in cli("verify", out, code=1).stdout
    assert "is sound" in cli("verify", out, "--trust-remote-code").stdout


def test_side_files_are_names_relative_to_the_folder(model):
    assert side_files(model, code=False) == [
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
