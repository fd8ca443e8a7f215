"""A model's tensors as they come from its files: quantized if asked, moved, and only as wide as they must be.

A matrix that runs packed passes on as it is; one that has no kernel here is expanded. The pages of a mapped
file that only repeat what the model now holds are given back, one tensor at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from puna.devices import DTYPES
from puna.errors import ModelError, SettingsError
from puna.formats.packed import canonical, plain
from puna.formats.source import Source
from puna.model.weights import Packed
from puna.quantize.loading import runs
from puna.quantize.recipe import Recipe, choices, settled, told
from puna.quantize.release import release, trim
from puna.quantize.schemes import SCHEMES, Format, quantized
from puna.settings import parse

OFTEN = 1 << 28  # bytes of matrices that were copied, after which the system is given back what was freed


def quantization(asked: str | Recipe | Mapping[str, Any] | None) -> Recipe | None:
    """What `load` is to round to, from what a user says of it.

    Raises:
        SettingsError: there is no such scheme, or it needs text to be calibrated with.
    """
    if asked is None:
        return None
    if isinstance(asked, str):
        asked = {"scheme": asked}
    recipe = asked if isinstance(asked, Recipe) else parse(Recipe, asked, "quantize")
    asked_of_parts = (recipe.embeddings, recipe.output, *recipe.exceptions.values())
    named = (recipe.scheme, *(how.partition(":")[0] for how in asked_of_parts))
    slow = next((name for name in named if name in SCHEMES and SCHEMES[name].calibrated), None)
    if slow is not None:
        raise SettingsError(
            f"quantize={slow!r} is calibrated with text, which takes its time: make a model of it once "
            f"(puna quantize MODEL DST --scheme {slow}) and load that"
        )
    return recipe


class Arriving:
    """The tensors of an opened model, to be read once; `notes` say afterwards what became of them.

    Raises:
        ModelError: it is to be quantized, and is already; or its shapes do not allow the recipe.
        SettingsError: the recipe contradicts the model.
    """

    def __init__(
        self, source: Source, device: torch.device, dtype: torch.dtype, recipe: Recipe | None
    ) -> None:
        self._source, self._device, self._dtype = source, device, dtype
        self._formats: dict[str, Format] = {}
        self._expanded: Counter[str] = Counter()
        self._nf4 = 0
        self._told: tuple[str, ...] = ()
        if recipe is not None:
            _check_plain(source, recipe)
            chosen = choices(settled(recipe, source.dtype), source.config)
            self._formats = {name: each.format for name, each in chosen.items()}
            self._told = tuple(told(recipe, source.config))

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        left = 0  # bytes copied since the last time that what was freed was given back
        for name, value in self._source.weights:
            passed = self._passed(name, value)
            yield name, passed
            if _copied(value, passed):
                for part in _parts(value):
                    release(part)
                    left += part.nbytes
            if left > OFTEN:
                trim()
                left = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, a sentence each."""
        notes = [*self._told]
        if self._expanded:
            each = ", ".join(f"{count} of {scheme}" for scheme, count in self._expanded.most_common())
            kind = str(self._dtype).removeprefix("torch.")
            notes.append(
                f"{self._expanded.total():,} quantized matrices ({each}) are expanded to {kind}, as slow and "
                "large as that, and saved so: products here take int8 and int4, on a CPU with a compiler"
            )
        if self._nf4:
            notes.append(
                f"{self._nf4:,} matrices are nf4, which is for fine-tuning: each product expands its matrix "
                "anew, and answers are slow; int4 is as small and fast"
            )
        return tuple(notes)

    def _passed(self, name: str, value: Tensor | Packed) -> Tensor | Packed:
        if isinstance(value, Tensor) and name in self._formats:
            value = quantized(value, self._formats[name], name)
        if isinstance(value, Tensor):
            return value.to(self._device, self._dtype)
        as_it_is = runs(name, value, self._device, self._dtype)
        known = value if as_it_is else canonical(value)
        if known is not None and (as_it_is or runs(name, known, self._device, self._dtype)):
            self._nf4 += known.scheme == "nf4"
            scales = None if known.scales is None else known.scales.to(self._device)
            return replace(known, data=known.data.to(self._device), scales=scales)
        self._expanded[value.scheme] += 1
        return plain(value).to(self._device, self._dtype)


def _parts(value: Tensor | Packed) -> tuple[Tensor, ...]:
    """All tensors of a value."""
    if isinstance(value, Tensor):
        return (value,)
    return (value.data,) if value.scales is None else (value.data, value.scales)


def _copied(value: Tensor | Packed, passed: Tensor | Packed) -> bool:
    """Whether the model has a copy of its own of what came."""
    if isinstance(passed, Packed):
        return passed.scheme != "nf4" or passed.data is not value.data
    return passed is not value


def _check_plain(source: Source, recipe: Recipe) -> None:
    already = [kind for kind in source.stored if kind not in DTYPES]
    if already:
        raise ModelError(
            f"{source.path} is quantized already ({', '.join(already)}), and rounding it again would lose "
            f"twice: leave quantize={recipe.scheme!r} out, or give the model that it was made from"
        )
