"""K5: attention with a bias per key against float64 attention, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_close
from vtoken.ops import attention_with_bias, attention_with_sizes
from vtoken_kernels.attention import attention

#: Relative RMS error: what a few roundings in the dtype add up to.
ERROR = {torch.float32: 2e-6, torch.float16: 7e-4, torch.bfloat16: 3e-3}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_qkv(seed: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As a fused projection leaves them: [B, H, T, D] views of [B, T, 3, H, D]."""
    return list(draw(seed, 2, tokens, 3, 2, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4))


def draw_size(seed: int, tokens: int) -> Tensor:
    return torch.randint(1, 30, (2, tokens), generator=torch.Generator().manual_seed(seed)).float()


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    mask = None if bias is None else bias.double()
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=scale)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(1, 16), (17, 24), (50, 64), (64, 80), (33, 128), (131, 32)]
)  # fmt: skip
def test_forward_and_gradients(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in draw_qkv(1, tokens, head_dim, dtype))
    size, grad = draw_size(2, tokens), draw(3, 2, 2, tokens, head_dim, dtype=dtype)
    out = attention_with_sizes(q, k, v, size, backend="triton")
    double = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = exact(*double, size.double().log()[:, None, None])
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_close("out", expected, out, ERROR[dtype])
    found = torch.autograd.grad(out, (q, k, v), grad)
    for name, a, b in zip("qkv", torch.autograd.grad(expected, double, grad.double()), found, strict=True):
        if tokens == 1 and name != "v":  # one key: the gradient is zero, up to rounding of what cancels
            assert b.abs().max() < 10 * ERROR[dtype]
        else:
            assert_close(f"gradient of {name}", a, b, 2 * ERROR[dtype])


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (70, 3), (40, 65)])
def test_cross_attention_scale_and_shared_bias(queries: int, keys: int) -> None:
    q = draw(4, 2, 3, queries, 16).requires_grad_()
    k, v = (draw(s, 2, 3, keys, 16).requires_grad_() for s in (5, 6))
    bias, grad = draw(7, 1, 1, 1, keys), draw(8, 2, 3, queries, 16)
    for given in (bias, None, draw(9, 2, 1, 1, 2 * keys)[..., ::2]):
        out = attention_with_bias(q, k, v, given, scale=0.4, backend="triton")
        double = [t.detach().double().requires_grad_() for t in (q, k, v)]
        expected = exact(*double, given, 0.4)
        assert_close("out", expected, out, 2e-6)
        found = torch.autograd.grad(out, (q, k, v), grad)
        for name, a, b in zip("qkv", torch.autograd.grad(expected, double, grad.double()), found, strict=True):
            assert_close(f"gradient of {name}", a, b, 4e-6)


def test_keys_that_are_masked_out() -> None:
    # The first tile of keys has no finite score: no NaN may come of it.
    q, k, v = (t.requires_grad_() for t in draw_qkv(10, 100, 16))
    bias = torch.zeros(2, 1, 1, 100)
    bias[..., :70] = float("-inf")
    out = attention_with_bias(q, k, v, bias, backend="triton")
    assert_close("out", exact(q, k, v, bias), out, 2e-6)
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_queries_without_keys_give_zeros() -> None:
    q, k, v = (t.requires_grad_() for t in draw_qkv(14, 40, 16))
    bias = draw(15, 2, 1, 1, 40)
    bias[0] = float("-inf")
    out = attention_with_bias(q, k, v, bias, backend="triton")
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert_close("the other image", exact(q, k, v, bias)[1], out[1], 2e-6)
    expected = torch.autograd.grad(exact(q[1:], k[1:], v[1:], bias[1:]).square().sum(), (q, k, v))
    for a, b in zip(expected, torch.autograd.grad(out.square().sum(), (q, k, v)), strict=True):
        assert_close("gradient", a, b, 4e-6)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = draw_qkv(11, 40, 16)
    out = attention_with_bias(100 * q, 100 * k, v, None, backend="triton")
    assert_close("out", exact(100 * q, 100 * k, v, None), out, 1e-4)


def test_log_of_sizes_is_added_in_float32() -> None:
    # log(300) and log(301) are one bfloat16 number; with equal keys the output shows the sizes themselves.
    q, k, _ = draw_qkv(12, 3, 16, torch.bfloat16)
    v = torch.eye(16, dtype=torch.bfloat16)[:3].expand(2, 2, 3, 16)
    same = k[:, :, :1].expand(2, 2, 3, 16)
    size = torch.tensor([[300.0, 301.0, 1.0]]).expand(2, 3)
    out, _ = attention(q.float(), same.float(), v.float(), size.log(), 0.25)
    assert torch.allclose(out[..., :3].double(), (size / 602).double()[:, None, None], rtol=1e-5)
    assert attention_with_sizes(q, same, v, size, backend="triton").dtype == torch.bfloat16


def test_strides() -> None:
    q, k, v = draw_qkv(13, 30, 16)
    expected = attention_with_bias(q, k, v, None, backend="triton")
    flipped = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]  # channels are not neighbours
    assert torch.equal(attention_with_bias(*flipped, None, backend="triton"), expected)
    one = attention_with_bias(q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v, None, backend="triton")
    assert_close("expanded", exact(q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v, None), one, 2e-6)


def test_empty() -> None:
    for shape in ((0, 2, 5, 16), (2, 2, 0, 16)):
        q = torch.zeros(shape, requires_grad=True)
        k = torch.zeros(shape[0], 2, 5, 16)
        out = attention_with_bias(q, k, k, None, backend="triton")
        assert out.shape == q.shape
        out.sum().backward()
        assert q.grad.shape == q.shape
