"""The modules of a packed model: matrices in panels, those that take the same input as one.

B batch   T positions in the input   D width   N query heads   K key/value heads
H head width   F feed-forward width
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from puna.errors import ModelError
from puna.kernels import panels, rowwise
from puna.model.llama import MLP, Attend, Attention, RMSNorm


class PackedLinear(nn.Module):
    """A linear layer whose `weight` lies in panels."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1] * weight.shape[3], outputs
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out).

        Raises:
            ModelError: it is to learn.
        """
        if self.training and torch.is_grad_enabled():  # the rest of the model would learn, and this not
            raise ModelError("a packed model answers and does not learn: call unpack() before training it")
        return panels.multiply(x, self.weight, self.bias, self.out_features)

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights (…, in) of some outputs (…)."""
        return panels.outputs_of(self.weight, outputs)

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the layer that it stands for."""
        yield "weight", panels.out_of_panels(self.weight, self.out_features)
        if self.bias is not None:
            yield "bias", self.bias


class PackedEmbedding(nn.Module):
    """An embedding whose `weight` lies in panels, since an output projection shares it."""

    def __init__(self, weight: nn.Parameter, count: int) -> None:
        super().__init__()
        self.num_embeddings, self.weight = count, weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, D)."""
        return panels.outputs_of(self.weight, ids)

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the embedding that it stands for."""
        yield "weight", panels.out_of_panels(self.weight, self.num_embeddings)


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

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the MLP that it stands for."""
        width = self.down_proj.in_features
        yield from _parts(self.gate_up, {"gate_proj": width, "up_proj": width})
        yield from _parts(self.down_proj, {"down_proj": self.down_proj.out_features})


class PackedAttention(nn.Module):
    """Attention whose queries, keys and values are one product."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.kernel, self.head_dim, self.dropout = attention.kernel, attention.head_dim, attention.dropout
        self.window = attention.window
        self.heads = q.out_features // self.head_dim, k.out_features // self.head_dim  # N, K
        self.qkv, self.o_proj = joined(q, k, v), joined(attention.o_proj)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, attend: Attend | None
    ) -> Tensor:
        """(B, T, D) → (B, T, D), as `puna.model.llama.Attention` does."""
        q, k, v = rowwise.turned(self.qkv(x), cos, sin, self.heads)
        if attend is not None:
            out = attend(q, k, v)
        else:
            dropout = self.dropout if self.training else 0.0
            out = self.kernel(q, k, v, mask=mask, causal=mask is None, dropout=dropout, window=self.window)
        found: Tensor = self.o_proj(out.flatten(2))
        return found

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the attention that it stands for."""
        queries, keys = (count * self.head_dim for count in self.heads)
        yield from _parts(self.qkv, {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        yield from _parts(self.o_proj, {"o_proj": self.o_proj.out_features})


def joined(*linears: nn.Linear) -> PackedLinear:
    """One product for linear layers that take the same input, outputs in their order."""
    outputs = sum(linear.out_features for linear in linears)
    weights = [linear.weight for linear in linears]
    weight = nn.Parameter(panels.into_panels(*weights), requires_grad=False)
    if linears[0].bias is None:
        return PackedLinear(weight, None, outputs)
    bias = torch.cat([linear.bias for linear in linears])
    return PackedLinear(weight, nn.Parameter(bias, requires_grad=False), outputs)


def _parts(packed: PackedLinear, outputs: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the layers that were joined, by their names and numbers of outputs."""
    tensors = [(name, tensor.split(list(outputs.values()))) for name, tensor in packed.plain()]
    for index, name in enumerate(outputs):
        yield from ((f"{name}.{leaf}", parts[index]) for leaf, parts in tensors)
