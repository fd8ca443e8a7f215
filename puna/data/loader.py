"""Rows of a token set as training steps, for any number of ranks, from any position; and in order, to score.

One number says where training stands: the global sample position, how many rows all ranks together have
consumed since the beginning. The row at a position is a pure function of (seed, position), so a run may stop
and go on, change its micro-batches or its number of ranks, and still sees the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from puna.data.batches import Batch
from puna.data.order import row_at
from puna.data.packing import count_rows, pack_row, stack
from puna.data.prefetch import prefetch
from puna.data.shards import TokenSet
from puna.errors import DataError, SettingsError
from puna.progress import counted


@dataclass(frozen=True)
class Step:
    """What one update learns from, on one rank; `position` is the global sample position after it."""

    batches: list[Batch]
    position: int

    @property
    def targets_total(self) -> int:
        """Trained tokens of this rank, over all micro-batches."""
        return sum(batch.targets_total for batch in self.batches)


class Loader:
    """Shuffled rows for training.

    Args:
        tokens: what to learn from.
        row_length: T, inputs in a row.
        rows_per_step: rows that one update learns from, over all ranks.
        micro_rows: rows that pass through the model at once, on one rank.
        seed: of the order; every epoch has another.
        rank, world: which of how many processes this is; ranks take neighbouring parts of each step's rows.
        cross_documents: whether attention and positions run on from one document to the next; see packing.py.

    Raises:
        SettingsError: the rows of a step cannot be divided evenly.
        DataError: there are too few tokens for one step.
    """

    def __init__(
        self,
        tokens: TokenSet,
        row_length: int,
        rows_per_step: int,
        micro_rows: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        cross_documents: bool = False,
    ) -> None:
        check_division(rows_per_step, micro_rows, world)
        assert 0 <= rank < world
        self.tokens = tokens
        self.row_length = row_length
        self.rows_per_step = rows_per_step
        self.micro_rows = micro_rows
        self.seed = seed
        self.rank = rank
        self.world = world
        self.cross_documents = cross_documents
        self.rows = count_rows(tokens.tokens_total, row_length)
        if self.rows < rows_per_step:
            raise DataError(
                f"{tokens.directory}: too few tokens for one step: {tokens.tokens_total:,} tokens make "
                f"{counted(self.rows, 'row')} of {row_length:,}, and a step takes {rows_per_step:,}; "
                "add text, or lower the rows of a step or their length"
            )

    def steps(self, position: int = 0) -> Iterator[Step]:
        """Steps without end, from a global sample position on; the next ones are made ahead in a thread."""
        return prefetch(self._steps(position))

    def describe(self, step: Step) -> list[str]:
        """Where the documents of a step came from, on all ranks, each once, in the order of the rows."""
        first = step.position - self.rows_per_step
        sources: dict[str, None] = {}
        for position in range(first, step.position):
            sources.update(dict.fromkeys(self._sources(self.row_at(position))))
        return list(sources)

    def row_at(self, position: int) -> int:
        """The row of the token set that a global sample position visits."""
        return row_at(position, self.rows, self.seed)

    def _steps(self, position: int) -> Iterator[Step]:
        while True:
            yield self._step(position)
            position += self.rows_per_step

    def _step(self, position: int) -> Step:
        share = self.rows_per_step // self.world
        first = position + self.rank * share
        after = position + self.rows_per_step
        return Step(
            [self._batch(start, after) for start in range(first, first + share, self.micro_rows)], after
        )

    def _batch(self, first: int, after: int) -> Batch:
        numbers = [self.row_at(position) for position in range(first, first + self.micro_rows)]
        rows = [pack_row(self.tokens, number * self.row_length, self.row_length) for number in numbers]
        return stack(rows, numbers, after, self.cross_documents)

    def _sources(self, row: int) -> list[str]:
        start = row * self.row_length
        starts = self.tokens.document_starts(start + 1, start + self.row_length)
        return [self.tokens.source_at(int(offset)) for offset in (start, *starts)]


def evaluation_batches(
    tokens: TokenSet, row_length: int, rows: int, overlap: int = 0, cross_documents: bool = False
) -> Iterator[Batch]:
    """Every target of a token set exactly once, in order, `rows` rows at a time.

    With `overlap`, each row begins with that many tokens of the row before, as context that is not scored
    again: a scored token then has at least `overlap` tokens of its own document before it, or all there are.
    The last batch is filled up with rows that have no targets, so that all batches have one shape.

    Raises:
        SettingsError: `overlap` leaves no room in a row.
        DataError: there are too few tokens for one target.
    """
    if not 0 <= overlap < row_length:
        raise SettingsError(f"overlap must be from 0 to row_length - 1 = {row_length - 1}, got {overlap}")
    total = count_rows(tokens.tokens_total, row_length, overlap)
    if total == 0:
        raise DataError(f"{tokens.directory}: {tokens.tokens_total} tokens are too few to score; add text")

    def batch(first: int) -> Batch:
        packed = [
            pack_row(tokens, row * (row_length - overlap), row_length, context=overlap if row else 0)
            for row in range(first, first + rows)
        ]
        numbers = range(first, min(first + rows, total))
        return stack(packed, numbers, numbers.stop, cross_documents)

    return prefetch(batch(first) for first in range(0, total, rows))


def check_division(rows_per_step: int, micro_rows: int, world: int) -> None:
    """Raises SettingsError where the rows of a step cannot be divided evenly."""
    if min(rows_per_step, micro_rows, world) < 1:
        raise SettingsError(
            f"rows per step, rows per micro-batch and ranks must be at least 1, "
            f"got {rows_per_step}, {micro_rows} and {world}"
        )
    if rows_per_step % (micro_rows * world):
        raise SettingsError(
            f"{rows_per_step} rows per step cannot be divided into micro-batches of {micro_rows} on "
            f"{counted(world, 'rank')}; take a multiple of {micro_rows * world} rows, or micro-batches of "
            f"{_best_micro(rows_per_step, micro_rows, world)}"
        )


def _best_micro(rows_per_step: int, micro_rows: int, world: int) -> str:
    """The largest micro-batch not above the wished one that divides the rows of a rank."""
    share, left = divmod(rows_per_step, world)
    if left:
        return f"any size once the rows are a multiple of {world}"
    return str(max(size for size in range(1, min(micro_rows, share) + 1) if share % size == 0))
