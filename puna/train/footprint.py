"""What a run needs of memory, by arithmetic on its config, and whether the device has it.

    R rows that pass at once (micro_rows · T)   D width   N query heads   K key/value heads   H head width
    F feed-forward width   V vocabulary

Of a layer and token there stays, from the forward pass to the backward pass, in bytes; c is the size of a
number of matrix products, s that of one of the residual stream, w that of a weight:

    paper, offload   s·D + c·((N + 2K)·H + N·H + D + 2·F) + 4·N + 8      layer.py: Kept
    block            s·D
    none             what autograd keeps of model/llama.py, every operation by itself; see `_autograd`

Two moments can hold the most: the loss, when everything is kept and no layer has its gradients yet, and the
end of the backward pass, when all gradients are there. Both are estimated, and what the C library keeps of
freed memory comes on top of what tensors take: the estimate is up to a fifth more than these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from puna.devices import free_memory
from puna.errors import ResourceError
from puna.model.config import ModelConfig
from puna.model.counts import parameters
from puna.progress import counted, quantity
from puna.train.loss import CHUNK_NUMBERS, SMALLEST_CHUNK
from puna.train.policies import Policy

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Run:
    """What decides about memory: the model's shape, how much of it passes at once, and the number types.

    `state` is what the optimizer keeps of a parameter, in bytes; `micro_batches` are those of an update.
    """

    config: ModelConfig
    micro_rows: int
    row_length: int
    policy: Policy
    compute: torch.dtype
    weights: torch.dtype = torch.float32
    state: int = 8
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """R."""
        return self.micro_rows * self.row_length

    @property
    def width_of_gradients(self) -> int:
        """Bytes of each of their numbers: those of several micro-batches are added up in float32 at least."""
        width = self.weights.itemsize
        return width if self.micro_batches == 1 else max(width, torch.float32.itemsize)


@dataclass(frozen=True)
class Footprint:
    """Bytes of what a run holds; `at_loss` and `at_end` leave out weights and optimizer.

    `least` is of what layers keep if nothing is kept but what no compiler would compute again.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    least: int
    at_loss: int
    at_end: int

    @property
    def held(self) -> int:
        """What is there however small the rows: weights, gradients, optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The most that is held at any moment."""
        return self.weights + self.optimizer + max(self.at_loss, self.at_end)

    @property
    def above(self) -> int:
        """The most that is held above weights, gradients and optimizer."""
        return self.total - self.held

    @property
    def unavoidable(self) -> int:
        """What no way of computing it saves: without what passes for a moment."""
        return self.weights + self.optimizer + max(self.gradients, self.least)


def footprint(run: Run) -> Footprint:
    """The memory of a run; what compiling and libraries take comes on top."""
    counts, layers = parameters(run.config), run.config.num_hidden_layers
    twice = run.config.tie_word_embeddings and run.policy == "none"
    gradients = counts.total * run.width_of_gradients
    words = run.config.vocab_size * run.config.hidden_size * run.width_of_gradients
    kept, least = (layers * run.tokens * each(run) for each in KEPT[run.policy])
    passing = run.tokens * _passing(run)
    casts = _casts(run) if run.policy == "none" else 0
    # autograd forms the gradients of a word's two uses one after the other, each whole; tied.py does not.
    # What an update frees stays with the process, in pieces that the next one cannot always use.
    return Footprint(
        weights=counts.total * run.weights.itemsize,
        gradients=gradients,
        optimizer=counts.total * run.state,
        kept=kept,
        least=least,
        at_loss=gradients + words + kept + casts + max(_loss(run), passing),
        at_end=gradients + max((2 if twice else 1) * words + run.tokens * 2 * _block(run), passing),
    )


def check_fits(run: Run, device: torch.device) -> None:
    """Refuse a run that cannot fit, before any work is done.

    Only what is clearly impossible is refused: the part that no way of computing it saves is more than what
    is free.

    Raises:
        ResourceError: what is needed, what is free, and what would fit.
    """
    needed, free = footprint(run), available_memory(device)
    if needed.unavoidable <= free:
        return
    raise ResourceError(
        f"training {counted(run.micro_rows, 'row')} of {run.row_length:,} tokens at once needs at least "
        f"{quantity(needed.unavoidable)}B ({quantity(needed.weights + needed.optimizer)}B of weights and "
        f"optimizer, {quantity(max(needed.gradients, needed.least))}B of gradients or what layers keep), and "
        f"{quantity(free)}B are free on {device}; {_advice(run, device, free)}"
    )


def _advice(run: Run, device: torch.device, free: int) -> str:
    """The largest micro-batch that would fit; or with what policy one row would."""
    if rows := _most_rows(run, free):
        return f"batch.micro_rows = {rows} would fit"
    others: Sequence[Policy] = ("block", "offload") if device.type == "cuda" else ("block",)
    for policy in others:
        if rows := _most_rows(replace(run, policy=policy), free):
            return f'memory.policy = "{policy}" with batch.micro_rows = {rows} would fit'
    if footprint(run).held < free:
        return "one row of that length is too much: lower data.row_length"
    return "no batch is small enough: take a smaller model"


def _most_rows(run: Run, free: int) -> int:
    """The largest number of rows at once that divides the present one and fits; 0 if none does."""
    whole = run.micro_rows * run.micro_batches
    fitting = (
        rows
        for rows in range(run.micro_rows, 0, -1)
        if whole % rows == 0
        and footprint(replace(run, micro_rows=rows, micro_batches=whole // rows)).total <= free
    )
    return next(fitting, 0)


# What layers keep


def _stream(run: Run) -> int:
    """s: in mixed runs the stream has the type of the weights, as the embedding gives it."""
    return run.weights.itemsize


def _paper(run: Run) -> int:
    c, heads = run.compute.itemsize, run.config
    D, F, H = heads.hidden_size, heads.intermediate_size, heads.head_dim
    N, K = heads.num_attention_heads, heads.num_key_value_heads
    return _stream(run) * D + c * (2 * (N + K) * H + D + 2 * F) + 4 * N + 8


def _block(run: Run) -> int:
    return _stream(run) * run.config.hidden_size


def _autograd(run: Run) -> int:
    """Autograd's: the stream twice and each norm's result before its gain; of what products take, a copy in
    their type for each of them; queries and keys before and after they are turned; the gate's parts.
    """
    c, s, config = run.compute.itemsize, _stream(run), run.config
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    casts = c if c != s else 0
    norms = 4 * s * D + 2 * (s if not casts else 0) * D + 8
    attention = casts * 3 * D + c * (2 * N + 2 * K) * H + 4 * N
    return norms + attention + casts * 2 * D + c * 4 * F


def _nothing(run: Run) -> int:
    return 0


KEPT: dict[Policy, tuple[Callable[[Run], int], Callable[[Run], int]]] = {
    "none": (_autograd, _paper),
    "paper": (_paper, _paper),
    "block": (_block, _block),
    "offload": (_nothing, _nothing),  # on the device
}
"""Bytes of a token that one layer keeps, and how few they may be."""


# What passes


def _passing(run: Run) -> int:
    """Bytes of a token that the backward pass of one layer holds at once, above what layers keep."""
    c, s, config = run.compute.itemsize, _stream(run), run.config
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * H
    again = _paper(run) - _block(run) if run.policy == "block" else 0
    again = _paper(run) if run.policy == "offload" else again
    return again + c * (3 * F + heads + 4 * D) + 3 * s * D


def _casts(run: Run) -> int:
    """Copies of all matrices in the type of products, which autocast keeps for the backward pass."""
    return 0 if run.compute == run.weights else parameters(run.config).total * run.compute.itemsize


def _loss(run: Run) -> int:
    """A chunk of logits, which their gradient replaces; hidden states and their gradient."""
    words, rows = run.config.vocab_size, run.tokens
    logits = min(max(CHUNK_NUMBERS, SMALLEST_CHUNK * words), rows * words) * run.compute.itemsize
    return logits + 3 * rows * _block(run)


# What there is


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take: what is free, or less where its control group has a limit."""
    free = free_memory(device)
    return free if device.type == "cuda" else min([free, *_left_in_groups()])


def _left_in_groups(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group (version 2) above this process leaves it, as far as the system tells."""
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return []
    path = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "/")
    place = root / path.lstrip("/")
    found = [_left(group) for group in (place, *place.parents) if group == root or root in group.parents]
    return [left for left in found if left is not None]


def _left(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files that nobody used lately are given up before memory ends.
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
