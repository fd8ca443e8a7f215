"""The fused call against the plain formula, forward and backward, and where each query begins to see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.model.attention import KERNELS, first_keys, fused, reference

B, T, H = 2, 37, 16
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 27, [4] + [5] * 20 + [4] * 16])
STARTS = {
    "causal": None,
    "documents": first_keys(T, None, DOCUMENTS, torch.device("cpu")),
    "window": first_keys(T, 5, None, torch.device("cpu")),
    "both": first_keys(T, 12, DOCUMENTS, torch.device("cpu")),
}


def inputs(heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, keys: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, heads, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fused_equals_the_formula(kv_heads: int, starts: str, dtype: torch.dtype, within: float) -> None:
    outputs = []
    for kernel in (fused, reference):
        q, k, v = inputs(6, kv_heads, dtype)
        out = kernel(q, k, v, starts=STARTS[starts], causal=True, dropout=0.0)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        outputs.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*outputs, strict=True):
        assert (ours - expected).abs().max() <= within * expected.abs().max()


@pytest.mark.parametrize("window", [1, 2, 5, 8, T - 1, T, T + 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_window_and_documents_are_seen_as_they_say(kernel: str, window: int) -> None:
    """Values that name their position: of equal scores a query gets the mean of what it sees."""
    starts = first_keys(T, window, DOCUMENTS, torch.device("cpu"))
    zeros = torch.zeros(B, T, 1, 2, dtype=torch.float64)
    values = torch.arange(T, dtype=torch.float64)[None, :, None, None].expand(B, T, 1, 2)
    out = KERNELS[kernel](zeros, zeros, values, starts=starts, causal=True, dropout=0.0)
    begins = {0: [0, 10], 1: [0, 1, 21]}
    for b in range(B):
        for t in range(T):
            first = max(*(x for x in begins[b] if x <= t), t - window + 1, 0)
            assert out[b, t, 0, 0].item() == pytest.approx((first + t) / 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_without_causality_every_query_sees_all_keys(kernel: str, kv_heads: int) -> None:
    q, k, v = inputs(6, kv_heads, keys=50)
    out = KERNELS[kernel](q, k, v, starts=None, causal=False, dropout=0.0)
    keys, values = (x.repeat_interleave(6 // kv_heads, dim=2) for x in (k, v))
    weights = (torch.einsum("btnh,bsnh->bnts", q, keys) / 4).exp()
    expected = torch.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdim=True), values)
    assert torch.allclose(out, expected, atol=1e-12)


def test_query_heads_share_key_heads_in_consecutive_groups() -> None:
    """Values say which key/value head was read: head n of 6 reads head n // 2 of 3."""
    q, k, _ = inputs(6, 3)
    v = torch.arange(3.0, dtype=torch.float64)[:, None].expand(B, T, 3, H)
    for kernel in KERNELS.values():
        out = kernel(q, k, v, starts=None, causal=True, dropout=0.0)
        assert torch.allclose(out[0, 5, :, 0], torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.float64))


def test_a_run_of_equal_numbers_is_a_document() -> None:
    documents = torch.tensor([[3, 3, 8, 8, 8, 3], [1, 1, 1, 1, 1, 1]])
    cpu = torch.device("cpu")
    assert first_keys(6, None, documents, cpu).tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert first_keys(6, 2, documents, cpu).tolist() == [[0, 0, 2, 2, 3, 5], [0, 0, 1, 2, 3, 4]]
    assert first_keys(6, 4, None, cpu).tolist() == [[0, 0, 0, 0, 1, 2]]
    assert first_keys(6, 6, None, cpu) is None and first_keys(6, None, None, cpu) is None
    assert first_keys(6, 4, documents, cpu).dtype == torch.int32


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_drops_and_keeps_the_mean(kernel: str) -> None:
    torch.manual_seed(0)
    q, k, _ = inputs(2, 2)
    ones = torch.ones(B, T, 2, H, dtype=torch.float64)
    out = KERNELS[kernel](q, k, ones, starts=None, causal=True, dropout=0.25)
    assert not torch.allclose(out, ones)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("starts", STARTS)
def test_dropout_in_blocks_is_the_formula_with_the_same_weights_dropped(
    monkeypatch: pytest.MonkeyPatch, starts: str
) -> None:
    """In blocks of 8 queries, their gradients computed again: against autograd over all scores at once."""
    from puna.kernels import causal_plain

    monkeypatch.setattr(causal_plain, "LARGEST", 8)
    monkeypatch.setattr(causal_plain, "SMALLEST", 8)
    q, k, v = inputs(6, 2)
    torch.manual_seed(3)
    out = fused(q, k, v, starts=STARTS[starts], causal=True, dropout=0.5)
    out.square().sum().backward()
    found = [out.detach(), *(x.grad for x in (q, k, v))]

    torch.manual_seed(3)
    kept = [
        torch.nn.functional.dropout(
            torch.ones(B, 6, min(8, T - at), min(at + 8, T), dtype=torch.float64), 0.5
        )
        for at in range(0, T, 8)
    ]
    q, k, v = inputs(6, 2)
    keys, values = (x.repeat_interleave(3, dim=2) for x in (k, v))
    own, first = torch.arange(T), torch.zeros(1, T) if STARTS[starts] is None else STARTS[starts]
    hidden = (own > own[:, None]) | (own < first[:, None, :, None])
    weights = (torch.einsum("btnh,bsnh->bnts", q, keys) / 4).masked_fill(hidden, -torch.inf).softmax(-1)
    mask = torch.cat([torch.nn.functional.pad(x, (0, T - x.shape[-1])) for x in kept], dim=2)
    expected = torch.einsum("bnts,bsnh->btnh", weights * mask, values)
    expected.square().sum().backward()
    for ours, theirs in zip(found, [expected.detach(), q.grad, k.grad, v.grad], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("starts", ["causal", "documents"])
def test_fused_gives_the_same_bits_twice(starts: str) -> None:
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            q, k, v = inputs(6, 2, torch.float32)
            out = fused(q, k, v, starts=STARTS[starts], causal=True, dropout=0.0)
            out.square().sum().backward()
            runs.append([out.detach(), q.grad, k.grad, v.grad])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_fused_equals_the_formula_on_cuda(
    kv_heads: int, starts: str, dtype: torch.dtype, within: float
) -> None:
    first = None if STARTS[starts] is None else STARTS[starts].cuda()
    outputs = []
    for kernel, kind in ((fused, dtype), (reference, torch.float32)):
        q, k, v = (x.detach().to("cuda", dtype).to(kind).requires_grad_() for x in inputs(6, kv_heads))
        out = kernel(q, k, v, starts=first, causal=True, dropout=0.0)
        out.float().square().sum().backward()
        outputs.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*outputs, strict=True):
        assert (ours - expected).abs().max() <= within * expected.abs().max()
