"""The training loop: set the rate, accumulate, clip, step, report. It takes an objective, and knows neither
language modelling nor how a checkpoint is written.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from pydantic import Field
from torch import nn

from puna.data.batches import Batch
from puna.data.loader import Step
from puna.errors import Interrupted, PunaError
from puna.parallel import World
from puna.plan.measure import Peak
from puna.progress import Tracker, counted, silent
from puna.settings import Settings, neutral
from puna.train.determinism import seed_for
from puna.train.gradients import Totals, accumulate, clipping, gradient_norm, known_scale
from puna.train.metrics import Record, discard
from puna.train.objectives import Objective
from puna.train.optimizer import Optimizer
from puna.train.precision import LossScale, Precision
from puna.train.reporting import Outcome, Reporter, Spent
from puna.train.run import GO_ON
from puna.train.signals import StopRequest, stop_requests


class LoopSettings(Settings):
    """How many updates, the largest gradient norm, the seed of dropout, and the patience with bad steps."""

    steps: int = Field(ge=0)
    clip_norm: float = Field(default=1.0, gt=0.0)
    seed: int = Field(default=0, ge=0)
    max_skipped: int = neutral(10, ge=1)


@dataclass
class TrainState:
    """Where training stands: all that a resumed run needs besides weights and optimizer state.

    `step` counts batches taken, skipped ones too; `position` is the data's, after them. `tokens` counts the
    positions that went through the model, on all ranks. `served` is the last step whose interval functions
    were called: a checkpoint that one of them writes must not make the resumed run call them again.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    overflows: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    served: int = -1
    loss_scale: LossScale = field(default_factory=LossScale)

    def values(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainState:
        """The state that gave these values."""
        return cls(**{**values, "loss_scale": LossScale(**values["loss_scale"])})

    def improved(self, loss: float) -> bool:
        """Whether a validation loss is the best so far; if so it is remembered with its step."""
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best_loss, self.best_step = loss, self.step
        return True


class Source(Protocol):
    """What the loop asks of a loader."""

    def steps(self, position: int) -> Iterator[Step]:
        """Steps from a global sample position on, at least as many as will be made."""

    def describe(self, step: Step) -> list[str]:
        """Where the documents of a step came from."""


Visit = Callable[[TrainState], None]


def train(
    objective: Objective,
    model: nn.Module,
    optimizer: Optimizer,
    source: Source,
    state: TrainState,
    *,
    settings: LoopSettings,
    rate: Callable[[int], float],
    precision: Precision,
    world: World = World(),
    every: Sequence[tuple[int, Visit]] = (),
    save: Visit = lambda state: None,
    record: Record = discard,
    bar: Tracker | None = None,
    peak: Peak | None = None,
    flops_per_token: float = 0.0,
) -> None:
    """Update the model until `state.step` reaches `settings.steps`.

    A step whose loss or gradient is not finite, or that had nothing to learn, leaves weights and optimizer as
    they were, and is told.

    Args:
        state: where to begin; changed in place.
        rate: the learning rate of a step.
        every: pairs (interval, function), called in this order before each step that the interval divides and
            after the last; the one that saves checkpoints stands last.
        save: called before the loop ends early.
        record: takes a record of each step.
        bar: advanced by the positions of each step.
        peak, flops_per_token: what utilisation is computed from.

    Raises:
        Interrupted: SIGINT or SIGTERM came, on any rank; the step was finished and `save` called.
        PunaError: `settings.max_skipped` steps in a row were skipped; `save` was called.
        ResourceError: memory ran out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    with stop_requests() as stop, silent("", 0, "") as quiet:
        reporter = Reporter(record, bar or quiet, world, peak, flops_per_token)
        steps = source.steps(state.position)
        while True:
            _call_due(every, state, settings.steps)
            _stop_if_asked(stop, world, save, state)
            if state.step >= settings.steps:
                return

            began = time.perf_counter()
            step = next(steps)
            loaded = time.perf_counter()
            positions = world.size * sum(batch.tokens.numel() for batch in step.batches)
            scale = known_scale(positions) * (state.loss_scale.scale if precision.scales else 1.0)
            first = world.rank * len(step.batches)
            seeds = [seed_for(settings.seed, state.step, first + micro) for micro in range(len(step.batches))]
            totals = accumulate(objective, model, step.batches, precision, scale=scale, seeds=seeds).over(
                world
            )

            formed = time.perf_counter()
            world.sum_gradients(parameters)
            average = 1.0 / (scale * max(totals.count, 1.0))
            norm = average * gradient_norm(parameters)

            learning_rate, fault = rate(state.step), _fault(totals, norm)
            if fault:
                optimizer.discard()
            else:
                optimizer.step(learning_rate, average * clipping(norm, settings.clip_norm))

            state.step, state.position, state.tokens = state.step + 1, step.position, state.tokens + positions
            ended = time.perf_counter()
            spent = Spent(ended - began, waiting=loaded - began, updating=ended - formed)
            outcome = Outcome(totals, norm, learning_rate, positions, spent, fault)
            _note(state, outcome, reporter, scales=precision.scales, describe=partial(source.describe, step))
            if state.skipped_in_row >= settings.max_skipped:
                save(state)
                raise PunaError(
                    f"stopped at step {state.step} after skipping {counted(state.skipped_in_row, 'step')} in "
                    f"a row, the last because {fault}; state is saved: lower the learning rate (that needs "
                    f"--allow-changes) and {GO_ON}, or mend the documents that metrics.jsonl names and begin "
                    "anew in another directory"
                )


def rehearse(objective: Objective, model: nn.Module, batch: Batch, precision: Precision) -> None:
    """One forward and backward pass for nothing: it compiles what is compiled, and shows whether it fits."""
    model.train()
    try:
        accumulate(objective, model, [batch], precision)
    finally:
        model.zero_grad(set_to_none=True)


def _call_due(every: Sequence[tuple[int, Visit]], state: TrainState, last: int) -> None:
    if state.served >= state.step:
        return
    state.served = state.step
    for interval, function in every:
        if state.step % interval == 0 or state.step == last:
            function(state)


def _stop_if_asked(stop: StopRequest, world: World, save: Visit, state: TrainState) -> None:
    """All ranks stop after the same step, whichever of them was asked."""
    if world.any(stop.signal is not None):
        save(state)
        number = signal.Signals(stop.signal or signal.SIGTERM)
        raise Interrupted(number, f"stopped by {number.name} at step {state.step}; state is saved: {GO_ON}")


def _fault(totals: Totals, norm: float) -> str:
    """Why the weights must not move, as a clause; "" if they may. Every rank comes to the same answer."""
    if totals.count == 0:
        return "no token of the batch is trained"
    if not math.isfinite(totals.loss):
        return f"the loss is {totals.loss}"
    return "" if math.isfinite(norm) else f"the gradient's norm is {norm}"


def _note(
    state: TrainState,
    outcome: Outcome,
    reporter: Reporter,
    *,
    scales: bool,
    describe: Callable[[], list[str]],
) -> None:
    """Count what happened, and tell it."""
    if not outcome.fault:
        state.skipped_in_row = 0
        if scales:
            state.loss_scale.succeeded()
        reporter.updated(state.step, state.tokens, outcome)
    elif scales and math.isfinite(outcome.totals.loss) and state.loss_scale.overflowed():
        state.overflows += 1
        reporter.overflowed(state.step, outcome, state.loss_scale.scale)
    else:
        state.skipped += 1
        state.skipped_in_row += 1
        reporter.skipped(state.step, state.position, outcome, describe())
