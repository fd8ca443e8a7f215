"""Norm, gate and rotary turn: torch's numbers, and a row's bits in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from puna.kernels import rowwise
from puna.kernels.library import load

pytestmark = pytest.mark.skipif(load("rowwise").functions is None, reason=load("rowwise").fault)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 15, 16, 17, 48, 100, 288, 2049]
HEADS = [(4, 4, 8), (6, 2, 48), (3, 1, 50), (8, 2, 64), (2, 1, 2)]  # (N, K, H)
Result = tuple[Tensor, ...]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps_apart(found: Tensor, expected: Tensor) -> float:
    """The largest distance, in last bits of the expected number, or of the smallest normal ones."""
    kind = torch.finfo(found.dtype)
    unit = (expected.double().abs() * kind.eps).clamp(min=kind.tiny)
    return float(((found.double() - expected.double()).abs() / unit).max())


def alike_in_any_company(run: Callable[..., Result], *columns: Tensor) -> None:
    """Rows of columns (R, …) together, on several threads, are what each is alone."""
    alone = [torch.cat(parts) for parts in zip(*(run(*(x[at : at + 1] for x in columns))
             for at in range(len(columns[0]))), strict=True)]  # fmt: skip
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for first in (0, 1, len(columns[0]) - 3):
            for one, other in zip(run(*(x[first:] for x in columns)), alone, strict=True):
                assert torch.equal(one, other[first:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = (3 * normal(70, width)).to(dtype), (1 + normal(width, seed=1) / 5).to(dtype)
    found = rowwise.norm(x.view(7, 10, width), weight, 1e-5)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert found.shape == (7, 10, width) and steps_apart(found.view(70, width), exact.to(dtype)) <= 4
    alike_in_any_company(lambda x: (rowwise.norm(x, weight, 1e-5),), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated(width: int, dtype: torch.dtype) -> None:
    x = (4 * normal(70, 2 * width)).to(dtype)
    found = rowwise.gated(x.view(7, 10, 2 * width))
    gate, up = x.double().chunk(2, dim=-1)
    exact = gate / (1 + (-gate).exp()) * up
    assert found.shape == (7, 10, width) and steps_apart(found.view(70, width), exact.to(dtype)) <= 4
    alike_in_any_company(lambda x: (rowwise.gated(x),), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_any_size(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1e-8, -1e-8, 20.0, -20.0, 88.0, -88.0, 60000.0, -60000.0, torch.inf, torch.nan]
    x = torch.tensor([*values, *[1.0] * len(values)], dtype=dtype)[None]
    found, expected = rowwise.gated(x), rowwise.plain_gated(x)
    assert torch.allclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-30, equal_nan=True)
    assert found[0, -2] == torch.inf and found[0, -1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "width"), HEADS)
def test_turned(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    x = normal(5, 14, (queries + 2 * keys) * width).to(dtype)
    cos, sin = normal(5, 14, width, seed=1), normal(5, 14, width, seed=2)
    heads = (queries, keys)
    exact = rowwise.plain_turned(x.double(), cos.double(), sin.double(), heads)
    for found, expected in zip(rowwise.turned(x, cos, sin, heads), exact, strict=True):
        tolerance = expected.abs() * torch.finfo(dtype).eps + 1e-6
        assert found.shape == expected.shape and ((found.double() - expected).abs() <= tolerance).all()
        assert found.is_contiguous()
    assert torch.equal(
        rowwise.turned(x, cos[:1], sin[:1], heads)[1],
        rowwise.turned(x, cos[:1].expand(5, -1, -1), sin[:1].expand(5, -1, -1), heads)[1],
    )
    alike_in_any_company(
        lambda x, cos, sin: (
            rowwise.turned(x[None], cos[None], sin[None], heads)[0].unbind(0)
            + rowwise.turned(x[None], cos[None], sin[None], heads)[1].unbind(0)
        ),
        *(each.flatten(0, 1) for each in (x, cos, sin)),
    )


def test_what_learns_is_computed_by_torch() -> None:
    x, weight = normal(3, 16), normal(16, seed=1).requires_grad_()
    rowwise.norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert torch.allclose(rowwise.norm(x, weight, 1e-5), rowwise.plain_norm(x, weight, 1e-5))
