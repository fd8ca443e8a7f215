"""llama2.c's files: its .bin in three versions, float32 or int8, and its training checkpoint ckpt.pt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from puna.errors import ModelError
from puna.formats import rotary
from puna.formats.archives import torch_archive
from puna.formats.beside import own_vocabulary, tokenizer_beside
from puna.formats.casting import is_finite, stored
from puna.formats.content import Content, Obstacle, Record
from puna.formats.huggingface.safetensors_layout import payload
from puna.formats.llama2c import checkpoint as llama2c_checkpoint
from puna.formats.llama2c import limits as llama2c_limits
from puna.formats.llama2c.checkpoint import CheckpointTensors
from puna.formats.llama2c.layout import (
    EPS,
    LARGEST,
    MAGIC,
    ROOM,
    THETA,
    Header,
    is_int8,
    is_plausible,
    layout,
    read_header,
    size,
    tensor_bytes,
    write_header,
)
from puna.formats.llama2c.limits import BOS, EOS
from puna.formats.packed import canonical, in_groups_of, plain, unpack
from puna.formats.source import Source
from puna.model.config import ModelConfig
from puna.model.weights import Packed, Weights, shapes
from puna.quantize.schemes import Format, quantized
from puna.settings import Settings

_INT8 = "int8"
_NO_THETA = f"rope_theta {THETA:g}: llama2.c defines it, its files do not name it"
_NO_EPS = f"rms_norm_eps {EPS:g} and rope_theta {THETA:g}: run.c defines them, its files do not name them"


Bytes = npt.NDArray[np.uint8]


class Llama2cSettings(Settings):
    """How to write: float32 for run.c, or int8 for runq.c.

    `version` None is 0 for float32 and 2 for int8, which those programs read; 1 is float32 with a magic
    number. `group_size` numbers share a scale in version 2; it is halved until it divides every row.
    """

    dtype: Literal["float32", "int8"] | None = None
    version: Literal[0, 1, 2] | None = None
    group_size: int = Field(64, gt=0, le=LARGEST)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.version is not None and self.dtype not in (None, "int8" if self.version == 2 else "float32"):
            raise ValueError(f"version {self.version} does not hold {self.dtype}; leave one of them out")
        return self

    @property
    def file_version(self) -> int:
        """The version to write."""
        return (2 if self.dtype == _INT8 else 0) if self.version is None else self.version


def recognises(path: Path) -> bool:
    """Whether a path is a file of llama2.c: a torch archive, a magic number, or the sizes of a model.

    Sizes that any model may have are enough, so that a file that was cut short is told from other files.
    """
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            data = file.read(ROOM)
        if data[:4] == MAGIC or torch_archive.recognises(path):
            return True
        header = read_header(data, str(path))
        return is_plausible(header) or size(header) == path.stat().st_size
    except (OSError, ModelError):
        return False


def read(path: Path) -> Source:
    """Open a model file; its size is checked against what its header says, no tensor read.

    Raises:
        ModelError: the file is damaged, or of another kind.
    """
    if torch_archive.recognises(path):
        checkpoint = CheckpointTensors(path)
        weights, stored_as = Weights(checkpoint.config, checkpoint), checkpoint.files.stored
        dtype, notes = checkpoint.files.dtype, (_NO_THETA,)
    else:
        header = _checked_header(path)
        tensors = _Tensors(path, header)
        weights, stored_as = Weights(header.config, tensors), tensors.stored
        dtype, notes = torch.float32, (_NO_EPS,)
    vocab_size = weights.config.vocab_size
    return Source(
        path=path,
        format="llama2c",
        weights=weights,
        dtype=dtype,
        stored=stored_as,
        end_ids=tuple(index for index in (EOS, BOS) if index < vocab_size),
        bos_id=BOS,
        open_tokenizer=tokenizer_beside(path, vocab_size),
        notes=notes,
    )


def _checked_header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            header = read_header(file.read(ROOM), str(path))
        found, expected = path.stat().st_size, size(header)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    if found != expected:
        raise ModelError(f"{path}: {found} bytes, its header asks for {expected}; cut short or damaged")
    return header


class _Tensors:
    """The tensors of a file, in the order of `Weights`; those that need no rearranging are views of it."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header
        self._shapes, self._offsets = shapes(header.config), layout(header).offsets

    @property
    def stored(self) -> dict[str, int]:
        """How many tensors are read in each type, by name."""
        kinds = (_INT8 if self._is_packed(shape) else "float32" for shape in self._shapes.values())
        return dict(Counter(kinds))

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every tensor.

        Raises:
            ModelError: one holds NaN or infinite values.
        """
        for name, shape in self._shapes.items():
            data = self._mapped(self._offsets[name], tensor_bytes(name, shape, self._header))
            value = self._int8(data, shape) if is_int8(shape, self._header) else _floats(data).view(shape)
            numbers = value.scales if isinstance(value, Packed) else value
            assert numbers is not None
            if not is_finite(numbers):
                raise ModelError(
                    f"{self._path}: {name} holds NaN or infinite values: a damaged file, or training diverged"
                )
            yield name, rotary.half_split(name, value, self._header.config)

    def _mapped(self, at: int, size: int) -> Bytes:
        """Bytes of the file, copied where they are written to: torch warns of memory it cannot write to.

        Each tensor's for itself: one private mapping of a file larger than memory may be refused.
        """
        try:
            return np.memmap(self._path, np.uint8, mode="c", offset=at, shape=(size,))
        except (OSError, ValueError) as error:
            raise ModelError(f"{self._path}: changed while it was read: {error}") from None

    def _is_packed(self, shape: tuple[int, ...]) -> bool:
        return is_int8(shape, self._header) and shape[1] % self._header.group == 0

    def _int8(self, data: Bytes, shape: tuple[int, ...]) -> Packed | Tensor:
        """A matrix with its scales; expanded where a group reaches over the end of a row."""
        count = shape[0] * shape[1]
        whole, scales = torch.from_numpy(data[:count].view(np.int8)), _floats(data[count:])
        if self._is_packed(shape):
            return Packed(_INT8, whole.view(shape), scales.view(shape[0], -1), shape)
        return unpack(Packed(_INT8, whole[None], scales[None], (1, count))).view(shape)


def _floats(data: Bytes) -> Tensor:
    """Bytes as float32; copied where odd groups have moved them off a multiple of four."""
    aligned = data if data.ctypes.data % 4 == 0 else data.copy()
    return torch.from_numpy(aligned.view(np.float32))


def obstacles(content: Content, settings: Llama2cSettings) -> Iterator[Obstacle]:
    """What of a model run.c has no place for."""
    yield from llama2c_limits.obstacles(content)


def write(target: Path, content: Content, settings: Llama2cSettings, record: Record) -> list[str]:
    """Write a model file, and its tokenizer beside it; the model's tensors go straight to their places.

    Returns what the user should know of it, a sentence each.

    Raises:
        ModelError: the weights cannot be stored.
        TokenizerError: such a file cannot express the tokenizer.
        OSError: as it comes; the file is then incomplete.
    """
    if target.name.startswith("tok") and target.suffix == ".bin":
        raise ModelError(f"{target.name} is a name for the tokenizer beside a model; choose another")
    notes = _write_model(target, content.weights, settings, record)
    if content.tokenizer is None:
        return notes
    place = own_vocabulary(target)
    place.write_bytes(llama2c_limits.vocabulary_of(content.tokenizer, content.config.vocab_size))
    return [*notes, f"the tokenizer is {place.name}; run.c takes it with -z"]


def _write_model(target: Path, weights: Weights, settings: Llama2cSettings, record: Record) -> list[str]:
    version, asked = settings.file_version, settings.group_size
    if target.suffix == ".pt":
        if settings.dtype == _INT8 or settings.version is not None:
            raise ModelError(f"{target.name}: a checkpoint holds float32 and has no versions; name it .bin")
        return llama2c_checkpoint.write(target, weights, record)
    group = _group(weights.config, asked) if version == 2 else 0
    with target.open("wb") as file:
        _write_file(file, Header(weights.config, version, group), weights, record)
    return [] if group in (0, asked) else [f"group_size {group}: {asked} does not divide every row"]


def _group(config: ModelConfig, group: int) -> int:
    """The group size, halved until it divides the rows of every matrix."""
    while config.hidden_size % group or config.intermediate_size % group:
        group //= 2
    return group


def _write_file(file: BinaryIO, header: Header, weights: Weights, record: Record) -> None:
    places = layout(header)
    file.truncate(size(header))
    file.write(write_header(header))
    if places.tables is not None:
        file.seek(places.tables)
        for table in _tables(header.config):
            file.write(payload(table))
    # A packed matrix passes as it is, so that one in groups of the same size is not rounded twice.
    for name, value in stored(weights, lambda name, shape: None if is_int8(shape, header) else "float32"):
        ready = _in_groups(value, header.group) if is_int8(tuple(value.shape), header) else value
        record(name, ready)
        file.seek(places.offsets[name])
        moved = rotary.interleaved(name, ready, header.config)
        for part in (moved.data, moved.scales) if isinstance(moved, Packed) else (moved,):
            assert part is not None
            file.write(payload(part))


def _in_groups(value: Tensor | Packed, group: int) -> Packed:
    """A matrix as the file has it; one that is int8 in groups that these divide is not rounded again."""
    form = canonical(value) if isinstance(value, Packed) else None
    finer = in_groups_of(form, group) if form is not None and form.scheme == _INT8 else None
    if finer is None or finer.scales is None:
        return quantized(plain(value), Format("int8", group, torch.float32))
    return replace(finer, scales=finer.scales.float())


def _tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, H / 2) that version 0 carries and run.c passes over."""
    H = config.head_dim
    frequencies = 1.0 / THETA ** (torch.arange(0, H, 2).float() / H)
    angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies)
    return angles.cos(), angles.sin()
