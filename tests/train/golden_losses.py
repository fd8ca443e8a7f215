"""The loss curve of a tiny run: float32, eager, thirty steps.

    python -m tests.train.golden_losses        writes tests/golden/losses_tiny.json

A change that should leave results alone leaves this file alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from puna.train.loop import LoopSettings, TrainState, train
from puna.train.objectives import language_modelling
from puna.train.optimizer import OptimizerSettings, build
from puna.train.schedule import ScheduleSettings, learning_rate
from tests.train.tiny import TinySource, precision, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "losses_tiny.json"
STEPS, PEAK = 30, 1e-2
SCHEDULE = ScheduleSettings(warmup_steps=5)


def curve() -> list[dict[str, float]]:
    model = tiny_model()
    rows: list[dict[str, float]] = []

    def record(kind: str, **values: object) -> None:
        assert kind == "train", values
        rows.append({name: values[name] for name in ("step", "loss", "lr", "grad_norm")})  # type: ignore[misc]

    train(
        language_modelling, model, build(model, OptimizerSettings(learning_rate=PEAK)), TinySource(4),
        TrainState(), settings=LoopSettings(steps=STEPS), precision=precision(), record=record,
        rate=lambda step: learning_rate(SCHEDULE, PEAK, step, STEPS),
    )  # fmt: skip
    return rows


def readable(rows: list[dict[str, float]]) -> str:
    lines = [json.dumps({name: float(f"{value:.7g}") for name, value in row.items()}) for row in rows]
    return "[\n  " + ",\n  ".join(lines) + "\n]\n"


if __name__ == "__main__":
    GOLDEN.write_text(readable(curve()))
