"""Attention over blocks of keys and values in plain torch: for any device, and where nothing is compiled.

A query row is computed alone: its scores, over blocks of 64 absolute positions in order, give a running
maximum, a sum of weights and a weighted sum of values (online softmax, arXiv 1805.02867). So a row's bits do
not depend on the rows beside it, on how a prompt was cut, or on where its blocks lie. Nothing that a row may
not see has any effect, whatever an earlier owner left in a block, unless it is a value of its own sequence
that is not finite. `paged_attention.cpp` does the same faster.

    M rows of a step   N query heads   K key/value heads   G = N/K   H head width
    P = H rounded up to whole vectors   n = 2 in bfloat16, else 1: numbers that lie in pairs
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.kernels.pages import BLOCK, Attend, Pages, Step

TILE = 16  # queries that are multiplied together
TOGETHER, MANY = {"cpu": 8}, 64  # tiles in one product; MANY where starting one costs more than doing it


def plain(pages: Pages) -> Attend:
    """Attention in plain torch, for any device, and where nothing can be compiled.

    Products have one shape whatever the step holds, TOGETHER tiles of TILE queries and one block of keys
    each, padded where there are fewer: so they always run the same way. A block of keys is copied out for
    its product; all is computed in float32, or float64 for a float64 model. Weights of bfloat16 values are
    rounded to it, and what they are divided by is the sum of the rounded ones.
    """

    def attend(step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _store(pages, step, k[0], v[0])
        M, N, H = q.shape[1:]
        queries, out = q.reshape(M * N, H), q.new_zeros(M * N, H)
        for tiles in _groups(step, N, pages.heads[0], q.device):
            found = _attend_tiles(pages, tiles, queries[tiles.queries])[..., :H]  # (tiles, TILE, H)
            out[tiles.queries[tiles.real]] = found[tiles.real].to(q.dtype)
        return out.view(1, M, N, H)

    return attend


def _store(pages: Pages, step: Step, k: Tensor, v: Tensor) -> None:
    """Write k and v (M, K, H) to their places."""
    places = [
        (table[position // BLOCK], position % BLOCK)
        for table, start, count in zip(step.tables, step.starts, step.counts, strict=True)
        for position in range(start, start + count)
    ]
    if not places:
        return
    blocks, slots = torch.tensor(places, device=k.device).unbind(1)  # (rows,)
    n, H = pages.keys.shape[4], k.shape[2]
    k, v = k[: len(places)], v[: len(places)]
    if pages.key_scales is not None and pages.value_scales is not None:
        k, pages.key_scales[blocks, :, slots] = quantized(k)
        v, pages.value_scales[blocks, :, slots] = quantized(v)
    pages.keys[blocks, :, :, slots] = k.unflatten(2, (-1, n))  # (rows, K, H / n, n)
    pages.values[blocks, :, slots // n, :H, slots % n] = v  # (rows, K, H)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, H) as int8 and the scales (…) that undo it: the largest magnitude becomes 127."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(dim=-1) / 127).to(torch.float32)
    scaled = torch.where(scale[..., None] > 0, wide / scale[..., None], 0)
    return scaled.round().clamp(-127, 127).to(torch.int8), scale


@dataclass(frozen=True)
class _Tiles:
    """A fixed number of tiles of TILE queries, each of one sequence and one key/value head."""

    queries: Tensor
    """(tiles, TILE): their places among all M · N."""
    real: Tensor
    """(tiles, TILE): False for what only fills a tile."""
    own: Tensor
    """(tiles, TILE): positions of the queries."""
    heads: Tensor
    """(tiles,)"""
    blocks: Tensor
    """(tiles, most blocks that one of the tiles reads); whatever a tile does not read is block 0, unseen."""
    first: Tensor
    """(tiles,): the position at which the first of its blocks begins."""
    window: int | None


def _groups(step: Step, N: int, K: int, device: torch.device) -> Iterator[_Tiles]:
    """All queries of a step as groups of tiles; the last group is filled up."""
    G, row, tiles = N // K, 0, []
    for table, start, count in zip(step.tables, step.starts, step.counts, strict=True):
        for query in range(0, count * G, TILE):
            tiles += [(table, start, row, query, min(TILE, count * G - query), head) for head in range(K)]
        row += count
    together = TOGETHER.get(device.type, MANY)
    for group in range(0, len(tiles), together):
        yield _group(tiles[group : group + together], together, G, N, step.window, device)


def _group(
    tiles: list[tuple[Items[int], int, int, int, int, int]],
    together: int,
    G: int,
    N: int,
    window: int | None,
    device: torch.device,
) -> _Tiles:
    """Tiles of (table, start, first row, first query, number of queries, head)."""
    queries, own, real, heads, blocks, first = [], [], [], [], [], []
    for table, start, row, query, size, head in tiles:
        within = [divmod(query + min(i, size - 1), G) for i in range(TILE)]  # (row, head) of each
        queries.append([(row + r) * N + head * G + g for r, g in within])
        own.append([start + r for r, _ in within])
        real.append([i < size for i in range(TILE)])
        heads.append(head)
        earliest = 0 if window is None else max(0, own[-1][0] - window + 1) // BLOCK
        first.append(earliest * BLOCK)
        blocks.append(list(table[earliest : own[-1][-1] // BLOCK + 1]))
    most = max(map(len, blocks))
    blocks = [[*row, *[0] * (most - len(row))] for row in blocks]
    unused = together - len(tiles)
    columns = (queries, own, heads, blocks, first)
    places, positions, whose, read, begins = (
        torch.tensor(column + [column[0]] * unused, device=device) for column in columns
    )
    real += [[False] * TILE] * unused
    return _Tiles(places, torch.tensor(real, device=device), positions, whose, read, begins, window)


def _attend_tiles(pages: Pages, tiles: _Tiles, q: Tensor) -> Tensor:
    """The attention of q (tiles, TILE, H): (tiles, TILE, P), float32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype, q = pages.values.dtype, q.to(wide) * (1 / math.sqrt(q.shape[-1]))
    largest = q.new_full(q.shape[:2], -math.inf)
    total, out = q.new_zeros(q.shape[:2]), q.new_zeros(*q.shape[:2], pages.heads[2])
    offsets = torch.arange(BLOCK, device=q.device)
    for number, block in enumerate(tiles.blocks.unbind(1)):
        positions = (tiles.first + number * BLOCK)[:, None, None] + offsets  # (tiles, 1, BLOCK)
        seen = (positions <= tiles.own[:, :, None]) & tiles.real[:, :, None]  # (tiles, TILE, BLOCK)
        if tiles.window is not None:
            seen &= positions > tiles.own[:, :, None] - tiles.window
        keys, values = (
            x[block, tiles.heads].transpose(2, 3).flatten(1, 2).to(wide) for x in (pages.keys, pages.values)
        )  # (tiles, H, BLOCK), (tiles, BLOCK, P)
        scores = torch.bmm(q, keys)  # (tiles, TILE, BLOCK)
        if pages.key_scales is not None:
            scores = scores * pages.key_scales[block, tiles.heads][:, None].to(wide)
        scores = torch.where(seen, scores, -math.inf)
        risen = torch.maximum(largest, scores.amax(dim=-1))  # (tiles, TILE)
        weights = torch.where(seen, (scores - risen[..., None]).exp(), 0)
        if dtype == torch.bfloat16:
            weights = weights.to(dtype).to(wide)  # as products of pairs take them
        kept = torch.where(seen.any(dim=-1), (largest - risen).exp(), 1)
        largest, total = risen, total * kept + weights.sum(dim=-1)
        values = torch.where(seen.any(dim=1)[..., None], values, 0)  # zero times NaN would be NaN
        if pages.value_scales is not None:
            scales = pages.value_scales[block, tiles.heads][:, None].to(wide)
            weights = torch.where(seen, weights * scales, 0)
        out = out * kept[..., None] + torch.bmm(weights, values)  # (tiles, TILE, P)
    return out / total[..., None]
