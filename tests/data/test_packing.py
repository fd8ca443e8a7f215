from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.data.loader import evaluation_batches
from puna.data.packing import count_rows, pack_row
from puna.errors import DataError, SettingsError


def test_a_row_by_hand(token_set):
    tokens = token_set([3, 2, 6])  # 1 10 11 | 1 12 | 1 13 14 15 16 17
    row = pack_row(tokens, 0, 7)
    assert row.tokens.tolist() == [1, 10, 11, 1, 12, 1, 13]
    assert row.targets.tolist() == [10, 11, 1, 12, 1, 13, 14]
    assert row.loss_mask.tolist() == [True, True, False, True, False, True, True]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert row.documents.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_document_goes_on_in_the_next_row_and_the_last_row_is_padded(token_set):
    tokens = token_set([3, 2, 6])
    row = pack_row(tokens, 7, 7)
    assert row.tokens.tolist() == [14, 15, 16, 0, 0, 0, 0]
    assert row.targets.tolist() == [15, 16, 17, 0, 0, 0, 0]
    assert row.loss_mask.tolist() == [True] * 3 + [False] * 4
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert row.documents.tolist() == [0, 0, 0, 1, 1, 1, 1]


def expected_targets(lengths):
    """Every token with a predecessor in its document, as (predecessor, token) pairs; numbers never repeat."""
    pairs, value = [], 10
    for length in lengths:
        ids = [1, *range(value, value + length - 1)]
        pairs += itertools.pairwise(ids)
        value += length - 1
    return pairs


def trained(batches):
    """(input, target) of every counted target, in order."""
    for batch in batches:
        mask = batch.loss_mask
        yield from zip(batch.tokens[mask].tolist(), batch.targets[mask].tolist(), strict=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12),
    row_length=st.integers(1, 12),
    rows=st.integers(1, 4),
    overlap=st.integers(0, 11),
)
def test_every_target_exactly_once_in_order(token_set, lengths, row_length, rows, overlap):
    overlap = min(overlap, row_length - 1)
    if sum(lengths) < 2:
        return
    tokens = token_set(lengths)
    batches = list(evaluation_batches(tokens, row_length, rows, overlap))
    assert list(trained(batches)) == expected_targets(lengths)
    assert all(batch.tokens.shape == (rows, row_length) for batch in batches)
    assert sum(len(batch.rows) for batch in batches) == count_rows(tokens.tokens_total, row_length, overlap)
    assert batches[-1].loss_mask[: len(batches[-1].rows)].any() or 1 in lengths


def test_scored_tokens_have_the_context_asked_for(token_set):
    lengths, overlap = [40, 3, 17, 30], 5
    tokens = token_set(lengths)
    context = {}
    for batch in evaluation_batches(tokens, 8, 2, overlap):
        for target, position in zip(
            batch.targets[batch.loss_mask].tolist(), batch.positions[batch.loss_mask].tolist(), strict=True
        ):
            context[target] = position + 1
    value = 10
    for length in lengths:
        for before in range(1, length):
            assert context[value] >= min(before, overlap + 1)
            value += 1


@pytest.mark.parametrize("cross", [False, True])
def test_what_is_scored_can_see_what_it_should(token_set, cross):
    tokens = token_set([4, 6, 9])
    for batch in evaluation_batches(tokens, 6, 2, cross_documents=cross):
        if cross:
            assert batch.documents is None
            assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
            continue
        for ids, documents, positions in zip(batch.tokens, batch.documents, batch.positions, strict=True):
            for index in range(1, 6):
                begins = int(ids[index]) == 1 or (int(ids[index]) == 0 and int(ids[index - 1]) != 0)
                assert bool(documents[index] != documents[index - 1]) == begins
                assert int(positions[index]) == (0 if begins else int(positions[index - 1]) + 1)


def test_overlap_that_fills_the_row_is_refused(token_set):
    with pytest.raises(SettingsError, match="overlap must be from 0 to row_length - 1 = 7, got 8"):
        evaluation_batches(token_set([40]), 8, 2, overlap=8)


def test_a_single_token_cannot_be_scored(token_set):
    with pytest.raises(DataError, match="1 tokens are too few to score"):
        evaluation_batches(token_set([1]), 8, 2)


def test_bytes_of_a_sample_go_with_its_targets(token_set):
    tokens = token_set([10, 20, 30, 40])
    sample = tokens.sample(50)
    every = expected_targets([10, 20, 30, 40])
    assert list(trained(evaluation_batches(sample, 8, 3))) == every[:9] + every[28:57]
    assert sample.bytes_total == 120


def test_batches_move_whole(token_set):
    batch = next(evaluation_batches(token_set([40]), 8, 2))
    moved = batch.to(torch.device("meta"))
    tensors = (moved.tokens, moved.targets, moved.loss_mask, moved.positions, moved.documents)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.rows, moved.position) == (batch.rows, batch.position)
