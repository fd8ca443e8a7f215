"""How a step is told: on the console, and as one record in the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.parallel import World
from puna.plan.measure import Peak
from puna.progress import Tracker, quantity
from puna.train.gradients import Totals
from puna.train.metrics import Record

SHOWN = 3  # documents named on the console; the metrics name all
WAITS = 0.01  # from this share of a step on, waiting for data is worth a word on the console


@dataclass(frozen=True)
class Spent:
    """Seconds of a step: all of them, those in which it waited for rows, and those of the update.

    The update is what comes after the gradient is formed: summing it over ranks, clipping, the optimizer.
    """

    seconds: float
    waiting: float = 0.0
    updating: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Of waiting and updating in the whole."""
        return {"waiting": self.waiting / self.seconds, "updating": self.updating / self.seconds}


@dataclass(frozen=True)
class Outcome:
    """What one step came to; `fault` says why it was skipped, "" if it was not."""

    totals: Totals
    norm: float
    learning_rate: float
    positions: int
    spent: Spent
    fault: str = ""


@dataclass(frozen=True)
class Reporter:
    """Tells outcomes to a record and a progress bar; `step` is always the number of batches taken so far."""

    record: Record
    bar: Tracker
    world: World
    peak: Peak | None
    flops_per_token: float

    def updated(self, step: int, tokens: int, outcome: Outcome) -> None:
        """The weights moved."""
        self.record(
            "train",
            step=step,
            tokens=tokens,
            loss=outcome.totals.loss,
            lr=outcome.learning_rate,
            grad_norm=outcome.norm,
            **outcome.totals.means,
            timing=self._timing(outcome),
        )
        self._advance(outcome, f"loss {outcome.totals.loss:.3f}")

    def skipped(self, step: int, position: int, outcome: Outcome, documents: list[str]) -> None:
        """The step was left out, because of what its batch did."""
        self.record(
            "skipped",
            step=step,
            position=position,
            reason=outcome.fault,
            loss=outcome.totals.loss,
            grad_norm=outcome.norm,
            documents=documents,
        )
        more = f" and {len(documents) - SHOWN} more" if len(documents) > SHOWN else ""
        self.bar.say(
            f"step {step:>6}  skipped: {outcome.fault}; documents: {', '.join(documents[:SHOWN])}{more}"
        )
        self._advance(outcome, "skipped")

    def overflowed(self, step: int, outcome: Outcome, scale: float) -> None:
        """float16 ended before the gradient did; not a fault of the batch."""
        self.record("event", step=step, text=f"gradients left float16's range; loss scale is now {scale:g}")
        self._advance(outcome, f"loss scale {scale:g}")

    def _advance(self, outcome: Outcome, note: str) -> None:
        if self.peak is not None:
            note += f"  {self._utilisation(outcome):.0%} of {quantity(self.peak.flops)}FLOP/s"
        if outcome.spent.shares["waiting"] >= WAITS:
            note += f"  {outcome.spent.shares['waiting']:.0%} waiting for data"
        self.bar.advance(outcome.positions, note)

    def _timing(self, outcome: Outcome) -> dict[str, Any]:
        seconds = outcome.spent.seconds
        rates = {"seconds": seconds, "tokens_per_s": outcome.positions / seconds}
        timing = {**rates, **outcome.spent.shares}
        return timing if self.peak is None else {**timing, "utilisation": self._utilisation(outcome)}

    def _utilisation(self, outcome: Outcome) -> float:
        """The model's own operations per second, as a share of what all ranks' matrix products reach."""
        assert self.peak is not None
        rate = outcome.positions * self.flops_per_token / outcome.spent.seconds
        return rate / (self.peak.flops * self.world.size)
