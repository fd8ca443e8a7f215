"""GGUF's blocks in panels: what taking them apart gives, bit for bit, in C++ and in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.formats import blocks as codec
from puna.kernels import blocks, integers
from puna.kernels.library import load
from puna.model.weights import Packed

pytestmark = pytest.mark.skipif(load("laying").functions is None, reason=load("laying").fault)

SHAPES = [(32, 32), (1, 64), (31, 96), (33, 160), (64, 192), (96, 288), (320, 5632), (64, 2048)]  # (O, I)


def some(scheme: str, outputs: int, inputs: int) -> Tensor:
    """Blocks of any bytes at all: scales may be NaN."""
    size = inputs // blocks.SIZE * blocks.BYTES[scheme]
    return torch.randint(256, (outputs, size), generator=torch.Generator().manual_seed(inputs)).byte()


def bits(panels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return panels[0], panels[1].view(torch.int16)


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    pairs = list(zip(bits(first), bits(second), strict=True))
    return all(one.dtype == two.dtype and torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scheme", blocks.BYTES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_panels_are_those_of_codes_and_scales(scheme: str, outputs: int, inputs: int, threads: int) -> None:
    data, before = some(scheme, outputs, inputs), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = blocks.into_panels(scheme, data)
    finally:
        torch.set_num_threads(before)
    apart = codec.apart(Packed(scheme, data, None, (outputs, inputs)))
    assert apart.scales is not None
    assert same(found, integers.into_panels((apart.data, apart.scales)))
    assert same(found, blocks.plain_into_panels(scheme, data))


@pytest.mark.parametrize("scheme", blocks.BYTES)
def test_blocks_are_taken_and_laid_wherever_they_lie(scheme: str) -> None:
    data = some(scheme, 64, 96)
    whole = blocks.into_panels(scheme, data)
    odd = torch.cat((data.flatten()[:1], data.flatten()))[1:].view_as(data)
    assert same(blocks.into_panels(scheme, odd), whole)
    room = integers.empty(blocks.KINDS[scheme], 128, 96, 3, torch.float16)
    places = room[0][1:3], room[1][1:3]
    for part in room:
        part.zero_()
    assert blocks.into_panels(scheme, data, out=places)[0] is places[0]
    assert same(places, whole) and not any(part[index].any() for part in room for index in (0, 3))


def test_what_does_not_fit_is_refused() -> None:
    room = integers.empty(torch.int8, 32, 64, 2, torch.float16)
    with pytest.raises(AssertionError):
        blocks.into_panels("q8_0", some("q8_0", 64, 64), out=room)
    assert not blocks.suits(Packed("q6_k", some("q8_0", 32, 64), None, (32, 64)))
    assert not blocks.suits(Packed("q8_0", some("q8_0", 64, 64)[::2], None, (32, 64)))
