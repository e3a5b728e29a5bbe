import pytest
import torch

from compressor.methods.magnitude import compress
from compressor.pattern import Pattern


def test_sparsity_is_met_over_the_whole_matrix():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [10.0, 20.0, -30.0, 40.0]])
    pruned = compress(weight, None, Pattern.parse("50%")).dense()
    assert torch.equal(pruned, torch.tensor([[0.0, 0, 0, 0], [10, 20, -30, 40]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_groups_keep_the_largest(dtype):
    weight = torch.tensor([[1.0, -5.0, 3.0, 2.0, 0.0, 0.0, 0.0, 7.0]], dtype=dtype)
    pruned = compress(weight, None, Pattern.parse("2:4")).dense()
    assert torch.equal(pruned, torch.tensor([[0.0, -5, 3, 0, 0, 0, 0, 7]], dtype=dtype))
