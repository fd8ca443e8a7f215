"""Causal attention and its gradients: the formula query by query, exact differences, and what it costs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.kernels import causal, causal_cuda, causal_op, causal_plain
from puna.kernels.causal import Heads, attend, attend_backward
from puna.kernels.library import load
from puna.model.attention import KERNELS, first_keys
from puna.model.llama import Block
from tests.model.shapes import CONFIGS
from tests.reference.numpy_llama import rotate

needs_compiler = pytest.mark.skipif(load("causal").functions is None, reason=load("causal").fault)
CPU = torch.device("cpu")
FEW = Heads(4, 2, 16)
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 1.5e-2}
"""Of results, relative to the largest: sums of some hundred terms, and products of rounded weights."""


@dataclass(frozen=True)
class Case:
    B: int = 2
    T: int = 37
    heads: Heads = FEW
    dtype: torch.dtype = torch.float64
    turned: bool = True
    documents: tuple[int, ...] = ()
    """Lengths of the first row's; in the others they come the other way round. The last goes to the end."""
    window: int | None = None

    @property
    def starts(self) -> Tensor | None:
        if not self.documents:
            return first_keys(self.T, self.window, None, CPU)
        rows = [(self.documents, self.documents[::-1])[b % 2] for b in range(self.B)]
        numbers = torch.stack(
            [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
        )
        padding = torch.full((self.B, max(0, self.T - numbers.shape[1])), -1)
        return first_keys(self.T, self.window, torch.cat((numbers, padding), dim=1)[:, : self.T], CPU)

    def inputs(self) -> tuple[Tensor, ...]:
        """grad, q, k and v (views of a joint projection), cos and sin."""
        generator = torch.Generator().manual_seed(self.T)
        B, T, (N, K, H) = self.B, self.T, self.heads
        joint = torch.randn(B, T, (N + 2 * K) * H, generator=generator).to(self.dtype)
        grad = torch.randn(B, T, N, H, generator=generator).to(self.dtype)
        angles = 6 * torch.rand(1 if self.B == 1 else B, T, H // 2, generator=generator)
        wide = torch.promote_types(self.dtype, torch.float32)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        return grad, *self.heads.split(joint), torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def run(self, wide: bool = False) -> list[Tensor]:
        """out, lse, dq, dk, dv; `wide` in float64, hence plain torch, of the same numbers."""
        grad, q, k, v, *angles = (x.double() if wide else x for x in self.inputs())
        cos, sin = angles if self.turned else (None, None)
        out, lse = attend(q, k, v, cos, sin, self.starts)
        return [out, lse, *attend_backward(grad, q, k, v, out, lse, cos, sin, self.starts)]


def gaps(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest differences, relative to the largest number expected, or to 1."""
    pairs = zip(found, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs]


def attended_by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Query by query and head by head, of what has been turned."""
    out = np.empty_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        head, seen = n // (q.shape[2] // k.shape[2]), slice(starts[b, t], t + 1)
        weights = np.exp(k[b, seen, head] @ q[b, t, n] / np.sqrt(q.shape[-1]))
        out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


PATTERNS = [{}, {"documents": (2, 1, 34)}, {"window": 6}, {"documents": (5, 32), "window": 3}]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("heads", [Heads(4, 2, 16), Heads(3, 3, 10), Heads(4, 1, 8)])
def test_plain_equals_the_formula_query_by_query(heads: Heads, pattern: dict) -> None:
    case = Case(heads=heads, **pattern)
    _, q, k, v, cos, sin = (x.numpy() for x in case.inputs())
    half = heads.width // 2
    q, k = (rotate(x, cos[:, :, None, :half], sin[:, :, None, half:]) for x in (q, k))
    starts = np.zeros((1, case.T), int) if case.starts is None else case.starts.numpy()
    expected = attended_by_hand(q, k, v, np.broadcast_to(starts, (case.B, case.T)))
    assert np.abs(case.run(wide=True)[0].numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_plain_gradients_are_exact_differences(
    monkeypatch: pytest.MonkeyPatch, turned: bool, pattern: dict
) -> None:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, cos, sin, starts):
            out, lse = attend(q, k, v, cos, sin, starts)
            ctx.save_for_backward(q, k, v, out, lse, cos, sin, starts)
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, out, lse, cos, sin, starts = ctx.saved_tensors
            return *attend_backward(grad, q, k, v, out, lse, cos, sin, starts), None, None, None

    monkeypatch.setattr(causal_plain, "LARGEST", 4)
    case = Case(B=1, T=9, heads=Heads(2, 1, 2), **pattern)
    _, q, k, v, cos, sin = case.inputs()
    rest = (cos if turned else None, sin if turned else None, case.starts)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: Attention.apply(*x, *rest), leaves)


@pytest.mark.parametrize("largest", [1, 4, 1000])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_plain_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, pattern: dict, largest: int
) -> None:
    case = Case(**pattern)
    expected = case.run(wide=True)
    monkeypatch.setattr(causal_plain, "LARGEST", largest)
    monkeypatch.setattr(causal_plain, "SMALLEST", 1)
    assert max(gaps(case.run(wide=True), expected)) < 1e-13


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    "heads", [Heads(4, 2, 64), Heads(2, 2, 48), Heads(6, 1, 16), Heads(2, 1, 50), Heads(1, 1, 130)]
)
@pytest.mark.parametrize("T", [1, 2, 7, 16, 33, 63, 64, 65, 130, 257, 301])
def test_cpp_equals_plain(T: int, heads: Heads, dtype: torch.dtype) -> None:
    patterns = ({}, {"documents": (5, 1, 20, 40)}, {"window": 70}, {"documents": (100, 30), "window": 21})
    for number, pattern in enumerate(patterns):
        case = Case(2, T, heads, dtype, turned=(number + T) % 2 == 0, **pattern)
        assert max(gaps(case.run(), case.run(wide=True))) < ROUNDING[dtype], case


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_cpp_equals_plain_on_a_long_row(dtype: torch.dtype) -> None:
    case = Case(1, 4096, Heads(2, 1, 16), dtype)
    assert max(gaps(case.run(), case.run(wide=True))) < ROUNDING[dtype]


@needs_compiler
@pytest.mark.parametrize("heads", [Heads(3, 3, 32), Heads(8, 8, 16), Heads(12, 2, 16)])
def test_many_heads_and_many_rows(heads: Heads) -> None:
    case = Case(9, 150, heads, torch.float32, documents=(70, 20))
    assert max(gaps(case.run(), case.run(wide=True))) < ROUNDING[torch.float32]


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("T", "turned"), [(256, True), (350, False)])
def test_results_too_many_for_the_caches(T: int, turned: bool, dtype: torch.dtype) -> None:
    """From 2^20 numbers on they are written past them."""
    case = Case((1 << 20) // (T * 8 * 64) + 1, T, Heads(8, 2, 64), dtype, turned, documents=(100, 40))
    assert max(gaps(case.run(), case.run(wide=True))) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_results_have_their_types_and_shapes(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    out, lse, dq, dk, dv = case.run()
    assert (
        out.shape == dq.shape == (2, 37, 4, 16)
        and out.is_contiguous()
        and dk.shape == dv.shape == (2, 37, 2, 16)
    )
    assert lse.shape == (2, 4, 37) and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x in (out, dq, dk, dv)} == {dtype}
    assert max(gaps(case.run(), case.run(wide=True))) < 1.5e-2


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_where_things_lie_changes_no_bit(dtype: torch.dtype) -> None:
    case = Case(2, 70, Heads(4, 2, 16), dtype, documents=(30, 40))
    grad, q, k, v, cos, sin = case.inputs()
    expected = case.run()
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, q, k, v)]
    scattered = [torch.stack((x, x), dim=-1)[..., 1] for x in (grad, q, k, v)]  # no two numbers side by side
    for grad, q, k, v in (apart, scattered):
        out, lse = attend(q, k, v, cos, sin, case.starts)
        joint = torch.full((2, 70, 8 * 16), torch.nan, dtype=dtype)
        found = attend_backward(grad, q, k, v, out, lse, cos, sin, case.starts, into=joint)
        assert all(torch.equal(a, b) for a, b in zip((out, lse, *found), expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(case.heads.split(joint), found, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("B", "T"), [(3, 256), (1, 700)])
def test_the_same_bits_twice_and_on_any_number_of_threads(B: int, T: int, dtype: torch.dtype) -> None:
    case, runs = Case(B, T, Heads(6, 3, 32), dtype, documents=(150, 33, 300)), []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(case.run())
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_documents_bits_are_those_it_has_alone(dtype: torch.dtype) -> None:
    """As long as it begins where a block does; else sums are put together elsewhere."""
    case = Case(1, 192, Heads(2, 1, 16), dtype, documents=(64, 128))
    grad, q, k, v, cos, sin = case.inputs()
    whole, last = case.run(), slice(64, 192)
    out, lse = attend(*(x[:, last] for x in (q, k, v, cos, sin)), None)
    alone = attend_backward(
        *(x[:, last] for x in (grad, q, k, v)), out, lse, cos[:, last], sin[:, last], None
    )
    assert torch.equal(out, whole[0][:, last]) and torch.equal(lse, whole[1][..., last])
    assert max(gaps(list(alone), [x[:, last] for x in whole[2:]])) < ROUNDING[dtype] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-30, 100.0, 1e18])
def test_scores_of_any_size(size: float, dtype: torch.dtype) -> None:
    """Of huge scores the largest takes all; of tiny ones all share."""
    generator = torch.Generator().manual_seed(0)
    q = torch.ones(1, 70, 1, 16, dtype=dtype)
    k = (size * torch.randn(1, 70, 1, 1, generator=generator)).to(dtype).expand(1, 70, 1, 16)
    v = torch.randn(1, 70, 1, 16, generator=generator).to(dtype)
    out, lse = attend(q, k, v, None, None, None)
    scores = (
        (k[0, :, 0].double().sum(-1) / 4)
        .expand(70, 70)
        .masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
    )
    expected = (scores.softmax(-1) @ v[0, :, 0].double())[None, :, None]
    assert max(gaps([out, lse], [expected, scores.logsumexp(-1)[None, None]])) < 1e-2
    for gradient in attend_backward(v, q, k, v, out, lse, None, None, None):
        assert size > 1e9 or gradient.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_document(which: str, value: float, dtype: torch.dtype) -> None:
    case = Case(1, 192, Heads(2, 1, 16), dtype, turned=False, documents=(64, 128))
    grad, *given, _, _ = case.inputs()
    expected = case.run()
    given["qkv".index(which)][0, 150, 0, 3] = value
    out, lse = attend(*given, None, None, case.starts)
    found = [out, lse, *attend_backward(grad, *given, out, lse, None, None, case.starts)]
    assert not out.isfinite().all()
    assert all(torch.equal(a[:, :64], b[:, :64]) for a, b in zip(found[2:], expected[2:], strict=True))
    assert torch.equal(
        out[:, :144], expected[0][:, :144]
    )  # rows that are computed together may take NaN along


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@needs_compiler
def test_memory_grows_with_length_and_not_with_its_square() -> None:
    """Of 32,768 positions all scores would take 4 GiB, and those that are seen 1 GiB in bfloat16."""

    def kib(name: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return int(line.split()[1])

    case = Case(1, 32_768, Heads(1, 1, 8), torch.bfloat16, turned=False)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("the system does not let a process count its peak anew")
    before = kib("VmRSS")
    case.run()
    assert kib("VmHWM") - before < 64 * 1024


def test_what_autograd_keeps_grows_with_length_and_not_with_its_square() -> None:
    def kept(T: int, **how: object) -> int:
        sizes = []
        q, k, v = (x.requires_grad_() for x in Case(1, T, Heads(2, 1, 8), torch.float32).inputs()[1:4])
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            KERNELS["fused"](q, k, v, causal=True, **how)
        return sum(sizes)

    starts = first_keys(2048, 100, None, CPU)
    assert kept(2048, starts=None, dropout=0.0) == 2048 * (2 * 8 + 2 * 8 + 2 * 8 + 2)
    assert kept(2048, starts=starts, dropout=0.0) == 2048 * (2 * 8 + 2 * 8 + 2 * 8 + 2 + 1)
    assert kept(2048, starts=None, dropout=0.1) < 2048 * 2048 // 4


# ---- as an operator


def test_the_operator_is_what_torch_asks_of_one() -> None:
    case = Case(dtype=torch.float32, **PATTERNS[1])
    q, k, v = (x.clone().requires_grad_() for x in case.inputs()[1:4])
    torch.library.opcheck(torch.ops.puna.attend.default, (q, k, v, case.starts))


@pytest.mark.parametrize("pattern", [{}, {"documents": (10, 1, 26)}], ids=str)
def test_compiled_blocks_call_it_whole(monkeypatch: pytest.MonkeyPatch, pattern: dict) -> None:
    calls = []
    for name in ("attend", "attend_backward"):
        actual = getattr(causal, name)
        monkeypatch.setattr(
            causal_op.causal, name, lambda *x, name=name, run=actual: calls.append(name) or run(*x)
        )
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = CONFIGS["grouped"]
    block, case = Block(config, KERNELS["fused"]), Case(**pattern)
    cos, sin = torch.ones(1, 37, config.head_dim), torch.zeros(1, 37, config.head_dim)
    x = torch.randn(2, 37, config.hidden_size)
    results = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        out = run(x, cos, sin, case.starts)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in block.parameters())])
    assert calls == ["attend", "attend_backward"] * 2
    assert max(gaps(results[1], results[0])) < 1e-5
    torch._dynamo.reset()


# ---- torch's flash attention on CUDA


def test_documents_and_a_window_are_found_again_in_where_queries_begin_to_see() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]])
    found = causal_cuda.lengths_of(first_keys(8, None, documents, CPU))
    assert (
        found is not None
        and found.ends.tolist() == [0, 3, 8, 9, 16]
        and (found.longest, found.window) == (7, None)
    )
    found = causal_cuda.lengths_of(first_keys(8, 4, documents, CPU))
    assert (
        found is not None
        and found.ends.tolist() == [0, 3, 8, 9, 16]
        and (found.longest, found.window) == (7, 4)
    )
    found = causal_cuda.lengths_of(first_keys(8, 7, documents, CPU))
    assert found is not None and found.window is None
    found = causal_cuda.lengths_of(first_keys(8, 1, documents, CPU))
    assert (
        found is not None
        and found.ends.tolist() == list(range(17))
        and (found.longest, found.window) == (1, None)
    )
    assert causal_cuda.lengths_of(torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32)) is None


def test_torch_still_has_the_operators_that_are_called_by_name() -> None:
    names = {
        "_scaled_dot_product_flash_attention": ("dropout_p", "is_causal"),
        "_flash_attention_forward": ("cum_seq_q", "window_size_left", "window_size_right"),
        "_flash_attention_backward": ("rng_state", "window_size_left", "window_size_right"),
        "_scaled_dot_product_flash_attention_backward": ("philox_seed", "philox_offset"),
    }
    for name, arguments in names.items():
        known = {x.name for x in getattr(torch.ops.aten, name).default._schema.arguments}
        assert known.issuperset(arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("heads", [Heads(4, 2, 64), Heads(6, 6, 48), Heads(2, 1, 50)])
def test_flash_attention_on_cuda_equals_plain(heads: Heads, pattern: dict) -> None:
    case = Case(heads=heads, dtype=torch.bfloat16, **pattern)
    grad, q, k, v, cos, sin = (x.cuda() for x in case.inputs())
    starts = None if case.starts is None else case.starts.cuda()
    assert causal_cuda.suits(q, starts) is (heads.width % 8 == 0)
    out, lse = attend(q, k, v, cos, sin, starts)
    found = [out, lse, *attend_backward(grad, q, k, v, out, lse, cos, sin, starts)]
    assert max(gaps([x.cpu() for x in found], replace(case).run(wide=True))) < 2e-2
