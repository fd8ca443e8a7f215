"""`quantization_config` of the compressed-tensors layout: what a file's says, and ours for given matrices.

Three of its formats hold whole numbers, beside a `.weight_scale` of a row or a group each:

    int-quantized     `.weight`, int8 (O, I), scales per channel; products round their activations too
    naive-quantized   the same without activations; also codes of fewer bits, one to a byte
    pack-quantized    `.weight_packed`, int32 (O, I · bits / 32), lowest bits first, each code plus half of
                      its range, and `.weight_shape`

O outputs   I inputs
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from puna.errors import ModelError
from puna.model.weights import Packed
from puna.quantize.codes import whole_numbers

METHOD = "compressed-tensors"
INT, NAIVE, PACKED, MIXED = "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision"
SCHEMES = {4: "int4", 8: "int8"}  # by the bits of a code
BITS = {scheme: bits for bits, scheme in SCHEMES.items()}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_FORMATS = (INT, NAIVE, PACKED, MIXED, "dense", None)
_ADVICE = "take the plain float model that it was made from"


@dataclass(frozen=True)
class Quantization:
    """What a file's config says of its matrices; where they lie, and their sizes, the tensors tell.

    Attributes:
        bits: of a code, those that any matrix has.
        nibbles: modules whose four-bit codes lie one to a byte.
        notes: what is not honoured, a sentence each.
    """

    bits: frozenset[int]
    nibbles: frozenset[str]
    notes: tuple[str, ...]


def read_quantization(values: Mapping[str, Any], origin: str) -> Quantization:
    """The content of `quantization_config`, checked.

    Raises:
        ModelError: something in it changes the numbers in a way that is not known here.
    """
    method = values.get("quant_method")
    if method != METHOD:
        raise ModelError(
            f"{origin}: quantized by {brief(method)}; expected {METHOD} or nf4 of bitsandbytes; {_ADVICE}"
        )
    for key, why in (("transform_config", "its weights are rotated"), ("sparsity_config", "it is sparse")):
        if _says_something(values.get(key)):
            raise ModelError(f"{origin}: {why} ({key}), which is not supported; {_ADVICE}")
    groups = [_group(name, group, origin) for name, group in _groups(values, origin)]
    weights = [(group, group["weights"]) for group in groups if group.get("weights") is not None]
    formats = [values.get("format"), *(group.get("format") for group in groups)]
    unknown = [each for each in formats if each not in _FORMATS]
    if unknown:
        raise ModelError(f"{origin}: stored as {brief(unknown[0])}; expected {INT} or {PACKED}; {_ADVICE}")
    return Quantization(
        bits=frozenset(args["num_bits"] for _, args in weights),
        nibbles=frozenset(
            target
            for group, args in weights
            if args["num_bits"] == 4 and (group.get("format") or values.get("format")) != PACKED
            for target in _targets(group)
        ),
        notes=tuple(_notes(values, groups)),
    )


Kind = tuple[str, int, int | None]
"""Format, bits and group (None: per channel) of a matrix on disk."""


def write_quantization(matrices: Mapping[str, Kind], plain: Iterable[str], tied: bool) -> dict[str, Any]:
    """The config for quantized matrices by module; `plain` are the modules of the others.

    One kind of linear layers is named by its class, several by their modules, so that none is guessed.
    """
    kinds: dict[Kind, list[str]] = {}
    for module, kind in matrices.items():
        kinds.setdefault(kind, []).append(module)
    kept = [module for module in plain if module != EMBEDDING]
    if tied and EMBEDDING in matrices:  # the output projection has its numbers, and a name of its own
        kinds[matrices[EMBEDDING]].append(HEAD)
    elif tied:
        kept.append(HEAD)
    linear = [kind for kind, modules in kinds.items() if EMBEDDING not in modules]
    formats = {kind[0] for kind in kinds}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _written(kind, ["Linear"] if linear == [kind] else modules)
            for index, (kind, modules) in enumerate(kinds.items())
        },
        "ignore": kept if len(linear) == 1 else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def kind_of(module: str, packed: Packed) -> Kind:
    """How a matrix is stored; an embedding one code to a byte, for transformers opens no packed one."""
    assert packed.scales is not None
    groups = packed.scales.shape[1]
    group = None if groups == 1 else packed.shape[1] // groups
    bits = BITS[packed.scheme]
    if module == EMBEDDING:
        return NAIVE, bits, group
    return (INT if bits == 8 and group is None else PACKED), bits, group


def parts(module: str, packed: Packed, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of a matrix, by name."""
    assert packed.scales is not None
    format, bits, _ = kind_of(module, packed)
    if format == PACKED:
        yield (
            f"{module}.weight_packed",
            _words(packed.data if bits == 4 else packed.data.view(torch.uint8) ^ 0x80),
        )
        yield f"{module}.weight_shape", torch.tensor(packed.shape)
    else:
        yield f"{module}.weight", whole_numbers(packed)
    yield f"{module}.weight_scale", packed.scales
    if tied and module == EMBEDDING:
        yield f"{HEAD}.weight_scale", packed.scales


def _words(bytes_: Tensor) -> Tensor:
    """Bytes (O, n) in words of 32 bits (O, n / 4), the last filled up with zeros."""
    return nn.functional.pad(bytes_, (0, -bytes_.shape[1] % 4)).contiguous().view(torch.int32)


def brief(value: Any) -> str:
    """A value from a file, in one line and not without end."""
    return repr(value)[:80]


def _groups(values: Mapping[str, Any], origin: str) -> Iterator[tuple[str, Any]]:
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError(f"{origin}: quantization_config has no config_groups, which say how it is quantized")
    yield from groups.items()


def _group(name: str, group: Any, origin: str) -> Mapping[str, Any]:
    weights = group.get("weights") if isinstance(group, dict) else group
    if not isinstance(group, dict) or not isinstance(weights, dict | None):
        raise ModelError(
            f"{origin}: {brief(name)} of config_groups is {brief(group)}; expected an object with weights"
        )
    if weights is None:
        return group
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    if kind != "int":
        raise ModelError(
            f"{origin}: its weights are of type {brief(kind)} in {brief(bits)} bits (fp8 and such); expected "
            f"whole numbers of 4 or 8 bits; {_ADVICE}"
        )
    if type(bits) is not int or bits not in SCHEMES:
        raise ModelError(f"{origin}: its weights have {brief(bits)} bits; expected 4 or 8; {_ADVICE}")
    return group


def _targets(group: Mapping[str, Any]) -> list[str]:
    found = group.get("targets")
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _notes(values: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    if values.get("kv_cache_scheme") is not None:
        yield "the cache is not quantized, as kv_cache_scheme would have it: keys and values keep their type"
    activations = [group.get("input_activations") for group in groups]
    if any(isinstance(args, dict) and not args.get("dynamic") for args in activations):
        yield "activations are scaled row by row as they come; the fixed scales of the files are not used"


def _says_something(value: Any) -> bool:
    """Whether a part of the config is there that changes numbers."""
    if not isinstance(value, dict):
        return value is not None
    return bool(value.get("config_groups")) or value.get("format", "dense") != "dense"


def _written(kind: Kind, targets: list[str]) -> dict[str, Any]:
    format, bits, group = kind
    whole = {"num_bits": bits, "type": "int", "symmetric": True}
    size = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    rounded = {**whole, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": {**whole, **size, "dynamic": False},
        "input_activations": rounded if format == INT else None,
        "output_activations": None,
        "format": format,
    }
