"""GGUF files for tests: written for a model, and bent where the structure lies."""

from __future__ import annotations

import argparse
import base64
import functools
import inspect
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.formats.content import Content
from puna.formats.gguf import file as gguf
from puna.formats.gguf.file import GgufSettings
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, weights_of
from puna.tokenizer.tiktoken_reader import TiktokenCodec
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train

Recorded = dict[str, Tensor | Packed]
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@functools.cache
def small_tokenizer() -> Tokenizer:
    """SentencePiece's kind, trained by LLaMA's rules."""
    return train([inspect.getsource(argparse)], TokenizerSettings(vocab_size=400))


@functools.cache
def byte_level_tokenizer() -> Tokenizer:
    """Llama 3's kind: every byte, and pairs of letters."""
    pairs = [(left + right).encode() for left in "aeinorst " for right in "abcdefghilmnoprstuvwy"]
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs]
    rows = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    return Tokenizer(TiktokenCodec("\n".join(rows).encode()), chat_template="{{ bos_token }}")


TOKENIZERS = {"sentencepiece": small_tokenizer, "byte-level": byte_level_tokenizer}


def write(
    path: Path, model: Llama | Weights, tokenizer: Tokenizer | None = None, **settings: Any
) -> tuple[Recorded, list[str]]:
    """Write a file; the tensors as they were recorded, and the notes."""
    recorded: Recorded = {}
    weights = weights_of(model) if isinstance(model, Llama) else model
    ends, bos = ((), None) if tokenizer is None else (tokenizer.end_ids, tokenizer.bos_id)
    content = Content(weights, tokenizer, ends, bos)
    assert not list(gguf.obstacles(content, GgufSettings(**settings)))
    notes = gguf.write(path, content, GgufSettings(**settings), recorded.__setitem__)
    return recorded, notes


class _Scan:
    """Walks a sound file and notes where its numbers and names stand."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.numbers: list[tuple[int, int]] = []  # place and width
        self.names: list[tuple[int, int]] = []  # place and length

    def number(self, width: int) -> int:
        self.numbers.append((self.at, width))
        self.at += width
        return int.from_bytes(self.data[self.at - width : self.at], "little")

    def text(self, is_name: bool = False) -> None:
        length = self.number(8)
        if is_name:
            self.names.append((self.at, length))
        self.at += length

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner, count = self.number(4), self.number(8)
            for index in range(count):
                if inner == _STRING and index < 3:
                    self.text()
                elif inner == _STRING:
                    self.at += 8 + int.from_bytes(self.data[self.at : self.at + 8], "little")
                else:
                    self.at += _WIDTHS[inner]
        else:
            self.number(_WIDTHS[kind])


def places(data: bytes) -> _Scan:
    """Every number and name of a file's header."""
    scan = _Scan(data)
    scan.at = 4
    scan.number(4)
    tensors, entries = scan.number(8), scan.number(8)
    for _ in range(entries):
        scan.text(is_name=True)
        scan.value(scan.number(4))
    for _ in range(tensors):
        scan.text(is_name=True)
        for _ in range(scan.number(4)):
            scan.number(8)
        scan.number(4)
        scan.number(8)
    return scan


def bent(draw: random.Random, data: bytes) -> bytes:
    """A header with one number or name, or a few of them, replaced."""
    scan, changed = places(data), bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        if draw.random() < 0.15:
            (at, length), (other, size) = draw.choice(scan.names), draw.choice(scan.names)
            name = data[other : other + size] if draw.random() < 0.5 else draw.randbytes(length)
            changed[at : at + min(length, len(name))] = name[:length]
        else:
            at, width = draw.choice(scan.numbers)
            value = draw.choice(list(_numbers(draw, data, at, width, scan)))
            changed[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(changed)


def _numbers(draw: random.Random, data: bytes, at: int, width: int, scan: _Scan) -> Iterator[int]:
    now = int.from_bytes(data[at : at + width], "little")
    yield from (0, 1, 2, 3, 8, 9, 31, 32, 33, 255, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1)
    yield from (1 << 40, 1 << 60, (1 << 61) + 1, 1 << 62, 1 << 63, (1 << 64) - 1, len(data), len(data) - at)
    yield from (now + 1, now - 1, now + 32, now - 32, now * 2, now // 2)
    yield from struct.unpack("<II", struct.pack("<ff", float("nan"), float("inf")))
    place, size = draw.choice(scan.numbers)
    yield int.from_bytes(data[place : place + size], "little")
