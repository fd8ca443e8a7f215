"""Hidden states of a text on its way through a model, kept in files: memory holds a few sequences of them.

B sequences at once   T positions in the input   D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from puna.files import sync_file

_TOKENS = 2048  # in memory at once
_NUMBER = 4  # bytes, of float32


@dataclass(frozen=True)
class HiddenStates:
    """The states of `ids` (sequences, T) at each place between two layers that is asked for.

    A place is a name: of a file `NAME-PLACE.states`, which holds (sequences, T, D) in float32, by rows.
    """

    directory: Path
    name: str
    ids: Tensor
    width: int

    @property
    def parts(self) -> list[slice]:
        """The sequences, a few at a time; the same on every machine, since sums round by it."""
        step = max(1, _TOKENS // self.ids.shape[1])
        return [slice(at, min(at + step, len(self.ids))) for at in range(0, len(self.ids), step)]

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.ids.numel()

    @property
    def file_bytes(self) -> int:
        """Of one place."""
        return self.tokens * self.width * _NUMBER

    def read(self, place: str, part: slice) -> Tensor:
        """(B, T, D) of some sequences."""
        T, row = self.ids.shape[1], self.ids.shape[1] * self.width
        with self.file(place).open("rb") as file:
            file.seek(part.start * row * _NUMBER)
            numbers = np.fromfile(file, np.float32, (part.stop - part.start) * row)
        return torch.from_numpy(numbers).view(-1, T, self.width)

    def read_all(self, place: str) -> Tensor:
        """(sequences · T, D)."""
        return torch.from_numpy(np.fromfile(self.file(place), np.float32)).view(-1, self.width)

    def put(self, place: str, parts: Iterator[Tensor]) -> None:
        """Write the states at a place, (B, T, D) for each of `parts` in turn, onto the disk.

        Raises:
            OSError: as it comes.
        """
        with self.file(place).open("wb") as file:
            for states in parts:
                file.write(states.contiguous().numpy().data)
        sync_file(self.file(place))

    def advance(self, before: str, after: str, through: Callable[[Tensor], Tensor]) -> None:
        """The states at the place `after`, made of those at the place `before`."""
        self.put(after, (through(self.read(before, part)) for part in self.parts))

    def forget(self, place: str) -> None:
        """Remove what is kept of a place."""
        self.file(place).unlink(missing_ok=True)

    def file(self, place: str) -> Path:
        """Where the states at a place lie."""
        return self.directory / f"{self.name}-{place}.states"


def relative_distance(first: HiddenStates, second: HiddenStates, place: str) -> float:
    """√(Σ (second - first)² / Σ first²) over all states at a place, summed in float64."""
    apart = size = 0.0
    for part in first.parts:
        a, b = first.read(place, part), second.read(place, part)
        apart += float((b - a).double().square().sum())
        size += float(a.double().square().sum())
    return (apart / size) ** 0.5 if size else 0.0
