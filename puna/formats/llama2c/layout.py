"""Where llama2.c's single files keep what: their headers, and the place of every tensor.

Version 0, which has no magic number, and version 1 hold float32; version 2 holds norms in float32 and
matrices as int8, each followed by a float32 scale for every group of its numbers. Tensors stand by kind, not
by layer.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from puna.errors import ModelError, SettingsError
from puna.model.config import ModelConfig
from puna.model.weights import shapes
from puna.settings import parse

MAGIC = struct.pack("<I", 0x616B3432)
EPS, THETA = 1e-5, 10_000.0  # written into run.c; no file names them
LARGEST = 2**31 - 1  # of the header's numbers
ROOM = 256  # bytes at the beginning of versions 1 and 2, and what has to be read to tell a file
_LEGACY, _VERSIONED = struct.Struct("<7i"), struct.Struct("<4si7iB")
_GROUP = struct.Struct("<i")
_FLOAT = 4  # bytes
_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_TABLES = "rotary tables"


@dataclass(frozen=True)
class Header:
    """The beginning of a file; `group` is the numbers per scale, 0 where there are no scales."""

    config: ModelConfig
    version: int
    group: int = 0


@dataclass(frozen=True)
class Layout:
    """Byte offsets: of every tensor by name, and of the rotary tables where there are any."""

    offsets: dict[str, int]
    tables: int | None


def read_header(data: bytes, origin: str) -> Header:
    """What the first bytes of a file say.

    Raises:
        ModelError: they are no such header, or describe no model.
    """
    if data[:4] == MAGIC:
        return _read_versioned(data, origin)
    if len(data) < _LEGACY.size:
        raise ModelError(f"{origin}: {len(data)} bytes; a llama2.c model begins with {_LEGACY.size}")
    *numbers, vocabulary, context = _LEGACY.unpack_from(data)
    return Header(_config([*numbers, abs(vocabulary), context], vocabulary > 0, origin), 0)


def write_header(header: Header) -> bytes:
    """The first bytes of a file."""
    config = header.config
    numbers = [
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.max_position_embeddings,
    ]
    if header.version == 0:
        numbers[5] *= 1 if config.tie_word_embeddings else -1
        return _LEGACY.pack(*numbers)
    data = _VERSIONED.pack(MAGIC, header.version, *numbers, config.tie_word_embeddings)
    return (data + (_GROUP.pack(header.group) if header.version == 2 else b"")).ljust(ROOM, b"\0")


def is_plausible(header: Header) -> bool:
    """Whether somebody may have trained such a model: seven numbers of another kind of file say no."""
    config = header.config
    return (
        config.hidden_size < config.vocab_size * 64
        and config.intermediate_size < config.hidden_size * 64
        and max(config.hidden_size, config.max_position_embeddings, config.vocab_size) < 1 << 22
        and max(config.head_dim, config.num_hidden_layers) <= 1024
    )


def size(header: Header) -> int:
    """Bytes of the whole file, by arithmetic over one layer: a header may claim any number of them."""
    config = header.config
    one = {
        name: tensor_bytes(name, shape, header)
        for name, shape in shapes(config.model_copy(update={"num_hidden_layers": 1})).items()
    }
    layer = sum(count for name, count in one.items() if name.startswith("model.layers."))
    tables = 2 * _table_bytes(config) if header.version == 0 else 0
    return len(write_header(header)) + sum(one.values()) + (config.num_hidden_layers - 1) * layer + tables


def layout(header: Header) -> Layout:
    """The place of every tensor."""
    known = shapes(header.config)
    at, tables = len(write_header(header)), None
    offsets: dict[str, int] = {}
    for name in _order(header):
        if name == _TABLES:
            tables, at = at, at + 2 * _table_bytes(header.config)
        else:
            offsets[name], at = at, at + tensor_bytes(name, known[name], header)
    return Layout(offsets, tables)


def tensor_bytes(name: str, shape: tuple[int, ...], header: Header) -> int:
    """Bytes of a tensor, its scales included."""
    count = math.prod(shape)
    if not is_int8(shape, header):
        return count * _FLOAT
    if count % header.group:
        raise ModelError(f"{name} {list(shape)} cannot be divided into groups of {header.group}")
    return count + count // header.group * _FLOAT


def is_int8(shape: tuple[int, ...], header: Header) -> bool:
    """Whether a tensor of this shape is stored in groups with scales."""
    return header.version == 2 and len(shape) == 2


def _order(header: Header) -> Iterator[str]:
    """The names of all tensors as they follow each other in a file."""
    layers = [f"model.layers.{index}." for index in range(header.config.num_hidden_layers)]
    input_norms = [f"{layer}input_layernorm.weight" for layer in layers]
    inner_norms = [f"{layer}post_attention_layernorm.weight" for layer in layers]
    matrices = [f"{layer}{kind}.weight" for kind in _MATRICES for layer in layers]
    if header.version == 0:
        attention = 4 * len(layers)
        yield from (_EMBEDDING, *input_norms, *matrices[:attention], *inner_norms, *matrices[attention:])
        yield from (_NORM, _TABLES)
    else:
        yield from (*input_norms, *inner_norms, _NORM, _EMBEDDING, *matrices)
    if not header.config.tie_word_embeddings:
        yield _HEAD


def _table_bytes(config: ModelConfig) -> int:
    return config.max_position_embeddings * (config.head_dim // 2) * _FLOAT


def _read_versioned(data: bytes, origin: str) -> Header:
    if len(data) < ROOM:
        raise ModelError(f"{origin}: cut short within its header of {ROOM} bytes; copy it again")
    _, version, *numbers, shared = _VERSIONED.unpack_from(data)
    if version not in (1, 2):
        raise ModelError(f"{origin}: version {version} of llama2.c's format; expected 1 or 2")
    if shared not in (0, 1):
        raise ModelError(f"{origin}: the mark of a shared classifier is {shared}, expected 0 or 1")
    (group,) = _GROUP.unpack_from(data, _VERSIONED.size) if version == 2 else (0,)
    if version == 2 and group < 1:
        raise ModelError(f"{origin}: {group} numbers in a group; expected at least 1")
    return Header(_config(numbers, bool(shared), origin), version, group)


def _config(numbers: list[int], shared: bool, origin: str) -> ModelConfig:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    values = {
        **dict(zip(names, numbers, strict=True)),
        "tie_word_embeddings": shared,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
    }
    try:
        return parse(ModelConfig, values, origin)
    except SettingsError as error:
        raise ModelError(str(error)) from None
