"""The fused call against the plain formula, forward and backward, and the mask of packed rows."""

from __future__ import annotations

import math

import pytest
import torch

from puna.model.attention import KERNELS, document_mask, fused, reference

B, T, H = 2, 37, 16
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 27, [4] + [5] * 20 + [4] * 16])


def inputs(heads, kv_heads, dtype=torch.float64, keys=T):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, heads, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def masks(dtype):
    additive = document_mask(DOCUMENTS, dtype)
    return {"causal": None, "additive": additive, "boolean": additive == 0}


@pytest.mark.parametrize("mask", ["causal", "additive", "boolean"])
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fused_equals_the_formula(kv_heads, mask, dtype, within):
    outputs = []
    for kernel in (fused, reference):
        q, k, v = inputs(6, kv_heads, dtype)
        out = kernel(q, k, v, mask=masks(dtype)[mask], causal=mask == "causal", dropout=0.0)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        outputs.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*outputs, strict=True):
        assert (ours - expected).abs().max() <= within * expected.abs().max()


def test_more_keys_than_queries():
    q, k, v = inputs(6, 2, keys=50)
    mask = torch.rand(B, 1, T, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    ours, expected = (kernel(q, k, v, mask=mask, causal=False, dropout=0.0) for kernel in (fused, reference))
    assert torch.allclose(ours, expected, atol=1e-12)


def test_query_heads_share_key_heads_in_consecutive_groups():
    """Values say which key/value head was read: head n of 6 reads head n // 2 of 3."""
    q, k, _ = inputs(6, 3)
    v = torch.arange(3.0, dtype=torch.float64)[:, None].expand(B, T, 3, H)
    for kernel in KERNELS.values():
        out = kernel(q, k, v, mask=None, causal=True, dropout=0.0)
        assert torch.allclose(out[0, 5, :, 0], torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.float64))


def test_document_mask_is_causal_and_stays_within():
    visible = document_mask(torch.tensor([[3, 3, 8, 8]]), torch.bfloat16)
    off = -math.inf
    assert visible.dtype == torch.bfloat16
    assert visible[0, 0].tolist() == [
        [0, off, off, off],
        [0, 0, off, off],
        [off, off, 0, off],
        [off, off, 0, 0],
    ]


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_drops_and_keeps_the_mean(kernel):
    torch.manual_seed(0)
    q, k, _ = inputs(2, 2)
    ones = torch.ones(B, T, 2, H, dtype=torch.float64)
    out = KERNELS[kernel](q, k, ones, mask=None, causal=True, dropout=0.25)
    assert not torch.allclose(out, ones)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("packed", [False, True])
def test_fused_gives_the_same_bits_twice(packed):
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            q, k, v = inputs(6, 2, torch.float32)
            mask = document_mask(DOCUMENTS, torch.float32) if packed else None
            out = fused(q, k, v, mask=mask, causal=not packed, dropout=0.0)
            out.square().sum().backward()
            runs.append([out.detach(), q.grad, k.grad, v.grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", ["causal", "additive", "boolean"])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_fused_equals_the_formula_on_cuda(kv_heads, mask):
    given = None if mask == "causal" else masks(torch.float32)[mask].cuda()
    q, k, v = (x.detach().cuda() for x in inputs(6, kv_heads, torch.float32))
    ours, expected = (
        kernel(q, k, v, mask=given, causal=given is None, dropout=0.0) for kernel in (fused, reference)
    )
    assert torch.allclose(ours, expected, atol=1e-4)
