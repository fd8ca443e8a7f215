"""A stretch of the token sequence as one row: inputs, targets, and where documents begin in it.

Documents lie end to end and the sequence is cut every T tokens, so that no position is padding except at
the very end. Row r has inputs [rT, rT + T) and targets one further on. Thus every token that has a
predecessor in its document is a target exactly once in an epoch, also where the cut falls inside a document:
a document longer than a row goes on in the next one, with positions from 0 and without sight of what came
before.

Attention stays inside each document, and positions restart with it, unless `cross_documents`. That is the
default because a neighbour in the row is there by chance: nothing in it helps to predict this document, and
what a document teaches would depend on what happens to stand beside it. (Llama 3 was trained like this;
many earlier models with attention across, which `cross_documents=True` does, with positions running through
the row.) The first token of a document is never a target in either case: nothing before it predicts it.

Dimensions: B rows, T positions in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from puna.data.batches import Batch
from puna.data.shards import TokenSet


@dataclass(frozen=True)
class Row:
    """One row of T positions; the fields mean what they mean in `Batch`."""

    tokens: NDArray[np.int64]  # (T,)
    targets: NDArray[np.int64]  # (T,)
    loss_mask: NDArray[np.bool_]  # (T,)
    positions: NDArray[np.int64]  # (T,)
    documents: NDArray[np.int64]  # (T,)


def count_rows(tokens: int, row_length: int, overlap: int = 0) -> int:
    """Rows of T inputs, T - overlap apart, that make every token but the very first a target."""
    stride = row_length - overlap
    return max(0, -(-(tokens - 1 - overlap) // stride)) if tokens > 1 + overlap else int(tokens > 1)


def pack_row(tokens: TokenSet, start: int, row_length: int, context: int = 0) -> Row:
    """The row whose inputs begin at token `start`; the first `context` targets are not counted.

    Past the end of the tokens the row is padded with zeros that are never targets and that form a document of
    their own, so that attention over them is defined.
    """
    T = row_length
    window = tokens.slice(start, start + T + 1)
    real = max(len(window) - 1, 0)  # inputs that have a target
    is_start = np.zeros(T + 1, dtype=bool)  # (T + 1,)
    is_start[tokens.document_starts(start, start + T + 1) - start] = True
    is_target = ~is_start[1:]  # (T,)
    is_target[:context] = False
    is_target[real:] = False
    is_start[0] = True
    is_start[real] = True
    index = np.arange(T)
    return Row(
        tokens=_padded(window[:real], T),
        targets=_padded(window[1:], T),
        loss_mask=is_target,
        positions=index - np.maximum.accumulate(np.where(is_start[:T], index, 0)),
        documents=np.cumsum(is_start[:T]) - 1,
    )


def stack(rows: Sequence[Row], numbers: Sequence[int], position: int, cross_documents: bool) -> Batch:
    """Rows as a batch; `numbers` are their indices and `position` is where to resume after it."""
    positions = np.stack([row.positions for row in rows])  # (B, T)
    if cross_documents:
        positions = np.broadcast_to(np.arange(positions.shape[1]), positions.shape).copy()
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        targets=torch.from_numpy(np.stack([row.targets for row in rows])),
        loss_mask=torch.from_numpy(np.stack([row.loss_mask for row in rows])),
        positions=torch.from_numpy(positions),
        documents=None if cross_documents else torch.from_numpy(np.stack([row.documents for row in rows])),
        position=position,
        rows=tuple(numbers),
    )


def _padded(ids: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    return np.concatenate((ids, np.zeros(length - len(ids), dtype=np.int64)))
