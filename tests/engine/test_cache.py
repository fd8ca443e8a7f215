"""With a cache the logits are those of one pass over the whole sequence, whatever the rows beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puna.engine.cache import PagedCache, bytes_per_position
from puna.engine.rows import RowClasses
from puna.errors import ResourceError
from puna.kernels.pages import BLOCK
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from tests.model.shapes import CONFIGS, ids_of, model_of

LENGTH = 40  # two and a half times the configs' context
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CPU = torch.device("cpu")


class Served:
    """Sequences that go through one model as flat steps, each at its own place; blocks in falling order."""

    def __init__(
        self, model: Llama, ids: list[Tensor], classes: RowClasses | None = None, quantized: bool = False
    ) -> None:
        dtype, blocks = model.lm_head.weight.dtype, [-(-len(row) // BLOCK) for row in ids]
        self.model, self.ids, self.classes = model, ids, classes
        self.cache = PagedCache(model.config, sum(blocks), dtype, CPU, quantized)
        order = iter(range(sum(blocks) - 1, -1, -1))
        self.tables: list[list[int | None]] = [[next(order) for _ in range(count)] for count in blocks]
        self.done = [0] * len(ids)
        self.logits: list[list[Tensor]] = [[] for _ in ids]

    def step(self, counts: list[int]) -> None:
        """The next counts[i] tokens of sequence i."""
        those = [number for number, count in enumerate(counts) if count]
        starts, sizes = [self.done[n] for n in those], [counts[n] for n in those]
        rows = sum(sizes) if self.classes is None else self.classes.padded(sum(sizes))
        by_length = self.model.model.rope.scaling.by_length
        lengths = [len(self.ids[n]) for n in those] if by_length else None
        self.cache.begin([self.tables[n] for n in those], starts, sizes, rows, lengths)
        shares = zip(those, starts, sizes, strict=True)
        spans = [(n, slice(start, start + size)) for n, start, size in shares]
        ids = torch.cat([self.ids[n][span] for n, span in spans])
        positions = torch.cat([torch.arange(span.start, span.stop) for _, span in spans])
        padded = [torch.nn.functional.pad(x, (0, rows - len(x)))[None] for x in (ids, positions)]
        hidden = self.model.model(*padded, cache=self.cache)[0, : len(ids)]
        logits = self.model.lm_head(hidden) if self.classes is None else self.classes.head(hidden)
        for (n, span), found in zip(spans, logits.split(sizes), strict=True):
            self.logits[n].append(found)
            self.done[n] = span.stop

    def in_chunks(self, chunks: list[int]) -> Tensor:
        """All sequences side by side in the same chunks: (B, T, V)."""
        for chunk in chunks:
            self.step([chunk] * len(self.ids))
        return torch.stack([torch.cat(rows) for rows in self.logits])


def gap(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_equals_the_whole(name: str, dtype: torch.dtype) -> None:
    model, ids = model_of(CONFIGS[name], dtype), ids_of(CONFIGS[name], 2, LENGTH)
    logits = Served(model, list(ids)).in_chunks([9] + [1] * (LENGTH - 9))
    assert gap(logits, model(ids)) < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [1, 7, 3, 20, 9], [39, 1]])
@pytest.mark.parametrize("name", ["all at once", "sliding window"])
def test_any_chunks_equal_the_whole(name: str, chunks: list[int]) -> None:
    model = model_of(CONFIGS[name], torch.float64)
    ids = ids_of(model.config, 3, LENGTH)
    assert gap(Served(model, list(ids)).in_chunks(chunks), model(ids)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", ["grouped", "sliding window", "dynamic", "all at once"])
def test_rows_of_different_length_are_each_as_if_alone(name: str) -> None:
    """The first stays within the context of 16, the others pass it: each has its own dynamic base."""
    model = model_of(CONFIGS[name], torch.float64)
    ids = [row[:length] for row, length in zip(ids_of(CONFIGS[name], 3, 150), (15, 150, 23), strict=True)]
    served = Served(model, ids)
    served.step([3, 130, 0])
    served.step([1, 1, 11])
    for _ in range(12):
        served.step([int(done < len(row)) for done, row in zip(served.done, ids, strict=True)])
    served.step([len(row) - done for row, done in zip(ids, served.done, strict=True)])
    for row, logits in zip(ids, served.logits, strict=True):
        assert gap(torch.cat(logits), model(row[None])[0]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 9, LENGTH - 1, LENGTH, 2 * LENGTH])
def test_any_window_equals_the_whole(window: int) -> None:
    config = CONFIGS["sliding window"].model_copy(update={"sliding_window": window})
    model, ids = model_of(config, torch.float64), ids_of(config, 2, LENGTH)
    logits = Served(model, list(ids)).in_chunks([11, 1, 1, 7, *[1] * (LENGTH - 20)])
    assert gap(logits, model(ids)) < 1e-10


@torch.no_grad()
def test_blocks_behind_the_window_are_not_needed() -> None:
    config = CONFIGS["sliding window"]
    model, ids = model_of(config, torch.float64), ids_of(config, 1, 150)
    served = Served(model, list(ids))
    served.step([70])
    served.tables[0][0] = None  # position 70 sees 65..70
    served.step([75])
    served.tables[0][1] = None
    served.step([5])
    assert gap(torch.cat(served.logits[0]), model(ids)[0]) < 1e-10


@torch.no_grad()
def test_a_window_not_yet_full_changes_no_bit() -> None:
    plain = model_of(CONFIGS["grouped"])
    windowed = model_of(plain.config.model_copy(update={"sliding_window": LENGTH}))
    ids = list(ids_of(plain.config, 2, LENGTH))
    chunks = [5, 20, *[1] * (LENGTH - 25)]
    assert torch.equal(*(Served(model, ids).in_chunks(chunks) for model in (plain, windowed)))


@torch.no_grad()
def test_a_block_that_two_begin_with_is_held_once() -> None:
    model, ids = model_of(CONFIGS["grouped"], torch.float64), ids_of(CONFIGS["grouped"], 2, 100)
    ids[1, :BLOCK] = ids[0, :BLOCK]
    served = Served(model, list(ids))
    served.step([100, 0])
    served.tables[1][0], served.done[1] = served.tables[0][0], BLOCK
    served.step([0, 36])
    assert gap(torch.cat(served.logits[1]), model(ids[1:])[0, BLOCK:]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["grouped", "sliding window", "dynamic", "multi-query", "all at once"])
def test_bits_are_equal_in_any_chunks_and_company(name: str, dtype: torch.dtype) -> None:
    model, rows = model_of(CONFIGS[name], dtype), ids_of(CONFIGS[name], 3, 80)
    ids = [rows[0], rows[1, :33], rows[2, :50]]
    classes = RowClasses(model, 64)
    together = Served(model, ids, classes)
    together.step([10, 20, 0])
    together.step([1, 1, 40])
    together.step([57, 1, 1])
    together.step([1, 1, 1])
    together.step([11, 10, 8])
    for number, row in enumerate(ids):
        for chunks in ([len(row) - 30, 30], [1] * len(row), [7] * (len(row) // 7) + [len(row) % 7]):
            alone = Served(model, [row], classes).in_chunks([chunk for chunk in chunks if chunk])
            assert torch.equal(alone[0], torch.cat(together.logits[number]))


@torch.no_grad()
def test_an_int8_cache_changes_little() -> None:
    config = CONFIGS["grouped"].model_copy(update={"hidden_size": 128, "head_dim": 32})
    model, ids = model_of(config), ids_of(config, 2, LENGTH)
    logits = Served(model, list(ids), quantized=True).in_chunks([9] + [1] * (LENGTH - 9))
    assert 0 < gap(logits, model(ids)) < 0.05


def test_a_position_takes_what_is_told() -> None:
    config = ModelConfig(
        vocab_size=8, hidden_size=100, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    cache = PagedCache(config, 5, torch.bfloat16, CPU)  # H = 50, held in 64
    assert bytes_per_position(config, torch.bfloat16) == 3 * 2 * (50 + 64) * 2
    assert bytes_per_position(config, torch.bfloat16, True) == 3 * 2 * (50 + 64 + 8)
    assert cache.bytes == 5 * 64 * 3 * 2 * (50 + 64) * 2
    assert cache.bytes == sum(x.nbytes for page in cache.pages for x in (page.keys, page.values))


def test_memory_is_taken_when_it_is_used() -> None:
    """The blocks of this cache would not fit into the machine ten times over, and nobody has used one."""
    config = CONFIGS["grouped"]
    per_block = BLOCK * bytes_per_position(config, torch.float32)
    assert PagedCache(config, 2**32 // per_block, torch.float32, CPU).bytes > 2**31


def test_too_little_memory_is_one_line_of_advice() -> None:
    with pytest.raises(ResourceError, match=r"need [\d.]+ GiB, which could not be had; lower cache_memory"):
        PagedCache(CONFIGS["grouped"], 2**40, torch.float32, CPU)
