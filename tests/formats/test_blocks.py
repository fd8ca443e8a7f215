"""Low-bit blocks, expanded as the gguf package expands them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from puna.formats.blocks import SCALES
from puna.formats.gguf.header import PLAIN
from puna.formats.packed import BLOCKS, WRITABLE, block_sizes, pack, scales_are_finite, unpack
from puna.model.weights import Packed


def blocks(scheme: str, rows: int, columns: int) -> Packed:
    """Every byte random, scales finite."""
    numbers, size = block_sizes(scheme)
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 256, (rows, columns // numbers, size), dtype=torch.uint8, generator=generator)
    for at in SCALES[scheme]:
        data[:, :, at + 1] &= 0xBB  # no exponent of all ones, and both signs
    return Packed(scheme, data.flatten(1), None, (rows, columns))


@pytest.mark.parametrize("scheme", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (530, 1024)])
def test_expanded_as_the_package_does(scheme: str, shape: tuple[int, int]) -> None:
    packed = blocks(scheme, *shape)
    expected = dequantize(packed.data.numpy(), GGMLQuantizationType(BLOCKS[scheme]))
    assert unpack(packed).shape == shape
    assert np.array_equal(unpack(packed).numpy(), expected)


def test_numbers_and_sizes_are_the_packages() -> None:
    names = {name: GGMLQuantizationType[name.upper()] for name in BLOCKS}
    assert names == BLOCKS
    assert {name: GGML_QUANT_SIZES[kind] for name, kind in names.items()} == {
        n: block_sizes(n) for n in BLOCKS
    }
    for number, (name, size) in PLAIN.items():
        kind = GGMLQuantizationType(number)
        short = name.replace("float", "F").replace("bF", "BF")
        assert kind.name == short and GGML_QUANT_SIZES[kind] == (1, size)


@pytest.mark.parametrize("scheme", WRITABLE)
def test_what_is_packed_is_near(scheme: str) -> None:
    values = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    bits = {"q8_0": 8, "q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5}[scheme]
    largest = values.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    gap = (unpack(pack(values, scheme)) - values).unflatten(1, (-1, 32)).abs()
    assert (gap <= 1.01 * largest / 2 ** (bits - 1)).all()


@pytest.mark.parametrize("scheme", BLOCKS)
def test_scales_that_are_not_finite_are_seen(scheme: str) -> None:
    packed = blocks(scheme, 3, 256)
    assert scales_are_finite(packed)
    for at in SCALES[scheme]:
        for bad in (0x7C, 0xFC, 0x7E):
            broken = packed.data.clone()
            broken[2, at + 1] = bad
            assert not scales_are_finite(Packed(scheme, broken, None, packed.shape))
            assert not torch.isfinite(unpack(Packed(scheme, broken, None, packed.shape))).all()
