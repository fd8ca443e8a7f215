"""How many rows a step may have, so that each gets the same bits in any company: shown, not assumed.

A library chooses how to form a product by its shape, and treats the ends of a vector differently; so a row
may come out otherwise among 3 rows than among 4, or as the last rather than the first. A step is therefore
padded to one of a few classes of rows, and a class is used only after the parts of this very model gave each
of its rows, at every place, the bits that it has in a small tile of the base class. What the parts are given
is chosen to make a difference visible: see `puna.engine.probes`.

    M rows of a step   R rows in any number   D width   V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.engine.probes import Probe, body_probes, head_probes
from puna.engine.still import still
from puna.model.llama import Llama
from puna.quantize.packing import is_packed

BASES = (4, 8, 16, 32, 64)
CLASSES = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
FEW = (1, 2)  # what a packed model is tried with too: its own products treat any number of rows alike
HEAD_ROWS = 64  # rows of one product with the output projection: prompt log-probabilities ask for more
STRIDE = 32  # rows of the tiles with which larger classes are compared, where that class itself holds


class RowClasses:
    """The classes of rows of one model, on the device and with the number of threads it has now."""

    def __init__(self, model: Llama, largest: int, deterministic: bool = True) -> None:
        """The base and the largest class are tried here, every other class when it is first wanted.

        Args:
            model: as it will be run; whoever changes its modules makes a new object.
            largest: the most rows that a step should have.
            deterministic: False pads nothing and tries nothing; bits then depend on company.
        """
        self._lm_head = model.lm_head
        self._body = self._head = None
        if deterministic:
            with still(model.modules()):
                self._body = _Classes(model, body_probes(model), largest)
                self._head = _Classes(model, head_probes(model), min(largest, HEAD_ROWS))
        self.largest = largest if self._body is None else self._body.largest

    def padded(self, rows: int) -> int:
        """The smallest class that holds so many rows, of at most `largest`."""
        return rows if self._body is None else self._body.padded(rows)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) of normalised hidden states (R, D), for any R, with the same promise."""
        if self._head is None:
            return self._lm_head(hidden)
        pieces = [self._padded_head(piece, self._head) for piece in hidden.split(self._head.largest)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _padded_head(self, hidden: Tensor, classes: _Classes) -> Tensor:
        missing = classes.padded(len(hidden)) - len(hidden)
        if not missing:
            return self._lm_head(hidden)
        filled = torch.cat((hidden, hidden.new_zeros(missing, hidden.shape[1])))
        return self._lm_head(filled)[: len(hidden)]


class _Classes:
    """What has been shown of some parts of a model."""

    def __init__(self, model: Llama, probes: list[Probe], largest: int) -> None:
        self._model, self._probes = model, probes
        few = FEW if is_packed(model) else ()
        self._bases = (*few, *BASES)
        self._candidates = sorted({size for size in (*few, *CLASSES) if size < largest} | {largest})
        self._shown: dict[tuple[int, int], bool] = {}
        self._base, self.largest = self._found()

    def padded(self, rows: int) -> int:
        """The smallest class shown to be equal, of at least so many rows and at most the largest."""
        for size in self._candidates:
            if rows <= size < self.largest and self._holds(size, self._base):
                return size
        return self.largest

    def _found(self) -> tuple[int, int]:
        """The base with which the largest possible class agrees, and that class; (1, 1) where none does."""
        for size in reversed(self._candidates):
            for base in self._bases:
                if base <= size and self._holds(base, base) and self._holds(size, base):
                    return base, size
        return 1, 1

    def _holds(self, size: int, base: int) -> bool:
        """Whether rows have in this class the bits that they have in tiles of the base."""
        if (size, base) not in self._shown:
            with still(self._model.modules()):
                self._shown[size, base] = size % base == 0 and self._agrees(size, base)
        return self._shown[size, base]

    def _agrees(self, size: int, base: int) -> bool:
        shorter = size > STRIDE and size % STRIDE == 0 and base < STRIDE
        stride = STRIDE if shorter and self._holds(STRIDE, base) else base
        probes = [probe for probe in self._probes if probe.largest is None or size <= probe.largest]
        return all(_agree(probe, size, stride) for probe in probes)


def _agree(probe: Probe, size: int, tile: int) -> bool:
    """Whether rows together have the bits that they have in smaller tiles, one place further on."""
    rows = -(-max(size, probe.least) // size) * size
    columns = probe.inputs(rows)
    ours = _tiled(probe, columns, size, turned=0)
    return all(torch.equal(a, b) for a, b in zip(ours, _tiled(probe, columns, tile, turned=1), strict=True))


def _tiled(probe: Probe, columns: list[Tensor], tile: int, turned: int) -> list[Tensor]:
    """Results of all rows, computed tile by tile, each tile's rows turned by some places."""
    parts = []
    for tiles in zip(*(column.split(tile) for column in columns), strict=True):
        found = probe.run(*(column.roll(turned, 0) for column in tiles))
        parts.append([result.roll(-turned, 0) for result in found])
    return [torch.cat(column) for column in zip(*parts, strict=True)]
