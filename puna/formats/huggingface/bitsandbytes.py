"""NF4 matrices as bitsandbytes publishes them, read and written.

`.weight` holds the codes of all rows in one run, uint8 (n, 1), the first of two in the high half;
`.weight.absmax` the scale of every 64 weights, `.weight.quant_map` the levels, and `.weight.quant_state.…`
the rest as JSON in bytes. Scales may be quantized themselves, by blocks of 256 with an offset ("double
quant"); they are then expanded.

O outputs   I inputs
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import ModelError
from puna.formats.huggingface.compressed_tensors import EMBEDDING, HEAD, Kind, brief
from puna.formats.packed import in_words
from puna.formats.tensor_files import Opened, TensorFile, shown
from puna.model.weights import Packed
from puna.quantize.codes import NF4

METHOD = "bitsandbytes"
BLOCK = 64
KIND: Kind = ("nf4", 4, BLOCK)
_STATE = "quant_state.bitsandbytes__nf4"
_LEAVES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE)


def check(config: Mapping[str, Any], origin: str) -> None:
    """Refuse what is not NF4.

    Raises:
        ModelError: it is quantized by bitsandbytes in another way.
    """
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if not config.get("load_in_4bit") or kind != "nf4":
        what = f"4-bit {brief(kind)}" if config.get("load_in_4bit") else "8-bit"
        raise ModelError(
            f"{origin}: quantized by bitsandbytes as {what}; of its kinds nf4 is read: take the plain float "
            "model that it was made from"
        )


def check_written(name: str, packed: Packed) -> None:
    """Refuse a matrix that bitsandbytes could not open.

    Raises:
        ModelError: it is the embedding, or its groups or scales are of another size.
    """
    if name == f"{EMBEDDING}.weight":
        raise ModelError(
            f"{name} is nf4, and bitsandbytes opens linear layers only; keep it, or choose a dtype"
        )
    scales = packed.scales
    assert scales is not None
    if scales.dtype != torch.float32 or packed.shape[1] != BLOCK * scales.shape[1]:
        kind = f"groups of {packed.shape[1] // scales.shape[1]} with {scales.dtype} scales".replace(
            "torch.", ""
        )
        raise ModelError(
            f"{name} is nf4 in {kind}; bitsandbytes has {BLOCK} with float32 scales: choose a dtype"
        )


def config(plain: Sequence[str], dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers are NF4 but for those named."""
    kept = [module for module in plain if module != EMBEDDING] + ([HEAD] if tied else [])
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept or ["none"],  # with an empty list it would leave out the projection
    }


def parts(name: str, packed: Packed, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of a matrix; `dtype` is what it is to be expanded to."""
    assert packed.scales is not None
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch.")}
    text = json.dumps({**state, "shape": list(packed.shape)}).encode()
    yield name, _exchanged(packed.data).reshape(-1, 1)
    yield f"{name}.absmax", packed.scales.flatten()
    yield f"{name}.quant_map", NF4
    yield f"{name}.{_STATE}", torch.frombuffer(bytearray(text), dtype=torch.uint8)


def as_matrices(opened: Opened, files: list[Path]) -> tuple[Opened, Counter[str]]:
    """All files as one, whose entries are whole matrices, opened by whatever path.

    With it, how many matrices there are of each kind, in words.
    """

    @contextmanager
    def whole(path: Path) -> Iterator[TensorFile]:
        with ExitStack() as stack:
            yield matrices(stack)

    def matrices(stack: ExitStack) -> _Matrices:
        return _Matrices({file: stack.enter_context(opened(file)) for file in files})

    with ExitStack() as stack:
        return whole, matrices(stack).packing()


@dataclass(frozen=True)
class _State:
    """What the JSON of a matrix says."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float


class _Matrices:
    """A tensor file over many."""

    def __init__(self, files: Mapping[Path, TensorFile]) -> None:
        self._home: dict[str, tuple[Path, TensorFile, str, tuple[int, ...]]] = {}
        for file, opened in files.items():
            for name, kind, shape in opened.entries():
                if name in self._home:
                    raise ModelError(f"{file}: {shown(name)} is also in {self._home[name][0].name}")
                self._home[name] = file, opened, kind, shape
        packed = [name for name in self._home if f"{name}.{_STATE}" in self._home]
        self._states = {name: self._state(name) for name in packed}

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of every matrix and every other tensor."""
        for name, (_, _, kind, shape) in self._home.items():
            if name in self._states:
                yield name, "nf4", self._states[name].shape
            elif not self._belongs(name):
                yield name, kind, shape

    def packing(self) -> Counter[str]:
        """How many matrices there are of each kind, in words; scales of two levels are expanded to one."""
        return Counter(
            in_words("nf4", state.shape[1], state.shape[1] // state.block, "float32")
            for state in self._states.values()
        )

    def tensor(self, name: str) -> Tensor | Packed:
        """One tensor, a copy where it is packed.

        Raises:
            ModelError: the levels are not NF4's.
        """
        state = self._states.get(name)
        if state is None:
            return self._read(name)
        if not torch.equal(self._read(f"{name}.quant_map"), NF4):
            raise ModelError(
                f"{self._home[name][0]}: the levels of {shown(name)} are not NF4's; a damaged file"
            )
        rows, columns = state.shape
        data = _exchanged(self._read(name).view(rows, -1))
        return Packed("nf4", data, self._scales(name, state).view(rows, -1), (rows, columns))

    def _scales(self, name: str, state: _State) -> Tensor:
        """Of every block: (O · I / block,)."""
        scales = self._read(f"{name}.absmax")
        if scales.dtype == torch.float32:
            return scales
        levels, outer = self._read(f"{name}.nested_quant_map"), self._read(f"{name}.nested_absmax")
        of_block = torch.arange(len(scales)) // state.nested_block
        return levels[scales.int()] * outer[of_block] + state.offset

    def _state(self, name: str) -> _State:
        """What a matrix is, once it is sure that all of its parts fit.

        Raises:
            ModelError: they do not.
        """
        file = self._home[name][0]
        try:
            said = json.loads(bytes(self._read(f"{name}.{_STATE}").tolist()))
            rows, columns = (int(size) for size in said["shape"])
            state = _State(
                (rows, columns),
                int(said["blocksize"]),
                int(said.get("nested_blocksize", 1)),
                float(said.get("nested_offset", 0)),
            )
            if min(rows, columns, state.block, state.nested_block) < 1:
                raise ValueError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise ModelError(
                f"{file}: {shown(name)}.{_STATE} is not what bitsandbytes writes; a damaged file"
            ) from None
        wrong = [
            part for part, kinds in self._expected(name, state).items() if self._stored(part) not in kinds
        ]
        if wrong or columns % state.block or columns % 2:
            raise ModelError(
                f"{file}: {shown(wrong[0] if wrong else name)} does not fit a matrix {[rows, columns]} in "
                f"blocks of {state.block}; a damaged file"
            )
        return state

    def _expected(self, name: str, state: _State) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """Types and shapes that the parts of a matrix may have."""
        count = state.shape[0] * state.shape[1]
        blocks = count // state.block
        found: dict[str, list[tuple[str, tuple[int, ...]]]] = {
            name: [("U8", (count // 2, 1))],
            f"{name}.quant_map": [("float32", (16,))],
            f"{name}.absmax": [("float32", (blocks,)), ("U8", (blocks,))],
        }
        if self._stored(f"{name}.absmax")[0] == "U8":
            found[f"{name}.nested_quant_map"] = [("float32", (256,))]
            found[f"{name}.nested_absmax"] = [("float32", (-(-blocks // state.nested_block),))]
        return found

    def _stored(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of a stored tensor; of one that is missing, none that fit."""
        return self._home[name][2:] if name in self._home else ("", ())

    def _belongs(self, name: str) -> bool:
        """Whether a tensor is a part of a matrix."""
        return any(
            name.removesuffix(f".{leaf}") in self._states for leaf in _LEAVES if name.endswith(f".{leaf}")
        )

    def _read(self, name: str) -> Tensor:
        found = self._home[name][1].tensor(name)
        assert isinstance(found, Tensor)
        return found


def _exchanged(bytes_: Tensor) -> Tensor:
    """The two halves of every byte exchanged."""
    return bytes_ << 4 | bytes_ >> 4
