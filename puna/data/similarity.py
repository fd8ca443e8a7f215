"""Near copies among texts made of lines, and texts that are tables rather than writing.

Texts are compared by their shingles: every three consecutive lines, blank lines and indentation aside. A
shared shingle is a passage taken over; single shared lines (`return None`) say nothing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LINES = 3  # in a shingle
COPIED = 0.5  # of a text's shingles stood in one earlier text: it is a near copy
LEAKED = 0.2  # the same beside a held-out text, either way round: what is in it must not be trained on
LEAST = 40  # shared shingles that count beside a held-out text: fewer may be a licence
TABULAR = 0.5  # of the lines hold nothing but literals

# Possessive throughout (`++`, `(?>`): a line is read once, whatever stands in it.
_SIGNS = r"[\s\[\](){},:+*\-.|]*+"
_STRING = r"""[bBrRuU]{0,2}(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
_NUMBER = r"0[xX][0-9a-fA-F]++|\d[\d_.eE]*+"
_TABLE_LINE = re.compile(rf"{_SIGNS}(?:(?>{_STRING}|{_NUMBER}|None|True|False){_SIGNS})++(?:\#.*)?")
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated (?:from|by \w+\.py)|do not edit", re.I
)


def is_table(text: str) -> bool:
    r"""Whether most lines hold nothing but literals: data that a program wrote, with nothing to learn from.

    >>> is_table("TABLE = {\n  0x41: 'A',  # LETTER A\n  0x42: 'B',\n  0x43: 'C',\n}")
    True
    """
    lines = [line for line in text.split("\n") if line.strip()]
    tabular = sum(_TABLE_LINE.fullmatch(line) is not None for line in lines)
    return tabular > TABULAR * len(lines)


def is_generated(text: str) -> bool:
    """Whether the first lines say that a program wrote the rest."""
    comments = (line for line in text.split("\n", 12)[:12] if line.lstrip().startswith(("#", '"""')))
    return any(_GENERATED.search(line) for line in comments)


def near_copies(texts: Sequence[str], held_out: int) -> dict[int, int]:
    """Texts to leave out because an earlier one has the same passages: index → index of that earlier one.

    The first `held_out` texts are held out. After them a text is left out already when it shares much less
    with one of these, so that nothing held out is read in training.
    """
    shingles = [_shingles(text) for text in texts]
    sizes = np.array([len(found) for found in shingles])
    owner, other, shared = _shared(shingles)
    of_other, of_owner = shared / sizes[other], shared / sizes[owner]
    leaks = (owner < held_out) & (other >= held_out) & (shared >= LEAST)
    copies = (of_other >= COPIED) | (leaks & (np.maximum(of_other, of_owner) >= LEAKED))
    return {
        int(text): int(earlier)
        for text, earlier in zip(other[copies][::-1], owner[copies][::-1], strict=True)
    }


def _shared(shingles: Sequence[NDArray[np.uint64]]) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs (owner, other) of texts, with how many shingles of `other` stood first in the earlier `owner`."""
    texts = np.repeat(np.arange(len(shingles)), [len(found) for found in shingles])
    values = np.concatenate(shingles)
    order = np.argsort(values, kind="stable")  # equal shingles together, earliest text first
    values, texts = values[order], texts[order]
    begins = np.concatenate(([True], values[1:] != values[:-1]))
    owners = texts[begins][np.cumsum(begins) - 1]
    codes, shared = np.unique((owners * len(shingles) + texts)[~begins], return_counts=True)
    return *np.divmod(codes, len(shingles)), shared


def _shingles(text: str) -> NDArray[np.uint64]:
    """The distinct shingles of a text as numbers; a text of fewer lines is one shingle."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    hashes = np.array([zlib.crc32(line.encode("utf-8", "surrogatepass")) for line in lines], dtype=np.uint64)
    hashes = np.concatenate((hashes, np.zeros(max(0, LINES - len(hashes)), dtype=np.uint64)))
    mixed = np.zeros(len(hashes) - LINES + 1, dtype=np.uint64)
    for offset in range(LINES):  # a polynomial modulo 2⁶⁴ with an odd base
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(mixed)]
    return np.unique(mixed)
