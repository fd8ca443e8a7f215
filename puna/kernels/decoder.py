"""The C++ pass through a packed model: what it is told, and its call from Python.

R rows of a step   C rows whose logits are wanted   P positions   D width
F feed-forward width   N query heads   K key/value heads   H head width   V vocabulary
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puna.kernels import matrix, native, products, rowwise
from puna.kernels.library import NAMES, load
from puna.kernels.matrix import Matrix
from puna.kernels.pages import Pages, Step
from puna.kernels.panels import WIDTH

FEW = 32  # rows of which all layers are computed in one call; between two calls Ctrl-C is heard
_LOOKUPS = {"float32": 1, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}  # as embedding.hpp has them
_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm: its weight (D,) and ε."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: products whose outputs stand side by side, norms, and the pages of its keys and values."""

    input_norm: Norm
    qkv: Sequence[Matrix]
    o_proj: Sequence[Matrix]
    pages: Pages
    post_attention_norm: Norm
    gate_up: Sequence[Matrix]
    down_proj: Sequence[Matrix]


@dataclass(frozen=True, eq=False)
class Parts:
    """What a model's pass is computed from."""

    embedding: Matrix | Tensor | None
    """In panels, or as a matrix (V, D); None: rows are given as they are embedded."""
    layers: Sequence[Layer]
    norm: Norm
    head: Sequence[Matrix]
    heads: tuple[int, int]
    """N and K."""
    head_dim: int


class _Kernels(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("norm", "turned", "attend", "gated")]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("eps", ctypes.c_double)]


class _Product(ctypes.Structure):
    _fields_ = [("matrix", _POINTER), ("multiply", _POINTER)]


class _Linear(ctypes.Structure):
    _fields_ = [("products", _POINTER), ("count", _COUNT), ("outputs", _COUNT)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", _Norm),
        ("qkv", _Linear),
        ("o_proj", _Linear),
        ("pages", _POINTER),
        ("post_attention_norm", _Norm),
        ("gate_up", _Linear),
        ("down_proj", _Linear),
    ]


class _Embedding(ctypes.Structure):
    _fields_ = [("matrix", _POINTER), ("kind", _THREADS), ("width", _THREADS)]


class _Model(ctypes.Structure):
    _fields_ = [
        ("kernels", _Kernels),
        ("embedding", _Embedding),
        ("layers", _POINTER),
        ("norm", _Norm),
        ("head", _Linear),
        *((name, _COUNT) for name in "DFNKH"),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("ids", "x", "cos", "sin", "angles")),
        *((name, _POINTER) for name in ("step", "hidden", "chosen", "logits")),
        ("R", _COUNT),
        ("C", _COUNT),
        ("threads", _THREADS),
    ]


class Decoder:
    """A model's layers and its output projection over the rows of a step.

    Tensors are read where they lie: what is written into them counts, what takes their place does not.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype, call: Callable[..., None], model: _Model) -> None:
        """For `decoder` to make."""
        self._parts, self._dtype, self._call, self._model = parts, dtype, call, model
        self._outputs = sum(each.outputs for each in parts.head)
        self._tokens = 0 if parts.embedding is None else self._outputs
        self._room: tuple[Tensor, Tensor, Tensor] | None = None

    def embeds(self, ids: Sequence[int]) -> bool:
        """Whether these rows' tokens can be embedded here."""
        return min(ids) >= 0 and max(ids) < self._tokens

    def __call__(
        self,
        given: Sequence[int] | Tensor,
        angles: tuple[Tensor, Tensor],
        which: list[int],
        step: Step,
        chosen: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (R, D), normalised, and the logits (C, V) of the chosen rows, until the next call.

        `given` are the rows' tokens, which it `embeds`, or what they are embedded as, (R, D), which is
        something else afterwards; `which` says of each row where its cosines and sines stand in `angles`,
        (P, H) each; `step` says whose the rows are.
        """
        R, (cos, sin) = len(which), angles
        x, hidden, logits = self._rooms(R, len(chosen))
        if isinstance(given, Tensor):
            ids, x = array("q"), given
            assert x.is_contiguous() and x.dtype == self._dtype
        else:
            assert self.embeds(given)
            ids = array("q", given)
        assert len(given) == step.rows == R and min(which) >= 0 and max(which) < len(cos)
        turned, wanted = array("q", which), array("q", chosen)
        prepared = native.prepare(step)  # held until the last call returns, as all above
        rows = _Rows(
            ids.buffer_info()[0] if ids else None, x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            turned.buffer_info()[0], prepared.address, hidden.data_ptr(), wanted.buffer_info()[0],
            logits.data_ptr(), R, len(chosen), torch.get_num_threads(),
        )  # fmt: skip
        count = len(self._parts.layers)
        each = count if R <= FEW else 1
        for first in range(0, count, each):
            last = first + each
            self._call(ctypes.addressof(self._model), ctypes.addressof(rows), first, last, last == count)
        return hidden, logits

    def _rooms(self, R: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
        """For rows, their hidden states and logits: the same again where few rows are as many as before."""
        if self._room is not None and (len(self._room[0]), len(self._room[2])) == (R, C):
            return self._room
        x, hidden = (torch.empty(R, self._model.D, dtype=self._dtype, device="cpu") for _ in range(2))
        found = x, hidden, torch.empty(C, self._outputs, dtype=self._dtype, device="cpu")
        self._room = found if R <= FEW else None
        return found


def decoder(parts: Parts, dtype: torch.dtype) -> Decoder | None:
    """The compiled pass of a model whose rows are of this type; None where not all of it is compiled."""
    functions, attention = load("decoder").functions, load("paged_attention").functions
    rows, name = load("rowwise").functions, NAMES[dtype]
    if functions is None or attention is None or rows is None or dtype not in rowwise.DTYPES:
        return None
    maker = _Maker(dtype)
    try:
        layers = (_Layer * len(parts.layers))(*map(maker.layer, parts.layers))
        head = maker.linear(parts.head)
    except LookupError:
        return None
    attend = native.attend_entry(attention, parts.layers[0].pages, dtype)
    calls = rows[f"norm_{name}"], rows[f"turned_{name}"], attend, rows[f"gated_{name}"]
    D, F = parts.layers[0].o_proj[0].outputs, parts.layers[0].down_proj[0].inputs
    model = _Model(
        _Kernels(*map(_address, calls)),
        maker.embedding(parts.embedding),
        ctypes.addressof(layers),
        maker.norm(parts.norm),
        head,
        *(D, F, *parts.heads, parts.head_dim),
    )
    model.held = (layers, *maker.held)  # only addresses are in it
    call = functions[f"decode_{name}"]
    call.argtypes, call.restype = [_POINTER, _POINTER, _COUNT, _COUNT, _THREADS], None
    return Decoder(parts, dtype, call, model)


class _Maker:
    """Makes structures, and keeps what their addresses lead to."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.held = dtype, list[Any]()

    def layer(self, layer: Layer) -> _Layer:
        pages = native.described(layer.pages)
        self.held.append(pages)
        return _Layer(
            self.norm(layer.input_norm),
            self.linear(layer.qkv),
            self.linear(layer.o_proj),
            ctypes.addressof(pages),
            self.norm(layer.post_attention_norm),
            self.linear(layer.gate_up),
            self.linear(layer.down_proj),
        )

    def embedding(self, held: Matrix | Tensor | None) -> _Embedding:
        if held is None:
            return _Embedding(None, 0, 0)
        if isinstance(held, Tensor):
            V, D = held.shape
            told, kind = products.described(held, None, None, D, V, D), 0
            self.held += [told, held.detach()]
        else:
            told, kind = self._described(held), _LOOKUPS[held.kind]
        return _Embedding(ctypes.addressof(told), kind, WIDTH)

    def norm(self, norm: Norm) -> _Norm:
        self.held.append(norm.weight.detach())
        return _Norm(norm.weight.data_ptr(), norm.eps)

    def linear(self, matrices: Sequence[Matrix]) -> _Linear:
        """Products side by side.

        Raises:
            LookupError: a matrix's product is not compiled.
        """
        products = (_Product * len(matrices))(*map(self.product, matrices))
        self.held.append(products)
        outputs = sum(each.outputs for each in matrices)
        return _Linear(ctypes.addressof(products), len(matrices), outputs)

    def product(self, one: Matrix) -> _Product:
        call = matrix.compiled(one.kind, self.dtype)
        if call is None:
            raise LookupError(one.kind)
        told = self._described(one)
        return _Product(ctypes.addressof(told), _address(call))

    def _described(self, one: Matrix) -> products.Described:
        told = matrix.described(one)
        # A parameter may be given other memory (`.data = …`) while its old memory is read here.
        kept = [x.detach() for x in (one.panels, one.scales, one.bias) if x is not None]
        self.held += [told, kept]
        return told


def _address(call: Any) -> int | None:
    return ctypes.cast(call, _POINTER).value
