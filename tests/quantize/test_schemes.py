"""Rounding to nearest: by hand, beside GGUF's and bitsandbytes' own, over extremes, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

import puna
from puna.errors import ModelError
from puna.model.weights import weights_of
from puna.quantize import scales
from puna.quantize.codes import NF4, apart, expand, whole_numbers
from puna.quantize.schemes import SCHEMES, Format, allowed, quantized

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
Q8_0, Q4_0 = Format("int8", 32, HALF), Format("int4", 32, HALF)


def matrix_of(kind: str) -> Tensor:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(24, 256, generator=random)
    return {"normal": 0.02 * normal, "heavy tails": normal**3, "one sign": normal.abs() + 0.5}[kind]


def real(assets: Path) -> Tensor:
    llm = puna.load(str(assets / "weights" / "stories260K" / "stories260K.bin"))
    wide = [
        tensor.float() for _, tensor in weights_of(llm.model) if tensor.shape[-1] == 64 and tensor.dim() == 2
    ]
    return torch.cat(wide)


def squared_error(matrix: Tensor, values: Tensor, group: int) -> Tensor:
    return (matrix.double() - values.double()).unflatten(-1, (-1, group)).square().sum(-1)


def gguf_blocks(matrix: Tensor, name: str) -> tuple[np.ndarray, Tensor]:
    """Bytes of the package's blocks, and their numbers."""
    kind = gguf.GGMLQuantizationType[name]
    blocks = quantize(matrix.numpy(), kind)
    return blocks, torch.from_numpy(dequantize(blocks, kind))


def test_int8_by_hand() -> None:
    packed = quantized(torch.tensor([[1.27, -0.5, 0.014, 0.016], [0, 0, 0, 0]]), Format("int8", None, FULL))
    assert packed.scales is not None
    assert whole_numbers(packed).tolist() == [[127, -50, 1, 2], [0, 0, 0, 0]]
    assert packed.scales.tolist() == [[pytest.approx(0.01)], [0]]


def test_int4_takes_the_end_that_reaches_farther() -> None:
    weights = torch.cat([torch.arange(-8, 8.0).repeat(2), torch.arange(8, -8, -1.0).repeat(2)])[None] / 4
    packed = quantized(weights, Q4_0)
    assert packed.scales is not None
    assert packed.scales.tolist() == [[0.25, -0.25]]
    assert torch.equal(expand(packed), weights)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign"])
def test_int8_by_groups_has_the_scales_of_q8_0_and_never_more_error(kind: str) -> None:
    matrix = matrix_of(kind)
    packed, (blocks, values) = quantized(matrix, Q8_0), gguf_blocks(matrix, "Q8_0")
    parts = blocks.reshape(24, 8, 34)
    assert packed.scales is not None
    assert np.array_equal(packed.scales.numpy(), parts[..., :2].copy().view(np.float16)[..., 0])
    # The package rounds weights before it rounds the scale, so that a few are not at the nearest.
    theirs = torch.from_numpy(parts[..., 2:].copy().view(np.int8).reshape(24, 256))
    apart_by = (whole_numbers(packed).int() - theirs).abs()
    assert int(apart_by.max()) <= 1 and apart_by.float().mean() < 0.03
    assert bool((squared_error(matrix, expand(packed), 32) <= squared_error(matrix, values, 32)).all())


def test_int8_by_groups_is_q8_0_where_its_scale_is_exact() -> None:
    matrix = torch.randn(24, 8, 32, generator=torch.Generator().manual_seed(1)).clamp(-1.9, 1.9)
    matrix[..., 5] = 127 / 64
    blocks, _ = gguf_blocks(matrix.flatten(1), "Q8_0")
    theirs = blocks.reshape(24, 8, 34)[..., 2:].copy().view(np.int8).reshape(24, 256)
    assert np.array_equal(whole_numbers(quantized(matrix.flatten(1), Q8_0)).numpy(), theirs)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one sign"])
def test_int4_never_has_more_error_than_q4_0_in_any_group(kind: str) -> None:
    matrix = matrix_of(kind)
    errors = squared_error(matrix, expand(quantized(matrix, Q4_0)), 32)
    theirs = squared_error(matrix, gguf_blocks(matrix, "Q4_0")[1], 32)
    assert bool((errors <= theirs * (1 + 1e-6)).all())
    assert errors.sum() < 0.97 * theirs.sum()


def test_int4_never_has_more_error_than_q4_0_on_real_weights(assets: Path) -> None:
    matrix = real(assets)
    errors = squared_error(matrix, expand(quantized(matrix, Q4_0)), 32)
    theirs = squared_error(matrix, gguf_blocks(matrix, "Q4_0")[1], 32)
    assert bool((errors <= theirs * (1 + 1e-6)).all())
    assert errors.sum() < 0.92 * theirs.sum()


def test_scales_of_int4_are_near_the_best_of_an_exhaustive_search() -> None:
    groups = matrix_of("normal")[:4].unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    for share in torch.linspace(-1.2, 1.2, 2000):
        scale = (share * largest / 8)[..., None]
        best = torch.minimum(best, squared_of(groups, scale))
    found = squared_of(groups, scales.chosen("int4", groups, FULL)[..., None])
    assert found.sum() < 1.01 * best.sum()


def squared_of(groups: Tensor, scale: Tensor) -> Tensor:
    return ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)


def test_importance_moves_the_error_away_from_what_counts() -> None:
    matrix, importance = matrix_of("heavy tails"), torch.ones(256)
    importance[::4] = 100
    error = (expand(quantized(matrix, Q4_0, importance=importance)) - matrix).square()
    plain = (expand(quantized(matrix, Q4_0)) - matrix).square()
    assert (error * importance).sum() < 0.9 * (plain * importance).sum()
    assert error.sum() > plain.sum()


@pytest.mark.parametrize("format", [Format("int8", None, FULL), Q8_0, Format("int8", 128, BRAIN)], ids=str)
@given(exponent=some.integers(-38, 3), seed=some.integers(0, 9))
def test_int8_is_within_half_a_step_of_any_size(format: Format, exponent: int, seed: int) -> None:
    matrix = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    packed = quantized(matrix, format)
    assert packed.scales is not None
    steps = packed.scales.float().repeat_interleave(256 // packed.scales.shape[1], 1)
    assert bool(((expand(packed) - matrix).abs() <= steps * 0.5001).all())


@pytest.mark.parametrize("format", [Q4_0, Format("int4", 128, BRAIN), Format("int4", 32, FULL)], ids=str)
@given(exponent=some.integers(-42, 3), seed=some.integers(0, 9))
def test_int4_of_any_size_is_finite_and_no_worse_than_zeros(format: Format, exponent: int, seed: int) -> None:
    matrix = torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    error = squared_error(matrix, expand(quantized(matrix, format)), 256).sum()
    of_zeros = squared_error(matrix, torch.zeros_like(matrix), 256).sum()
    assert error <= of_zeros
    if exponent > -5:
        assert error < 0.02 * of_zeros


@pytest.mark.parametrize("format", [scheme.format for scheme in SCHEMES.values()], ids=SCHEMES)
def test_zeros_stay_zeros(format: Format) -> None:
    assert torch.equal(expand(quantized(torch.zeros(3, 128), format)), torch.zeros(3, 128))


def test_many_rows_are_as_each_alone() -> None:
    matrix = torch.randn(1100, 128, generator=torch.Generator().manual_seed(3))  # in two parts
    for format in (Q4_0, Q8_0, SCHEMES["nf4"].format):
        values = expand(quantized(matrix, format))
        assert torch.equal(values[1090:1095], expand(quantized(matrix[1090:1095], format)))


def test_nf4_takes_the_nearest_level() -> None:
    matrix = matrix_of("normal")
    packed = quantized(matrix, SCHEMES["nf4"].format)
    blocks = matrix.unflatten(-1, (-1, 64))
    largest = blocks.abs().amax(-1, keepdim=True)
    nearest = ((blocks / largest)[..., None] - NF4).abs().argmin(-1)
    assert torch.equal(apart(packed.data).long(), nearest.flatten(-2))
    assert packed.scales is not None and torch.equal(packed.scales, largest[..., 0])


def test_nf4_is_that_of_bitsandbytes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
        matrix = matrix_of("normal")
        codes, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
        theirs = functional.dequantize_4bit(codes, state)
    assert torch.allclose(expand(quantized(matrix, SCHEMES["nf4"].format)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("format", "inputs", "bits"),
    [
        (Q4_0, 4096, 4.5),
        (Q8_0, 64, 8.5),
        (Format("int8", None, FULL), 64, 8.5),
        (SCHEMES["nf4"].format, 64, 4.5),
        (Format("int4", 128, BRAIN), 4096, 4.125),
        (Format("int8", None, HALF), 4096, 8 + 1 / 256),
    ],
    ids=str,
)
def test_bits_per_weight_count_scales_and_are_those_of_the_tensors(
    format: Format, inputs: int, bits: float
) -> None:
    assert format.bits_per_weight(inputs) == bits
    packed = quantized(torch.ones(2, inputs), format)
    assert packed.scales is not None
    assert 8 * (packed.data.nbytes + packed.scales.nbytes) == 2 * inputs * bits


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", [scheme.format for scheme in SCHEMES.values()], ids=SCHEMES)
def test_numbers_that_are_not_finite_are_refused_by_name(bad: float, format: Format) -> None:
    matrix = torch.ones(3, 128)
    matrix[2, 77] = bad
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        quantized(matrix, format, "layers.1.mlp.up_proj.weight")


def test_scales_beyond_their_type_are_refused_with_a_wider_one() -> None:
    with pytest.raises(ModelError, match=r"needs scales above 65504, .* float16; set scales=float32"):
        quantized(torch.full((1, 32), 1e7), Q4_0)
    assert torch.equal(
        expand(quantized(torch.full((1, 32), -8e6), Format("int4", 32, FULL))), torch.full((1, 32), -8e6)
    )


def test_a_shape_that_does_not_fit_is_refused_with_the_option_that_mends_it() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ModelError) as error:
        allowed(name, (64, 172), Q4_0)
    assert str(error.value) == (
        "model.layers.0.mlp.down_proj.weight (64, 172) has 172 inputs, and int4 in groups of 32 needs a "
        "multiple of 32; puna quantize with --except '*.down_proj=int8' "
        "(one scale per channel fits any shape), or =keep"
    )
    with pytest.raises(ModelError, match=r"multiple of 128; set group=32, or puna quantize with --except"):
        allowed(name, (64, 160), Format("int4", 128, HALF))
    with pytest.raises(ModelError, match=r"has shape \(64,\), expected a matrix"):
        allowed(name, (64,), Format("int8", None, FULL))
    allowed(name, (64, 172), Format("int8", None, FULL))
