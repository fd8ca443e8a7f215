"""Tensors in the types in which a format is to store them, checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from puna.devices import DTYPES
from puna.errors import ModelError
from puna.formats.packed import WRITABLE, in_blocks, pack, plain, scales_are_finite
from puna.model.weights import Packed, Weights, shapes

Choice = Callable[[str, tuple[int, ...]], str | None]
"""The type to store a tensor in, by its name and shape: of DTYPES, or a scheme; None keeps what it has."""


def stored(weights: Weights, choose: Choice) -> Iterator[tuple[str, Tensor | Packed]]:
    """Every tensor in the type to store, once it is sure that it belongs to the model and survives this.

    Raises:
        ModelError: a tensor is missing or not the model's, not finite, or does not fit into its type.
    """
    missing = shapes(weights.config)
    for name, value in weights:
        if missing.pop(name, None) != tuple(value.shape):
            raise ModelError(f"{name} {list(value.shape)} is not a tensor of a model of this config")
        yield name, _as(name, value, choose(name, tuple(value.shape)))
    if missing:
        raise ModelError(f"the weights lack {', '.join(list(missing)[:5])}; the model was not saved")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass, nothing allocated."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN where any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def all_finite(value: Tensor | Packed) -> bool:
    """Whether no number is NaN or infinite; of a packed matrix, no scale."""
    return scales_are_finite(value) if isinstance(value, Packed) else is_finite(value)


def _as(name: str, value: Tensor | Packed, kind: str | None) -> Tensor | Packed:
    if isinstance(value, Packed) and kind in (None, value.scheme):
        return value
    same = in_blocks(value) if isinstance(value, Packed) else None
    if same is not None and same.scheme == kind:  # rounding to blocks again might move numbers
        return same
    tensor = plain(value)
    if kind is not None and kind not in DTYPES:
        assert kind in WRITABLE
        _check(name, tensor, tensor, kind)
        return pack(tensor, kind)
    target = tensor.dtype if kind is None else DTYPES[kind]
    if target not in DTYPES.values():
        raise ModelError(f"{name} is {target}; expected one of {', '.join(DTYPES)}")
    converted = tensor.to(target)
    _check(name, tensor, converted, str(target).removeprefix("torch."))
    return converted


def _check(name: str, tensor: Tensor, converted: Tensor, kind: str) -> None:
    if is_finite(converted):
        return
    overflows = is_finite(tensor)
    why = f"overflows {kind}" if overflows else "holds NaN or infinite values: training diverged"
    raise ModelError(f"{name} {why}; the model was not saved")
