"""The fused call against the plain formula, forward and backward, and the mask of packed rows."""

from __future__ import annotations

import math

import pytest
import torch

from puna.model import attention
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


@pytest.mark.parametrize("block", [1, 4, 512])
@pytest.mark.parametrize("window", [1, 2, 5, 8, T - 1, T, T + 1])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_window_equals_the_mask_that_says_it(monkeypatch, window, block, dtype, within):
    monkeypatch.setattr(attention, "BLOCK", block)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = (distance >= 0) & (distance < window)
    asked = [
        (reference, {"mask": mask, "causal": False}),
        *((kernel, {"mask": None, "causal": True, "window": window}) for kernel in (reference, fused)),
    ]
    outputs = []
    for kernel, how in asked:
        q, k, v = inputs(6, 2, dtype)
        out = kernel(q, k, v, dropout=0.0, **how)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        outputs.append([out.detach(), q.grad, k.grad, v.grad])
    for found in outputs[1:]:
        for ours, expected in zip(found, outputs[0], strict=True):  # one key gets all: no gradient of q
            assert (ours - expected).abs().max() <= within * max(expected.abs().max(), 1)


def test_nothing_of_size_t_by_t_is_held_where_the_window_is_short(monkeypatch):
    sizes = []

    def spy(q, k, v, **rest):
        sizes.append(q.shape[2] * k.shape[2])
        return actual(q, k, v, **rest)

    actual = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attention, "BLOCK", 4)
    q, k, v = inputs(6, 2)
    fused(q, k, v, mask=None, causal=True, dropout=0.0, window=3)
    assert max(sizes) == 4 * 6
    assert len(sizes) == 10


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


def test_document_mask_keeps_a_window_in_each_document():
    visible = document_mask(torch.tensor([[3, 3, 3, 8, 8]]), torch.float32, window=2)
    assert (visible[0, 0] == 0).tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [False, True, True, False, False],
        [False, False, False, True, False],
        [False, False, False, True, True],
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
@pytest.mark.parametrize("window", [1, 5, 24])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_a_window_equals_the_formula_on_cuda(monkeypatch, kv_heads, window):
    monkeypatch.setattr(attention, "BLOCK", 7)
    outputs = []
    for kernel in (fused, reference):
        q, k, v = (x.detach().cuda().requires_grad_() for x in inputs(6, kv_heads, torch.float32))
        out = kernel(q, k, v, mask=None, causal=True, dropout=0.0, window=window)
        out.square().sum().backward()
        outputs.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*outputs, strict=True):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


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
