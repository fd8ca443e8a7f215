"""Archives of torch taken apart and put together, bent in their directory, their pickle, their tensors."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import re
import struct
import zipfile
from collections import OrderedDict
from typing import Any

import torch

from tests.formats.damage import cut_or_flipped

NUMBERS = [0, 1, 2, 3, 7, 64, 255, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, -1, -4, 2**70]
HOSTILE = {
    "a command": b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R",
    "an old spelling": b"(S'true'\nios\nsystem\n",
    "evaluation": b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R",
    "a terabyte": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R",
    "a terabyte of storage": b"ctorch\nUntypedStorage\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R",
    "another unpickler": b"c_pickle\nloads\nX\x01\x00\x00\x00N\x85R",
    "numpy": b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n(NNNNtR",
    "an attribute": b"ctorch\nserialization.os.system\nX\x01\x00\x00\x00N\x85R",
    "settings": b"cargparse\nNamespace\n)\x81}b",
    "a class": b"ctorch.nn.modules.linear\nLinear\n)\x81",
    "a hash without end": b"K\x01\x85q\x01" + b"h\x01h\x01\x86q\x01" * 80 + b"}h\x01Ns",
    "nested lists": b"]" * 300_000 + b"a" * 299_999,
    "too many instructions": b"N" * 600_000,
    "an instruction unknown": b"]0",
    "a huge number": b"\x8b\xff\xff\xff\x7f\x01",
    "a huge text": b"X\xff\xff\xff\xff",
    "a newer text": b"\x8d" + b"\xff" * 8,
    "nothing on the stack": b"R",
    "marks": b"tttt",
    "no storage": b"X\x07\x00\x00\x00storageNNNN(tQ",
    "a dictionary within itself": b"}q\x00h\x00h\x00s",
    "a list within itself": b"]q\x00h\x00a",
    "a call of a type": b"ctorch\nfloat32\n)R",
    "a call of a storage": b"ctorch\nFloatStorage\n)R",
    "text that is none": b"X\x02\x00\x00\x00\xff\xfe",
    "protocol 4": b"\x80\x04\x95\x01\x00\x00\x00\x00\x00\x00\x00N",
}
"""Pickles, without the first two bytes (the protocol) and the last (the end)."""


def repacked(data: bytes, description: bytes) -> bytes:
    """The same archive with another pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, description if name.endswith("/data.pkl") else old.read(name))
    return out.getvalue()


def description_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


class Storage:
    """Stands for a storage in a pickle to be made."""

    def __init__(self, *identity: Any) -> None:
        self.identity = identity


class Tensor:
    """Stands for a tensor in a pickle to be made."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def pickled(value: Any) -> bytes:
    """A pickle of values, `Tensor`s and `Storage`s, whatever nonsense they say."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    pickler.persistent_id = lambda item: item.identity if isinstance(item, Storage) else None
    pickler.dispatch_table = {Tensor: lambda tensor: (torch._utils._rebuild_tensor_v2, tensor.arguments)}
    pickler.dump(value)
    return buffer.getvalue()


def described(data: bytes) -> dict[str, list[Any]]:
    """Name → [storage kind, key, numel, offset, shape, strides] of an archive of tensors."""
    tensors = torch.load(io.BytesIO(data), weights_only=True)
    found, keys = {}, {}
    for name, tensor in tensors.items():
        key = keys.setdefault(tensor.untyped_storage().data_ptr(), str(len(keys)))
        numel = tensor.untyped_storage().nbytes() // tensor.element_size()
        kind = _KINDS[tensor.dtype]
        found[name] = [kind, key, numel, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()]
    return found


_KINDS = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
}


def from_description(table: dict[str, list[Any]]) -> bytes:
    return pickled(
        {
            name: Tensor(
                Storage("storage", kind, key, "cpu", numel), offset, shape, strides, False, OrderedDict()
            )
            for name, (kind, key, numel, offset, shape, strides) in table.items()
        }
    )


def bent_archive(draw: random.Random, data: bytes) -> bytes:
    """An archive damaged in its structure more often than in its bytes."""
    kind = draw.random()
    if kind < 0.3:
        return repacked(data, from_description(_bent_table(draw, described(data))))
    if kind < 0.5:
        return repacked(data, _bent_pickle(draw, description_of(data)))
    if kind < 0.6:
        hostile = b"\x80\x02" + draw.choice(list(HOSTILE.values())) + b"."
        return repacked(
            data, hostile if draw.random() < 0.5 else b"\x80\x02}X\x01\x00\x00\x00a" + hostile[2:-1] + b"s."
        )
    if kind < 0.85:
        return _bent_directory(draw, data)
    return cut_or_flipped(draw, data, len(data))


def _bent_table(draw: random.Random, table: dict[str, list[Any]]) -> dict[str, list[Any]]:
    name = draw.choice(list(table))
    kind = draw.randrange(8)
    if kind == 0:
        return {other: row for other, row in table.items() if other != name}
    if kind == 1:
        return {
            (other + draw.choice("x.\n\0é") if other == name else other): row for other, row in table.items()
        }
    row = list(table[name])
    if kind == 2:
        row[0] = draw.choice(list(_KINDS.values()))
    elif kind == 3:
        row[1] = draw.choice([*(other[1] for other in table.values()), "x", "", "../0", "0" * 300, 3])
    elif kind == 4:
        row[draw.choice([2, 3])] = draw.choice([*NUMBERS, None, 1.5])
    else:
        place = draw.choice([4, 5])
        sizes = [
            draw.choice([*NUMBERS, size, size * 2]) if draw.random() < 0.5 else size for size in row[place]
        ]
        row[place] = draw.choice([tuple(sizes), tuple(sizes[1:]), (*sizes, 1), sizes, (0,) * len(sizes)])
    return {**table, name: row}


def _bent_pickle(draw: random.Random, data: bytes) -> bytes:
    """Instructions left out, repeated, exchanged or given other data."""
    places = [place for _, _, place in pickletools.genops(data)]
    parts = [data[begin:end] for begin, end in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, other = draw.randrange(len(parts)), draw.randrange(len(parts))
        kind = draw.randrange(5)
        if kind == 0:
            parts[at] = b""
        elif kind == 1:
            parts.insert(at, parts[other])
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] = bytes([draw.randrange(256)]) + parts[at][1:]
        else:
            parts[at] = parts[at][:1] + bytes(draw.randrange(256) for _ in parts[at][1:])
    return b"".join(parts)


def _bent_directory(draw: random.Random, data: bytes) -> bytes:
    """One field of a header, of the directory or of its end with another number."""
    changed = bytearray(data)
    sizes = {b"PK\5\6": (22, 4), b"PK\1\2": (46, 4), b"PK\3\4": (30, 4)}
    mark = draw.choice(list(sizes))
    places = [match.start() for match in re.finditer(re.escape(mark), data)] or [len(data) - 22]
    at = draw.choice(places)
    offset = at + draw.randrange(4, sizes[mark][0], 2)
    form = draw.choice(["<H", "<I"])
    limit = 1 << (8 * struct.calcsize(form))
    value = draw.choice([*NUMBERS, len(data), at, draw.randrange(limit)]) % limit
    end = min(len(changed), offset + struct.calcsize(form))
    changed[offset:end] = struct.pack(form, value)[: end - offset]
    return bytes(changed)
