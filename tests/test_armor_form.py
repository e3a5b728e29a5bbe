"""ARMOR's stored form and the module that runs it."""

from __future__ import annotations

import pytest
import torch

from compressor.formats import form_class
from compressor.formats.armor import Armor
from compressor.methods import armor
from compressor_kernels import reference
from compressor_kernels.linear import ArmorLinear
from tests.armor_problems import FAST, P24, layer


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def form(request: pytest.FixtureRequest) -> Armor:
    weight, stats = layer(24, 32)
    result = armor.compress(weight.to(request.param), stats, P24, **FAST, overhead=1)
    assert isinstance(result, Armor)
    return result


def test_form_round_trips(form: Armor) -> None:
    tensors = form.pack()
    assert sorted(tensors) == ["weight_a", "weight_b", "weight_metadata", "weight_values"]
    again = form_class("armor").unpack(form.entry, {k: v.clone() for k, v in tensors.items()})
    assert all(torch.equal(x, again.pack()[k]) for k, x in tensors.items())
    exact = (
        torch.block_diag(*form.a.double())
        @ form.core().double()
        @ torch.block_diag(*form.b.double())
    )
    assert torch.equal(again.dense(), form.dense())
    assert torch.allclose(
        form.dense().double(),
        exact,
        rtol=2**-8 if form.a.dtype == torch.bfloat16 else 1e-5,
        atol=1e-5,
    )


def test_form_refuses_what_does_not_belong_together(form: Armor) -> None:
    tensors = form.pack()
    for change in (
        {"weight_a": form.a[:-1]},
        {"weight_b": form.b[:, :-1]},
        {"weight_a": form.a.double()},
        {"weight_metadata": torch.zeros_like(form.metadata)},
    ):
        with pytest.raises(ValueError, match=r"weight_|metadata"):
            Armor.unpack(form.entry, tensors | change)


@pytest.mark.parametrize("bias", [True, False])
def test_module_computes_what_the_form_stands_for(form: Armor, bias: bool) -> None:
    dtype = form.a.dtype
    module = ArmorLinear(
        32, 24, block_a=form.a.shape[1], block_b=form.b.shape[1], bias=bias, dtype=dtype
    )
    stored = form.pack() | ({"bias": torch.randn(24).to(dtype)} if bias else {})
    module.load_state_dict(stored)
    x = torch.randn(2, 5, 32).to(dtype)
    expected = x.double() @ form.dense().double().T + (stored["bias"].double() if bias else 0)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    packed = module(x)
    assert packed.shape == (2, 5, 24)
    assert packed.dtype == dtype
    assert (packed.double() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(
        packed, reference.armor(x, form.values, form.metadata, form.a, form.b, stored.get("bias"))
    )
    module.unpack_()
    assert "weight_values" not in dict(module.named_parameters())
    assert (module(x).double() - expected).norm() <= tolerance * expected.norm()
    saved = module.state_dict()
    assert sorted(saved) == sorted(stored)
    assert all(torch.equal(saved[k], stored[k]) for k in stored)


def test_module_refuses_blocks_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        ArmorLinear(32, 24, block_a=16, block_b=16, bias=False, dtype=torch.float32)
