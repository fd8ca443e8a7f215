"""The learning rate: a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math
from collections.abc import Callable

from pydantic import Field, field_validator

from puna.errors import SettingsError, nearest
from puna.settings import Settings


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1.0 - progress


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}
"""Progress after warm-up, 0 to 1 → the share of the way from the minimum to the peak."""


class ScheduleSettings(Settings):
    """Linear warm-up, then a decay to `minimum` times the peak; LLaMA: 2,000 steps, cosine, 0.1."""

    name: str = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    minimum: float = Field(default=0.1, ge=0.0, le=1.0)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}.{nearest(name, SCHEDULES)}"
            )
        return name


def check(settings: ScheduleSettings, steps: int) -> None:
    """Raises SettingsError where warm-up would take the whole run."""
    if settings.warmup_steps >= steps:
        raise SettingsError(
            f"warmup_steps must be below the number of steps, got {settings.warmup_steps} of {steps}; "
            "lower it, or train longer"
        )


def learning_rate(settings: ScheduleSettings, peak: float, step: int, steps: int) -> float:
    """The rate of update `step` (from 0) of `steps`.

    The first update already moves, step `warmup_steps` has the peak, and the last one exactly the minimum.

    >>> settings = ScheduleSettings(warmup_steps=4, minimum=0.1)
    >>> [round(learning_rate(settings, 1.0, step, 9), 3) for step in range(9)]
    [0.2, 0.4, 0.6, 0.8, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    progress = (step - settings.warmup_steps) / max(1, steps - 1 - settings.warmup_steps)
    share = SCHEDULES[settings.name](min(progress, 1.0))
    return peak * (settings.minimum + (1.0 - settings.minimum) * share)
