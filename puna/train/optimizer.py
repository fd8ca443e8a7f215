"""Optimizers, and their state by parameter name.

torch numbers optimizer state by the position of a parameter in a list; here it is kept under the parameter's
name, so that a checkpoint can be read by eye and survives a change of that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from puna.errors import CheckpointError, nearest
from puna.settings import Settings

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Groups = list[dict[str, Any]]


def _adamw(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    # Fused: one pass over memory instead of ten, and elementwise, hence the same bits every time.
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerSettings], torch.optim.Optimizer]] = {"adamw": _adamw}


class OptimizerSettings(Settings):
    """AdamW (arXiv 1711.05101) with LLaMA's values; the learning rate is the peak of the schedule."""

    name: str = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0.0)
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)  # TOML has lists only
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.{nearest(name, OPTIMIZERS)}"
            )
        return name


def build(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """An optimizer of the parameters that require gradients.

    Matrices decay (the embedding too: it is one), vectors do not: pulling the gain of a norm towards zero
    would shrink the layer's whole output.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[settings.name]([group for group in groups if group["params"]], settings)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<kind>.<parameter>`, for instance `exp_avg.model.norm.weight`.

    Empty before the first update.
    """
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `state_tensors` gave, bit for bit, on each parameter's device.

    Raises:
        CheckpointError: a name or shape fits no trained parameter.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    restored: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise CheckpointError(f"optimizer state {key!r} belongs to no trained parameter of this model")
        if value.dim() and value.shape != parameters[name].shape:
            expected, came = tuple(parameters[name].shape), tuple(value.shape)
            raise CheckpointError(f"optimizer state {key!r}: expected shape {expected}, got {came}")
        restored[name][kind] = value.to(parameters[name].device, copy=True)
    optimizer.state.clear()
    optimizer.state.update({parameters[name]: state for name, state in restored.items() if state})
