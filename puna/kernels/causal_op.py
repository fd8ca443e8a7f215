"""Causal attention as an operator of torch: autograd and the compiler know it, and call it whole.

B batch   T positions   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puna.kernels import causal

# Not `torch.library.custom_op`: what it makes imports the compiler at the first call, 70 MiB and a second.
_LIBRARY = torch.library.Library("puna", "DEF")
_LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, Tensor? starts) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? starts)"
    " -> (Tensor, Tensor, Tensor)"
)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√H)·v (B, T, N, H) over the keys starts[t]..t, or all up to t, of q and k as they are.

    Args:
        q: (B, T, N, H).
        k: (B, T, K, H), as v.
        v: (B, T, K, H).
        starts: (B or 1, T), int32, or None.
    """
    return attend(q, k, v, starts)[0]


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same, and the logarithms of the sums (B, N, T), which `attend_backward` asks for."""
    found: tuple[Tensor, Tensor] = torch.ops.puna.attend(q, k, v, starts)
    return found


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `out` (B, T, N, H)."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.puna.attend_backward(grad, q, k, v, out, lse, starts)
    return found


def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    return causal.attend(q, k, v, None, None, starts)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return causal.attend_backward(grad, q, k, v, out, lse, None, None, starts)


# Results without numbers, for the compiler and for models without memory.


def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, N, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(B, N, T, dtype=wide)


def _attend_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, starts, out, lse = ctx.saved_tensors
    if grad is None:
        return None, None, None, None
    return *attend_backward(grad, q, k, v, out, lse, starts), None


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("puna::attend", _attend_shapes, lib=_LIBRARY)
torch.library.register_fake("puna::attend_backward", _attend_backward_shapes, lib=_LIBRARY)
torch.library.register_autograd("puna::attend", _differentiate, setup_context=_keep, lib=_LIBRARY)
