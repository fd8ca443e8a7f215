"""Optimizers: AdamW, or Muon for the matrices of layers; and their state by parameter name.

An update scales gradients in the pass that reads them. State is kept under the parameter's name, so that a
checkpoint can be read by eye and survives a change of their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from puna.errors import CheckpointError, nearest
from puna.kernels import adamw
from puna.kernels.rounding import Key
from puna.model.llama import Llama
from puna.settings import Settings, fixed
from puna.train import muon
from puna.train.muon import MuonSettings
from puna.train.precision import Precision

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
State = dict[str, Tensor]


def _none(model: Llama) -> Collection[nn.Parameter]:
    return ()


def _matrices_of_layers(model: Llama) -> Collection[nn.Parameter]:
    """Not the embedding nor the output layer, whose rows are tokens that a batch has or has not."""
    return [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]


OPTIMIZERS: dict[str, Callable[[Llama], Collection[nn.Parameter]]] = {
    "adamw": _none,
    "muon": _matrices_of_layers,
}
"""Which parameters Muon moves; AdamW moves all others."""

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}
"""What is kept of gradients for each number."""


class OptimizerSettings(Settings):
    """AdamW (arXiv 1711.05101) with LLaMA's values, or muon: then `betas` and `eps` are for what AdamW moves.

    The learning rate is the peak of the schedule, the same for both.
    """

    name: str = fixed("adamw")
    learning_rate: float = Field(default=3e-4, gt=0.0)
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)  # TOML has lists only
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    muon: MuonSettings = MuonSettings()

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.{nearest(name, OPTIMIZERS)}"
            )
        return name

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.name != "muon" and self.muon != MuonSettings():
            raise ValueError(
                f'optimizer.muon is for optimizer.name = "muon", got {self.name!r}; set that, or leave it out'
            )
        return self


class Types(NamedTuple):
    """The number types of a run that an optimizer asks for."""

    master: torch.dtype
    products: torch.dtype

    @classmethod
    def of(cls, precision: Precision) -> Types:
        """Products in float16 lose what is small: float32 stands in for it."""
        bfloat16 = precision.compute == torch.bfloat16
        return cls(precision.master, torch.bfloat16 if bfloat16 else precision.master)


@dataclass(frozen=True)
class Trained:
    """A parameter that requires gradients."""

    name: str
    parameter: nn.Parameter
    rule: str
    decay: float

    @property
    def gradient(self) -> Tensor:
        """What moves it now."""
        assert self.parameter.grad is not None
        return self.parameter.grad

    def begin(self, master: torch.dtype) -> State:
        """The state before the first update; a copy of the weights where updates are of another type."""
        weight = self.parameter.detach()
        kinds = MOMENTS[self.rule]
        state = {"step": torch.zeros(())} | {kind: torch.zeros_like(weight, dtype=master) for kind in kinds}
        return state if weight.dtype == master else state | {"master": weight.to(master)}


class Optimizer:
    """Moves parameters against their gradients; one without a gradient stays as it is."""

    def __init__(
        self, trained: Sequence[Trained], settings: OptimizerSettings, types: Types, seed: int = 0
    ) -> None:
        self.trained, self.settings, self.types, self.seed = trained, settings, types, seed
        self.state: dict[str, State] = {}

    @torch.no_grad()
    def step(self, rate: float, factor: float = 1.0) -> None:
        """Update at a learning rate by the gradients times `factor`, and drop them."""
        moving = [one for one in self.trained if one.parameter.grad is not None]
        for one in moving:
            if one.name not in self.state:
                self.state[one.name] = one.begin(self.types.master)
            self.state[one.name]["step"] += 1
        rates = adamw.Rates(rate, self.settings.betas, self.settings.eps, factor)
        adamw.update([self._update(one) for one in moving if one.rule == "adamw"], rates)
        for one in moving:
            if one.rule == "muon":
                muon.update(self._matrix(one), self.settings.muon, rate, factor, self.types.products)
        self.discard()

    def discard(self) -> None:
        """Drop the gradients: a step without effect ends so."""
        for one in self.trained:
            one.parameter.grad = None

    def _update(self, one: Trained) -> adamw.Update:
        state = self.state[one.name]
        return adamw.Update(
            one.parameter.detach(), one.gradient, state["exp_avg"], state["exp_avg_sq"], state.get("master"),
            int(state["step"]), one.decay, self._key(one),
        )  # fmt: skip

    def _matrix(self, one: Trained) -> muon.Matrix:
        state = self.state[one.name]
        return muon.Matrix(
            one.parameter.detach(), one.gradient, state["momentum"], state.get("master"), one.decay,
            self._key(one),
        )  # fmt: skip

    def _key(self, one: Trained) -> Key:
        """Of the parameter's own step, so that the order of parameters plays no part, nor does resumption."""
        return Key.of(self.seed, int(self.state[one.name]["step"]), one.name)


def build(
    model: Llama, settings: OptimizerSettings, precision: Precision | None = None, seed: int = 0
) -> Optimizer:
    """An optimizer of the parameters that require gradients.

    Matrices decay (the embedding too: it is one), vectors do not: pulling the gain of a norm towards zero
    would shrink the layer's whole output.

    Args:
        precision: the run's number types; those of the parameters unless given.
        seed: of stochastic rounding.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    by_muon = {id(parameter) for parameter in OPTIMIZERS[settings.name](model)}
    entries = [
        Trained(
            name,
            parameter,
            "muon" if id(parameter) in by_muon else "adamw",
            settings.weight_decay if parameter.dim() >= 2 else 0.0,
        )
        for name, parameter in trained
    ]
    stored = next((parameter.dtype for _, parameter in trained), torch.float32)
    return Optimizer(entries, settings, Types.of(precision) if precision else Types(stored, stored), seed)


def bytes_per_number(precision: Precision, rule: str = "adamw", micro_batches: int = 1) -> dict[str, int]:
    """Bytes that each number of a parameter takes while it is trained, by what they hold.

    | weights | `weights` | `gradients` | `optimizer`, AdamW | Muon |
    |---|---|---|---|---|
    | float32 | 4 | 4 | 8 | 4 |
    | bfloat16+float32 | 2 | 2 | 12 | 8 |
    | bfloat16 | 2 | 2 | 4 | 2 |

    Gradients of several micro-batches are added up in float32: 4 in any case.
    """
    stored, master = precision.stored.itemsize, precision.master.itemsize
    copies = len(MOMENTS[rule]) + (precision.stored != precision.master)
    gradients = stored if micro_batches == 1 else max(stored, torch.float32.itemsize)
    return {"weights": stored, "gradients": gradients, "optimizer": copies * master}


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<kind>.<parameter>`, for instance `exp_avg.model.norm.weight`.

    Empty before the first update.
    """
    return {
        f"{kind}.{name}": value for name, state in optimizer.state.items() for kind, value in state.items()
    }


def load_state_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, bit for bit, on each parameter's device.

    Raises:
        CheckpointError: a name, type or shape fits no trained parameter, or another optimizer saved this.
    """
    expected = {one.name: one for one in optimizer.trained}
    restored: dict[str, State] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in expected:
            raise CheckpointError(f"optimizer state {key!r} belongs to no trained parameter of this model")
        restored.setdefault(name, {})[kind] = value
    for name, state in restored.items():
        fresh = expected[name].begin(optimizer.types.master)
        _check(name, fresh, state)
        restored[name] = {kind: state[kind].to(like.device, copy=True) for kind, like in fresh.items()}
    optimizer.state.clear()
    optimizer.state.update(restored)


def _check(name: str, fresh: State, saved: State) -> None:
    for kind in [kind for kind in fresh if kind in saved]:
        key, wanted, came = f"{kind}.{name}", fresh[kind], saved[kind]
        if came.shape != wanted.shape:
            shape, given = tuple(wanted.shape), tuple(came.shape)
            raise CheckpointError(f"optimizer state {key!r}: expected shape {shape}, got {given}")
        if came.dtype != wanted.dtype:
            raise CheckpointError(
                f"optimizer state {key!r}: expected {wanted.dtype}, got {came.dtype}; it was saved with "
                "other precision.weights: put them back, or begin a new run with init_from"
            )
    if fresh.keys() != saved.keys():
        expected, got = ", ".join(sorted(fresh)), ", ".join(sorted(saved))
        raise CheckpointError(
            f"optimizer state of {name}: expected {expected}, got {got}; it was saved with another "
            "optimizer.name or other precision.weights: put them back, or begin a new run with init_from"
        )
