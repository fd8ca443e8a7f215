"""Keys and values of a batch, each row at its own positions.

B batch   T positions in the input   S positions attended to   C positions there is room for
N query heads   K key/value heads   H head width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.model.attention import fused

SMALLEST = 64  # positions


class ContiguousCache:
    """One block of memory per layer, (B, C, K, H) for keys and for values, that doubles as rows grow.

    Rows have different lengths: every token is stored at its own position, and a query sees the keys of its
    row up to its own position, or those of them that its window spans. So a row may be padded on the right;
    what padding stored is never seen, and is overwritten when the row gets there. Positions of a row must
    have been stored without gaps. All are kept, also those that every window has left behind.
    """

    def __init__(
        self, layers: int, longest: int, rope_lengths: Tensor | None = None, window: int | None = None
    ) -> None:
        """Room is made when it is needed, for `longest` positions at most.

        `rope_lengths` (B,) are the lengths by which dynamic NTK turns each row: `puna.model.attention.Cache`.
        `window` is the model's `sliding_window`.
        """
        self.rope_lengths = rope_lengths
        self._window = window
        self._longest = longest
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._step: _Step | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Store k and v (B, T, K, H) at positions (B, T), then let q (B, T, N, H) see those up to its own.

        A pass through the model begins with layer 0; what positions mean is worked out there, once.
        """
        if layer == 0:
            self._step = _Step.of(positions, self._window)
        step = self._step
        assert step is not None
        keys = self._store(self._keys, layer, k, step, positions)
        values = self._store(self._values, layer, v, step, positions)
        if step.from_start:  # all there is to see is in the input
            return fused(q, k, v, mask=None, causal=True, dropout=0.0, window=self._window)
        seen = slice(step.begin, step.end)
        return fused(q, keys[:, seen], values[:, seen], mask=step.mask, causal=False, dropout=0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        chosen = list(rows)
        self._keys = [None if held is None else held[chosen] for held in self._keys]
        self._values = [None if held is None else held[chosen] for held in self._values]
        if self.rope_lengths is not None:
            self.rope_lengths = self.rope_lengths[chosen]

    def _store(
        self, held: list[Tensor | None], layer: int, new: Tensor, step: _Step, positions: Tensor
    ) -> Tensor:
        room = self._with_room(held[layer], new, step.end)
        held[layer] = room
        room[step.rows, positions] = new
        return room

    def _with_room(self, held: Tensor | None, like: Tensor, end: int) -> Tensor:
        """Memory for at least `end` positions that holds what was held."""
        size = 0 if held is None else held.shape[1]
        if held is not None and end <= size:
            return held
        capacity = max(end, min(max(2 * size, SMALLEST), self._longest))
        grown = like.new_zeros(like.shape[0], capacity, *like.shape[2:])  # (B, C, K, H)
        if held is not None:
            grown[:, :size] = held
        return grown


@dataclass(frozen=True)
class _Step:
    """What the positions (B, T) of one pass mean for every layer."""

    begin: int
    """The smallest position that a query sees."""
    end: int
    """One more than the largest position."""
    from_start: bool
    """Whether every row's input is all that it has."""
    rows: Tensor
    """(B, 1)"""
    mask: Tensor | None
    """(B, 1, T, S); None where every query sees all S keys."""

    @classmethod
    def of(cls, positions: Tensor, window: int | None) -> _Step:
        B, T = positions.shape
        device = positions.device
        rows = torch.arange(B, device=device)[:, None]  # (B, 1)
        first, last = (int(edge) for edge in positions.aminmax())
        if first == 0 and bool((positions == torch.arange(T, device=device)).all()):
            return cls(0, T, True, rows, None)
        begin = 0 if window is None else max(0, first - window + 1)
        if first == last:  # one token for every row, all rows equally long
            return cls(begin, last + 1, False, rows, None)
        keys, own = torch.arange(begin, last + 1, device=device), positions[:, :, None]
        seen = keys <= own  # (B, T, S)
        if window is not None and window <= last:
            seen &= keys > own - window
        return cls(begin, last + 1, False, rows, seen[:, None])  # (B, 1, T, S)
