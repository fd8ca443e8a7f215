"""Tensors and metadata into a GGUF file, one tensor in memory at a time.

The header comes first and is known last: types are known when the tensors have passed. It takes the same
room whatever the types, so that room is left, and filled in the end.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_writer import WriterState
from torch import Tensor

from puna.formats.casting import Choice, stored
from puna.formats.content import Record
from puna.formats.gguf.config import gguf_name
from puna.formats.gguf.rope import DIVISORS, divisors
from puna.formats.huggingface.safetensors_layout import payload
from puna.formats.packed import BLOCKS
from puna.formats.rotary import interleaved
from puna.model.config import ModelConfig
from puna.model.weights import Packed, Weights, shapes

_ALIGNMENT = 32
_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    **{name: gguf.GGMLQuantizationType(number) for name, number in BLOCKS.items()},
}
_FILE_TYPES = {  # what llama.cpp calls a file by the type most of its matrices have
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k": gguf.LlamaFileType.MOSTLY_Q5_K_M,
} | {
    name: gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]
    for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k")
}
_NUMBERS: dict[type, Callable[[gguf.GGUFWriter, str, Any], None]] = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}

_Info = tuple[str, tuple[int, ...], int]
"""Type, shape and bytes of a tensor."""


def write_file(
    target: Path, metadata: Mapping[str, Any], weights: Weights, choose: Choice, record: Record
) -> Counter[str]:
    """Write a file; returns how many tensors are stored in each type.

    Raises:
        ModelError: a tensor is missing, not finite, or does not fit into its type.
        OSError: as it comes; the file is then incomplete.
    """
    config = weights.config
    extra = divisors(config.rope_scaling, config.rope_theta, config.head_dim)
    room = len(_header(metadata, _provisional(config, extra)))
    infos: dict[str, _Info] = {}
    with target.open("wb") as file:
        file.seek(room)
        if extra is not None:
            infos[DIVISORS] = _append(file, extra.float())
        for name, value in stored(weights, choose):
            record(name, value)
            infos[gguf_name(name)] = _append(file, interleaved(name, value, config))
        header = _header(metadata, infos)
        assert len(header) == room
        file.seek(0)
        file.write(header)
    kinds = Counter(kind for kind, _, _ in infos.values())
    kinds["float32"] -= extra is not None
    return +kinds


def _append(file: io.BufferedWriter, value: Tensor | Packed) -> _Info:
    """Put a tensor's bytes at the end of the file, and fill up to the next one's place."""
    data = payload(value.data if isinstance(value, Packed) else value)
    file.write(data)
    file.write(bytes(-len(data) % _ALIGNMENT))
    kind = value.scheme if isinstance(value, Packed) else str(value.dtype).removeprefix("torch.")
    return kind, tuple(value.shape), len(data)


def _provisional(config: ModelConfig, extra: Tensor | None) -> dict[str, _Info]:
    """Names and shapes as they will be, types as they may not."""
    infos: dict[str, _Info] = {} if extra is None else {DIVISORS: ("float32", tuple(extra.shape), 0)}
    return infos | {gguf_name(name): ("float32", shape, 0) for name, shape in shapes(config).items()}


def _header(metadata: Mapping[str, Any], infos: Mapping[str, _Info]) -> bytes:
    """Everything before the tensors' bytes."""
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_custom_alignment(_ALIGNMENT)
    writer.add_file_type(_FILE_TYPES[_most(infos)])
    for key, value in metadata.items():
        _NUMBERS[type(value)](writer, key, value)
    for name, (kind, shape, size) in infos.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=_TYPES[kind])
    buffer = io.BytesIO()
    writer.fout = [buffer]  # type: ignore[list-item]  # it asks for a file; what it writes, any stream takes
    writer.state = WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    buffer.write(bytes(-buffer.tell() % _ALIGNMENT))
    return buffer.getvalue()


def _most(infos: Mapping[str, _Info]) -> str:
    """The type that most matrices have."""
    return Counter(kind for kind, shape, _ in infos.values() if len(shape) > 1).most_common(1)[0][0]
