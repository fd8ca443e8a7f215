"""Which sequences are computed in the next step, how much of each, who gives way where memory is short."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from puna.engine.blocks import BlockPool, first_needed
from puna.errors import ResourceError

if TYPE_CHECKING:
    from puna.engine.sequence import Sequence

HEAD_START = 256  # steps; what one level of priority is worth
RANK = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a step: its positions start … start + count - 1.

    `samples` says whether the last of them is its newest token, so that the next one is chosen after it.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool


class Scheduler:
    """Chooses each step's rows by rank; keeps the sequences' blocks.

    A rank is the step of arrival, HEAD_START steps earlier for each level of priority, and never changes:
    whoever waits is overtaken only by those who come soon after, so nobody starves. Every running sequence
    that decodes has its row in every step; prompts share what rows are left, smallest rank first.

    Memory goes to the smallest rank too. Where it is short, the running sequence of the largest rank gives
    way: it waits, keeps its tokens and its rank, and finds its own blocks again where they still are. The
    smallest rank of all therefore advances at every step.
    """

    def __init__(self, pool: BlockPool, step_tokens: int, running: int, window: int | None = None) -> None:
        """At most `step_tokens` rows in a step and `running` sequences at once.

        `window` is how many positions a token sees, itself included; None: all.
        """
        self._pool, self._window = pool, window
        self._step_tokens, self._most = step_tokens, min(running, step_tokens)
        self._running: list[Sequence] = []  # both smallest rank first
        self._waiting: list[Sequence] = []
        self._steps = self._arrivals = self.preemptions = 0
        self._rows = 0  # of the step being planned, still to be given to prompts
        self._short: tuple[Sequence, int] | None = None  # who found too little memory, and how much

    @property
    def running(self) -> int:
        """How many sequences have blocks and take part in steps."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many sequences have yet to begin, or to resume."""
        return len(self._waiting)

    def check(self, sequence: Sequence) -> None:
        """Whether a sequence can be served at all.

        Raises:
            ResourceError: even alone it could outgrow the blocks there are.
        """
        size, count = self._pool.size, self._pool.count
        needed = self._most_at_once(sequence.longest, 1)
        if needed > count:
            raise ResourceError(
                f"the cache has room for {count * size} positions, and this sequence may need "
                f"{needed * size}, with a prompt of {len(sequence.prompt)} tokens and an answer of up to "
                f"{sequence.limit}; shorten either, or give the engine more cache_memory"
            )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence take part.

        Raises:
            ResourceError: as `check`.
        """
        self.check(sequence)
        self._arrivals += 1
        sequence.rank = (self._steps - sequence.params.priority * HEAD_START, self._arrivals)
        insort(self._waiting, sequence, key=RANK)

    def plan(self) -> list[Part]:
        """The next step; empty only where nothing waits or runs. What was not done is planned again."""
        self._steps += 1
        self._count_rows()
        decoding: list[Part] = []
        chunks: list[Part] = []
        running, waiting = self._running, self._waiting
        index, admitting = 0, True
        while True:
            if admitting and waiting and (index == len(running) or waiting[0].rank < running[index].rank):
                admitting = self._admit(index)
            if index == len(running):
                return decoding + chunks
            part = self._part(index)
            if part is None:
                admitting = False  # what it gave up is too little for whoever comes next
                continue
            if part.count:
                (decoding if part.count == 1 and part.samples else chunks).append(part)
            index += 1

    def done(self, parts: Iterable[Part]) -> None:
        """The parts were computed: what is full can be shared, what no later position sees is given back.

        Sequences that have finished since are left alone, and so are those that slid.
        """
        size, sharing = self._pool.size, self._pool.sharing
        for part in parts:
            sequence = part.sequence
            content = sequence.content
            if content is None or sequence.slid:
                continue
            sequence.computed += part.count
            if sharing and sequence.computed >= (content.depth + 1) * size:
                self._publish(sequence)
            if self._window is not None:
                self._give_back(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Let go of a sequence, running or waiting; its blocks go back. More than once does no harm."""
        for queue in (self._running, self._waiting):
            index = bisect_left(queue, sequence.rank, key=RANK)
            if index < len(queue) and queue[index] is sequence:
                del queue[index]
        self._release(sequence)

    def _count_rows(self) -> None:
        """Rows left for prompts. What slid begins anew first, in its old place."""
        for sequence in [sequence for sequence in self._running if sequence.slid]:
            self._running.remove(sequence)
            self._wait(sequence)
        self._rows = self._step_tokens - sum(map(_decodes, self._running))

    def _part(self, index: int) -> Part | None:
        """The share of a running sequence, empty where no rows are left; None: it had to give way itself."""
        sequence = self._running[index]
        start, length = sequence.computed, len(sequence.ids)
        decodes = length - start == 1
        count = 1 if decodes else min(length - start, self._rows)
        if start + count > len(sequence.blocks) * self._pool.size:
            count = self._extend(index, start + count) - start
            if count <= 0:
                self._preempt(index)
                return None
        if not decodes:
            self._rows -= count
        return Part(sequence, start, count, start + count == length)

    def _extend(self, index: int, end: int) -> int:
        """Take blocks for all positions before `end`, larger ranks giving way; as far as there are any."""
        pool, running = self._pool, self._running
        blocks = running[index].blocks
        while len(blocks) * pool.size < end:
            block = pool.take()
            if block is not None:
                blocks.append(block)
            elif index + 1 < len(running):
                self._preempt(len(running) - 1)
            else:
                break
        return min(end, len(blocks) * pool.size)

    def _admit(self, index: int) -> bool:
        """Let the first that waits run, at this place among the running, if it finds rows, room and memory.

        The smallest rank of all does: larger ones give way.
        """
        sequence, running = self._waiting[0], self._running
        full = len(running) == self._most
        if full and index == len(running):
            return False
        if not self._rows and not (full and _decodes(running[-1])):
            return False
        if index and not self._found_memory(sequence, index):
            return False
        if index == 0:
            self._begin(sequence)
        del self._waiting[0]
        if full:
            self._preempt(len(running) - 1)
        running.insert(index, sequence)
        self._rows -= _decodes(sequence)
        return True

    def _found_memory(self, sequence: Sequence, index: int) -> bool:
        """Begin a sequence if there will be memory until all its tokens are computed, the running considered.

        Otherwise it would take blocks only to give them up again. Those before it keep what they have yet to
        take, and a block for what each decodes meanwhile, unless it has all; those after it would give way.
        """
        free = self._pool.free
        if self._short is not None and self._short[0] is sequence and free <= self._short[1]:
            return False  # finding out costs a look at all its tokens
        self._begin(sequence)
        before, after = self._running[:index], self._running[index:]
        room = self._pool.free + sum(len(other.blocks) - other.behind for other in after)
        growing = sum(len(other.blocks) * self._pool.size < other.longest for other in before)
        if self._wants(sequence) + sum(map(self._wants, before)) + growing <= room:
            return True
        self._release(sequence)
        self._short = (sequence, free)
        return False

    def _wants(self, sequence: Sequence) -> int:
        """How many blocks it has yet to take until all its tokens are computed, less what it gives back."""
        held = len(sequence.blocks)
        whole = -(-len(sequence.ids) // self._pool.size)
        most = self._most_at_once(len(sequence.ids), self._step_tokens)
        return max(0, min(whole - held, most - held + sequence.behind))

    def _most_at_once(self, length: int, rows: int) -> int:
        """Blocks that a sequence of a length holds at most, if it is computed by so many rows at a time."""
        size = self._pool.size
        whole = -(-length // size)
        if self._window is None:
            return whole
        seen = self._window - 1 + rows
        return min(whole, (seen + size - 2) // size + 1)  # that many positions, wherever a block begins

    def _begin(self, sequence: Sequence) -> None:
        """Hold what is known of its beginning."""
        ids = sequence.ids if sequence.shares else ()
        sequence.blocks, sequence.content = self._pool.match(sequence.salt, ids, self._window)
        sequence.computed = len(sequence.blocks) * self._pool.size
        sequence.behind = sequence.blocks.count(None)

    def _preempt(self, index: int) -> None:
        """Let a running sequence wait."""
        sequence = self._running.pop(index)
        self._rows += _decodes(sequence)
        self.preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        self._release(sequence)
        insort(self._waiting, sequence, key=RANK)

    def _publish(self, sequence: Sequence) -> None:
        """Let others find its blocks that have become full."""
        size, content = self._pool.size, sequence.content
        assert content is not None
        for index in range(content.depth, sequence.computed // size):
            block = sequence.blocks[index]
            assert block is not None, "a block is published before it is given back"
            tokens = tuple(sequence.ids[index * size : (index + 1) * size])
            content = self._pool.publish(block, content, tokens)
            sequence.blocks[index] = content.block
        sequence.content = content

    def _give_back(self, sequence: Sequence) -> None:
        """Drop the blocks that are wholly behind the window."""
        first = first_needed(sequence.computed, self._window) // self._pool.size
        for index in range(sequence.behind, first):
            block = sequence.blocks[index]
            assert block is not None
            self._pool.drop(block)
            sequence.blocks[index] = None
        sequence.behind = max(sequence.behind, first)

    def _release(self, sequence: Sequence) -> None:
        """Drop all its blocks, the last one first: beginnings are worth more to others."""
        for block in reversed(sequence.blocks):
            if block is not None:
                self._pool.drop(block)
        if sequence.content is not None:
            self._pool.release(sequence.content)
        sequence.blocks, sequence.content = [], None
        sequence.computed = sequence.behind = 0
        sequence.slid = False


def _decodes(sequence: Sequence) -> bool:
    """Whether one row computes all that is left of it."""
    return len(sequence.ids) - sequence.computed == 1
