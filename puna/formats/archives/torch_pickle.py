"""The pickle inside a torch archive, read as data: tensors, dictionaries and plain values; nothing is called.

A pickle is a program for a small stack machine. This machine has the instructions that torch writes (pickle's
protocol 2) and knows only the names below, which stand for tensors and their types. It imports nothing, so
that no file can make it run code, allocate what it does not hold, or work without end.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pickle import decode_long
from typing import Any

import torch
from torch import Tensor

from puna.errors import ModelError

STEPS = 1 << 18  # instructions; the archives of the largest Llama take about fifty thousand each
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_SLACK = 1 << 20  # bytes that may be claimed however often
_TYPES = {str(dtype): dtype for dtype in STORAGES.values()}
_ADVICE = "save its tensors alone, with torch.save(model.state_dict(), path)"

Open = Callable[[str, torch.dtype, int], Tensor]
"""The storage of a key, type and number of elements: (numel,)."""


def read_pickle(data: bytes, storage: Open) -> Any:
    """What a pickle describes: dictionaries, lists, tuples, plain values, and tensors over their storages.

    Raises:
        ModelError: it is damaged, or holds more than that.
    """
    machine = _Machine(data, storage)
    try:
        return machine.run()
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError, struct.error) as error:
        reason = str(error) if isinstance(error, _Fault) else "its pickle is damaged"
        raise ModelError(reason) from None


class _Fault(ValueError):
    """A fault that can be named."""


class _Name(str):
    """A name that the pickle would import."""

    __slots__ = ()


class _Machine:
    """A stack, what was remembered of it, and where the data of the instruction at hand begins."""

    def __init__(self, data: bytes, storage: Open) -> None:
        self._data, self._at, self._storage = data, 0, storage
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._claimed, self._held, self._keys = 0, 0, set[str]()

    def run(self) -> Any:
        """Every instruction up to the one that stops."""
        for _ in range(STEPS):
            code = self._take(1)
            if code == b".":
                self._check_sharing()
                return self._stack.pop()
            if code not in _INSTRUCTIONS:
                raise _Fault(f"its pickle has the instruction {code!r}, which no tensor needs; {_ADVICE}")
            _INSTRUCTIONS[code](self)
        raise _Fault(f"its pickle has more than {STEPS} instructions; {_ADVICE}")

    # What an instruction carries

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _Fault("its pickle is cut short")
        found, self._at = self._data[self._at : end], end
        return found

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        return self._take(self._data.index(b"\n", self._at) + 1 - self._at)[:-1].decode("ascii")

    def _values_since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _last(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise _Fault("its pickle is damaged")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    # Instructions

    def protocol(self) -> None:
        version = self._number("<B")
        if version != 2:
            raise _Fault(
                f"its pickle has protocol {version}; torch writes 2 unless told otherwise; {_ADVICE}"
            )

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def number(self, form: str) -> None:
        self.push(self._number(form))

    def long(self) -> None:
        self.push(decode_long(self._take(self._number("<B"))))

    def text(self) -> None:
        self.push(self._take(self._number("<I")).decode("utf-8"))

    def short_bytes(self) -> None:
        self.push(self._take(self._number("<B")).decode("ascii"))

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def tuple(self, count: int | None = None) -> None:
        self.push(tuple(self._values_since_mark() if count is None else self._last(count)))

    def append(self, many: bool) -> None:
        items = self._values_since_mark() if many else self._last(1)
        if type(self._stack[-1]) is not list:
            raise _Fault("its pickle is damaged")
        self._stack[-1].extend(items)

    def set_items(self, many: bool) -> None:
        items = self._values_since_mark() if many else self._last(2)
        keys, target = items[::2], self._stack[-1]
        # Names and numbers only: a nest of tuples may take for ever to be hashed.
        if type(target) is not dict or len(items) % 2 or not all(type(key) in (str, int) for key in keys):
            raise _Fault("it holds a dictionary with keys other than names and numbers")
        target.update(zip(keys, items[1::2], strict=True))

    def remember(self, form: str) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def recall(self, form: str) -> None:
        self.push(self._memo[self._number(form)])

    def name(self) -> None:
        name = f"{self._line()}.{self._line()}"
        if name in _TYPES:
            self.push(_TYPES[name])
        elif name in STORAGES or name in _CALLS:
            self.push(_Name(name))
        else:
            raise _Fault(f"it holds more than tensors and plain values: {name[:80]!r}; {_ADVICE}")

    def call(self) -> None:
        function, arguments = self._last(2)
        if type(function) is not _Name or function not in _CALLS or type(arguments) is not tuple:
            raise _Fault("its pickle is damaged")
        self.push(_CALLS[function](self, *arguments))

    def build(self) -> None:
        """What torch hangs on a dictionary (the versions of modules) means nothing here."""
        self._last(1)
        if type(self._stack[-1]) is not dict:
            raise _Fault(f"it holds more than tensors and plain values; {_ADVICE}")

    def open_storage(self) -> None:
        (identity,) = self._last(1)
        word, kind, key, _, numel = identity
        if word != "storage" or type(kind) is not _Name or type(key) is not str or not _is_size(numel):
            raise _Fault("its pickle is damaged")
        found = self._storage(key, STORAGES[kind], numel)
        if key not in self._keys:
            self._keys.add(key)
            self._held += found.nbytes
        self.push(found)

    # What names stand for

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        """A view of a storage, which must hold as many elements as the view, and all that it reaches."""
        if not (isinstance(storage, Tensor) and _is_size(offset) and _are_sizes(shape, strides)):
            raise _Fault("its pickle is damaged")
        count = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if count > storage.numel() or (count and last >= storage.numel()):
            raise _Fault(f"it holds a tensor {list(shape)} that reaches beyond its {storage.numel()} values")
        self._claimed += count * storage.element_size()
        if not count:
            return storage.new_empty(shape)
        return storage.as_strided(shape, strides, offset)

    def parameter(self, tensor: Any, *_: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise _Fault("its pickle is damaged")
        return tensor

    def size(self, sizes: Any) -> Any:
        return sizes

    def dictionary(self) -> dict[Any, Any]:
        return {}

    def _check_sharing(self) -> None:
        # Two names for one matrix are usual (a tied embedding); a thousand make a large model of nothing.
        if self._claimed > 2 * self._held + _SLACK:
            raise _Fault(f"its tensors claim {self._claimed} bytes of the {self._held} that it holds")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(shape: Any, strides: Any) -> bool:
    both = (shape, strides)
    return all(
        type(sizes) is tuple and len(sizes) <= 8 and all(map(_is_size, sizes)) for sizes in both
    ) and len(shape) == len(strides)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine.parameter,
    "torch.Size": _Machine.size,
    "collections.OrderedDict": _Machine.dictionary,
}
_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m.protocol(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.number("<B"),
    b"M": lambda m: m.number("<H"),
    b"J": lambda m: m.number("<i"),
    b"G": lambda m: m.number(">d"),
    b"\x8a": _Machine.long,
    b"X": _Machine.text,
    b"U": _Machine.short_bytes,
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"(": _Machine.mark,
    b"t": _Machine.tuple,
    b"\x85": lambda m: m.tuple(1),
    b"\x86": lambda m: m.tuple(2),
    b"\x87": lambda m: m.tuple(3),
    b"a": lambda m: m.append(False),
    b"e": lambda m: m.append(True),
    b"s": lambda m: m.set_items(False),
    b"u": lambda m: m.set_items(True),
    b"q": lambda m: m.remember("<B"),
    b"r": lambda m: m.remember("<I"),
    b"h": lambda m: m.recall("<B"),
    b"j": lambda m: m.recall("<I"),
    b"c": _Machine.name,
    b"R": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.open_storage,
}
