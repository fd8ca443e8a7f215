"""Number types of a run: what matrix products are formed in, and what the weights are kept in.

| `precision.weights` | weights and gradients | what an update reads and writes | rounding |
|---|---|---|---|
| `float32` | float32; products in the chosen type, under autocast | the weights | none |
| `bfloat16+float32` | bfloat16 | a float32 copy, of which the weights are the rounding | to nearest |
| `bfloat16` | bfloat16 | the weights | stochastic |

With weights in bfloat16 everything between them is bfloat16 too, the residual stream included. float64, for
tests, keeps everything in float64.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from puna.devices import choose_dtype
from puna.errors import SettingsError
from puna.settings import Settings, fixed

Kept = Literal["float32", "bfloat16+float32", "bfloat16"]


class PrecisionSettings(Settings):
    """The type of matrix products: auto, float32, bfloat16, float16 or float64; and that of weights.

    `weights` is float32; or, with products in bfloat16, bfloat16+float32 (a float32 copy beside the
    optimizer's state) or bfloat16 (no copy: stochastic rounding, half the memory). `float8` forms products
    within the layers in float8, on devices that can; what they give stays bfloat16.
    """

    dtype: str = "auto"
    weights: Kept = fixed("float32")
    float8: bool = False


@dataclass(frozen=True)
class Precision:
    """A device, the type in which it forms matrix products, and what weights are kept in."""

    device: torch.device
    compute: torch.dtype
    weights: Kept = "float32"

    @classmethod
    def of(cls, settings: PrecisionSettings, device: torch.device) -> Precision:
        """The types of a run.

        Raises:
            SettingsError: the type is unknown, or weights in bfloat16 stand beside other products.
        """
        compute = choose_dtype(settings.dtype, device)
        if settings.float8 and compute != torch.bfloat16:
            name = str(compute).removeprefix("torch.")
            raise SettingsError(
                f"precision.float8 = true needs bfloat16 around it, got {name}; "
                'set precision.dtype = "bfloat16"'
            )
        if settings.weights != "float32" and compute != torch.bfloat16:
            name = str(compute).removeprefix("torch.")
            chosen = f"{name}, which auto chose for {device}" if settings.dtype == "auto" else name
            raise SettingsError(
                f'precision.weights = "{settings.weights}" needs products in bfloat16, got {chosen}; '
                'set precision.dtype = "bfloat16", or precision.weights = "float32"'
            )
        return cls(device, compute, settings.weights)

    @property
    def stored(self) -> torch.dtype:
        """The type of parameters and gradients."""
        return self.master if self.weights == "float32" else torch.bfloat16

    @property
    def master(self) -> torch.dtype:
        """The type that updates are made in: of the optimizer's state, and of the weights or their copy."""
        if self.weights == "bfloat16":
            return torch.bfloat16
        return torch.float64 if self.compute == torch.float64 else torch.float32

    @property
    def scales(self) -> bool:
        """Whether gradients need loss scaling: float16 ends at 6e-8, and most of them lie below."""
        return self.compute == torch.float16

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.compute == self.stored:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    def __str__(self) -> str:
        name = str(self.compute).removeprefix("torch.")
        plain = self.weights == "float32" and self.compute == self.master
        return name if plain else f"{name} with {self.weights} weights"


@dataclass
class LossScale:
    """Dynamic loss scaling (arXiv 1710.03740): as large as gradients in float16 allow.

    A power of two always, so that scaling up and down again changes no bit. An overflow halves it and costs
    one step; `GROWTH_STEPS` clean steps double it.
    """

    scale: float = 65536.0
    clean: int = 0

    GROWTH_STEPS = 2000
    LARGEST = 2.0**24

    def overflowed(self) -> bool:
        """Note an overflow. False when the scale cannot fall further: then scaling is not the cause."""
        if self.scale <= 1.0:
            return False
        self.scale, self.clean = self.scale / 2, 0
        return True

    def succeeded(self) -> None:
        """Note a step whose gradients were finite."""
        self.clean += 1
        if self.clean == self.GROWTH_STEPS:
            self.scale, self.clean = min(self.scale * 2, self.LARGEST), 0
