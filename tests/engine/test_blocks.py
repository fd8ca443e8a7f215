"""Blocks are never lost, held twice or shared wrongly: a naive model says what each must contain."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.engine.blocks import BlockPool, Content, first_needed

SIZE = 2
Known = tuple[
    int, int | None, tuple[int, ...]
]  # how often all was forgotten before; salt; all tokens up to here


@dataclass(eq=False)
class Client:
    """What a sequence does with a pool, and what it believes its blocks to hold."""

    generation: int
    salt: int | None
    ids: list[int]  # of its full blocks
    blocks: list[int | None]
    content: Content
    extra: int | None = None  # a block it has taken and not yet filled


class Truth:
    """Random operations on a pool, each compared with lists that are searched from end to end.

    `pick(n)` chooses a number below n.
    """

    def __init__(self, pool: BlockPool, pick: Callable[[int], int]) -> None:
        self.pool, self.pick = pool, pick
        self.clients: list[Client] = []
        self.generation = 0
        self.contents: dict[int, Known] = {}  # by block
        self.kept: list[int] = []  # blocks that nobody holds and that have content, dropped first first
        self.holders: Counter[int] = Counter()

    def operate(self) -> None:
        operations = [self.begin, self.begin, self.take, self.fill, self.fill, self.give_back, self.end]
        rare = self.pick(2000) == 0
        (self.forget if rare else operations[self.pick(len(operations))])()
        assert self.pool.used == len(+self.holders)
        assert self.pool.free == self.pool.count - len(+self.holders)

    def begin(self) -> None:
        salt = [None, 1][self.pick(2)]
        ids = [self.pick(2) for _ in range(1 + self.pick(6 * SIZE))]
        window = [None, 2, 3, 5][self.pick(4)]  # with 1 even what nobody knows would do
        expected = self.longest(salt, ids, window)
        blocks, content = self.pool.match(salt, ids, window)

        assert blocks == expected
        assert len(blocks) * SIZE < len(ids)
        assert content.depth == len(blocks)
        for block in blocks:
            if block is not None:
                self.hold(block)
        full = ids[: len(blocks) * SIZE]
        self.clients.append(Client(self.generation, salt, full, blocks, content))

    def longest(self, salt: int | None, ids: list[int], window: int | None) -> list[int | None]:
        """By definition: as many blocks as cover, unbroken, all that the next position and later ones see."""
        block_of = {known: block for block, known in self.contents.items()}
        for length in range((len(ids) - 1) // SIZE, -1, -1):
            first = first_needed(length * SIZE, window) // SIZE
            found = [
                block_of.get((self.generation, salt, tuple(ids[: (index + 1) * SIZE])))
                for index in range(first, length)
            ]
            if None not in found:
                return [None] * first + found
        raise AssertionError("no blocks at all always fit")

    def take(self) -> None:
        client = self.client(lambda client: client.extra is None)
        if client is None:
            return
        block = self.pool.take()
        if block is None:
            assert len(+self.holders) == self.pool.count
            return
        assert self.holders[block] == 0
        if block in self.contents:  # then none is left without content, and this was the first dropped
            assert len(+self.holders) + len(self.kept) == self.pool.count
            assert self.kept.pop(0) == block
            del self.contents[block]
        self.holders[block] += 1
        client.extra = block

    def fill(self) -> None:
        client = self.client(lambda client: client.extra is not None)
        if client is None:
            return
        block, client.extra = client.extra, None
        tokens = tuple(self.pick(2) for _ in range(SIZE))
        client.ids += tokens
        client.content = self.pool.publish(block, client.content, tokens)
        found = client.content.block
        known = (client.generation, client.salt, tuple(client.ids))
        same = [other for other, content in self.contents.items() if content == known]
        if same:
            assert [found] == same
            self.hold(found)
            self.drop(block)
        else:
            assert found == block
            self.contents[block] = known
        client.blocks.append(found)

    def give_back(self) -> None:
        client = self.client(lambda client: any(block is not None for block in client.blocks))
        if client is not None:
            first = next(index for index, block in enumerate(client.blocks) if block is not None)
            self.pool.drop(client.blocks[first])
            self.drop(client.blocks[first])
            client.blocks[first] = None

    def end(self) -> None:
        client = self.client(lambda client: True)
        if client is None:
            return
        self.clients.remove(client)
        for block in [client.extra, *reversed(client.blocks)]:
            if block is not None:
                self.pool.drop(block)
                self.drop(block)
        self.pool.release(client.content)

    def forget(self) -> None:
        self.pool.forget()
        self.generation += 1
        self.contents, self.kept = {}, []

    def hold(self, block: int) -> None:
        if self.holders[block] == 0:
            self.kept.remove(block)
        self.holders[block] += 1

    def drop(self, block: int) -> None:
        self.holders[block] -= 1
        assert self.holders[block] >= 0
        if self.holders[block] == 0 and block in self.contents:
            self.kept.append(block)

    def client(self, suits: Callable[[Client], bool]) -> Client | None:
        suitable = [client for client in self.clients if suits(client)]
        return suitable[self.pick(len(suitable))] if suitable else None

    def audit(self) -> None:
        """Every holder is a client's; what two clients hold is what both believe it to be."""
        held = Counter(client.extra for client in self.clients if client.extra is not None)
        for client in self.clients:
            for index, block in enumerate(client.blocks):
                if block is not None:
                    held[block] += 1
                    known = (client.generation, client.salt, tuple(client.ids[: (index + 1) * SIZE]))
                    assert self.contents.get(block) == known or client.generation < self.generation
        assert held == +self.holders
        assert len(set(self.contents.values())) == len(self.contents)

    def finish(self) -> None:
        """All let go: every block is there once, and nothing is remembered that no block holds."""
        while self.clients:
            self.end()
        assert (self.pool.used, self.pool.free) == (0, self.pool.count)
        assert sorted(self.pool.take() for _ in range(self.pool.count)) == list(range(self.pool.count))
        assert self.pool.take() is None
        for beginning in self.pool._beginnings.values():
            assert (beginning.uses, beginning.following) == (0, {})


@pytest.mark.parametrize("count", [1, 7, 24, 60])
def test_a_hundred_thousand_random_operations(count: int) -> None:
    truth = Truth(BlockPool(count, SIZE), random.Random(count).randrange)
    for operation in range(100_000):
        truth.operate()
        if len(truth.clients) > 12:
            truth.end()
        if operation % 100 == 0:
            truth.audit()
    truth.finish()


@given(st.data(), st.integers(1, 5))
def test_any_few_operations(data: st.DataObject, count: int) -> None:
    truth = Truth(BlockPool(count, SIZE), lambda n: data.draw(st.integers(0, n - 1)))
    for _ in range(data.draw(st.integers(0, 30))):
        truth.operate()
        truth.audit()
    truth.finish()


def filled(pool: BlockPool, ids: list[int], salt: int | None = None) -> tuple[list[int], Content]:
    """Blocks for ids, published."""
    blocks, content = pool.match(salt, ids)
    for start in range(len(blocks) * pool.size, len(ids) - pool.size + 1, pool.size):
        content = pool.publish(pool.take(), content, tuple(ids[start : start + pool.size]))
        blocks.append(content.block)
    return blocks, content


def drop(pool: BlockPool, blocks: list[int], content: Content) -> None:
    for block in reversed(blocks):
        pool.drop(block)
    pool.release(content)


def test_a_beginning_is_found_held_or_kept() -> None:
    pool = BlockPool(8, 4)
    blocks, content = filled(pool, [*range(12)])
    for keep in (True, False):
        again, last = pool.match(None, [*range(9), 99, 99, 99])
        assert again == blocks[:2]
        drop(pool, again, last)
        if keep:
            assert (pool.used, pool.free) == (3, 5)
            drop(pool, blocks, content)
    assert (pool.used, pool.free) == (0, 8)


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = BlockPool(8, 4)
    blocks, _ = filled(pool, [*range(12)])
    assert pool.match(None, [*range(12)])[0] == blocks[:2]
    assert pool.match(None, [*range(13)])[0] == blocks


def test_other_salts_and_other_beginnings_are_other_blocks() -> None:
    pool = BlockPool(8, 2)
    filled(pool, [1, 2, 3, 4], salt=7)
    assert pool.match(None, [1, 2, 3, 4, 5])[0] == []
    assert pool.match(8, [1, 2, 3, 4, 5])[0] == []
    assert pool.match(7, [3, 4, 1, 2, 5])[0] == []
    assert pool.match(7, [0, 0, 3, 4, 5])[0] == []
    assert len(pool.match(7, [1, 2, 3, 4, 5])[0]) == 2


def test_equal_hashes_are_not_equal_tokens() -> None:
    class Same(int):
        def __hash__(self) -> int:
            return 0

    pool = BlockPool(8, 2)
    filled(pool, [Same(1), Same(2), Same(3)])
    assert pool.match(None, [Same(2), Same(1), Same(3)])[0] == []
    assert len(pool.match(None, [Same(1), Same(2), Same(4)])[0]) == 1


def test_an_end_is_given_up_before_its_beginning_and_the_old_before_the_new() -> None:
    pool = BlockPool(6, 2)
    old, new = [*range(6)], [*range(10, 16)]
    drop(pool, *filled(pool, old))
    drop(pool, *filled(pool, new))
    found = []
    for _ in range(6):
        pool.take()
        found.append([])
        for ids in (old, new):
            blocks, content = pool.match(None, [*ids, 0])
            found[-1].append(len(blocks))
            drop(pool, blocks, content)
            # Looking makes it newer; the order stays, since both are looked at alike.
    assert found == [[2, 3], [1, 3], [0, 3], [0, 2], [0, 1], [0, 0]]


def test_what_was_used_again_is_kept_longer() -> None:
    pool = BlockPool(2, 2)
    drop(pool, *filled(pool, [1, 2]))
    drop(pool, *filled(pool, [3, 4]))
    drop(pool, *pool.match(None, [1, 2, 0]))
    pool.take()
    assert len(pool.match(None, [1, 2, 0])[0]) == 1
    assert pool.match(None, [3, 4, 0])[0] == []


def test_one_of_two_equal_blocks_is_enough() -> None:
    pool = BlockPool(4, 2)
    beginnings = [pool.match(None, [1, 2, 3])[1] for _ in range(2)]
    first, second = (
        pool.publish(block, content, (1, 2))
        for block, content in zip([pool.take(), pool.take()], beginnings, strict=True)
    )
    assert first is second
    assert (pool.used, pool.free) == (1, 3)
    for _ in range(2):
        pool.drop(first.block)
    assert pool.used == 0


def test_a_window_needs_only_what_later_positions_see() -> None:
    pool = BlockPool(4, 2)
    blocks, _ = filled(pool, [*range(8)])
    for block in [blocks[0], blocks[1]]:  # behind the window, and then given to others
        pool.drop(block)
    pool.take()
    pool.take()
    ids = [*range(8), 8]
    assert pool.match(None, ids)[0] == []
    assert pool.match(None, ids, 6)[0] == []
    assert pool.match(None, ids, 5)[0] == [None, None, *blocks[2:]]
    assert pool.match(None, ids, 1)[0] == [None] * 4


def test_what_is_forgotten_is_free_and_not_found() -> None:
    pool = BlockPool(6, 2)
    drop(pool, *filled(pool, [1, 2, 3, 4]))
    blocks, content = filled(pool, [5, 6])
    pool.forget()
    assert (pool.used, pool.free) == (1, 5)
    for ids in ([1, 2, 3, 4, 5], [5, 6, 7]):
        assert pool.match(None, ids)[0] == []
    # It goes on from keys of the old weights, so that nobody may go on from what follows either.
    content = pool.publish(pool.take(), content, (7, 8))
    assert pool.match(None, [5, 6, 7, 8, 9])[0] == []
    drop(pool, [*blocks, content.block], content)
    assert pool.used == 0


def test_a_block_cannot_be_dropped_more_often_than_held() -> None:
    pool = BlockPool(2, 2)
    block = pool.take()
    pool.drop(block)
    with pytest.raises(AssertionError, match="does not hold it"):
        pool.drop(block)
