"""The tensors of a GGUF model, out of memory-mapped files, one or many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.devices import DTYPES
from puna.errors import ModelError, nearest
from puna.formats.casting import all_finite
from puna.formats.gguf.config import gguf_name, read_config
from puna.formats.gguf.header import Entry
from puna.formats.gguf.rope import DIVISORS
from puna.formats.packed import BLOCKS
from puna.formats.rotary import half_split
from puna.formats.tensor_files import listed
from puna.model.weights import Packed, shapes


class GgufTensors:
    """The tensors of a model by name; iteration reads them in the model's order.

    A tensor read is a view of the mapped file, but for q_proj and k_proj, whose rows are put in order.

    Raises:
        ModelError: the metadata and tensors are not those of a Llama.
    """

    def __init__(self, metadata: dict[str, Any], entries: Mapping[str, Entry], origin: Path) -> None:
        self._origin = origin
        entries = dict(entries)
        divisors = _divisors(entries.pop(DIVISORS, None))
        found = {name: entry.shape for name, entry in entries.items()}
        self.config = read_config(metadata, found, divisors, origin)
        self._entries = self._check(entries)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most numbers are stored in; float16 where most are packed."""
        numbers: Counter[torch.dtype] = Counter()
        for entry in self._entries.values():
            numbers[DTYPES.get(entry.kind, torch.float16)] += int(np.prod(entry.shape))
        return numbers.most_common(1)[0][0]

    @property
    def stored(self) -> dict[str, int]:
        """How many tensors are stored in each type, by name."""
        return dict(Counter(entry.kind for entry in self._entries.values()))

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every tensor of the model.

        Raises:
            ModelError: a tensor holds NaN or infinite values.
        """
        for name, entry in self._entries.items():
            value = _read(entry)
            if not all_finite(value):
                raise ModelError(
                    f"{entry.file}: {name} holds NaN or infinite values: a damaged file, or training diverged"
                )
            yield name, half_split(name, value, self.config)

    def _check(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Where the tensors of the config lie, once it is sure that all are there and no other."""
        expected = {gguf_name(name): (name, shape) for name, shape in shapes(self.config).items()}
        unknown = [name for name in entries if name not in expected]
        if unknown:
            raise ModelError(
                f"{self._origin}: {listed(unknown)} not part of a Llama of these metadata."
                + nearest(unknown[0], expected)
            )
        missing = [name for name in expected if name not in entries]
        if missing:
            raise ModelError(f"{self._origin}: {listed(missing)} missing from the tensors")
        for name, (_, shape) in expected.items():
            if entries[name].shape != shape:
                raise ModelError(
                    f"{entries[name].file}: {name} has shape {list(entries[name].shape)}, expected "
                    f"{list(shape)} by the metadata (outermost first)"
                )
        return {ours: entries[name] for name, (ours, _) in expected.items()}


def _divisors(entry: Entry | None) -> Tensor | None:
    if entry is None:
        return None
    if entry.kind != "float32" or len(entry.shape) != 1:
        raise ModelError(
            f"{entry.file}: {DIVISORS} is {entry.kind} {list(entry.shape)}; expected float32 [H/2]"
        )
    tensor = _read(entry)
    assert isinstance(tensor, Tensor)
    return tensor


def _read(entry: Entry) -> Tensor | Packed:
    # Each tensor is mapped for itself: one private mapping of a file larger than memory may be refused.
    try:
        bytes_ = np.memmap(entry.file, np.uint8, mode="c", offset=entry.at, shape=(entry.size,))
    except (OSError, ValueError) as error:
        raise ModelError(f"{entry.file}: changed while it was read: {error}") from None
    data = torch.from_numpy(bytes_)
    if entry.kind in BLOCKS:
        return Packed(entry.kind, data.view(entry.shape[0], -1), None, entry.shape)
    return data.view(DTYPES[entry.kind]).view(entry.shape)
