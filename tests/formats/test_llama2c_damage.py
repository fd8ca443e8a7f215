"""llama2.c's files cut, bent and lying: a clean error or a valid model, quickly."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from puna import formats
from puna.errors import InputError, ModelError
from puna.formats.content import Content
from puna.model.weights import weights_of
from tests.formats.damage import VALUES, cut_or_flipped, fuzz, read_whole
from tests.formats.test_llama2c import MANNERS, write
from tests.model.shapes import CONFIGS, model_of


@pytest.mark.parametrize("manner", ["one.bin", "int8.bin"])
def test_a_header_that_lies_is_refused(manner: str, tmp_path: Path) -> None:
    path = tmp_path / manner
    write(path, Content(weights_of(model_of(CONFIGS["grouped"]))), **MANNERS[manner])
    data = path.read_bytes()
    for at, value, message in [
        (4, 3, "version 3"),
        (8, -32, "hidden_size"),
        (16, 2**31 - 1, "its header asks for"),
        (28, 2**31 - 1, "its header asks for"),
        (20, 3, "not divisible"),
    ]:
        path.write_bytes(data[:at] + struct.pack("<i", value) + data[at + 4 :])
        with pytest.raises(ModelError, match=message):
            formats.open_model(path)
    path.write_bytes(data[:36] + b"\2" + data[37:])
    with pytest.raises(ModelError, match="shared classifier"):
        formats.open_model(path)
    path.write_bytes(data[:-4])
    with pytest.raises(ModelError, match="cut short"):
        formats.open_model(path)


def test_a_file_without_magic_that_was_cut_short_is_told_from_others(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, Content(weights_of(model_of(CONFIGS["grouped"]))))
    data = path.read_bytes()
    for part in (data[:-4], data[:1000], data + bytes(4)):
        path.write_bytes(part)
        with pytest.raises(ModelError, match="its header asks for"):
            formats.open_model(path)
    for other in (bytes(5000), b"Once upon a time there was a llama. " * 9, b"\x93NUMPY\1\0" + data[:500]):
        path.write_bytes(other)
        with pytest.raises(ModelError, match="is not a model"):
            formats.open_model(path)


def test_a_group_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, Content(weights_of(model_of(CONFIGS["grouped"]))), dtype="int8", group_size=16)
    data = path.read_bytes()
    for group, message in [
        (0, "0 numbers in a group"),
        (-16, "in a group"),
        (7, "groups of 7"),
        (8, "asks for"),
    ]:
        path.write_bytes(data[:37] + struct.pack("<i", group) + data[41:])
        with pytest.raises(ModelError, match=message):
            formats.open_model(path)


@pytest.mark.parametrize("manner", MANNERS)
def test_values_that_are_not_numbers_are_told_when_read(manner: str, tmp_path: Path) -> None:
    path = tmp_path / manner
    write(path, Content(weights_of(model_of(CONFIGS["grouped"]))), **MANNERS[manner])
    data = path.read_bytes()
    gain = np.float32(
        next(iter(v for n, v in formats.open_model(path).weights if n == "model.norm.weight"))[0]
    )
    path.write_bytes(data.replace(gain.tobytes(), np.float32(np.nan).tobytes()))
    source = formats.open_model(path)
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN"):
        list(source.weights)


def bent_header(draw: random.Random, path: Path) -> bytes:
    """One or two of the header's numbers replaced, bytes flipped, or the file cut or made longer."""
    data = bytearray(path.read_bytes())
    kind = draw.random()
    if kind < 0.2:
        return cut_or_flipped(draw, bytes(data), head=600)
    if kind < 0.3:
        return bytes(data) + bytes(draw.randrange(1, 64))
    places = range(0, 28, 4) if data[:4] != b"24ka" else (*range(0, 36, 4), 37)
    for _ in range(draw.choice([1, 1, 2])):
        at = draw.choice(places)
        (old,) = struct.unpack_from("<i", data, at)
        new = draw.choice([0, 1, -1, -old, old + 1, old - 1, old * 2, old // 2, 2**31 - 1, -(2**31), 2**20])
        struct.pack_into("<i", data, at, max(-(2**31), min(new, 2**31 - 1)))
    if draw.random() < 0.2:
        data[36] = draw.randrange(256)
    return bytes(data)


@pytest.mark.parametrize(
    "rounds", [pytest.param(300, id="quick"), pytest.param(3000, id="whole", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("manner", ["legacy.bin", "one.bin", "int8.bin"])
def test_damaged_files(manner: str, rounds: int, tmp_path: Path) -> None:
    path = tmp_path / manner
    write(path, Content(weights_of(model_of(CONFIGS["grouped"]))), **MANNERS[manner])
    assert fuzz(path, [path], bent_header, rounds) < rounds


def bent_checkpoint(draw: random.Random, path: Path) -> bytes:
    """A checkpoint with another argument or tensor in it, or with bytes flipped."""
    if draw.random() < 0.3:
        return cut_or_flipped(draw, path.read_bytes())
    saved = torch.load(path, weights_only=True)
    place = draw.choice(["model_args", "model_args", "model", "whole"])
    table = saved if place == "whole" else saved[place]
    key = draw.choice(list(table))
    old = table.pop(key)
    if draw.random() < 0.8:
        values = [torch.zeros(draw.choice([0, 1, 32]), 48), torch.zeros(1).expand(2**40), *VALUES]
        value = draw.choice([*values, old])
        name = draw.choice(
            [key, key, f"{key}x", "layers.7.attention.wq.weight", "layers.99999999.ffn_norm.weight"]
        )
        table[name] = str(value) if isinstance(value, int) and abs(value) > 2**70 else value
    torch.save(saved, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "rounds", [pytest.param(100, id="quick"), pytest.param(2000, id="whole", marks=pytest.mark.slow)]
)
def test_damaged_checkpoints(rounds: int, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    write(path, Content(weights_of(model_of(CONFIGS["grouped"]))))
    assert fuzz(path, [path], bent_checkpoint, rounds) < rounds


@pytest.mark.parametrize("size", [0, 1, 3, 4, 27, 28, 29, 255])
def test_the_beginning_alone(size: int, tmp_path: Path) -> None:
    for name in ("legacy.bin", "one.bin", "ckpt.pt"):
        write(tmp_path / name, Content(weights_of(model_of(CONFIGS["tied"]))), **MANNERS[name])
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
        with pytest.raises(InputError) as caught:
            read_whole(tmp_path / name)
        assert "\n" not in str(caught.value)
