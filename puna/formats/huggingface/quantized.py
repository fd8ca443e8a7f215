"""Quantized directories: which layout one has, and what one to be written gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import ModelError
from puna.formats.huggingface import bitsandbytes, compressed_tensors, quantized_files
from puna.formats.huggingface.compressed_tensors import Kind
from puna.formats.packed import CODED, canonical, plain
from puna.formats.tensor_files import Opened
from puna.model.weights import Packed, Weights


@dataclass(frozen=True)
class Opening:
    """How to open all files of a quantized model as one of whole matrices.

    `notes` tell what of its config is not honoured, `packing` how many matrices there are of each kind.
    """

    opened: Opened
    notes: tuple[str, ...] = ()
    packing: Mapping[str, int] = field(default_factory=dict)


def opening(opened: Opened, files: list[Path], config: Any, origin: Path) -> Opening:
    """The way to open a model with this `quantization_config`.

    Raises:
        ModelError: it is quantized in a way that is not known here.
    """
    if not isinstance(config, dict):
        raise ModelError(
            f"{origin}: quantization_config must be an object, got {compressed_tensors.brief(config)}"
        )
    if config.get("quant_method") == bitsandbytes.METHOD:
        bitsandbytes.check(config, str(origin))
        matrices, kinds = bitsandbytes.as_matrices(opened, files)
        return Opening(matrices, packing=kinds)
    quantization = compressed_tensors.read_quantization(config, str(origin))
    whole, notes, packing = quantized_files.as_matrices(opened, files, quantization)
    return Opening(whole, (*quantization.notes, *notes), packing)


@dataclass
class Layout:
    """What is written, gathered on the way; `tied`: the output projection is the embedding."""

    tied: bool
    _kinds: dict[str, Kind] = field(default_factory=dict)
    _plain: list[str] = field(default_factory=list)
    _dtypes: list[torch.dtype] = field(default_factory=list)
    _scales: set[torch.dtype] = field(default_factory=set)
    _expanded: dict[str, None] = field(default_factory=dict)

    def storable(self, weights: Weights) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every tensor as a directory holds it: GGUF's blocks as whole numbers, others in float16."""
        for name, value in weights:
            form = canonical(value) if isinstance(value, Packed) else value
            if form is None:
                assert isinstance(value, Packed)
                self._expanded[value.scheme] = None
                form = plain(value).half()
            yield name, form

    def add(self, name: str, value: Tensor | Packed) -> None:
        """Take in one tensor.

        Raises:
            ModelError: no layout holds it together with those before.
        """
        module = name.removesuffix(".weight")
        if not isinstance(value, Packed):
            self._dtypes.append(value.dtype)
            if value.ndim == 2:
                self._plain.append(module)
            return
        assert value.scheme in CODED and value.scales is not None
        self._scales.add(value.scales.dtype)
        of_nf4 = value.scheme == "nf4"
        self._kinds[module] = bitsandbytes.KIND if of_nf4 else compressed_tensors.kind_of(module, value)
        if of_nf4:
            bitsandbytes.check_written(name, value)
        if len({kind == bitsandbytes.KIND for kind in self._kinds.values()}) > 1:
            raise ModelError(
                f"{name} is {value.scheme} in a model that is nf4 in part, and no directory holds both; "
                "choose one of the schemes, or a dtype, which expands them"
            )

    def parts(self, name: str, packed: Packed) -> Iterator[tuple[str, Tensor]]:
        """The tensors that one is stored as."""
        if packed.scheme == "nf4":
            return bitsandbytes.parts(name, packed, self.dtype)
        return compressed_tensors.parts(name.removesuffix(".weight"), packed, self.tied)

    @property
    def dtype(self) -> torch.dtype:
        """The type for config.json: what most tensors have; of quantized ones, the least that loses nothing.

        transformers casts scales and all else to it.
        """
        if not self._scales:
            return max(dict.fromkeys(self._dtypes), key=self._dtypes.count)
        if bitsandbytes.KIND in self._kinds.values():  # whose scales stay float32
            return max(dict.fromkeys(self._dtypes), key=self._dtypes.count, default=torch.float32)
        return reduce(torch.promote_types, {*self._dtypes, *self._scales})

    def quantization_config(self) -> dict[str, Any]:
        """The entry of config.json; none where nothing is quantized."""
        if not self._kinds:
            return {}
        if bitsandbytes.KIND in self._kinds.values():
            return {"quantization_config": bitsandbytes.config(self._plain, self.dtype, self.tied)}
        found = compressed_tensors.write_quantization(self._kinds, self._plain, self.tied)
        return {"quantization_config": found}

    def notes(self) -> Iterator[str]:
        """What the user should know, a sentence each."""
        if self._expanded:
            kinds = ", ".join(self._expanded)
            yield f"tensors stored as {kinds} are expanded to float16; with dtype float32 they keep every bit"
        if self._kinds and self.dtype not in self._dtypes:
            name = str(self.dtype).removeprefix("torch.")
            yield (
                f"config.json says {name}: in it transformers rounds no scale; dtype= there chooses another"
            )
        embedding = self._kinds.get(compressed_tensors.EMBEDDING)
        if embedding is not None and embedding[1] == 4 and embedding != bitsandbytes.KIND:
            yield "the embedding's four-bit codes take a byte each: transformers opens no packed embedding"
