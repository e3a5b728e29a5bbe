"""What a rank holds of each stored form, without an engine: the product of what is cut is the cut
of the product.
"""

from itertools import combinations

import pytest
import torch

from compressor.formats import FORMATS, form_class
from compressor.formats.pivot import Pivot
from compressor.runtime.vllm_plugin.fused import specs
from compressor.runtime.vllm_plugin.slicing import Share, cut, held_as, obstacle
from compressor_kernels.packing import metadata_of_columns, pack24
from tests.vllm.folders import largest_two, stored

FORMS = tuple(FORMATS)


def whole(form, rows, columns, blocks=(8, 4)):
    """A weight in `form`: its entry, its stored tensors, and the weight, all in float64."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if form == "dense":
        return {"format": "dense"}, {"weight": weight}, weight
    packed = stored(form, weight, generator, blocks)
    return packed.entry, packed.pack(), packed.dense()


def check(form, rows, columns, share):
    entry, tensors, weight = whole(form, rows, columns)
    assert obstacle(entry, share) == ""
    held = held_as(entry, share)
    if held != entry:
        assert form == "pivot"
        assert not share.whole
        tensors = Pivot.unpack(entry, tensors).thin().pack()
    local = {suffix: cut(held, suffix, tensor, share) for suffix, tensor in tensors.items()}
    due = specs(held, share.shape, torch.float64)
    assert {key: (part.dtype, tuple(part.shape)) for key, part in local.items()} == due
    made = (
        form_class(held["format"])
        .unpack(held, {key: part.contiguous() for key, part in local.items()})
        .dense()
    )
    expected = weight[share.rows][:, share.start : share.stop]
    if form in ("dense", "sparse24"):
        assert torch.equal(made, expected)
    else:
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    return local


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_every_rank(form, ranks):
    rows = torch.arange(128)
    for own in rows.chunk(ranks):
        check(form, 128, 48, Share(own, 0, 48, 48))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [32, 48, 40, 16, 24])
@pytest.mark.parametrize("ranks", [1, 2])
def test_columns_of_every_rank_whole_words_of_metadata_or_not(form, columns, ranks):
    width = columns // ranks
    for rank in range(ranks):
        span = rank * width, (rank + 1) * width, columns
        check(form, 16, columns, Share(torch.arange(16), *span))
        check(form, 16, columns, Share(torch.arange(16), *span, whole=True))


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_columns_at_once(form):
    check(form, 32, 64, Share(torch.arange(8, 24), 20, 44, 64))


@pytest.mark.parametrize("form", FORMS)
def test_rows_out_of_order_as_replicated_and_interleaved_heads_are(form):
    heads = torch.arange(48).view(-1, 8)
    check(form, 48, 32, Share(heads[[4, 0, 2]].flatten(), 0, 32, 32))


@pytest.mark.parametrize(("start", "stop"), combinations(range(0, 44, 4), 2))
def test_metadata_of_any_columns_is_that_of_the_weight_cut_and_packed(start, stop):
    generator = torch.Generator().manual_seed(7)
    weight = largest_two(torch.randn(9, 40, generator=generator))
    weight[3] = 0
    values, metadata = pack24(weight)
    of_cut = pack24(weight[:, start:stop])
    assert torch.equal(metadata_of_columns(metadata, start, stop, 40), of_cut[1])
    assert torch.equal(values[:, start // 2 : stop // 2], of_cut[0])


def test_metadata_of_whole_words_is_a_view():
    metadata = torch.full((3, 4), 0x4444, dtype=torch.int16)
    part = metadata_of_columns(metadata, 16, 48, 64)
    assert part.untyped_storage().data_ptr() == metadata.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="cut a group of four"):
        metadata_of_columns(metadata, 2, 48, 64)


def test_a_range_of_rows_is_a_view():
    entry, tensors, _ = whole("sparse24", 32, 32)
    part = cut(
        entry, "weight_values", tensors["weight_values"], Share(torch.arange(8, 16), 0, 32, 32)
    )
    assert (
        part.untyped_storage().data_ptr() == tensors["weight_values"].untyped_storage().data_ptr()
    )


ARMOR = {"format": "armor", "block_a": 8, "block_b": 16}


@pytest.mark.parametrize(
    ("entry", "share", "reason"),
    [
        ({"format": "sparse24"}, Share(torch.arange(3), 6, 12, 12), "cut a group of four"),
        (ARMOR, Share(torch.arange(8), 0, 18, 36), "which do not divide [8, 18]"),
        (ARMOR, Share(torch.arange(12), 0, 32, 32), "which do not divide [12, 32]"),
        (ARMOR, Share(torch.arange(4, 12), 0, 32, 32), "not whole blocks of 8"),
        (ARMOR, Share(torch.arange(8).flip(0), 0, 32, 32), "not whole blocks of 8"),
        (ARMOR, Share(torch.arange(8), 8, 24, 32), "8 to 24 are not whole blocks of 16"),
        (ARMOR, Share(torch.arange(8), 0, 24, 48), "which do not divide [8, 24]"),
        ({"format": "armor"}, Share(torch.arange(8), 0, 16, 16), "wrappers of"),
        ({"format": "lowrank", "rank": 5}, Share(torch.arange(4), 0, 16, 16), "the rank 5"),
        ({"format": "lowrank", "rank": "5"}, Share(torch.arange(4), 0, 16, 16), "the rank 5"),
    ],
)
def test_what_cannot_be_cut_is_said(entry, share, reason):
    assert reason in obstacle(entry, share)


def test_forms_whose_tensors_are_not_known_here_are_not_cut(monkeypatch):
    monkeypatch.setattr(FORMATS["sparse24"], "SUFFIXES", ("weight_values", "weight_scales"))
    assert "weight_scales" in obstacle({"format": "sparse24"}, Share(torch.arange(4), 0, 16, 16))


def test_some_rows_of_a_weight_by_pivots_are_thin_factors_where_those_are_smaller():
    entry = {"format": "pivot", "rank": 6}
    everything, some = torch.arange(16), torch.arange(8)
    assert held_as(entry, Share(everything, 0, 16, 16, whole=True)) == entry
    assert held_as(entry, Share(everything, 0, 8, 16, whole=True)) == entry
    thin = Share(some, 0, 40, 40)
    assert held_as(entry, thin) == {"format": "lowrank", "rank": 6}
    assert obstacle(entry, thin) == ""
    assert "no smaller" in obstacle(entry, Share(some, 0, 16, 16))
    assert "the rank 6" in obstacle(entry, Share(some[:5], 0, 40, 40))


def test_thin_factors_and_dense_weights_are_cut_anywhere():
    share = Share(torch.tensor([5, 1, 9, 2, 0, 7]), 3, 9, 11)
    check("lowrank", 12, 11, share)
    check("dense", 12, 11, share)
