"""Matrices in the compressed-tensors layout, made of parts that lie in any of a model's files.

O outputs   I inputs   groups I / weights that share a scale
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.devices import DTYPES
from puna.errors import ModelError
from puna.formats.huggingface.compressed_tensors import EMBEDDING, HEAD, SCHEMES, Quantization
from puna.formats.packed import in_words
from puna.formats.tensor_files import Opened, TensorFile, listed, shown
from puna.model.weights import Packed
from puna.quantize.codes import apart, row_parts, together, whole_numbers

_SCALE, _ZERO, _ORDER, _SHAPE = "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"
_LEFT = (  # of activations and caches, which are not rounded by them here
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
)


def as_matrices(
    opened: Opened, files: list[Path], quantization: Quantization
) -> tuple[Opened, tuple[str, ...], Counter[str]]:
    """All files as one, whose entries are whole matrices, opened by whatever path.

    With it, what is expanded, and how many matrices there are of each kind, both in words.
    """

    @contextmanager
    def whole(path: Path) -> Iterator[TensorFile]:
        with ExitStack() as stack:
            yield matrices(stack)

    def matrices(stack: ExitStack) -> _Matrices:
        return _Matrices({file: stack.enter_context(opened(file)) for file in files}, quantization)

    with ExitStack() as stack:
        found = matrices(stack)
        return whole, tuple(found.notes()), found.packing()


@dataclass(frozen=True)
class _Part:
    """One stored tensor."""

    file: Path
    read: Callable[[], Tensor]
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Form:
    """How a matrix is stored: its name, the file that holds its codes, and whether they are packed."""

    name: str
    file: Path
    bits: int
    shape: tuple[int, ...]
    packed: bool
    groups: int


class _Matrices:
    """A tensor file over many."""

    def __init__(self, files: Mapping[Path, TensorFile], quantization: Quantization) -> None:
        self._quantization = quantization
        self._parts: dict[str, _Part] = {}
        for file, opened in files.items():
            for name, kind, shape in opened.entries():
                if name in self._parts:
                    raise ModelError(f"{file}: {shown(name)} is also in {self._parts[name].file.name}")
                self._parts[name] = _Part(file, _reader(opened, name), kind, shape)
        self._forms = {form.name: form for form in map(self._form, list(self._parts)) if form is not None}

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of every matrix and every other tensor."""
        for form in self._forms.values():
            yield form.name, self._kind(form), form.shape
        for name, part in self._parts.items():
            if name not in self._forms and not self._belongs(name):
                yield name, part.kind, part.shape

    def notes(self) -> Iterator[str]:
        """What is not kept as it is stored."""
        for leaf, why in ((_ZERO, "have zero points"), (_ORDER, "have groups out of order")):
            names = [form.name for form in self._forms.values() if self._has(form, leaf)]
            if names:
                yield f"{listed(names)} expanded to floating point: such matrices {why}"

    def packing(self) -> Counter[str]:
        """How many matrices there are of each kind, in words."""
        kept = [form for form in self._forms.values() if not self._is_plain(form)]
        return Counter(
            in_words(SCHEMES[form.bits], form.shape[1], form.groups, self._part(form, _SCALE).kind)
            for form in kept
        )

    def tensor(self, name: str) -> Tensor | Packed:
        """A view of the mapped file where codes lie there as they are computed with.

        Raises:
            ModelError: the columns of a matrix are in groups that there are not.
        """
        form = self._forms.get(name)
        if form is None:
            return self._parts[name].read()
        scales = self._part(form, _SCALE).read()
        scales = scales.reshape(-1, form.groups).expand(form.shape[0], -1)
        if self._is_plain(form):
            return self._floats(form, self._whole(form), scales)
        return Packed(SCHEMES[form.bits], self._codes(form), scales.contiguous(), form.shape)

    def _form(self, name: str) -> _Form | None:
        """The form of the matrix whose codes are called so; None of everything else.

        Raises:
            ModelError: its parts do not fit each other.
        """
        module, _, leaf = name.rpartition(".")
        part = self._parts[name]
        if leaf == "weight_packed":
            bits, shape = self._packed(module, part)
            if f"{module}.weight" in self._parts:
                raise ModelError(
                    f"{part.file}: {shown(module)} has both weight and weight_packed; expected one"
                )
        elif leaf == "weight" and part.kind == "I8" and len(part.shape) == 2:
            bits, shape = (4 if self._is_nibbles(module) else 8), part.shape
        else:
            return None
        if bits not in self._quantization.bits:
            said = " or ".join(map(str, sorted(self._quantization.bits))) or "no"
            raise ModelError(f"{part.file}: {shown(name)} has {bits} bits, where config.json says {said}")
        form = _Form(f"{module}.weight", part.file, bits, shape, leaf == "weight_packed", 1)
        return self._grouped(form)

    def _is_nibbles(self, module: str) -> bool:
        """Whether codes that take a byte each are of four bits."""
        named = self._quantization.nibbles
        return module in named or ("Linear" in named and module != EMBEDDING)

    def _packed(self, module: str, part: _Part) -> tuple[int, tuple[int, ...]]:
        """Bits and shape of a matrix in whole words of 32 bits."""
        place = self._parts.get(f"{module}.{_SHAPE}")
        is_there = place is not None and place.shape == (2,) and place.kind in ("I32", "I64")
        shape = tuple(place.read().tolist()) if place is not None and is_there else ()
        for bits in SCHEMES:
            if len(shape) == 2 and part.shape == (shape[0], -(-shape[1] * bits // 32)) and part.kind == "I32":
                return bits, shape
        raise ModelError(
            f"{part.file}: {shown(module)}.weight_packed is {part.kind} {list(part.shape)} where {_SHAPE} "
            f"says {list(shape)}; expected I32 [outputs, inputs · bits / 32], of 4 or 8 bits"
        )

    def _grouped(self, form: _Form) -> _Form:
        """The form with its number of groups, which is that of its scales."""
        scale = self._part(form, _SCALE)
        rows, columns = form.shape
        groups = 1 if scale.shape in ((), (1,), (rows,)) else scale.shape[-1]
        fits = scale.shape in ((), (1,), (rows,), (rows, groups)) and 0 < groups <= columns
        if not fits or scale.kind not in DTYPES or (columns % groups and not self._has(form, _ORDER)):
            raise ModelError(
                f"{scale.file}: the {_SCALE} of {shown(form.name)} {list(form.shape)} is {scale.kind} "
                f"{list(scale.shape)}; expected [{rows}, groups] floating-point numbers"
            )
        if form.bits == 4 and columns % 2:
            raise ModelError(
                f"{form.file}: {shown(form.name)} has rows of {columns} four-bit codes; expected even numbers"
            )
        return _Form(form.name, form.file, form.bits, form.shape, form.packed, groups)

    def _part(self, form: _Form, leaf: str) -> _Part:
        name = f"{form.name.removesuffix('.weight')}.{leaf}"
        if name not in self._parts:
            raise ModelError(
                f"{form.file}: {shown(name)} is missing, without which {shown(form.name)} means nothing"
            )
        return self._parts[name]

    def _has(self, form: _Form, leaf: str) -> bool:
        return f"{form.name.removesuffix('.weight')}.{leaf}" in self._parts

    def _is_plain(self, form: _Form) -> bool:
        """Whether the matrix is given as floating-point numbers: what it is has no scheme here."""
        return self._has(form, _ZERO) or self._has(form, _ORDER)

    def _kind(self, form: _Form) -> str:
        return self._part(form, _SCALE).kind if self._is_plain(form) else SCHEMES[form.bits]

    def _belongs(self, name: str) -> bool:
        """Whether a tensor is a part of a matrix, or of what is left out."""
        module, _, leaf = name.rpartition(".")
        if leaf in _LEFT or leaf == "weight_packed":
            return True
        owner = EMBEDDING if module == HEAD and f"{HEAD}.weight" not in self._forms else module  # a tied one
        return leaf in (_SCALE, _ZERO, _ORDER, _SHAPE) and f"{owner}.weight" in self._forms

    def _codes(self, form: _Form) -> Tensor:
        """As `Packed` holds them."""
        if not form.packed:
            codes = self._parts[form.name].read()
            if form.bits == 8:
                return codes
            if codes.min() < -8 or codes.max() > 7:
                raise ModelError(
                    f"{form.file}: {shown(form.name)} holds codes beyond -8 to 7: a damaged file"
                )
            return together((codes + 8).view(torch.uint8))
        bytes_ = self._part(form, "weight_packed").read().view(torch.uint8)
        bytes_ = bytes_[:, : form.shape[1] * form.bits // 8].contiguous()
        return bytes_ if form.bits == 4 else (bytes_ ^ 0x80).view(torch.int8)

    def _whole(self, form: _Form) -> Tensor:
        """The codes one by one, int8 (O, I)."""
        empty = torch.empty(form.shape[0], 0)
        return whole_numbers(Packed(SCHEMES[form.bits], self._codes(form), empty, form.shape))

    def _floats(self, form: _Form, codes: Tensor, scales: Tensor) -> Tensor:
        """Numbers in the type of the scales, rounded once; of each group its zero is taken off first."""
        of_column = self._order(form)
        zeros = self._zeros(form).expand(form.shape[0], -1) if self._has(form, _ZERO) else None
        out = torch.empty(form.shape, dtype=scales.dtype)
        for part in row_parts(form.shape):
            numbers = codes[part].float()
            if zeros is not None:
                numbers -= zeros[part].float()[:, of_column]
            out[part] = numbers * scales[part].float()[:, of_column]
        return out

    def _order(self, form: _Form) -> Tensor:
        """The group that each column is of: (I,)."""
        columns = form.shape[1]
        if not self._has(form, _ORDER):
            return torch.arange(columns) // (columns // form.groups)
        part = self._part(form, _ORDER)
        found = (
            part.read().long()
            if part.kind in ("I32", "I64") and part.shape == (columns,)
            else torch.tensor([-1])
        )
        if bool((found < 0).any()) or bool((found >= form.groups).any()):
            raise ModelError(
                f"{part.file}: {_ORDER} of {shown(form.name)} names groups that there are not; expected "
                f"{columns} whole numbers below {form.groups}"
            )
        return found

    def _zeros(self, form: _Form) -> Tensor:
        """The code of zero in each group: (O, groups) or (1, 1)."""
        part, rows = self._part(form, _ZERO), form.shape[0]
        if part.kind == "I8" and part.shape in ((rows, form.groups), (1,), ()):
            return part.read().reshape(-1, form.groups if len(part.shape) == 2 else 1)
        words = (-(-rows * form.bits // 32), form.groups)
        if part.kind != "I32" or part.shape != words:
            raise ModelError(
                f"{part.file}: {_ZERO} of {shown(form.name)} is {part.kind} {list(part.shape)}; expected I32 "
                f"{list(words)}"
            )
        bytes_ = part.read().t().contiguous().view(torch.uint8)  # (groups, rows · bits / 8)
        codes = apart(bytes_) if form.bits == 4 else bytes_
        return (codes[:, :rows].t().to(torch.int16) - (8 if form.bits == 4 else 128)).contiguous()


def _reader(file: TensorFile, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        found = file.tensor(name)
        assert isinstance(found, Tensor)
        return found

    return read
