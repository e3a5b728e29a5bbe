"""Linears that are one layer of the engine, without an engine: memory, loading, and what is
refused.
"""

import pytest
import torch

from compressor.errors import CheckpointError
from compressor.formats import FORMATS
from compressor.runtime.vllm_plugin.fused import Part, allocate, fitting, suffixes, unpacked
from compressor.runtime.vllm_plugin.slicing import Share
from compressor_kernels.layouts import InTiles
from tests.cpu_problems import here
from tests.vllm.folders import stored

INPUTS = 64


def linear(form, rows, seed=0, dtype=torch.float32):
    """A form and its stored tensors."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, INPUTS, generator=generator).to(dtype)
    if form == "dense":
        return {"format": "dense"}, {"weight": weight}, weight
    packed = stored(form, weight, generator, (8, 16))
    return packed.entry, packed.pack(), packed.dense()


def layer(forms, *, packed=True, rank=0, ranks=1, loaded=True, dtype=torch.float32):
    """The parts and segments of linears of 32 outputs each, and the weight they stand for."""
    parts, tensors, weights = [], [], []
    own = torch.arange(32).chunk(ranks)[rank]
    for seed, form in enumerate(forms):
        entry, stored_tensors, weight = linear(form, 32, seed, dtype)
        held = form in ("lowrank", "pivot") or (packed and form != "dense")
        share = Share(own, 0, INPUTS, INPUTS, whole=ranks == 1)
        parts.append(Part(f"block.{seed}", entry, share, held))
        tensors.append(stored_tensors)
        weights.append(weight[own])
    segments = allocate(parts, dtype, torch.device("cpu"))
    for part, own_tensors in zip(parts, tensors, strict=True):
        for suffix, tensor in own_tensors.items() if loaded else ():
            part.load(suffix, tensor)
    return parts, segments, torch.cat(weights)


def load_all(part, tensors):
    for suffix, tensor in tensors.items():
        part.load(suffix, tensor)
    part.check()


def outputs(segments, x):
    return torch.cat([segment.module("a layer")(x) for segment in segments], dim=-1)


MIXTURES = [
    ("sparse24", "sparse24", "sparse24"),
    ("sparse24", "lowrank", "dense"),
    ("dense", "dense", "armor"),
    ("armor", "armor"),
    ("lowrank", "lowrank"),
    ("pivot", "pivot", "sparse24"),
    ("dense", "sparse24", "sparse24", "armor", "lowrank", "dense", "dense"),
]


@pytest.mark.parametrize("forms", MIXTURES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_computes_what_its_linears_do(forms, packed, ranks):
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(9))
    for rank in range(ranks):
        parts, segments, weight = layer(forms, packed=packed, rank=rank, ranks=ranks)
        for part in parts:
            part.check()
        torch.testing.assert_close(outputs(segments, x), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("forms", "packed", "kinds"),
    [
        (("sparse24",) * 3, True, ["sparse24"]),
        (("sparse24", "armor", "dense"), False, ["dense"]),
        (("sparse24", "armor", "dense"), True, ["sparse24", "armor", "dense"]),
        (("dense", "sparse24", "sparse24", "dense"), True, ["dense", "sparse24", "dense"]),
        (("armor", "armor"), True, ["armor", "armor"]),
        (("sparse24", "lowrank", "dense"), False, ["dense", "lowrank", "dense"]),
    ],
)
def test_neighbours_that_are_held_alike_are_one(forms, packed, kinds):
    _, segments, _ = layer(forms, packed=packed)
    assert [segment.entry["format"] for segment in segments] == kinds


def test_memory_is_taken_before_loading_and_only_for_this_rank():
    parts, segments, _ = layer(("sparse24", "sparse24"), rank=1, ranks=2, loaded=False)
    (segment,) = segments
    assert segment.tensors["weight_values"].shape == (32, INPUTS // 2)
    addresses = {key: tensor.data_ptr() for key, tensor in segment.tensors.items()}
    for seed, part in enumerate(parts):
        for suffix, tensor in linear("sparse24", 32, seed)[1].items():
            part.load(suffix, tensor)
    module = segment.module("a layer")
    state = module.state_dict()
    assert {key: state[key].data_ptr() for key in addresses} == addresses


def test_without_weights_it_computes_zeros():
    """As vLLM's dummy loader needs it: no metadata is out of bounds."""
    _, segments, _ = layer(("sparse24", "armor", "lowrank", "pivot", "dense"), loaded=False)
    assert not outputs(segments, torch.ones(2, INPUTS)).any()


@pytest.mark.parametrize("form", ["sparse24", "armor", "lowrank", "pivot"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_missing_tensor_is_named(form, packed):
    tensors = linear(form, 32)[1]
    for absent in tensors:
        parts, _, _ = layer((form,), packed=packed, loaded=False)
        for suffix, tensor in tensors.items():
            if suffix != absent:
                parts[0].load(suffix, tensor)
        with pytest.raises(CheckpointError, match=f"lacks block.0.{absent}"):
            parts[0].check()


@pytest.mark.parametrize("form", ["sparse24", "armor"])
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_metadata_is_refused_by_name(form, packed):
    tensors = linear(form, 32)[1]
    tensors["weight_metadata"][5, 1] = 0
    parts, _, _ = layer((form,), packed=packed, loaded=False)
    with pytest.raises(CheckpointError, match=r"block\.0 is damaged: metadata of row 5"):
        load_all(parts[0], tensors)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("packed", [True, False])
def test_tensors_of_another_shape_are_refused_by_name(form, packed):
    for suffix, tensor in linear(form, 32)[1].items():
        narrow = tensor[..., : tensor.shape[-1] // 2]
        for wrong in (narrow, tensor[: len(tensor) // 2], tensor.flatten()[0]):
            parts, _, _ = layer((form,), packed=packed, loaded=False)
            damaged = {**linear(form, 32)[1], suffix: wrong}
            with pytest.raises(CheckpointError, match=r"block\.0"):
                load_all(parts[0], damaged)


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_pivots_are_refused_by_name(ranks):
    _, tensors, _ = linear("pivot", 32)
    tensors["weight_pivots"][4] = tensors["weight_pivots"][5]
    parts, _, _ = layer(("pivot",), ranks=ranks, loaded=False)
    with pytest.raises(CheckpointError, match=r"block\.0 is damaged: pivot 5 is"):
        load_all(parts[0], tensors)


def test_some_rows_of_a_weight_by_pivots_are_held_as_thin_factors():
    for ranks, kind in ((1, "pivot"), (2, "lowrank")):
        _, segments, _ = layer(("pivot",), ranks=ranks)
        assert [segment.entry["format"] for segment in segments] == [kind]


def test_a_tensor_of_another_form_is_refused():
    parts, _, _ = layer(("sparse24",), loaded=False)
    with pytest.raises(CheckpointError, match=r"weight_values, weight_metadata.*has its weight_u"):
        parts[0].load("weight_u", torch.zeros(32, 4))


def test_wrappers_of_another_size_than_config_json_says_are_refused():
    _, tensors, _ = linear("armor", 32)
    entry = {"format": "armor", "block_a": 16, "block_b": 16}
    for packed in (True, False):
        part = Part("block.0", entry, Share(torch.arange(32), 0, INPUTS, INPUTS), packed)
        allocate([part], torch.float32, torch.device("cpu"))
        with pytest.raises(CheckpointError, match=r"block\.0"):
            load_all(part, tensors)


def test_a_form_of_a_later_version_is_refused():
    with pytest.raises(CheckpointError, match=r"unknown format 'sparse48'.*update compress-llm"):
        suffixes({"format": "sparse48"})


def test_names_of_stored_tensors():
    for form in FORMATS:
        entry, tensors, _ = linear(form, 32)
        assert set(suffixes(entry)) == set(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cpu_computes_from_the_packed_weights_in_one_graph(dtype, ranks):
    """What vLLM compiles: one graph, kernels of ours in it, and no dense weight in memory."""
    here()
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(9)).to(dtype)
    for rank in range(ranks):
        _, segments, weight = layer(
            ("sparse24", "sparse24", "armor", "lowrank"), rank=rank, ranks=ranks, dtype=dtype
        )
        modules = torch.nn.ModuleList(segment.module("a layer") for segment in segments)
        for module in modules:
            module.prepare_()
        # two neighbours in 2:4 are one
        kernels = [getattr(module, "layout", None) for module in modules]
        assert kernels == [InTiles, InTiles, None]
        assert modules[2].cpu_kernels
        for module in modules[:2]:  # half of the values, four bits for each group of four
            held = sum(tensor.nbytes for tensor in module.core.tensors)
            size = module.out_features * module.in_features
            assert held == size // 2 * dtype.itemsize + size // 8
        y = torch.compile(
            lambda x, m=modules: torch.cat([one(x) for one in m], -1),
            backend="aot_eager",
            fullgraph=True,
        )(x)
        scale = 1e-5 if dtype == torch.float32 else 2e-2
        expected = x.double() @ weight.double().T
        assert (y.double() - expected).norm() <= scale * expected.norm()


def test_the_entry_of_an_experts_matrix_is_the_one_that_its_tensors_fit():
    entries = []
    for blocks in ((8, 4), (4, 8)):
        form = stored("armor", torch.randn(16, 32), torch.Generator().manual_seed(3), blocks)
        entries.append(form.entry)
    tensors = form.pack()
    assert fitting(entries, tensors) == entries[1]
    made = unpacked(entries[1], tensors, torch.float32).dense()
    assert torch.equal(made, form.dense())
    with pytest.raises(ValueError, match=r"are not what config\.json says"):
        fitting(entries[:1], tensors)
