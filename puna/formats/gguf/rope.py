"""Rotary scaling in GGUF's terms, in llama.cpp's reading of them.

Linear scaling and YaRN are metadata. Any other scaling that does not depend on the length is a tensor of
divisors, `rope_freqs.weight` (H/2): θ^(-2i/H) / divisor; Llama 3's is kept that way, and its numbers are not
written anywhere. So that all numbers come back exactly, they are also written as JSON under a key of our
own, which is believed only where it gives what the file says.

    H head width
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from puna.errors import ModelError
from puna.formats.gguf.header import brief
from puna.model.rope import (
    DynamicScaling,
    LinearScaling,
    NoScaling,
    RopeScaling,
    YarnScaling,
)

DIVISORS = "rope_freqs.weight"
OURS = "puna.rope_scaling"
BASE = "llama.rope.freq_base"
_PREFIX = "llama.rope.scaling."
_TYPE, _FACTOR, _ORIGINAL = f"{_PREFIX}type", f"{_PREFIX}factor", f"{_PREFIX}original_context_length"
_RATIO, _FAST, _SLOW = f"{_PREFIX}attn_factor", f"{_PREFIX}yarn_beta_fast", f"{_PREFIX}yarn_beta_slow"
_OLD_FACTOR = "llama.rope.scale_linear"
# Keys that other architectures use; here only the value that changes nothing is understood.
_IDLE = {f"{_PREFIX}yarn_log_multiplier": 0.0, f"{_PREFIX}yarn_ext_factor": 1.0}
_IDLE |= {f"{_PREFIX}yarn_attn_factor": 1.0}
_PUBLISHED = (1.0, 4.0, 8192)  # low and high frequency factor, original length: every Llama 3.1 and 3.2
_TOLERANCE = 1e-6  # of a frequency; writers compute divisors in float32


def decimal(value: float) -> float:
    """The shortest decimal number that is this float32: what was meant by a number stored in that type.

    >>> decimal(float(np.float32(1e-5)))
    1e-05
    """
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        return float(str(np.float32(value)))


def scaling_metadata(scaling: RopeScaling, theta: float, head_dim: int) -> dict[str, Any]:
    """The keys for a scaling; floats are stored as float32."""
    magnitude = _magnitude(scaling, theta, head_dim)
    found: dict[str, Any] = {}
    if isinstance(scaling, LinearScaling):
        found = {_TYPE: "linear", _FACTOR: scaling.factor}
    elif isinstance(scaling, YarnScaling) and scaling.truncate:
        found = {
            _TYPE: "yarn",
            _FACTOR: scaling.factor,
            _ORIGINAL: scaling.original_max_position_embeddings,
            # llama.cpp multiplies the magnitude that YaRN gives by this one.
            _RATIO: magnitude / _usual_magnitude(scaling.factor),
            _FAST: scaling.beta_fast,
            _SLOW: scaling.beta_slow,
        }
    elif magnitude != 1.0:
        found = {_RATIO: magnitude}
    if not isinstance(scaling, NoScaling):
        found[OURS] = json.dumps(scaling.model_dump(exclude_none=True))
    return found


def divisors(scaling: RopeScaling, theta: float, head_dim: int) -> Tensor | None:
    """What `rope_freqs.weight` holds for a scaling, (H/2,) in float64; None where metadata say it all."""
    if isinstance(scaling, NoScaling | LinearScaling | DynamicScaling):
        return None
    if isinstance(scaling, YarnScaling) and scaling.truncate:
        return None
    return _frequencies(NoScaling(), theta, head_dim) / _frequencies(scaling, theta, head_dim)


def read_scaling(
    metadata: dict[str, Any], tensor: Tensor | None, theta: float, head_dim: int, context: int, origin: Path
) -> RopeScaling:
    """The scaling that a file describes; `tensor` is its `rope_freqs.weight`.

    Raises:
        ModelError: it is of another kind, or no numbers give the tensor's values.
    """
    if tensor is not None and bool((tensor == 1).all()):
        tensor = None
    meant = _meaning(metadata, context, origin)
    for candidate in _candidates(metadata, meant, tensor, context):
        if _turns_alike(candidate, tensor, theta, head_dim) and _equal(
            meant, _meaning(scaling_metadata(candidate, theta, head_dim), context, origin)
        ):
            return candidate
    what = f"the keys {_PREFIX}*" if tensor is None else f"the divisors in {DIVISORS}"
    raise ModelError(
        f"{origin}: {what} are of no rotary scaling known here; expected linear, yarn or Llama 3's"
    )


def _meaning(metadata: dict[str, Any], context: int, origin: Path) -> dict[str, Any]:
    """What the keys ask for, with llama.cpp's defaults and only where it bears on the result."""
    for key, idle in _IDLE.items():
        if _number(metadata, key, idle, origin) != idle:
            raise ModelError(f"{origin}: {key} is {brief(metadata[key])}; only {idle} is supported")
    kind = metadata.get(_TYPE, "linear" if _OLD_FACTOR in metadata else "none")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"{origin}: {_TYPE} is {brief(kind)}; expected none, linear or yarn")
    found: dict[str, Any] = {"ratio": _number(metadata, _RATIO, 1.0, origin)}
    factor = _number(metadata, _FACTOR, _number(metadata, _OLD_FACTOR, 1.0, origin), origin)
    if kind == "none" or factor == 0 or (kind == "linear" and factor == 1):  # llama.cpp takes 0 for none
        return found
    found |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        found["original_max_position_embeddings"] = _length(metadata, context, origin)
        found["beta_fast"] = _number(metadata, _FAST, 32.0, origin)
        found["beta_slow"] = _number(metadata, _SLOW, 1.0, origin)
    return found


def _candidates(
    metadata: dict[str, Any], meant: dict[str, Any], tensor: Tensor | None, context: int
) -> Iterator[RopeScaling]:
    if OURS in metadata:
        yield from _valid(_parsed(metadata[OURS]))
    if tensor is None:
        values = {"rope_type": "default", **meant}
        ratio = values.pop("ratio")
        if ratio != 1 and values["rope_type"] == "yarn" and values["factor"] >= 1:
            values["attention_factor"] = ratio * _usual_magnitude(values["factor"])
        yield from _valid(values)
        return
    low, high, published = _PUBLISHED
    for original in (published, metadata.get(_ORIGINAL), context):
        yield from _valid(
            {
                "rope_type": "llama3",
                "factor": decimal(tensor.max().item()),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        )


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


def _valid(values: Any) -> Iterator[RopeScaling]:
    """The scaling with these fields, if there is one."""
    try:
        scaling: RopeScaling = TypeAdapter(RopeScaling).validate_python(values)
        # Numbers may be valid each and their powers not.
        if not isinstance(scaling, DynamicScaling) and math.isfinite(_magnitude(scaling, 10_000.0, 2)):
            yield scaling
    except (ValidationError, ArithmeticError, ValueError):
        return


def _turns_alike(scaling: RopeScaling, tensor: Tensor | None, theta: float, head_dim: int) -> bool:
    """Whether these are a scaling's divisors."""
    expected = divisors(scaling, theta, head_dim)
    if tensor is None or expected is None:
        return tensor is None and expected is None
    if tensor.shape != expected.shape:
        return False
    gap = (1 / tensor.double() - 1 / expected).abs().max().item()
    return gap <= _TOLERANCE  # false for NaN


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two meanings are the same within float32's rounding."""
    return one.keys() == other.keys() and all(
        value == other[key] if isinstance(value, str) else math.isclose(value, other[key], rel_tol=_TOLERANCE)
        for key, value in one.items()
    )


def _number(metadata: dict[str, Any], key: str, default: float, origin: Path) -> float:
    value = metadata.get(key, default)
    number = decimal(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number):
        raise ModelError(f"{origin}: {key} is {brief(value)}; expected a number")
    return number


def _length(metadata: dict[str, Any], default: int, origin: Path) -> int:
    value = metadata.get(_ORIGINAL, default)
    if type(value) is not int:
        raise ModelError(f"{origin}: {_ORIGINAL} is {brief(value)}; expected a whole number")
    return value


def _usual_magnitude(factor: float) -> float:
    """YaRN's own: what a ratio of one stands for."""
    return 0.1 * math.log(factor) + 1.0


def _magnitude(scaling: RopeScaling, theta: float, head_dim: int) -> float:
    """What cosines and sines are multiplied by."""
    return 1.0 if scaling.by_length else scaling.frequencies(theta, head_dim, 1, None, torch.float64)[1]


def _frequencies(scaling: RopeScaling, theta: float, head_dim: int) -> Tensor:
    return scaling.frequencies(theta, head_dim, 1, None, torch.float64)[0]
