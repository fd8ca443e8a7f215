"""With a cache the logits are those of one pass over the whole sequence, whatever the rows beside it."""

from __future__ import annotations

import pytest
import torch

from puna.engine.cache import ContiguousCache
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from tests.model.shapes import CONFIGS, ids_of, model_of

LENGTH = 40  # two and a half times the configs' context
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def cache_of(model: Llama, lengths: list[int]) -> ContiguousCache:
    by_length = model.model.rope.scaling.by_length
    return ContiguousCache(
        model.config.num_hidden_layers,
        max(lengths),
        torch.tensor(lengths) if by_length else None,
        model.config.sliding_window,
    )


def in_chunks(
    model: Llama, ids: torch.Tensor, cache: ContiguousCache, chunks: list[int], start: int = 0
) -> torch.Tensor:
    """Logits (B, T, V) of ids (B, T) fed piece by piece."""
    outputs = []
    for chunk in chunks:
        positions = torch.arange(start, start + chunk).expand(len(ids), -1)
        outputs.append(model(ids[:, start : start + chunk], positions, cache=cache))
        start += chunk
    return torch.cat(outputs, dim=1)


def gap(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token_equals_the_whole(name: str, dtype: torch.dtype) -> None:
    model = model_of(CONFIGS[name], dtype)
    ids = ids_of(CONFIGS[name], 2, LENGTH)

    logits = in_chunks(model, ids, cache_of(model, [LENGTH] * 2), [9] + [1] * (LENGTH - 9))

    assert gap(logits, model(ids)) < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [1, 7, 3, 20, 9], [39, 1]])
@pytest.mark.parametrize("name", ["all at once", "sliding window"])
def test_any_chunks_equal_the_whole(name: str, chunks: list[int]) -> None:
    model = model_of(CONFIGS[name], torch.float64)
    ids = ids_of(model.config, 3, LENGTH)
    assert gap(in_chunks(model, ids, cache_of(model, [LENGTH] * 3), chunks), model(ids)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", ["grouped", "sliding window", "dynamic", "all at once"])
def test_rows_of_different_length_are_each_as_if_alone(name: str) -> None:
    model = model_of(CONFIGS[name], torch.float64)
    ids = ids_of(CONFIGS[name], 3, LENGTH)
    prompts, steps = [3, 20, 11], 12
    # The first row stays within the context of 16, the others pass it: each has its own dynamic base.
    lengths = [prompt + steps for prompt in prompts]
    cache = cache_of(model, lengths)
    padded = torch.zeros(3, max(prompts), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, :prompt] = ids[row, :prompt]

    hidden = model.model(padded, torch.arange(max(prompts)).expand(3, -1), cache=cache)
    found = [[model.lm_head(hidden[row, prompt - 1])] for row, prompt in enumerate(prompts)]
    for step in range(steps):
        positions = torch.tensor([[prompt + step] for prompt in prompts])
        logits = model(ids.gather(1, positions), positions, cache=cache)
        for row in range(3):
            found[row].append(logits[row, 0])

    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        alone = model(ids[row : row + 1, :length])[0, prompt - 1 :]
        assert gap(torch.stack(found[row]), alone) < 1e-10


@torch.no_grad()
def test_rows_may_leave_and_change_places() -> None:
    model = model_of(CONFIGS["dynamic"], torch.float64)
    ids = ids_of(model.config, 3, LENGTH)
    cache = cache_of(model, [LENGTH, 12, 30])
    in_chunks(model, ids, cache, [10, 1])
    cache.keep([2, 0])

    logits = in_chunks(model, ids[[2, 0]], cache, [1] * 19, start=11)

    assert gap(logits[0], model(ids[2:3, :30])[0, 11:30]) < 1e-10
    # The other row's base was fixed for all of LENGTH at its start.
    fixed = in_chunks(model, ids[:1], cache_of(model, [LENGTH]), [30])
    assert gap(logits[1], fixed[0, 11:]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 9, LENGTH - 1, LENGTH, 2 * LENGTH])
def test_any_window_equals_the_whole(window: int) -> None:
    config = CONFIGS["sliding window"].model_copy(update={"sliding_window": window})
    model = model_of(config, torch.float64)
    ids = ids_of(config, 2, LENGTH)
    logits = in_chunks(model, ids, cache_of(model, [LENGTH] * 2), [11, 1, 1, 7, *[1] * (LENGTH - 20)])
    assert gap(logits, model(ids)) < 1e-10


@torch.no_grad()
def test_a_window_not_yet_full_changes_no_bit() -> None:
    plain = model_of(CONFIGS["grouped"])
    windowed = model_of(plain.config.model_copy(update={"sliding_window": LENGTH}))
    ids = ids_of(plain.config, 2, LENGTH)
    found = [
        in_chunks(model, ids, cache_of(model, [LENGTH] * 2), [5, 20, *[1] * (LENGTH - 25)])
        for model in (plain, windowed)
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_memory_grows_with_the_rows_and_no_further() -> None:
    config = ModelConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    model = model_of(config, torch.float64)
    ids = ids_of(config, 1, 200)
    cache = cache_of(model, [200])
    sizes = set()
    outputs = []
    for position in range(200):
        outputs.append(in_chunks(model, ids, cache, [1], start=position))
        sizes.add(cache._keys[0].shape[1])

    assert gap(torch.cat(outputs, dim=1), model(ids)) < 1e-10
    assert sizes == {64, 128, 200}
