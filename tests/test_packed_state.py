"""A loaded packed model under the tools of torch, accelerate and transformers: its state comes back
by every way, mixed precision and training are those of its dense twin.
"""

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.utils import load_checkpoint_in_model
from safetensors.torch import load_model, save_model
from torch.nn.functional import linear
from transformers import Trainer, TrainingArguments

import compressor
from compressor.config.recipe import Recipe
from compressor.errors import UsageError
from compressor.run.pipeline import prune
from compressor_kernels.layouts import Dense, InFragments, Stored
from compressor_kernels.linear import PackedLinear
from compressor_kernels.pivot_linear import PivotLinear

IDS = torch.arange(4, 24)[None]
FAMILIES = ["llama", "gpt2", "qwen3_moe", "phi3"]
FORMS = {
    "2:4": dict(method="magnitude"),
    "armor": dict(method="armor", options={"iterations": 1}, num_samples=2, seq_len=32),
    "low rank": dict(method="svd", keep="60%"),
}
HELD = {"dense": Dense, "stored": Stored, "fragments": InFragments}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tiny, rows, tmp_path_factory):
    """A function: family, form -> a packed folder."""
    made = {}

    def make(family, form):
        if (family, form) not in made:
            made[family, form] = tmp_path_factory.mktemp("state") / "out"
            settings = {**FORMS[form], "dataset": str(rows)}
            prune(Recipe(str(tiny(family)), **settings), made[family, form])
        return made[family, form]

    return make


def loaded(path, held, **options):
    """The model with all its cores in one layout."""
    model = compressor.load(path, runtime="packed" if held == "stored" else "dense", **options)
    for module in packed(model):
        if isinstance(module, PackedLinear):
            module.place_(HELD[held])
    return model


def packed(model):
    return [m for m in model.modules() if isinstance(m, PackedLinear | PivotLinear)]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def scrambled(model):
    """Let every core be another one of the same positions, and every other tensor be zero but
    pivots, for which zeros are damage.
    """
    zeros = {
        n: t.clone() if n.endswith("weight_pivots") else torch.zeros_like(t)
        for n, t in model.state_dict().items()
    }
    model.load_state_dict(zeros)
    assert not logits(model).any()
    return model


def by_safetensors(model, state, tmp_path):
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(scrambled(model), tmp_path / "model.safetensors") == (set(), [])


def by_accelerator(model, state, tmp_path):
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    scrambled(prepared)
    accelerator.load_state(str(tmp_path))


def by_checkpoint(model, state, tmp_path):
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    load_checkpoint_in_model(scrambled(model), str(tmp_path / "model.safetensors"))


def strictly(model, state, tmp_path):
    scrambled(model).load_state_dict(state)


def leniently(model, state, tmp_path):
    done = scrambled(model).load_state_dict(state, strict=False)
    assert not done.missing_keys + done.unexpected_keys


WAYS = [strictly, leniently, by_safetensors, by_accelerator, by_checkpoint]


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_comes_back_by_every_way(folder, tmp_path, family, form, held):
    model = loaded(folder(family, form), held)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    for number, way in enumerate(WAYS):
        (tmp_path / str(number)).mkdir()
        way(model, state, tmp_path / str(number))
        again = model.state_dict()
        assert set(again) == set(state)
        assert all(torch.equal(again[name], state[name]) for name in state), way.__name__
        assert torch.equal(logits(model), expected), way.__name__
        held_so = {m.layout for m in packed(model) if isinstance(m, PackedLinear)}
        assert held_so <= {HELD[held]}, way.__name__


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerate_offloads_a_loaded_model(folder, tmp_path, family, form, held):
    path = folder(family, form)
    expected = logits(loaded(path, held))
    model = cpu_offload(loaded(path, held), execution_device=CPU)
    assert all(p.is_meta for m in packed(model) for p in m.parameters())
    assert torch.equal(logits(model), expected)
    model = disk_offload(loaded(path, held), str(tmp_path / "disk"), execution_device=CPU)
    assert torch.equal(logits(model), expected)
    model = loaded(path, held)
    names = [name for name, _ in model.base_model.named_children()]
    places = {f"{model.base_model_prefix}.{name}": "cpu" for name in names} | {"lm_head": "disk"}
    places[f"{model.base_model_prefix}.{names[1]}"] = "disk"
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "some"))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_computes_what_the_twin_computes(folder, family, form, held):
    path = folder(family, form)
    model, twin = (
        loaded(path, held, dtype=torch.float32),
        loaded(path, "dense", dtype=torch.float32),
    )
    for module in packed(twin):
        if not isinstance(module, PivotLinear):  # one product in bfloat16 in place of three
            module.forward = lambda x, m=module, w=module.weight: linear(x, w, m.bias)
    for to in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=to):
            ours, theirs = logits(model), logits(twin)
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()
    if form == "2:4":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_packed_is_frozen_and_the_rest_trains(folder, tmp_path, family, form):
    for held in HELD:
        model = loaded(folder(family, form), held, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            frozen = form != "low rank" and ".weight_" in name
            assert parameter.requires_grad != frozen, name
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IDS, labels=IDS).loss.backward()
        lone = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not [name for name in lone if ".experts." not in name]
        model.requires_grad_(True)
        model(IDS, labels=IDS).loss.backward()
        if form != "low rank":
            frozen = [p for n, p in model.named_parameters() if ".weight_" in n]
            assert frozen
            assert all(p.grad is None for p in frozen)
    model = loaded(folder(family, form), "dense", dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    if form != "low rank":
        with pytest.raises(
            UsageError, match=r"packed 2:4 weights are frozen: call model\.dequantize"
        ):
            Trainer(model, arguments, train_dataset=rows)
        return
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    attention = {n for n in before if ".weight_c" in n and ".experts." not in n}
    assert attention
    assert attention <= changed
