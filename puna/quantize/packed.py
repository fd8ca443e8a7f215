"""The modules of a packed model: matrices in panels, those that take the same input as one product.

B batch   T positions in the input   D width   N query heads   K key/value heads
H head width   F feed-forward width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from puna.errors import ModelError
from puna.kernels import integers, panels, rowwise
from puna.kernels.matrix import Matrix, multiply
from puna.model.llama import MLP, Attend, Attention, RMSNorm
from puna.model.weights import Packed
from puna.quantize.matrices import Value, apart, below, in_panels


@dataclass(frozen=True)
class Part:
    """A linear layer as it was before it was put together with others."""

    name: str
    value: Value
    bias: Tensor | None
    learns: bool

    def tensors(self) -> Iterator[tuple[str, Value]]:
        """Its tensors, by their names."""
        yield f"{self.name}.weight".removeprefix("."), self.value
        if self.bias is not None:
            yield f"{self.name}.bias".removeprefix("."), self.bias


class PackedMatrix(nn.Module):
    """Holds a matrix's tensors as parameters, so that they move, count and are shared as others do."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.panels, self.scales, self.bias = map(_held, (matrix.panels, matrix.scales, matrix.bias))
        self.outputs = matrix.outputs

    @property
    def matrix(self) -> Matrix:
        """The matrix, as it is now."""
        assert self.panels is not None
        return Matrix(self.panels, self.scales, self.bias, self.outputs)


class PackedLinear(nn.Module):
    """A linear layer whose matrices lie in panels: one, or several that take the same input.

    Gradients reach its input, so that what lies before or beside it can be trained; it does not learn itself.
    """

    def __init__(self, *matrices: Matrix, learns: bool = False) -> None:
        """Outputs stand in the order of the matrices.

        `learns`: whether it took the place of weights that were to be trained, which it then refuses to be.
        """
        super().__init__()
        self.in_features, self.out_features = matrices[0].inputs, sum(each.outputs for each in matrices)
        self.parts, self.learns = nn.ModuleList(map(PackedMatrix, matrices)), learns

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out).

        Raises:
            ModelError: it is to learn.
        """
        if self.learns and self.training and torch.is_grad_enabled():
            # The norms would learn, and the matrices stay as they are: nobody means that.
            raise ModelError(
                "a packed model answers and does not learn: call unpack() before training it, or freeze it "
                "(requires_grad_(False)) before packing, and train what is added to it"
            )
        found = [multiply(x, matrix) for matrix in self.matrices()]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def matrices(self) -> list[Matrix]:
        """What is multiplied by, in the order of the outputs."""
        return [part.matrix for part in self.parts if isinstance(part, PackedMatrix)]

    def plain(self, rows: int | None = None) -> Iterator[tuple[str, Value]]:
        """The tensors of the layer that it stands for."""
        return _tensors(self.apart({"": self.out_features}, rows))

    def apart(self, outputs: Mapping[str, int], rows: int | None = None) -> Iterator[Part]:
        """The layers that were put together, by their names and numbers of outputs; or some rows of each."""
        found = apart(self.matrices(), outputs.values(), rows)
        yield from (Part(name, *each, self.learns) for name, each in zip(outputs, found, strict=True))


class PackedEmbedding(nn.Module):
    """An embedding that lies in panels: an output projection shares it, or it is of whole numbers."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        """`dtype` is the model's, to which whole numbers are expanded on lookup."""
        super().__init__()
        self.held, self.num_embeddings = PackedMatrix(matrix), matrix.outputs
        # Nothing but a type and a device that change with the model's.
        self.register_buffer("like", matrix.panels.new_empty(0, dtype=dtype), persistent=False)

    @property
    def matrix(self) -> Matrix:
        """What its rows are taken from."""
        return self.held.matrix

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, D)."""
        matrix = self.matrix
        if matrix.scales is None:
            return panels.outputs_of(matrix.panels, ids)
        return integers.outputs_of(matrix.panels, matrix.scales, ids, self.get_buffer("like").dtype)

    def plain(self, rows: int | None = None) -> Iterator[tuple[str, Value]]:
        """The tensors of the embedding that it stands for."""
        ((value, _),) = apart([self.matrix], [self.num_embeddings], rows)
        yield "weight", value


class PackedNorm(nn.Module):
    """RMSNorm in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return rowwise.norm(x, self.weight, self.eps)


class PackedMLP(nn.Module):
    """SwiGLU whose gate and up are one product."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_up, self.down_proj = joined(mlp.gate_proj, mlp.up_proj), joined(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        found: Tensor = self.down_proj(rowwise.gated(self.gate_up(x)))
        return found

    def linears(self, rows: int | None = None) -> Iterator[Part]:
        """The linear layers of the MLP that it stands for, or some rows of each."""
        width = self.down_proj.in_features
        yield from self.gate_up.apart({"gate_proj": width, "up_proj": width}, rows)
        yield from self.down_proj.apart({"down_proj": self.down_proj.out_features}, rows)

    def plain(self, rows: int | None = None) -> Iterator[tuple[str, Value]]:
        """Its tensors."""
        return _tensors(self.linears(rows))


class PackedAttention(nn.Module):
    """Attention whose queries, keys and values are one product."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.kernel, self.head_dim, self.dropout = attention.kernel, attention.head_dim, attention.dropout
        self.heads = q.out_features // self.head_dim, k.out_features // self.head_dim  # N, K
        self.qkv, self.o_proj = joined(q, k, v), joined(attention.o_proj)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, attend: Attend | None
    ) -> Tensor:
        """(B, T, D) → (B, T, D), as `puna.model.llama.Attention` does."""
        q, k, v = rowwise.turned(self.qkv(x), cos, sin, self.heads)
        if attend is not None:
            out = attend(q, k, v)
        else:
            dropout = self.dropout if self.training else 0.0
            out = self.kernel(q, k, v, starts=starts, causal=True, dropout=dropout)
        found: Tensor = self.o_proj(out.flatten(2))
        return found

    def linears(self, rows: int | None = None) -> Iterator[Part]:
        """The linear layers of the attention that it stands for, or some rows of each."""
        queries, keys = (count * self.head_dim for count in self.heads)
        yield from self.qkv.apart({"q_proj": queries, "k_proj": keys, "v_proj": keys}, rows)
        yield from self.o_proj.apart({"o_proj": self.o_proj.out_features}, rows)

    def plain(self, rows: int | None = None) -> Iterator[tuple[str, Value]]:
        """Its tensors."""
        return _tensors(self.linears(rows))


def joined(*linears: nn.Module) -> PackedLinear:
    """One product, as far as they are of one kind, for linear layers that take the same input."""
    matrices: list[Matrix] = []
    for packed, neighbours in groupby(linears, lambda linear: type(linear) is PackedLinear):
        some = list(neighbours)
        # Plain ones go into panels together, straight from where they lie.
        matrices += below(_matrices(some)) if packed else [_of_plain(some)]
    return PackedLinear(*matrices, learns=any(map(_learns, linears)))


def linear_of(part: Part) -> nn.Linear | PackedLinear:
    """The layer for itself: torch's in floating point, packed in whole numbers."""
    value, bias = part.value, part.bias
    if isinstance(value, Packed):
        return PackedLinear(in_panels(value, bias=bias), learns=part.learns)
    outputs, inputs = value.shape
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=bias is not None)
    linear.weight = nn.Parameter(value.detach(), part.learns)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), part.learns)
    return linear


def _matrices(linears: Sequence[nn.Module]) -> list[Matrix]:
    return [each for linear in linears if isinstance(linear, PackedLinear) for each in linear.matrices()]


def _of_plain(linears: Sequence[nn.Module]) -> Matrix:
    plain = [linear for linear in linears if isinstance(linear, nn.Linear)]
    biases: list[Tensor] = [linear.bias for linear in plain if linear.bias is not None]
    return in_panels(*(linear.weight for linear in plain), bias=torch.cat(biases) if biases else None)


def _learns(linear: nn.Module) -> bool:
    if isinstance(linear, PackedLinear):
        return linear.learns
    return any(parameter.requires_grad for parameter in linear.parameters())


def _held(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):  # one that is shared stays the same
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def _tensors(linears: Iterator[Part]) -> Iterator[tuple[str, Value]]:
    for part in linears:
        yield from part.tensors()
