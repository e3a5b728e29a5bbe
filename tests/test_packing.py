import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.formats.sparse24 import Sparse24
from compressor_kernels.linear import Sparse24Linear
from compressor_kernels.packing import check24, pack24, unpack24
from compressor_kernels.reference import sparse24

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sparse(rows, columns, seed, dtype=torch.float32, most=2):
    """A random weight with 0..most non-zeros in each group of four."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + 3
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    keep = torch.randint(0, most + 1, (rows, columns // 4, 1), generator=generator)
    return (weight * (order < keep).reshape(rows, columns)).to(dtype)


def literal_pack(weight):
    """Group by group, in plain Python."""
    values, metadata = [], []
    for row in weight.tolist():
        row_values, nibbles = [], []
        for start in range(0, len(row), 4):
            group = row[start : start + 4]
            used = [column for column in range(4) if group[column] != 0]
            free = [column for column in range(4) if group[column] == 0]
            first, second = sorted((used + free)[:2])
            row_values += [group[first], group[second]]
            nibbles.append(first + 4 * second)
        nibbles += [4] * (-len(nibbles) % 4)
        words = [
            sum(nibble << 4 * place for place, nibble in enumerate(nibbles[start : start + 4]))
            for start in range(0, len(nibbles), 4)
        ]
        values.append(row_values)
        metadata.append([word - 65536 if word >= 32768 else word for word in words])
    return torch.tensor(values).to(weight.dtype), torch.tensor(metadata).to(torch.int16)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_packing_is_lossless_and_as_defined(rows, groups, seed, dtype):
    weight = sparse(rows, 4 * groups, seed, dtype)
    values, metadata = pack24(weight)
    expected = literal_pack(weight)
    assert torch.equal(values, expected[0])
    assert torch.equal(metadata, expected[1])
    check24(values, metadata)
    assert torch.equal(unpack24(values, metadata), weight)
    again = pack24(unpack24(values, metadata))
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], metadata)


def test_chunks_do_not_change_the_bytes(monkeypatch):
    weight = sparse(37, 64, 0)
    whole = pack24(weight)
    monkeypatch.setattr("compressor_kernels.packing._CHUNK", 200)
    assert all(map(torch.equal, pack24(weight), whole))
    assert torch.equal(unpack24(*whole), weight)


def test_ratio_is_nine_sixteenths():
    values, metadata = pack24(sparse(16, 64, 0, torch.bfloat16))
    assert (values.nbytes + metadata.nbytes) / (16 * 64 * 2) == 0.5625


def test_three_in_a_group_are_refused_by_place():
    weight = sparse(4, 16, 0)
    weight[2, 4:8] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(ValueError, match=r"row 2, columns 4\.\.7"):
        pack24(weight)
    with pytest.raises(ValueError, match="multiple of 4"):
        pack24(torch.zeros(2, 6))


def test_damaged_metadata_is_refused():
    values, metadata = pack24(sparse(4, 16, 0))
    with pytest.raises(ValueError, match="need metadata"):
        unpack24(values, metadata[:, :0])
    metadata[1, 0] = 0  # four groups that name column 0 twice
    with pytest.raises(ValueError, match="row 1, group 0"):
        check24(values, metadata)
    with pytest.raises(ValueError, match="row 1, group 0"):
        Sparse24.unpack(
            {"format": "sparse24"}, {"weight_values": values, "weight_metadata": metadata}
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_packed_and_unpacked_agree(dtype):
    weight, x, bias = (
        sparse(24, 32, 0, dtype),
        torch.randn(3, 5, 32).to(dtype),
        torch.randn(24).to(dtype),
    )
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(sparse24(x, *pack24(weight), bias), expected)
    module = Sparse24Linear(32, 24, bias=True, dtype=dtype)
    module.load_state_dict({**Sparse24.from_dense(weight).pack(), "bias": bias})
    assert torch.equal(module(x), expected)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.unpack_()
    assert torch.equal(module(x), expected)
    after = module.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
