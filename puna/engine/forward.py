"""A step's rows through the model: in one call where it was captured, else module by module, padded.

M rows of a pass   R rows in any number   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

import torch
from torch import Tensor
from torch.nn import Module

from puna.engine.cache import PagedCache
from puna.engine.captured import Captured
from puna.engine.rows import RowClasses
from puna.engine.scheduler import Part
from puna.engine.settings import EngineSettings
from puna.engine.still import still
from puna.model.llama import Llama

ROWS = 512  # that steps of fewer rows are held against, so that step_tokens changes no bit


class Forward:
    """The passes of one model with one cache; a row's bits depend on nothing beside it.

    The kernels of a captured pass treat rows alike by construction. Of other models the numbers of rows are
    found that do, which takes a second or more: only where it is needed.
    """

    def __init__(self, model: Llama, cache: PagedCache, settings: EngineSettings) -> None:
        """The model is captured, or its classes of rows are found."""
        self._model, self._cache, self._settings = model, cache, settings
        self._modules = list(model.modules())
        self._rows: RowClasses | None = None
        self._captured = Captured.of(model, cache)
        self.largest = settings.step_tokens
        """The most rows that a step may have."""
        if self._captured is None:
            self.largest = min(self.largest, self._classes().largest)

    @property
    def touched(self) -> Iterable[Module]:
        """What is run as modules, and must be `still` meanwhile."""
        return () if self._captured is not None else self._modules

    def look(self) -> None:
        """See whether the model's parts are still those that were captured."""
        if self._captured is not None and not self._captured.holds():
            self._captured = Captured.of(self._model, self._cache)

    def run(self, parts: Items[Part], chosen: Items[int]) -> tuple[Tensor, Tensor]:
        """Normalised hidden states (M, D) of the parts' rows, and the logits (R, V) of the chosen ones.

        They hold until the next pass.
        """
        ids: list[int] = []
        positions: list[int] = []
        for part in parts:
            end = part.start + part.count
            ids += part.sequence.ids[part.start : end]
            positions += range(part.start, end)
        if self._captured is not None:
            self._begin(parts, len(ids))
            return self._captured.run(ids, positions, chosen)
        # A model may lose its capture while it is used; its steps are then as large as they were planned.
        M = max(self._classes().padded(len(ids)), len(ids))
        padding = [0] * (M - len(ids))
        self._begin(parts, M)
        device = self._model.model.norm.weight.device
        flat = torch.tensor([ids + padding, positions + padding], device=device)  # (2, M)
        hidden = self._model.model(flat[:1], flat[1:], cache=self._cache)[0]  # (M, D)
        if not chosen:
            return hidden, hidden.new_empty(0, self._model.config.vocab_size)
        return hidden, self.head(hidden[torch.tensor(chosen, device=device)])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) of normalised hidden states (R, D), for any R."""
        if self._captured is not None:
            return self._captured.head(hidden)
        return self._classes().head(hidden)

    def _begin(self, parts: Items[Part], rows: int) -> None:
        by_length = self._model.model.rope.scaling.by_length
        self._cache.begin(
            [part.sequence.blocks for part in parts],
            [part.start for part in parts],
            [part.count for part in parts],
            rows,
            [part.sequence.longest for part in parts] if by_length else None,
        )

    def _classes(self) -> RowClasses:
        if self._rows is None:
            largest = max(self._settings.step_tokens, ROWS)
            with still(self._modules):
                self._rows = RowClasses(self._model, largest, self._settings.deterministic)
        return self._rows
