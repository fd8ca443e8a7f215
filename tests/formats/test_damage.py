"""Files cut, bent and lying: a clean error or a valid model, quickly, and no claim is believed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from puna import formats
from puna.errors import ModelError
from puna.formats.huggingface.directory import CONFIG, GENERATION, HuggingFaceSettings
from puna.formats.huggingface.safetensors_reader import INDEX, SINGLE
from puna.model.weights import weights_of
from tests.formats.damage import bent, bounded, cut_or_flipped, fuzz, read_whole
from tests.model.shapes import CONFIGS, model_of


def refused(path: Path) -> str:
    """The one line with which a damaged model is refused."""
    with bounded(), pytest.raises(ModelError) as caught:
        read_whole(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 5000, -100, -1])
def test_cut_short(saved: Path, length: int) -> None:
    data = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(data[:length])
    assert "damaged or cut short" in refused(saved)


def test_bytes_too_many(saved: Path) -> None:
    with (saved / SINGLE).open("ab") as file:
        file.write(b"\0" * 8)
    assert "damaged" in refused(saved)


@pytest.mark.parametrize("size", [0, 1, 2**20, 99_999_999, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_own_size(saved: Path, size: int) -> None:
    data = (saved / SINGLE).read_bytes()
    (saved / SINGLE).write_bytes(size.to_bytes(8, "little") + data[8:])
    assert "damaged" in refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": [128, 0]},
        {"shape": [2**40]},
        {"shape": [2**40, 2**40]},
        {"shape": [-32]},
        {"shape": 32},
        {"dtype": "F128"},
        {"dtype": 3},
    ],
)
def test_an_entry_that_lies(saved: Path, change: dict[str, Any]) -> None:
    header, body = header_of((saved / SINGLE).read_bytes())
    header["model.norm.weight"] |= change
    (saved / SINGLE).write_bytes(with_header(header, body))
    refused(saved)


@pytest.mark.parametrize("file", [CONFIG, GENERATION, INDEX])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b'{"rope_theta": NaN}', "NaN is not a JSON value"),
        (b'{"rope_theta": 1e999}', "1e999 is too large a number"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_json_that_is_none(saved: Path, file: str, content: bytes, message: str) -> None:
    (saved / file).write_bytes(content)
    assert message in refused(saved)


@pytest.mark.parametrize("value", [None, [], 3, {}, {"a": 3}, "x"])
def test_an_index_without_a_table(saved: Path, value: object) -> None:
    (saved / INDEX).write_text(json.dumps({"weight_map": value}))
    assert "expected a weight_map" in refused(saved)


def test_directories_where_files_are_expected(saved: Path) -> None:
    (saved / SINGLE).unlink()
    (saved / SINGLE).mkdir()
    refused(saved)


def damaged(draw: random.Random, path: Path) -> bytes:
    """A file's content, bent in its structure or in its bytes."""
    data = path.read_bytes()
    if draw.random() < 0.6:
        if path.suffix == ".json":
            return json.dumps(bent(draw, json.loads(data))).encode()
        header, body = header_of(data)
        return with_header(bent(draw, header), body)
    return cut_or_flipped(draw, data)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_mutated_files_are_refused_or_valid(tmp_path: Path, shard_bytes: int) -> None:
    formats.save(
        tmp_path / "m",
        weights_of(model_of(CONFIGS["llama3"])),
        end_ids=[2],
        settings=HuggingFaceSettings(shard_bytes=shard_bytes),
    )
    files = sorted(path for path in (tmp_path / "m").iterdir() if path.name != "puna.json")
    assert 0 < fuzz(tmp_path / "m", files, damaged, 300) < 150


@pytest.mark.slow
def test_many_mutated_files_are_refused_or_valid(tmp_path: Path) -> None:
    formats.save(tmp_path / "m", weights_of(model_of(CONFIGS["yarn"])), end_ids=[2])
    files = [tmp_path / "m" / name for name in (CONFIG, CONFIG, GENERATION, SINGLE)]
    assert 0 < fuzz(tmp_path / "m", files, damaged, 6000) < 3000
