from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data.order import permute, row_at

GOLDEN_10 = [1, 2, 4, 7, 3, 8, 0, 5, 9, 6, 3, 9, 1, 7, 2, 6, 8, 4, 5, 0]
GOLDEN_LARGE = [678953801865, 702502747640, 221283676597, 894205971071]


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 1000, 4096, 10_007])
def test_every_row_once_per_epoch(size):
    for epoch in (0, 1):
        visited = [row_at(epoch * size + index, size, seed=7) for index in range(size)]
        assert sorted(visited) == list(range(size))


@given(st.integers(1, 1 << 60), st.integers(0, 1 << 70), st.integers(0, 1000), st.data())
def test_images_of_large_sets_stay_inside_and_differ(size, seed, epoch, data):
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))
    images = {permute(index, size, seed, epoch) for index in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < size for image in images)


def test_golden_values():
    """Part of the format: another order would silently change what a resumed run sees."""
    assert [row_at(position, rows=10, seed=0) for position in range(20)] == GOLDEN_10
    assert [permute(index, 10**12, seed=2**40, epoch=3) for index in range(4)] == GOLDEN_LARGE


def test_epochs_and_seeds_have_unrelated_orders():
    size = 1000
    orders = [
        [permute(i, size, seed, epoch) for i in range(size)] for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    for number, first in enumerate(orders):
        for second in orders[number + 1 :]:
            same = sum(a == b for a, b in zip(first, second, strict=True))
            assert same < 10  # one in expectation


def test_all_orders_of_four_rows_are_about_equally_likely():
    counts = Counter(tuple(permute(i, 4, seed, 0) for i in range(4)) for seed in range(4800))
    assert len(counts) == 24
    assert chi_square(counts.values(), 200) < 49.7  # one in a thousand at 23 degrees of freedom


def test_every_place_of_every_row_is_about_equally_likely():
    size, seeds = 13, 2600
    for index in (0, 6, 12):
        counts = Counter(permute(index, size, seed, 5) for seed in range(seeds))
        assert chi_square((counts[row] for row in range(size)), seeds / size) < 32.9  # 12 degrees


def test_neighbours_do_not_stay_neighbours():
    size = 5000
    order = [permute(index, size, 3, 0) for index in range(size)]
    steps = [b - a for a, b in itertools.pairwise(order)]
    assert sum(step in (1, -1) for step in steps) < 12  # two in expectation
    assert Counter(steps).most_common(1)[0][1] < 12
    mean = sum(index * row for index, row in enumerate(order)) / size - ((size - 1) / 2) ** 2
    assert abs(mean / (size**2 / 12)) < 4 / math.sqrt(size)  # correlation of place and row


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)
