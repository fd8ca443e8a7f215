"""One draw per row in plain torch, from what scaling and narrowing leave of its logits.

A draw takes one uniform number and inverts the cumulative distribution. Each token's probability is computed
in float32, and so is exact to some 1e-7 of itself however small it is; they are added up by blocks of BLOCK
tokens in float32, over blocks in float64, and inside the block that was hit in float64. What has probability
0 is never drawn. What is as large as the vocabulary stays on the device: the host sees sums of blocks, the
likeliest tokens, and the block that was hit, so that sums over these have one order on every device.

R rows   V vocabulary   H the likeliest tokens of a row, in order
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.engine.rules import NARROWINGS, temperature, typical_p
from puna.engine.state import SamplingState

BLOCK = 64  # tokens; about the root of a vocabulary, so that both levels of a search are short
HEAD = 64  # tokens; rarely do more than these decide what top_k and top_p keep
LONGEST_HEAD = 1024  # beyond, sorting the whole row is as fast


def in_blocks(values: Tensor, fill: float) -> Tensor:
    """(R, V) as (R, V / BLOCK, BLOCK), filled up where BLOCK does not divide V."""
    rest = -values.shape[-1] % BLOCK
    return (F.pad(values, (0, rest), value=fill) if rest else values).unflatten(-1, (-1, BLOCK))


def rows_of(values: Tensor, rows: list[int]) -> Tensor:
    """These rows, not copied where they are all."""
    if len(rows) == len(values):
        return values
    return values.index_select(0, torch.tensor(rows, device=values.device))


def largest_ids(logits: Tensor, peaks: Tensor) -> list[int]:
    """The id of each row's largest logit, the lowest where several are; `peaks` are the blocks' largest."""
    block = peaks.argmax(dim=-1, keepdim=True)  # (R, 1)
    inside = _some(in_blocks(logits, -torch.inf), block).argmax(dim=-1)  # (R, 1)
    return (block * BLOCK + inside)[:, 0].tolist()


def drawn(logits: Tensor, peaks: Tensor, states: Items[SamplingState]) -> list[int]:
    """A token of each row of logits (R, V), drawn by its state; `peaks` are the blocks' largest."""
    setting = torch.tensor([state.params.temperature for state in states], device=logits.device)
    largest = peaks.amax(dim=-1)
    scaled = temperature(logits, setting, largest)  # (R, V)
    peaks = temperature(peaks, setting, largest)  # the largest of each block still: both had the same done
    weights = scaled.softmax(dim=-1)  # (R, V)
    tokens = [0] * len(states)
    for (way, head), rows in _ways(states, logits.shape[-1]).items():
        parts = rows_of(scaled, rows), rows_of(peaks, rows), rows_of(weights, rows)
        found = WAYS[way](*parts, [states[row] for row in rows], head)
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    return tokens


Way = Callable[[Tensor, Tensor, Tensor, Items[SamplingState], int], list[int]]


def _ways(states: Items[SamplingState], V: int) -> dict[tuple[str, int], list[int]]:
    """Rows by how they are drawn and how long a head they need: by nothing but their own settings."""
    ways: dict[tuple[str, int], list[int]] = {}
    for row, state in enumerate(states):
        asked = {n: rule for n, rule in NARROWINGS.items() if _setting(state, n, V) != rule.neutral}
        way = "typical" if state.params.typical_p < 1 else "narrowed" if asked else "whole"
        looks = any(rule.looks for rule in asked.values())
        ways.setdefault((way, _head_size(state, V) if looks else 0), []).append(row)
    return ways


def _head_size(state: SamplingState, V: int) -> int:
    """How many of the likeliest tokens to look at."""
    k = _setting(state, "top_k", V)  # one more than is kept shows that none equals the last
    return min(HEAD if k < HEAD else LONGEST_HEAD, V)


def _setting(state: SamplingState, name: str, V: int) -> float:
    value = getattr(state.params, name)
    return 0 if name == "top_k" and value >= V else value


def _whole(
    scaled: Tensor, peaks: Tensor, weights: Tensor, states: Items[SamplingState], head: int
) -> list[int]:
    """From the whole distribution."""
    block, inside = _inverse(in_blocks(weights, 0.0), states)
    return (block * BLOCK + inside)[:, 0].tolist()


def _narrowed(
    scaled: Tensor, peaks: Tensor, weights: Tensor, states: Items[SamplingState], head: int
) -> list[int]:
    """From tokens at or above a floor; only blocks that hold such are looked into, where they are few."""
    floor = _floor(scaled, peaks, weights, states, head)[:, None]  # (R, 1)
    blocks, scaled_blocks = in_blocks(weights, 0.0), in_blocks(scaled, -torch.inf)
    most = int((peaks >= floor).sum(dim=-1).max())
    ids = None
    if most * 2 < peaks.shape[-1]:
        ids = peaks.topk(most).indices.sort(dim=-1).values  # (R, most)
        blocks, scaled_blocks = _some(blocks, ids), _some(scaled_blocks, ids)
    kept = torch.ge(scaled_blocks, floor[:, :, None], out=torch.empty_like(scaled_blocks))  # 1 or 0
    block, inside = _inverse(kept.mul_(blocks), states)
    block = block if ids is None else ids.cpu().gather(1, block)
    return (block * BLOCK + inside)[:, 0].tolist()


def _typical(
    scaled: Tensor, peaks: Tensor, weights: Tensor, states: Items[SamplingState], head: int
) -> list[int]:
    """From the typical tokens of those at or above a floor."""
    floor = _floor(scaled, peaks, weights, states, head)[:, None]  # (R, 1)
    left = torch.where(scaled >= floor, weights.double(), 0.0).cpu()  # (R, V)
    setting = torch.tensor([state.params.typical_p for state in states], dtype=torch.float64)
    block, inside = _inverse(in_blocks(typical_p(scaled.cpu(), left, setting), 0.0), states)
    return (block * BLOCK + inside)[:, 0].tolist()


WAYS: dict[str, Way] = {"whole": _whole, "narrowed": _narrowed, "typical": _typical}


def _floor(scaled: Tensor, peaks: Tensor, weights: Tensor, states: Items[SamplingState], H: int) -> Tensor:
    """Of each row the least scaled logit (R,) that may be drawn, by the rules in their order."""
    V = scaled.shape[-1]
    settings = {
        name: torch.tensor([_setting(state, name, V) for state in states], dtype=torch.float64)
        for name in NARROWINGS
    }
    floor, known = _narrow(*_head(scaled, peaks, weights, H), settings, whole=H == V)
    for row in (~known).nonzero()[:, 0].tolist():  # mostly none
        mine = {name: setting[row : row + 1] for name, setting in settings.items()}
        search = _crossing if mine["top_k"] == 0 else _sorted
        head = search(scaled[row].cpu(), weights[row].cpu().double(), mine["top_p"])
        floor[row] = _narrow(*head, mine, whole=True)[0]
    return floor.to(scaled.device)


def _sorted(scaled: Tensor, weights: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """All of a row (V,) in falling order."""
    ordered, at = scaled.sort(descending=True)
    return ordered[None], weights[at][None]


def _crossing(scaled: Tensor, weights: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row's (V,) cumulative sum crosses p, in falling order: all before as one, then those near.

    A tenth of what sorting takes. Tokens are told apart by the upper half of a float32: order is kept.
    """
    key = scaled.float().neg().view(torch.int32) >> 16  # of -0 and positive numbers: in order as integers
    key &= 0x7FFF
    reached = torch.bincount(key, weights).cumsum(dim=-1)
    crossed = min(int(torch.searchsorted(reached, p)), len(reached) - 1)
    before = reached[crossed - 1 : crossed] if crossed else reached.new_zeros(1)
    near = (key == crossed).nonzero()[:, 0]
    ordered, at = scaled[near].sort(descending=True)
    return torch.cat([scaled.new_zeros(1), ordered])[None], torch.cat([before, weights[near][at]])[None]


def _head(scaled: Tensor, peaks: Tensor, weights: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """The H largest scaled logits in falling order, and their weights in float64: (R, H) each, on the CPU."""
    if 0 < H < peaks.shape[-1]:
        # Each of the H blocks with the largest peaks holds one: a token of another block is not among the H.
        ids = peaks.topk(H, sorted=False).indices
        scaled, weights = (_some(in_blocks(x, -torch.inf), ids).flatten(1) for x in (scaled, weights))
    ordered, at = scaled.topk(H)  # (R, H)
    return ordered.cpu(), weights.gather(1, at).cpu().double()


def _narrow(
    scaled: Tensor, weights: Tensor, settings: dict[str, Tensor], whole: bool
) -> tuple[Tensor, Tensor]:
    """The floor of each row, and whether these likeliest tokens were enough to know it: (R,) each."""
    floor = scaled.new_full((len(scaled),), -torch.inf)
    known = torch.ones(len(scaled), dtype=torch.bool)
    for name, rule in NARROWINGS.items():
        asked = settings[name] != rule.neutral
        if not asked.any():
            continue
        floor = rule.apply(scaled, weights, floor, settings[name])
        if rule.looks and not whole:
            known &= ~asked | (floor > scaled[:, -1])
    return floor, known


def _some(blocks: Tensor, which: Tensor) -> Tensor:
    """Of (R, blocks, BLOCK) the blocks (R, some) of each row: (R, some, BLOCK)."""
    R, count, _ = blocks.shape
    if R > 1:
        which = which + torch.arange(0, R * count, count, device=blocks.device)[:, None]
    return blocks.flatten(0, 1).index_select(0, which.flatten()).unflatten(0, which.shape)


def _inverse(blocks: Tensor, states: Items[SamplingState]) -> tuple[Tensor, Tensor]:
    """Block and place in it (R, 1) where the cumulative sum of weights passes each row's uniform number.

    Of weights (R, blocks, BLOCK), which need not add up to 1.
    """
    uniform = torch.tensor([state.uniform for state in states], dtype=torch.float64)[:, None]
    sums = blocks.sum(dim=-1).cpu().double()  # (R, blocks)
    block, rest = _hit(sums, uniform)
    chosen = _some(blocks, block.to(blocks.device))[:, 0].cpu().double()  # (R, BLOCK)
    return block, _hit(chosen, rest)[0]


def _hit(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where uniform (R, 1) falls among weights (R, n), and how far into it, from 0 to 1: (R, 1) each."""
    reached = weights.cumsum(dim=-1)
    total = reached[:, -1:].contiguous()
    aim = uniform * total
    # The product may round up to the total: the first place that reaches it is the last that can be hit.
    at = torch.minimum(torch.searchsorted(reached, aim, right=True), torch.searchsorted(reached, total))
    here = weights.gather(1, at)
    return at, ((aim - reached.gather(1, at) + here) / here).clamp(0, 1)
