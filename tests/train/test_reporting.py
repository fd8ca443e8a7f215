"""How a step is told: the shares of its time, on record and on the console."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from puna.data.loader import Step
from puna.parallel import World
from puna.plan.measure import Peak
from puna.train.gradients import Totals
from puna.train.loop import LoopSettings, TrainState, train
from puna.train.objectives import language_modelling
from puna.train.optimizer import OptimizerSettings, build
from puna.train.reporting import Outcome, Reporter, Spent
from tests.train.tiny import CPU, TinySource, precision, tiny_model


class Bar:
    """Keeps the notes of a progress bar."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start_at(self, amount: float) -> None:
        pass

    def advance(self, amount: float, note: str = "") -> None:
        self.notes.append(note)

    def say(self, text: str) -> None:
        pass


def told(spent: Spent, peak: Peak | None = None) -> tuple[dict[str, Any], str]:
    """The timing and the console's note of a step of 64 tokens, 1000 operations each."""
    records: list[dict[str, Any]] = []
    bar = Bar()
    reporter = Reporter(lambda kind, **values: records.append(values), bar, World(), peak, 1000.0)
    totals = Totals(loss_sum=10.0, count=5.0, metrics={})
    reporter.updated(3, 192, Outcome(totals, 0.5, 1e-3, 64, spent))
    return records[0]["timing"], bar.notes[0]


def test_shares_of_a_step_are_of_its_seconds() -> None:
    timing, note = told(Spent(2.0, waiting=0.5, updating=0.25))
    assert timing == {"seconds": 2.0, "tokens_per_s": 32.0, "waiting": 0.25, "updating": 0.125}
    assert note == "loss 2.000  25% waiting for data"


def test_waiting_is_worth_a_word_from_one_percent_on() -> None:
    peak = Peak(64_000.0, torch.float32, CPU, 1)
    timing, note = told(Spent(2.0, waiting=0.019), peak)
    assert note == "loss 2.000  50% of 64kFLOP/s"
    assert timing["utilisation"] == 0.5
    assert told(Spent(2.0, waiting=0.02), peak)[1] == "loss 2.000  50% of 64kFLOP/s  1% waiting for data"


class SlowSource(TinySource):
    """Needs a twentieth of a second for every step."""

    def steps(self, position: int) -> Iterator[Step]:
        for step in super().steps(position):
            time.sleep(0.05)
            yield step


@pytest.mark.parametrize(("source", "waits"), [(SlowSource(), True), (TinySource(), False)])
def test_the_loop_tells_how_long_it_waited_for_rows(source: TinySource, waits: bool) -> None:
    timings: list[dict[str, float]] = []
    model = tiny_model()
    train(
        language_modelling, model, build(model, OptimizerSettings()), source, TrainState(),
        settings=LoopSettings(steps=4), rate=lambda step: 1e-3, precision=precision(),
        record=lambda kind, **values: timings.append(values["timing"]),
    )  # fmt: skip
    waited = [timing["waiting"] * timing["seconds"] for timing in timings]
    assert min(waited) >= 0.05 if waits else min(waited) < 0.05
    for timing in timings:
        assert timing["updating"] > 0
        assert 0 <= timing["waiting"] + timing["updating"] <= 1
