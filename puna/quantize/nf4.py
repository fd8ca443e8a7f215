"""Linear layers whose weights are nf4, for fine-tuning beside them (QLoRA, arXiv 2305.14314).

They keep the codes and expand them for each product; gradients reach what stands before them.

O outputs   I inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from puna.errors import ModelError
from puna.model.llama import Llama
from puna.model.weights import Packed, spread
from puna.quantize.codes import expand
from puna.quantize.recipe import Recipe, choices
from puna.quantize.release import release
from puna.quantize.schemes import Format, quantized


class Nf4Linear(nn.Module):
    """A linear layer whose `codes` and `scales` are a matrix in nf4."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        assert packed.scales is not None
        self.out_features, self.in_features = packed.shape
        self.codes = nn.Parameter(packed.data, requires_grad=False)
        self.scales = nn.Parameter(packed.scales, requires_grad=False)
        self.bias = bias

    def packed(self) -> Packed:
        """The matrix as files hold it."""
        return Packed("nf4", self.codes.detach(), self.scales.detach(), (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in the type of x."""
        out: Tensor = _Product.apply(x, self.codes, self.scales)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias

    def plain(self, rows: int | None = None) -> Iterator[tuple[str, Tensor | Packed]]:
        """The tensors of the layer that it stands for, or some rows of them."""
        which = slice(None) if rows is None else spread(self.out_features, rows).to(self.codes.device)
        codes, scales = self.codes.detach()[which], self.scales.detach()[which]
        yield "weight", Packed("nf4", codes, scales, (len(codes), self.in_features))
        if self.bias is not None:
            yield "bias", self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ that keeps codes for the way back: kept expanded, all layers together would be the whole model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return x @ _matrix(codes, scales, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        codes, scales = ctx.saved_tensors
        return gradient @ _matrix(codes, scales, gradient.dtype), None, None


def _matrix(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return expand(Packed("nf4", codes, scales, (codes.shape[0], 2 * codes.shape[1]))).to(dtype)


@torch.no_grad()
def to_nf4(model: Llama, recipe: Recipe) -> None:
    """Rewrite the linear layers that a recipe makes nf4, one by one, each before the next is touched.

    Raises:
        ModelError: a layer is packed or adapted, or its shape does not allow nf4.
        SettingsError: the recipe asks for what is not nf4, or does not fit the model.
    """
    formats = {
        name.removesuffix(".weight"): choice.format for name, choice in choices(recipe, model.config).items()
    }
    for name in formats:
        _linear(model, name)  # all are looked at before the first is replaced
    for name, format in formats.items():
        linear = _linear(model, name)
        _replace(model, name, _quantized(linear, format, f"{name}.weight"))
        release(linear.weight)


@torch.no_grad()
def from_nf4(model: Llama) -> None:
    """Undo `to_nf4` but for the rounding: linear layers in the final norm's type, which can be trained."""
    dtype = model.model.norm.weight.dtype
    for name in [name for name, module in model.named_modules() if type(module) is Nf4Linear]:
        _replace(model, name, _expanded(model.get_submodule(name), dtype))


def _linear(model: Llama, name: str) -> nn.Linear:
    module = model.get_submodule(name) if name in dict(model.named_modules()) else None
    if type(module) is not nn.Linear:
        raise ModelError(
            f"{name} is not a plain linear layer, which nf4 takes the place of: undo packing first"
        )
    return module


def _quantized(linear: nn.Linear, format: Format, name: str) -> Nf4Linear:
    return Nf4Linear(quantized(linear.weight.detach(), format, name), linear.bias)


def _expanded(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    assert isinstance(module, Nf4Linear)
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(expand(module.packed()).to(dtype))
    if module.bias is not None:
        linear.bias = module.bias
    return linear


def _replace(model: Llama, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module.train(model.get_submodule(name).training))
