"""Which text is held out from training.

A document goes to the side that the hash of its text names: the choice does not change when other documents
are added, and identical documents cannot stand on both sides. A document so large that choosing it or not
would upset the proportion (a corpus that is one book, say) is divided instead: its end is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from puna.data.readers import Document, ReadReport

Side = Literal["train", "validation"]
COARSE = 0.005  # of all text: with no document larger, 200 or more are left to choose from


def split(documents: Iterable[Document], share: float, total_bytes: int) -> Iterator[tuple[Side, Document]]:
    """Each document with its side, about `share` of the `total_bytes` of text held out."""
    for document in documents:
        data = document.encoded()
        if share and len(data) > COARSE * total_bytes:
            yield from _divide(document, share)
        else:
            yield ("validation" if _fraction(data) < share else "train"), document


def keep_apart(
    train: Iterable[Document], validation: Iterable[Document], report: ReadReport
) -> Iterator[tuple[Side, Document]]:
    """Documents that were divided by hand, without those for training that are also held out."""
    held_out = set()
    for document in validation:
        held_out.add(content_hash(document))
        yield "validation", document
    for document in train:
        if content_hash(document) in held_out:
            report.repeated += 1
        else:
            yield "train", document


def content_hash(document: Document) -> bytes:
    """Sixteen bytes that name the text of a document."""
    return hashlib.blake2b(document.encoded(), digest_size=16).digest()


def _divide(document: Document, share: float) -> Iterator[tuple[Side, Document]]:
    """All but the end for training, the end held out, cut after a line or else between two words."""
    text = document.text
    wanted = min(len(text) - 1, round(len(text) * (1 - share)))
    ends = (text.rfind("\n", 1, wanted) + 1, text.rfind(" ", 1, wanted) + 1, wanted)
    cut = next((end for end in ends if end > wanted * (1 - share)), wanted)
    if cut > 0:
        yield "train", Document(text[:cut], document.source)
    yield "validation", Document(text[cut:], f"{document.source} (end)")


def _fraction(data: bytes) -> float:
    """The text's place in [0, 1), as good as random."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2**64
