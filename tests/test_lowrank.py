"""The low-rank linear and its twin against the dense product."""

import torch

from compressor.runtime.placement import place
from compressor_kernels.linear import LowRankLinear
from compressor_kernels.reference import lowrank


def test_twin_and_module_are_the_product_of_the_factors():
    torch.manual_seed(0)
    u, v, bias, x = (
        torch.randn(24, 5).double(),
        torch.randn(5, 32).double(),
        torch.randn(24).double(),
        torch.randn(3, 2, 32).double(),
    )
    expected = torch.einsum("or,ri,abi->abo", u, v, x) + bias
    torch.testing.assert_close(lowrank(x, u, v, bias), expected)
    module = LowRankLinear(32, 24, rank=5, bias=True, dtype=torch.float64)
    module.load_state_dict({"weight_u": u, "weight_v": v, "bias": bias})
    module.unpack_()
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.weight, u @ v)
    assert set(module.state_dict()) == {"weight_u", "weight_v", "bias"}


def test_any_runtime_keeps_the_factors():
    model = torch.nn.Sequential()
    model.add_module("a", LowRankLinear(8, 4, rank=2, bias=False, dtype=torch.bfloat16))
    for runtime in ("auto", "packed", "dense"):
        kernels = runtime != "dense" and model.get_submodule("a").kernels_run()
        told = "packed" if kernels else "two thin factors, multiplied by torch"
        assert place(model, {"a": "a"}, runtime) == {"a": told}
    assert set(model.state_dict()) == {"a.weight_u", "a.weight_v"}
