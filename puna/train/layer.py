"""A layer's forward and backward, written out: what is costly to compute is kept, the rest computed again.

As in the LLaMA paper (arXiv 2302.13971, section 2.4). torch's autograd would keep the input of every
operation; here a layer keeps its input and the outputs of its matrix products, and forms norms, turned
queries and keys, SiLU and gate again in the backward pass. Asked to, it keeps its input alone.

    R rows (B · T)   D width   N query heads   K key/value heads   H head width   F feed-forward width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.kernels import causal_op
from puna.kernels.causal import Heads, attend, attend_backward
from puna.kernels.causal_plain import turn, turn_back
from puna.kernels.gates import swiglu, swiglu_backward
from puna.kernels.norms import add_rms_norm, rms_norm, rms_norm_backward


class Parameters(NamedTuple):
    """A layer's parameters, in the order in which they are used; a bias may be None."""

    input_norm: Tensor  # (D)
    q: Tensor  # (N·H, D)
    k: Tensor  # (K·H, D)
    v: Tensor  # (K·H, D)
    o: Tensor  # (D, N·H)
    post_norm: Tensor  # (D)
    gate: Tensor  # (F, D)
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


Gradients = tuple[Tensor | None, ...]
"""Of each of the parameters; those of frozen ones are None where that saves work."""


class Angles(NamedTuple):
    """Where the tokens stand: what turns queries and keys, (1 | B, T, H), and the first key of each query."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None  # (1 | B, T) int32


class Products(NamedTuple):
    """The three products of a linear layer: those of puna/kernels/gemm.py, or others called alike."""

    linear: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]


class Form(NamedTuple):
    """What a layer computes with besides tensors; `compute` is the type of what its products give."""

    heads: Heads
    input_eps: float
    post_eps: float
    compute: torch.dtype
    products: Products


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    x: Tensor  # (B, T, D), the layer's input
    qkv: Tensor  # (B, T, (N + 2K)·H)
    attended: Tensor  # (B, T, N, H)
    sums: Tensor  # (B, N, T), log Σ exp of each query's scores
    projected: Tensor  # (R, D), what attention adds
    gate_up: Tensor  # (R, 2F)
    input_scale: Tensor  # (R), 1 / √(mean(x²) + ε)
    post_scale: Tensor  # (R)


def forward(x: Tensor, angles: Angles, w: Parameters, form: Form) -> tuple[Tensor, Kept]:
    """The layer's output (B, T, D), and what its backward pass needs."""
    middle, kept = up_to_gates(x, angles, w, form)
    down = form.products.linear(swiglu(kept.gate_up), (w.down,), (w.down_bias,), form.compute)  # (R, D)
    return middle.add_(down).view(x.shape), kept


def up_to_gates(x: Tensor, angles: Angles, w: Parameters, form: Form) -> tuple[Tensor, Kept]:
    """The stream behind attention (R, D), and all that is kept: the forward pass but for its last product."""
    rows, compute, linear = x.flatten(0, 1), form.compute, form.products.linear  # (R, D)
    y, input_scale = rms_norm(rows, w.input_norm, form.input_eps, compute)
    qkv = linear(y, (w.q, w.k, w.v), (w.q_bias, w.k_bias, w.v_bias), compute)  # (R, (N + 2K)·H)
    qkv = qkv.view(*x.shape[:2], -1)
    attended, sums = _attention(qkv, angles, form.heads)  # (B, T, N, H)
    projected = linear(attended.view(len(rows), -1), (w.o,), (w.o_bias,), compute)  # (R, D)
    middle, y, post_scale = add_rms_norm(rows, projected, w.post_norm, form.post_eps, compute)
    gate_up = linear(y, (w.gate, w.up), (w.gate_bias, w.up_bias), compute)  # (R, 2F)
    return middle, Kept(x, qkv, attended, sums, projected, gate_up, input_scale, post_scale)


def backward(grad: Tensor, kept: Kept, angles: Angles, w: Parameters, form: Form) -> tuple[Tensor, Gradients]:
    """Gradients of the layer's input (B, T, D) and of its parameters, from that of its output (B, T, D)."""
    x, qkv, attended, sums, projected, gate_up, input_scale, post_scale = kept
    rows, grad = x.flatten(0, 1), grad.reshape(-1, x.shape[-1])  # (R, D)
    input_gradient, gradients = form.products.input_gradient, partial(_gradients, form.products)

    small = grad.to(form.compute)
    grad_gate_up, hidden = swiglu_backward(input_gradient(small, (w.down,)), gate_up)  # (R, 2F), (R, F)
    (down,), (down_bias,) = gradients(small, hidden, (w.down,), (w.down_bias,))
    grad_y = input_gradient(grad_gate_up, (w.gate, w.up))  # (R, D)
    grad, small, y, post_norm = rms_norm_backward(
        grad_y, rows + projected, post_scale, w.post_norm, grad, again=True
    )
    (gate, up), (gate_bias, up_bias) = gradients(grad_gate_up, y, (w.gate, w.up), (w.gate_bias, w.up_bias))

    (o,), (o_bias,) = gradients(small, attended.view(len(rows), -1), (w.o,), (w.o_bias,))
    grad_attended = input_gradient(small, (w.o,)).view(attended.shape)  # (B, T, N, H)
    grad_qkv = _attention_backward(grad_attended, qkv, attended, sums, angles, form.heads).flatten(0, 1)
    grad_y = input_gradient(grad_qkv, (w.q, w.k, w.v))
    grad, _, y, input_norm = rms_norm_backward(grad_y, rows, input_scale, w.input_norm, grad, again=True)
    (q, k, v), (q_bias, k_bias, v_bias) = gradients(
        grad_qkv, y, (w.q, w.k, w.v), (w.q_bias, w.k_bias, w.v_bias)
    )
    return grad.view(x.shape), (
        input_norm, q, k, v, o, post_norm, gate, up, down,
        q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias,
    )  # fmt: skip


def _attention(qkv: Tensor, angles: Angles, heads: Heads) -> tuple[Tensor, Tensor]:
    """What queries attend to (B, T, N, H), and log Σ exp of their scores (B, N, T)."""
    q, k, v = heads.split(qkv)
    if not torch.compiler.is_compiling():
        return attend(q, k, v, *angles)
    # An operator that the compiler takes whole: where documents begin is read while it runs, and traced, such
    # reading would take the graph apart.
    found: tuple[Tensor, Tensor] = causal_op.attend(*_turned(q, k, angles), v, angles.starts)
    return found


def _attention_backward(
    grad: Tensor, qkv: Tensor, attended: Tensor, sums: Tensor, angles: Angles, heads: Heads
) -> Tensor:
    """The gradient of qkv (B, T, (N + 2K)·H), from that of `attended` (B, T, N, H)."""
    q, k, v = heads.split(qkv)
    if not torch.compiler.is_compiling():
        joint = torch.empty_like(qkv)
        attend_backward(grad, q, k, v, attended, sums, *angles, into=joint)
        return joint
    cos, sin, starts = angles
    dq, dk, dv = causal_op.attend_backward(grad, *_turned(q, k, angles), v, attended, sums, starts)
    dq, dk = (turn_back(each, cos, sin).to(qkv.dtype) for each in (dq, dk))
    return torch.cat((dq, dk, dv), dim=2).flatten(2)


def _turned(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    return turn(q, angles.cos, angles.sin), turn(k, angles.cos, angles.sin)


def _gradients(
    products: Products,
    grad: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Of weights whose products with x (R, I) were formed together, and of their biases; grad (R, ΣO)."""
    sizes = [len(weight) for weight in weights]
    of_weights: Sequence[Tensor | None] = [None] * len(weights)
    if any(weight.requires_grad for weight in weights):
        of_weights = products.weight_gradient(grad, x, dtype=weights[0].dtype).split(sizes)
    pieces = zip(biases, grad.split(sizes, dim=1), strict=True)
    return of_weights, [
        piece.sum(0, dtype=bias.dtype) if bias is not None and bias.requires_grad else None
        for bias, piece in pieces
    ]


class Plan(NamedTuple):
    """How one kind of layer is run: its form, the functions above (perhaps compiled), and what is kept."""

    form: Form
    memory: Memory
    forward: Callable[..., tuple[Tensor, Kept]] = forward
    up_to_gates: Callable[..., tuple[Tensor, Kept]] = up_to_gates
    backward: Callable[..., tuple[Tensor, Gradients]] = backward


class Memory(NamedTuple):
    """What stays between the passes: `store` says what is held, `fetch` makes what is kept of it again."""

    store: Callable[[Kept], Sequence[Tensor]]
    fetch: Callable[[Sequence[Tensor], Callable[[Tensor], Kept]], Kept]


def run(plan: Plan, x: Tensor, angles: Angles, parameters: Parameters) -> Tensor:
    """The layer's output (B, T, D), differentiable once by the backward pass above."""
    if not torch.is_grad_enabled():  # nothing is to be kept, much less to be copied
        return _forward(plan, x, angles, parameters)[0]
    out: Tensor = _Layer.apply(plan, x, *angles, *parameters)
    return out


def _forward(plan: Plan, x: Tensor, angles: Angles, parameters: Parameters) -> tuple[Tensor, Kept]:
    with torch.autocast(x.device.type, enabled=False):  # types are chosen here, as in the backward pass
        # Detached: the compiler would make a graph for what requires a gradient, and one for what does not.
        return plan.forward(x.detach(), angles, parameters, plan.form)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, cos: Tensor, sin: Tensor, starts: Any, *tensors: Any) -> Any:
        angles, parameters = Angles(cos, sin, starts), Parameters(*tensors)
        out, kept = _forward(plan, x, angles, parameters)
        ctx.plan = plan
        ctx.save_for_backward(*angles, *parameters, *plan.memory.store(kept))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        plan, saved = ctx.plan, ctx.saved_tensors
        first, last = len(Angles._fields), len(Angles._fields) + len(Parameters._fields)
        angles, parameters = Angles(*saved[:first]), Parameters(*saved[first:last])

        def again(x: Tensor) -> Kept:
            kept: Kept = plan.up_to_gates(x, angles, parameters, plan.form)[1]
            return kept

        with torch.autocast(grad.device.type, enabled=False):
            kept = plan.memory.fetch(saved[last:], again)
            grad_x, gradients = plan.backward(grad, kept, angles, parameters, plan.form)
        return None, grad_x, None, None, None, *gradients
