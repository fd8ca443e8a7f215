"""Codes of int8, int4 and nf4: made, packed and expanded, against values by hand and other programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from puna.model.weights import Packed
from puna.quantize.codes import (
    NF4,
    apart,
    expand,
    from_whole_numbers,
    rounded,
    row_parts,
    together,
    whole_numbers,
)

# Published beside the paper (arXiv 2305.14314, appendix E), and in every program that reads nf4.
PUBLISHED = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def test_levels_of_nf4_are_the_published_ones_to_the_last_bit() -> None:
    assert torch.equal(NF4, torch.tensor(PUBLISHED))


def test_int8_by_hand() -> None:
    data = torch.tensor([[1, -2, 127, -128], [0, 5, -7, 3]], dtype=torch.int8)
    by_channel = Packed("int8", data, torch.tensor([[0.5], [-2.0]]), (2, 4))
    assert expand(by_channel).tolist() == [[0.5, -1.0, 63.5, -64.0], [0.0, -10.0, 14.0, -6.0]]
    by_group = Packed("int8", data, torch.tensor([[1.0, 2.0], [0.5, 0.25]]).bfloat16(), (2, 4))
    assert expand(by_group).tolist() == [[1.0, -2.0, 254.0, -256.0], [0.0, 2.5, -1.75, 0.75]]
    assert whole_numbers(by_group) is data


def test_int4_by_hand() -> None:
    # Byte j holds weight 2j in its low half and 2j + 1 in its high half, each as q + 8.
    data = torch.tensor([[0x80, 0xF7]], dtype=torch.uint8)
    packed = Packed("int4", data, torch.tensor([[0.5, 3.0]], dtype=torch.float16), (1, 4))
    assert whole_numbers(packed).tolist() == [[-8, 0, -1, 7]]
    assert expand(packed).tolist() == [[-4.0, 0.0, -3.0, 21.0]]


def test_nf4_by_hand() -> None:
    packed = Packed("nf4", torch.tensor([[0xF0, 0x87]], dtype=torch.uint8), torch.tensor([[2.0]]), (1, 4))
    assert expand(packed).tolist() == [[-2.0, 2.0, 0.0, 2 * NF4[8].item()]]


@given(some.integers(1, 5), some.integers(1, 9), some.randoms(use_true_random=False))
def test_halves_are_put_together_and_taken_apart(rows: int, pairs: int, random) -> None:  # type: ignore[no-untyped-def]
    codes = torch.tensor([[random.randrange(16) for _ in range(2 * pairs)] for _ in range(rows)])
    data = together(codes.to(torch.uint8))
    assert data.shape == (rows, pairs)
    assert torch.equal(apart(data), codes.to(torch.uint8))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_whole_numbers_go_in_and_come_out(scheme: str) -> None:
    low = -127 if scheme == "int8" else -8
    numbers = torch.arange(low, -low).repeat(3, 4)[:, : 8 * (2 if scheme == "int4" else 100)]
    packed = from_whole_numbers(scheme, numbers.float(), torch.ones(3, 1))
    assert torch.equal(whole_numbers(packed).long(), numbers)
    assert torch.equal(expand(packed), numbers.float())


def test_rounding_is_to_the_nearest_half_to_even_and_within_range() -> None:
    weights = torch.tensor([[2.5, 3.5, -2.5, 100.0, -100.0]])
    assert rounded("int4", weights, torch.ones(1, 1)).tolist() == [[2, 4, -2, 7, -8]]
    assert rounded("int4", weights, torch.tensor([[-1.0]])).tolist() == [[-2, -4, 2, -8, 7]]
    assert rounded("int8", 2 * weights, torch.ones(1, 1)).tolist() == [[5, 7, -5, 127, -127]]


def test_a_scale_of_zero_makes_zeros() -> None:
    assert rounded("int4", torch.tensor([[1e-30, -0.0]]), torch.zeros(1, 1)).tolist() == [[0, 0]]


def test_large_matrices_are_expanded_part_by_part_with_the_same_result() -> None:
    data = torch.randint(-127, 128, (40, 10_240), dtype=torch.int8)  # four parts
    scales = torch.rand(40, 320)
    assert len(row_parts((40, 10_240))) == 4
    expected = data.view(40, 320, 32).numpy().astype(np.float32) * scales[..., None].numpy()
    assert np.array_equal(
        expand(Packed("int8", data, scales, (40, 10_240))).numpy(), expected.reshape(40, -1)
    )


def test_compressed_tensors_packs_int4_the_same() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    numbers = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    ours = from_whole_numbers("int4", numbers, torch.ones(6, 2)).data
    assert torch.equal(helpers.pack_to_int32(numbers, 4).view(torch.uint8), ours)
