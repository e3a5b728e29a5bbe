"""A loaded packed model is a model like any other: made plain it is the unpacked twin, it is saved
and loaded as whatever class the twin is, and nothing about it is hidden in its config.
"""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

import compressor
import compressor.runtime
from compressor.checkpoint.packed_config import GUARD
from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError, UsageError
from compressor.tools.describe import describe
from compressor.tools.unpack import unpack
from compressor.tools.verify import verify
from compressor_kernels.layouts import Dense
from tests.packed_folders import FORMS, make_packed, tensors_of

IDS = torch.arange(4, 28)[None]
FAMILIES = ("llama", "gpt2", "qwen3_moe", "phi3", "mixtral")
EVERY = [(family, form) for family in FAMILIES for form in FORMS]


@pytest.fixture(scope="session")
def folders(tiny, tmp_path_factory):
    """A function: family, form -> a packed folder and its unpacked twin."""
    made = {}

    def make(family, form):
        if (family, form) not in made:
            at = tmp_path_factory.mktemp("loaded")
            made[family, form] = make_packed(tiny(family), at / "packed", FORMS[form]), at / "twin"
            unpack(*made[family, form])
        return made[family, form]

    return make


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def plain(folder, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, **options).eval()


def offloaded(model_of, tmp_path):
    """A device map that leaves the first module of the decoder where it is, the rest on disk."""
    first, *rest = [name for name, _ in model_of.base_model.named_children()]
    prefix = model_of.base_model_prefix
    places = {f"{prefix}.{first}": "cpu", "lm_head": "cpu"}
    places |= {f"{prefix}.{name}": "disk" for name in rest}
    return {"device_map": places, "offload_folder": tmp_path / "offload"}


WAYS = {
    "load": lambda folder, twin, tmp: compressor.load(folder),
    "packed": lambda folder, twin, tmp: compressor.load(folder, runtime="packed"),
    "plug-in": lambda folder, twin, tmp: plain(folder),
    "map": lambda folder, twin, tmp: plain(folder, device_map="auto"),
    "disk": lambda folder, twin, tmp: plain(folder, **offloaded(plain(twin), tmp)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "form"), EVERY)
def test_dequantized_it_is_the_unpacked_twin(family, form, way, folders, tmp_path):
    folder, twin = folders(family, form)
    expected = plain(twin)
    model = WAYS[way](folder, twin, tmp_path)
    assert model.dequantize() is model
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in expected.named_modules()
    }
    facts = [
        {n: (p.shape, p.dtype, p.requires_grad) for n, p in one.named_parameters()}
        for one in (model, expected)
    ]
    assert facts[0] == facts[1]
    assert model.config.to_dict() == {**expected.config.to_dict(), "_name_or_path": str(folder)}
    assert not compressor.runtime.runtimes(model)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = tensors_of(tmp_path / "saved"), tensors_of(twin)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(plain(tmp_path / "saved")), logits(expected))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("form", ["2:4", "mixed"])
def test_the_dtype_is_that_of_the_whole_model(family, form, folders):
    folder, twin = folders(family, form)
    wide = compressor.load(folder, dtype=torch.float32).dequantize()
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    for parameter in wide.parameters():  # the twin's weights, products of factors too, are bfloat16
        parameter.data = parameter.bfloat16().float()
    assert torch.equal(logits(wide), logits(plain(twin, dtype=torch.float32)))
    moved = compressor.load(folder).to(torch.float64).dequantize()
    assert {p.dtype for p in moved.parameters()} == {torch.float64}
    if family != "qwen3_moe":  # torch's product for experts knows no float64
        assert logits(moved).dtype == torch.float64
    for dtype in (torch.float32, "float32"):
        asked = compressor.load(folder).dequantize(dtype=dtype)
        assert torch.equal(logits(asked), logits(plain(twin, dtype=torch.float32)))
        assert asked.config.dtype == torch.float32
    for dtype in ("int", torch.int8, "auto"):
        with pytest.raises(UsageError, match="a floating dtype of torch"):
            compressor.load(folder).dequantize(dtype=dtype)


def test_parameters_that_a_family_keeps_in_float32_stay(folders):
    folder, _ = folders("llama", "2:4")
    model = compressor.load(folder)
    model.model.norm.float()
    model.dequantize(dtype=torch.float16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


def test_offloaded_weights_in_another_dtype_are_refused(folders, tmp_path):
    folder, twin = folders("llama", "2:4")
    model = plain(folder, **offloaded(plain(twin), tmp_path))
    with pytest.raises(UsageError, match=r"load the model with dtype=torch\.float32"):
        model.dequantize(dtype=torch.float32)
    model.dequantize(dtype=torch.bfloat16)


@pytest.mark.parametrize(("family", "form"), [("llama", "mixed"), ("qwen3_moe", "2:4")])
def test_hooks_mode_and_frozen_parameters_stay_as_they_were(family, form, folders):
    folder, _ = folders(family, form)
    model = compressor.load(folder)
    seen = []
    block = model.model.layers[0]
    watched = {"gate": block.mlp, "o_proj": block.self_attn.o_proj}
    if family == "qwen3_moe":
        watched["experts"] = block.mlp.experts
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
        for name, module in watched.items()
    ]
    before = block.self_attn.register_forward_pre_hook(lambda module, args: None)
    model.train()
    model.requires_grad_(False)
    model.dequantize()
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    logits(model)
    assert set(seen) == set(watched)
    seen.clear()
    for handle in (*handles, before):
        handle.remove()
    logits(model)
    assert not seen


def test_dequantize_lets_go_of_the_packed_modules(folders):
    model = compressor.load(folders("llama", "armor")[0])
    packed = weakref.ref(model.model.layers[0].mlp.up_proj)
    model.dequantize()
    gc.collect()
    assert packed() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_a_copy_is_dequantized_apart(family, copied, folders):
    folder, twin = folders(family, "mixed")
    model = compressor.load(folder)
    expected = logits(model)
    other = copied(model).dequantize()
    assert torch.equal(logits(other), logits(plain(twin)))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.dequantize()), logits(other))


def test_training_changes_every_matrix_as_in_the_twin(folders):
    for family in ("llama", "gpt2", "qwen3_moe"):
        folder, _ = folders(family, "mixed")
        model = compressor.load(folder, dtype=torch.float32).dequantize()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ids = torch.arange(3, 67).reshape(2, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        assert all(
            not torch.equal(before[n], p) for n, p in model.named_parameters() if p.dim() > 1
        )


# saving


@pytest.mark.parametrize(("family", "form"), EVERY)
def test_saving_leaves_the_live_model_as_it_was(family, form, folders, tmp_path):
    folder, _ = folders(family, form)
    model = plain(folder)
    names = set(vars(model.config))
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert set(vars(model.config)) == names
    assert not any(callable(v) for v in vars(model.config).values() if not isinstance(v, type))
    assert not list((tmp_path / "no").iterdir())
    json.loads(model.config.to_json_string())
    assert GUARD not in repr(model.config)
    pickle.dumps(model.config)
    torch.save(model, io.BytesIO())
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    problems = verify(tmp_path / "again")["problems"]
    assert all("SHA256SUMS is missing" in problem for problem in problems)
    model.dequantize()
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"transformers_weights", "quantization_config"} & config.keys()
    plain(tmp_path / "plain")


def edited_config(folder, out):
    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    config.save_pretrained(out)


def config_of_the_model(folder, out):
    model = plain(folder)
    model.config.use_cache = False
    model.config.save_pretrained(out)


def edited_model(folder, out):
    model = plain(folder)
    model.config.use_cache = False
    model.save_pretrained(out)


def twice(folder, out):
    edited_model(folder, out)
    edited_config(out, out)


def json_file(folder, out):
    out.mkdir()
    AutoConfig.from_pretrained(folder).to_json_file(out / "config.json")


def its_class(folder, out):
    config = type(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    type(config).from_dict(config.to_dict()).save_pretrained(out)


@pytest.mark.parametrize(
    "save", [edited_config, config_of_the_model, edited_model, twice, json_file, its_class]
)
def test_the_guard_survives_editing_and_saving(save, folders, tmp_path):
    folder, _ = folders("llama", "2:4")
    out = tmp_path / "out"
    save(folder, out)
    config = json.loads((out / "config.json").read_text())
    assert config["transformers_weights"] == GUARD
    assert (
        config["quantization_config"]
        == json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    for path in folder.glob("*.safetensors*"):
        if not (out / path.name).exists():
            (out / path.name).write_bytes(path.read_bytes())
    assert torch.equal(logits(plain(out)), logits(plain(folder)))
    code = f"import transformers as t\nt.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "import compressor.runtime" in done.stderr.splitlines()[-1]


def test_threads_may_load_at_once(demo_model, tmp_path):
    """Of two models that transformers loads at once, one leaves the classes as the other found
    them: no later model has its head tied.
    """
    folder = make_packed(demo_model, tmp_path / "packed", FORMS["2:4"])
    expected = [logits(compressor.load(folder, runtime=each)) for each in ("dense", "packed")]
    with ThreadPoolExecutor(4) as pool:
        runtimes = ["dense", "packed"] * 4
        models = list(pool.map(lambda each: compressor.load(folder, runtime=each), runtimes))
    for model, same in zip(models, expected * 4, strict=True):
        assert torch.equal(logits(model), same)
    assert {type(m.model.layers[0].mlp.up_proj.core) for m in models[::2]} == {Dense}
    assert torch.equal(logits(plain(folder)), logits(compressor.load(folder)))


@pytest.mark.parametrize("config", [lambda m: m.config, lambda m: copy.deepcopy(m.config)])
def test_the_config_of_a_loaded_model_loads_it_again(config, folders):
    folder, _ = folders("llama", "mixed")
    model = plain(folder)
    for again in (
        plain(folder, config=config(model)),
        compressor.load(folder, config=config(model)),
    ):
        assert torch.equal(logits(again), logits(model))


def test_other_configs_are_written_as_before(folders, tmp_path):
    _, twin = folders("llama", "2:4")
    AutoConfig.from_pretrained(twin).save_pretrained(tmp_path)
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())


# other classes


@pytest.mark.parametrize("way", ["memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_head_it_loads_as_the_twin_does(family, way, folders, tmp_path):
    folder, twin = folders(family, "mixed")
    expected = plain(twin, AutoModel)
    options = {}
    if way == "disk":
        names = [name for name, _ in expected.named_children()]
        places = dict.fromkeys(names, "disk") | {names[0]: "cpu"}
        options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    model = plain(folder, AutoModel, **options)
    with torch.no_grad():
        outputs = [one(IDS).last_hidden_state for one in (model, model.dequantize(), expected)]
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0.05, atol=0.05)
    assert torch.equal(outputs[1], outputs[2])
    model.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "expected")
    ours, theirs = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_saved_alone_loads_again(family, folders, tmp_path):
    folder, _ = folders(family, "mixed")
    model = plain(folder)
    model.base_model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = model.base_model(IDS).last_hidden_state
        for loaded in (plain(tmp_path / "base", AutoModel), plain(folder, AutoModel)):
            assert torch.equal(loaded(IDS).last_hidden_state, expected)
    plain(folder, AutoModel).save_pretrained(tmp_path / "again")
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "base")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def tensor_names(folder):
    return set(Reader(folder).tensors)


def problems(folder):
    """What `verify` finds, but that there is no manifest, and no head."""
    known = ("SHA256SUMS is missing", "lacks 1 tensors")
    return [line for line in verify(folder)["problems"] if not any(map(line.__contains__, known))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_saved_alone_is_a_packed_folder(family, folders, tmp_path, cli):
    """Its config has the names of the whole model, its files those of the base model."""
    folder, twin = folders(family, "mixed")
    base, dense, headed = tmp_path / "base", tmp_path / "dense", tmp_path / "headed"
    plain(folder).base_model.save_pretrained(base)
    assert tensor_names(base) != tensor_names(folder)
    assert not problems(base)
    own, whole = (describe(Reader(each))["linears"] for each in (base, folder))
    assert sum(row["bytes"] for row in own if row["format"] != "dense") == sum(
        row["bytes"] for row in whole if row["format"] != "dense"
    )
    unpack(base, dense)
    expected = plain(twin, AutoModel)
    with torch.no_grad():
        for loaded in (plain(dense, AutoModel), plain(base, AutoModel).dequantize()):
            assert torch.equal(loaded(IDS).last_hidden_state, expected(IDS).last_hidden_state)
    trained = cli("export", base, "--trainable", "lrc").stdout.split()
    assert trained
    assert set(trained) <= tensor_names(base)
    # and the reverse: packed as a base model, saved with a head
    config = json.loads((base / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    prefix = f"{expected.base_model_prefix}."
    shorter = {name.removeprefix(prefix): entry for name, entry in modules.items()}
    config["quantization_config"]["modules"] = shorter
    (base / "config.json").write_text(json.dumps(config))
    assert not problems(base)
    whole = plain(folder)
    whole.config.quantization_config.modules = shorter
    whole.save_pretrained(headed)
    assert unpack(headed, tmp_path / "headed-dense") == len(shorter)
    assert torch.equal(logits(plain(tmp_path / "headed-dense")), logits(plain(twin)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_is_new_as_in_the_twin(family, folders):
    folder, twin = folders(family, "2:4")
    for auto in (AutoModelForSequenceClassification, AutoModelForQuestionAnswering):
        if type(AutoConfig.from_pretrained(twin)) not in auto._model_mapping:
            continue
        expected, info = auto.from_pretrained(twin, output_loading_info=True)
        theirs = {n for n in info["missing_keys"] if n.startswith(f"{expected.base_model_prefix}.")}
        if theirs:  # transformers gives this class the weights of no language model
            with pytest.raises(
                CheckpointError, match=r"which a \w+ does not have \(what was saved"
            ):
                auto.from_pretrained(folder)
            continue
        model = auto.from_pretrained(folder)
        with torch.no_grad():
            ours, theirs = (one.base_model(IDS).last_hidden_state for one in (model, expected))
        assert torch.equal(ours, theirs)


def test_the_trainer_says_what_can_be_trained(folders, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    for form in ("2:4", "armor"):
        model = compressor.load(folders("llama", form)[0])
        with pytest.raises(UsageError, match=r"call model\.dequantize\(\) and train that"):
            Trainer(model, arguments)
        Trainer(model.dequantize(), arguments)
    Trainer(compressor.load(folders("llama", "low rank")[0]), arguments)
