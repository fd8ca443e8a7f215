"""What attention over blocks is given: a layer's blocks of keys and values, and whose a step's rows are.

M rows of a step   N query heads   K key/value heads   H head width   P = H rounded up to whole vectors
n = numbers that lie side by side, since a product takes them at once: 2 in bfloat16, else 1
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.kernels.panels import INPUTS

BLOCK = 64  # positions
LANES = 16  # values are padded to whole vectors of float32

Attend = Callable[["Step", Tensor, Tensor, Tensor], Tensor]
"""(step, q (1, M, N, H), k and v (1, M, K, H)) → (1, M, N, H)"""


@dataclass(frozen=True)
class Pages:
    """One layer's keys and values, in blocks that belong to one sequence or to several that begin alike."""

    keys: Tensor
    """(blocks, K, H / n, BLOCK, n): a vector of keys takes part in every step of a product over H."""
    values: Tensor
    """(blocks, K, BLOCK / n, P, n); what lies beyond H is zero."""
    key_scales: Tensor | None = None
    """(blocks, K, BLOCK), float32: what an int8 key of one position and head is to be multiplied by."""
    value_scales: Tensor | None = None

    @property
    def heads(self) -> tuple[int, int, int]:
        """K, H and P."""
        _, K, steps, _, n = self.keys.shape
        return K, steps * n, self.values.shape[3]


@dataclass(frozen=True, eq=False)
class Step:
    """Whose the rows of one step are: counts[i] rows after another are sequence i's, from position starts[i].

    Rows beyond sum(counts) belong to nobody.
    """

    tables: Items[Items[int]]
    """tables[i][j] is the block of sequence i's positions from j · BLOCK; -1 where its window has passed."""
    starts: Items[int]
    counts: Items[int]
    rows: int
    window: int | None


def page_shapes(blocks: int, K: int, H: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of keys and of values that are held in some number type; H is even."""
    n = INPUTS.get(dtype, 1)
    return (blocks, K, H // n, BLOCK, n), (blocks, K, BLOCK // n, rounded_width(H), n)


def rounded_width(head_dim: int) -> int:
    """P: the head width rounded up to whole vectors.

    >>> rounded_width(48), rounded_width(50)
    (48, 64)
    """
    return -(-head_dim // LANES) * LANES
