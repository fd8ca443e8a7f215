from __future__ import annotations

import threading
from itertools import islice

import pytest
import torch

from puna.data.loader import Loader
from puna.data.prefetch import prefetch
from puna.errors import DataError, SettingsError

LENGTHS = [30, 7, 80, 2, 55, 12, 9, 100, 41]  # 336 tokens: 42 rows of 8


@pytest.fixture
def tokens(token_set):
    return token_set(LENGTHS, shard_tokens=64)


def rows_of(steps):
    """Every row of some steps as plain lists, in order, whatever the micro-batches."""
    fields = ("tokens", "targets", "loss_mask", "positions", "documents")
    return [
        tuple(tuple(getattr(batch, name)[row].tolist()) for name in fields)
        for step in steps
        for batch in step.batches
        for row in range(len(batch.rows))
    ]


def steps(tokens, count, position=0, *, micro=8, rank=0, world=1, seed=5):
    loader = Loader(tokens, 8, 8, micro, seed=seed, rank=rank, world=world)
    return list(islice(loader.steps(position), count))


def test_every_target_once_per_epoch_and_epochs_cross_within_a_step(tokens):
    every = 8 * 21  # rows: four epochs of 42
    rows = rows_of(steps(tokens, every // 8))
    for epoch in range(4):
        seen = sorted(
            target
            for row in rows[42 * epoch : 42 * epoch + 42]
            for target, counts in zip(row[1], row[2], strict=True)
            if counts
        )
        assert seen == list(range(10, 10 + sum(LENGTHS) - len(LENGTHS)))
    assert len(set(rows[:42])) == 42
    assert rows[:42] != rows[42:84]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_split_the_same_rows(tokens, micro):
    assert rows_of(steps(tokens, 12, micro=micro)) == rows_of(steps(tokens, 12))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_divide_the_same_rows(tokens, world):
    whole = steps(tokens, 12)
    parts = [steps(tokens, 12, micro=1, rank=rank, world=world) for rank in range(world)]
    for number, step in enumerate(whole):
        together = [row for part in parts for row in rows_of([part[number]])]
        assert together == rows_of([step])
        assert {part[number].position for part in parts} == {step.position} == {8 * (number + 1)}
        assert {batch.position for part in parts for batch in part[number].batches} == {step.position}
        assert sum(part[number].targets_total for part in parts) == step.targets_total


def test_resuming_anywhere_gives_the_rest(tokens):
    whole = steps(tokens, 20)
    for done in (1, 5, 6, 13):  # rows 42 apart: 5 and 6 stand on either side of the first epoch's end
        position = whole[done - 1].position
        assert rows_of(steps(tokens, 20 - done, position)) == rows_of(whole[done:])


def test_the_seed_decides_the_order(tokens):
    assert rows_of(steps(tokens, 5, seed=5)) != rows_of(steps(tokens, 5, seed=6))


def test_crossing_documents_changes_only_positions_and_ids(tokens):
    apart = next(Loader(tokens, 8, 4, 4, seed=1).steps()).batches[0]
    across = next(Loader(tokens, 8, 4, 4, seed=1, cross_documents=True).steps()).batches[0]
    assert across.documents is None
    assert across.positions.tolist() == [list(range(8))] * 4
    for name in ("tokens", "targets", "loss_mask"):
        assert torch.equal(getattr(apart, name), getattr(across, name))


def test_describe_names_the_documents_of_all_ranks(tokens):
    owners = [f"doc{number}" for number, length in enumerate(LENGTHS) for _ in range(length)]
    loader = Loader(tokens, 8, 4, 2, seed=1, rank=1, world=2)
    step = next(loader.steps(8))
    expected = []
    for position in range(8, 12):
        row = loader.row_at(position)
        expected += owners[8 * row : 8 * row + 8]
    assert loader.describe(step) == list(dict.fromkeys(expected))


def test_uneven_divisions_are_refused_with_a_way_out(tokens):
    with pytest.raises(SettingsError, match="multiple of 3 rows, or micro-batches of 2"):
        Loader(tokens, 8, 8, 3, seed=0)
    with pytest.raises(SettingsError, match="multiple of 3 rows, or micro-batches of any size once"):
        Loader(tokens, 8, 8, 1, seed=0, world=3)
    with pytest.raises(SettingsError, match="must be at least 1, got 8, 0 and 1"):
        Loader(tokens, 8, 8, 0, seed=0)


def test_too_few_tokens_for_a_step_are_refused_with_numbers(tokens):
    with pytest.raises(DataError, match="336 tokens make 42 rows of 8, and a step takes 64"):
        Loader(tokens, 8, 64, 64, seed=0)


def test_prefetching_keeps_order_and_ends():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))


def test_prefetching_passes_errors_on_in_their_place():
    def failing():
        yield 1
        raise DataError("broken")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(DataError, match="broken"):
        next(items)


def test_prefetching_is_bounded_and_stops_when_dropped():
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    items = prefetch(endless(), depth=2)
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before
    assert len(made) <= 4  # one taken, two waiting, one in hand


def test_the_next_items_are_made_while_one_is_used():
    """So that a step that takes longer than the making never waits: nobody asks before they are there."""
    two_more = threading.Event()

    def slow():
        for number in range(9):
            if number == 3:
                two_more.set()
            yield number

    items = prefetch(slow(), depth=2)
    assert next(items) == 0
    assert two_more.wait(timeout=30)
    assert [next(items), next(items)] == [1, 2]
    items.close()
