"""GGUF files cut, bent and lying: a clean error or a valid model, quickly, and no claim is believed."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from puna import formats
from puna.errors import ModelError
from puna.formats import provenance
from tests.formats import gguf_files
from tests.formats.damage import bounded, cut_or_flipped, fuzz, read_whole
from tests.model.shapes import CONFIGS, model_of


@pytest.fixture(params=["sentencepiece"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model with vectors, matrices and packed ones, divisors, and a tokenizer."""
    tokenizer = gguf_files.TOKENIZERS[request.param]()
    config = CONFIGS["all at once"].model_copy(update={"vocab_size": tokenizer.vocab_size + 3})
    gguf_files.write(tmp_path / "model.gguf", model_of(config), tokenizer, dtype="q8_0")
    return tmp_path / "model.gguf"


def refused(path: Path) -> str:
    """The one line with which a damaged model is refused."""
    with bounded(), pytest.raises(ModelError) as caught:
        read_whole(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def damaged(draw: random.Random, path: Path) -> bytes:
    """A file bent in its header's structure, or in its bytes."""
    data = path.read_bytes()
    return gguf_files.bent(draw, data) if draw.random() < 0.7 else cut_or_flipped(draw, data, 20_000)


def test_mutated_files_are_refused_or_valid(file: Path) -> None:
    assert 0 < fuzz(file, [file], damaged, 300) < 200


@pytest.mark.slow
@pytest.mark.parametrize("file", gguf_files.TOKENIZERS, indirect=True)
def test_many_mutated_files_are_refused_or_valid(file: Path) -> None:
    assert 0 < fuzz(file, [file], damaged, 4000) < 2600


@pytest.mark.parametrize("length", [4, 7, 8, 23, 24, 100, 3000, -4000, -100, -1])
def test_cut_short(file: Path, length: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:length])
    assert "damaged or cut short" in refused(file)


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "version 1 is not supported"), (4, "version 4"), (3 << 24, "big-endian"), (2 << 24, "big-endian")],
)
def test_other_versions(file: Path, version: int, message: str) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
    assert message in refused(file)


def test_version_2_is_read(file: Path) -> None:
    data, before = file.read_bytes(), provenance.payload_hash(formats.open_model(file).weights)
    file.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    read_whole(file)
    assert provenance.payload_hash(formats.open_model(file).weights) == before


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    """One entry of the metadata."""
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (entry(b"x", 9, struct.pack("<IQ", 8, 1 << 40)), "claims 1099511627776 elements"),
        (entry(b"x", 9, struct.pack("<IQQ", 8, 1 << 22, 1 << 20)), "within its header"),
        (entry(b"x", 9, struct.pack("<IQ", 4, 1 << 22)), "within its header"),
        (entry(b"x", 9, struct.pack("<IQ", 9, 1) * 1000), "an array of unknown type 9"),
        (entry(b"x", 9, struct.pack("<IQ", 13, 1)), "an array of unknown type 13"),
        (entry(b"x", 13, b""), "unknown type 13"),
        (entry(b"x", 8, struct.pack("<Q", 1 << 40)), "claims 1099511627776 bytes"),
        (entry(b"x", 7, b"\x02"), "neither true nor false"),
        (entry(b"\xff", 7, b"\x01"), "not UTF-8"),
        (entry(b"a\nb" * 9999, 13, b""), "'a\\nba\\nb"),
        (entry(b"general.type", 7, b"\x01"), "general.type twice"),
    ],
)
def test_metadata_that_lie(file: Path, more: bytes, message: str) -> None:
    data = file.read_bytes()
    (entries,) = struct.unpack_from("<Q", data, 16)
    file.write_bytes(data[:16] + struct.pack("<Q", entries + 1) + more + data[24:])
    assert message in refused(file)


def tensor_at(data: bytes, name: bytes) -> int:
    """Where a tensor's number of dimensions stands."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (12, 8, "cannot be"),  # a vector is no matrix
        (12, 10, "Q2_K"),
        (12, 24, "I8"),
        (12, 99, "unknown type 99"),
        (16, 1 << 60, "takes 128 bytes from"),
        (16, 4, "takes 128 bytes from"),
        (16, 0, "overlap"),
        (4, 1 << 62, "of a file of"),
        (4, 0, "has shape [0]"),
        (4, 16, "expected [32]"),
        (0, 9, "9 dimensions"),
        (0, 0, "0 dimensions"),
    ],
)
def test_a_tensor_that_lies(file: Path, field: int, value: int, message: str) -> None:
    data = bytearray(file.read_bytes())
    at = tensor_at(data, b"output_norm.weight") + field
    width = 4 if field in (0, 12) else 8
    data[at : at + width] = value.to_bytes(width, "little")
    file.write_bytes(data)
    assert message in refused(file)


def test_an_alignment_that_is_none(file: Path) -> None:
    data = bytearray(file.read_bytes())
    at = data.index(b"general.alignment") + len(b"general.alignment") + 4
    for alignment in (0, 24, 1 << 31):
        data[at : at + 4] = struct.pack("<I", alignment)
        file.write_bytes(data)
        assert "expected a power of two" in refused(file)
