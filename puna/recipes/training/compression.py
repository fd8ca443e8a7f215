"""What general-purpose compressors need for a text: the yardstick beside a model's bits per byte."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Compression:
    """Bits per byte of `gzip -9` and `xz -9` over `size` bytes."""

    gzip: float
    xz: float
    size: int


def compress(texts: Iterable[str]) -> Compression:
    """Both over the texts concatenated, headers included, as the command-line tools write them."""
    data = "".join(texts).encode("utf-8")
    if not data:
        return Compression(0.0, 0.0, 0)
    zipped = len(gzip.compress(data, compresslevel=9, mtime=0))
    xz = len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9))
    return Compression(8 * zipped / len(data), 8 * xz / len(data), len(data))
