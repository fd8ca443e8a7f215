"""Keys and values in blocks of 64 positions, taken by any sequence, shared, and attended to where they lie.

B batch   T positions in the input   M rows of a step   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from puna.errors import ResourceError
from puna.kernels.native import attention_on
from puna.kernels.pages import BLOCK, Pages, Step, page_shapes, rounded_width
from puna.model.config import ModelConfig


class PagedCache:
    """Memory for a fixed number of blocks per layer; a step's rows say by their tables which are theirs.

    Who holds which block is not known here: see `puna.engine.blocks`. On a CPU only what has been written to
    takes memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        quantized: bool = False,
    ) -> None:
        """Room for `blocks` · 64 positions; `quantized` holds int8, with a scale per position and head.

        Raises:
            ResourceError: there is too little memory.
        """
        self.rope_lengths: Tensor | None = None
        self.bytes = blocks * BLOCK * bytes_per_position(config, dtype, quantized)
        self.dtype, self._window, self._device = dtype, config.sliding_window, device
        self._step: Step | None = None
        try:
            self.pages = [
                _pages(config, blocks, torch.int8 if quantized else dtype, device)
                for _ in range(config.num_hidden_layers)
            ]
        except (OSError, ValueError, OverflowError, RuntimeError):
            raise ResourceError(
                f"keys and values of {blocks * BLOCK} positions need {self.bytes / 2**30:.1f} GiB, which "
                "could not be had; lower cache_memory, or set cache_dtype to int8"
            ) from None
        kernel = attention_on(device)
        self.fault = kernel.fault
        """Why attention is plain torch on a CPU, in one line; "" where it is not."""
        self._attend = [kernel.bind(pages, dtype) for pages in self.pages]

    def begin(
        self,
        tables: list[list[int | None]],
        starts: list[int],
        counts: list[int],
        rows: int,
        lengths: list[int] | None = None,
    ) -> None:
        """Say whose the rows of the next pass through the model are.

        Sequence i's are the next counts[i] of M = `rows`, at positions starts[i] and on; rows beyond are
        padding. tables[i][j] is the block of its positions from 64 · j; None where its window has passed.
        `lengths` are those by which dynamic NTK turns each sequence: `puna.model.attention.Cache`.
        """
        self._step = Step(
            [
                [-1 if block is None else block for block in table[: -(-(start + count) // BLOCK)]]
                for table, start, count in zip(tables, starts, counts, strict=True)
            ],
            starts,
            counts,
            rows,
            self._window,
        )
        self.rope_lengths = None if lengths is None else self._per_row(lengths, counts, rows)

    @property
    def step(self) -> Step:
        """Whose the rows of this pass are, as `begin` was told."""
        assert self._step is not None
        return self._step

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Store k and v (1, M, K, H), then let q (1, M, N, H) see the keys up to its own, within the window.

        The positions are those that `begin` was told. Rows that are padding store nothing and give zeros.
        """
        return self._attend[layer](self.step, q, k, v)

    def _per_row(self, lengths: Items[int], counts: Items[int], rows: int) -> Tensor:
        flat = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
        return torch.tensor([flat + [1] * (rows - len(flat))], device=self._device)  # (1, M)


def bytes_per_position(config: ModelConfig, dtype: torch.dtype, quantized: bool = False) -> int:
    """What one position takes in all layers, keys and values and their scales."""
    width = config.head_dim + rounded_width(config.head_dim)
    per_head = width + 2 * torch.float32.itemsize if quantized else width * dtype.itemsize
    return config.num_hidden_layers * config.num_key_value_heads * per_head


def _pages(config: ModelConfig, blocks: int, dtype: torch.dtype, device: torch.device) -> Pages:
    K, H = config.num_key_value_heads, config.head_dim
    keys, values = (_zeros(shape, dtype, device) for shape in page_shapes(blocks, K, H, dtype))
    if dtype != torch.int8:
        return Pages(keys, values)
    key_scales, value_scales = (_zeros((blocks, K, BLOCK), torch.float32, device) for _ in range(2))
    return Pages(keys, values, key_scales, value_scales)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU pages of the system's, which take memory when they are first written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared ones take longer to get
    return torch.frombuffer(memory, dtype=dtype).view(shape)
