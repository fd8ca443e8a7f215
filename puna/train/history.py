"""What a run's `metrics.jsonl` tells, read for looking at: columns of numbers, and the rest as records."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

NUMBERS = ("train", "validation")  # kinds whose records become columns; there may be millions of them

LARGEST = 1e100


@dataclass
class Column:
    """A quantity by step; points that are not finite are left out."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        """The newest value, if there is one."""
        return self.values[-1] if self.values else None


@dataclass
class History:
    """Columns by kind and name, other records by kind, and the summary (later values over earlier)."""

    columns: dict[str, dict[str, Column]] = field(default_factory=lambda: {kind: {} for kind in NUMBERS})
    records: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    summary: dict[str, Any] = field(default_factory=dict)
    unreadable: int = 0  # lines that are not a record; the last line of a killed run may be one

    def column(self, kind: str, name: str) -> Column:
        """A column, empty where nothing was recorded."""
        return self.columns[kind].get(name, Column())


def read_history(path: Path) -> History:
    """Everything in a metrics file; a missing file is an empty history."""
    history = History()
    for record in _records(path, history):
        kind = record.get("kind")
        if kind == "summary":
            history.summary |= record
        elif kind in NUMBERS:
            _add_numbers(history.columns[kind], record)
        elif isinstance(kind, str):
            history.records[kind].append(record)
    return history


def _records(path: Path, history: History) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
            elif line.strip():
                history.unreadable += 1


def _add_numbers(columns: dict[str, Column], record: dict[str, Any]) -> None:
    step, timing = record.get("step"), record.get("timing")
    if not _is_number(step):
        return
    for name, value in {**record, **(timing if isinstance(timing, dict) else {})}.items():
        if name != "step" and _is_number(value):
            column = columns.setdefault(name, Column())
            column.steps.append(float(step))
            column.values.append(float(value))


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be drawn: neither NaN nor infinite nor beyond all measure."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST
