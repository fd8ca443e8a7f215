"""Number types of a run: what matrix products are formed in, and what the weights are kept in.

Weights, their gradients and the optimizer's state are float32; products run in the chosen type under
autocast. float64, for tests, keeps everything in float64.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from puna.devices import choose_dtype
from puna.settings import Settings


class PrecisionSettings(Settings):
    """The type of matrix products: auto, float32, bfloat16, float16 or float64."""

    dtype: str = "auto"


@dataclass(frozen=True)
class Precision:
    """A device, and the type in which it forms matrix products."""

    device: torch.device
    compute: torch.dtype

    @classmethod
    def of(cls, settings: PrecisionSettings, device: torch.device) -> Precision:
        """Raises SettingsError where the type is unknown."""
        return cls(device, choose_dtype(settings.dtype, device))

    @property
    def master(self) -> torch.dtype:
        """The type of parameters, gradients and optimizer state."""
        return torch.float64 if self.compute == torch.float64 else torch.float32

    @property
    def scales(self) -> bool:
        """Whether gradients need loss scaling: float16 ends at 6e-8, and most of them lie below."""
        return self.compute == torch.float16

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.compute == self.master:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.compute, self.master)]
        return names[0] if names[0] == names[1] else f"{names[0]} with {names[1]} weights"


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
