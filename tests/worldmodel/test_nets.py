"""Layers: the node by hand is the norm and the activation; block-linear is block-diagonal."""

import pytest
import torch
from torch.nn import functional as F

from worldmodel.nets import (
    BlockLinear,
    NormSiLU,
    RMSNorm,
    norm_silu,
    rms,
    silu_of_rms,
    silu_of_rms_,
    symexp,
    symlog,
)


def test_norm_silu_by_hand_has_the_values_and_gradients_of_its_parts():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    expected = F.silu(F.rms_norm(x, (4,), weight, 1e-4))
    found = NormSiLU.apply(x, weight)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    out = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, [x, weight], out),
        torch.autograd.grad(expected, [x, weight], out),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [(4,), (2, 4), (3, 4), (3, 2, 4)])
def test_in_place_where_no_gradient_is_wanted(scale: tuple[int, ...], dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 4, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.rand(scale, generator=g, dtype=torch.float64).to(dtype)
    ndim = 1 if scale in [(4,), (3, 4)] else 2  # the others have three groups, or none
    before = x.clone()
    found, expected = silu_of_rms(x, weight, ndim), F.silu(rms(x, weight, ndim))
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, before)
    torch.testing.assert_close(silu_of_rms_(x, weight, ndim), expected)


@pytest.mark.parametrize("rows", [2, 9000])
def test_many_rows_and_few_rows_agree(rows: int):
    norm = RMSNorm(4)
    x = torch.randn(rows, 4, requires_grad=True)
    assert torch.allclose(norm_silu(norm, x), F.silu(norm(x)), atol=1e-6)
    vmapped = torch.func.vmap(lambda row: norm_silu(norm, row))(x)
    assert torch.allclose(vmapped, F.silu(norm(x)), atol=1e-6)


def test_block_linear_is_a_block_diagonal_matrix():
    layer = BlockLinear(6, 9, 3)
    x = torch.randn(5, 6)
    expected = x @ torch.block_diag(*layer.weight) + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)
    with pytest.raises(ValueError, match="blocks=4"):
        BlockLinear(6, 9, 4)


def test_symexp_inverts_symlog():
    x = torch.tensor([-300.0, -0.5, 0.0, 1e-3, 20.0])
    assert torch.allclose(symexp(symlog(x)), x, rtol=1e-5)
