"""A tokenizer of bytes, and token sets with known content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from puna.data.shardfile import TokenDocument
from puna.data.shards import TokenSet, write_token_set

BOS, EOS = 256, 257


class ByteTokenizer:
    """One id per UTF-8 byte, BOS 256 and EOS 257, with the interface of `puna.tokenizer.Tokenizer`."""

    vocab_size = 258
    bos_id = BOS
    eos_id = EOS

    def __init__(self, name: str = "bytes") -> None:
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()
        self.encoded: list[str] = []

    def encode_batch(
        self, texts: Sequence[str], bos: bool = True, eos: bool = False, threads: int | None = None
    ) -> list[list[int]]:
        self.encoded += texts
        return [[BOS] * bos + list(text.encode("utf-8")) + [EOS] * eos for text in texts]


@pytest.fixture
def byte_tokenizer() -> type[ByteTokenizer]:
    return ByteTokenizer


@pytest.fixture
def token_set(tmp_path: Path) -> Callable[..., TokenSet]:
    """Documents of the given lengths: BOS 1, then numbers that never repeat, so that each token is known."""

    def write(lengths: Sequence[int], shard_tokens: int = 1 << 20, name: str = "tokens") -> TokenSet:
        documents, value = [], 10
        for number, length in enumerate(lengths):
            ids = np.concatenate(([1], np.arange(value, value + length - 1)))
            documents.append(TokenDocument(ids, size=3 * length, source=f"doc{number}"))
            value += length - 1
        return write_token_set(
            tmp_path / name, documents, vocab_size=1 << 20, fingerprint="f" * 64, shard_tokens=shard_tokens
        )

    return write
