"""The loop: golden losses, exact resumption, and what may never reach the weights."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.data.batches import Batch
from puna.errors import Interrupted, PunaError, ResourceError
from puna.model.llama import Llama
from puna.plan.measure import Peak, measure_peak
from puna.train.determinism import seed_for
from puna.train.loop import LoopSettings, TrainState, rehearse, train
from puna.train.objectives import OBJECTIVES, Objective, language_modelling
from puna.train.optimizer import OptimizerSettings, build, load_state_tensors, state_tensors
from tests.train.golden_losses import GOLDEN, curve
from tests.train.tiny import CPU, LENGTH, ROWS, TinySource, bits, precision, same_bits, tiny_model


class Run:
    """A tiny training that keeps what was recorded and said."""

    def __init__(self, dropout: float = 0.0, objective: Objective = language_modelling) -> None:
        self.model = tiny_model(dropout)
        self.optimizer = build(self.model, OptimizerSettings())
        self.state = TrainState()
        self.source = TinySource(micro_rows=4)
        self.objective = objective
        self.records: list[dict[str, Any]] = []
        self.saved: list[TrainState] = []
        self.said: list[str] = []

    def go(
        self, steps: int, max_skipped: int = 10, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Run:
        train(
            self.objective, self.model, self.optimizer, self.source, self.state,
            settings=LoopSettings(steps=steps, max_skipped=max_skipped), rate=lambda step: 0.01 / (step + 1),
            precision=precision(dtype), save=lambda state: self.saved.append(deepcopy(state)),
            record=self.record, bar=self, **options,
        )  # fmt: skip
        return self

    def record(self, kind: str, **values: Any) -> None:
        self.records.append({"kind": kind, **values})

    def advance(self, amount: float, note: str = "") -> None:
        assert amount == ROWS * LENGTH

    def say(self, text: str) -> None:
        self.said.append(text)

    def kinds(self) -> list[str]:
        return [record["kind"] for record in self.records]

    def exact(self) -> list[dict[str, Any]]:
        """The records without what depends on the clock."""
        return [{k: v for k, v in record.items() if k != "timing"} for record in self.records]


def at_steps(steps: set[int], then: Callable[[Llama, Tensor], Tensor]) -> Objective:
    """Language modelling whose loss `then` changes at some steps, of two micro-batches (calls) each."""
    calls = iter(range(10_000))

    def objective(model: Llama, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor | float]]:
        loss, count, metrics = language_modelling(model, batch)
        return (then(model, loss) if next(calls) // 2 in steps else loss), count, metrics

    return objective


def nan_loss(model: Llama, loss: Tensor) -> Tensor:
    return loss * math.nan


def infinite_gradient(model: Llama, loss: Tensor) -> Tensor:
    """A finite loss whose gradient is not."""
    return loss + (model.model.norm.weight.sum() * 0).sqrt()


# What the loop computes


def test_golden_losses() -> None:
    """Other machines sum in another order: 1e-4 holds across them, and no real change hides below it."""
    for ours, golden in zip(curve(), json.loads(GOLDEN.read_text()), strict=True):
        assert ours == pytest.approx(golden, rel=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens() -> None:
    run = Run()
    batches = next(run.source.steps(0)).batches
    sums = [language_modelling(run.model, batch) for batch in batches]
    wanted = sum(loss.item() for loss, _, _ in sums) / sum(int(count) for _, count, _ in sums)
    run.go(1)
    assert run.records[0]["loss"] == pytest.approx(wanted, rel=1e-6)
    assert run.records[0]["tokens"] == ROWS * LENGTH
    assert (run.state.step, run.state.position) == (1, ROWS)


def test_an_objectives_other_sums_are_recorded_as_means() -> None:
    def objective(model: Llama, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor | float]]:
        loss, count, _ = language_modelling(model, batch)
        return loss, count, {"hits": batch.loss_mask.sum() / 4, "ones": float(count)}

    record = Run(objective=objective).go(1).records[0]
    assert (record["hits"], record["ones"]) == (0.25, 1.0)


def test_utilisation_is_measured_against_the_peak() -> None:
    peak = Peak(1e9, torch.float32, CPU, 1)
    timing = Run().go(1, peak=peak, flops_per_token=1000.0).records[0]["timing"]
    assert timing["tokens_per_s"] == pytest.approx(ROWS * LENGTH / timing["seconds"])
    assert timing["utilisation"] == pytest.approx(timing["tokens_per_s"] * 1000 / 1e9)


def test_the_measured_peak_is_a_rate_this_machine_could_have() -> None:
    peak = measure_peak(CPU, torch.float32, seconds=0.1)
    assert 1e8 < peak.flops < 1e14
    assert "float32 matrix products" in str(peak)


def test_interval_functions_are_called_before_their_step_and_after_the_last() -> None:
    called: list[tuple[str, int, int]] = []
    run = Run()
    every = [
        (2, lambda state: called.append(("validate", state.step, len(run.records)))),
        (3, lambda state: called.append(("save", state.step, len(run.records)))),
    ]
    run.go(5, every=every)
    assert called == [
        ("validate", 0, 0), ("save", 0, 0), ("validate", 2, 2), ("save", 3, 3), ("validate", 4, 4),
        ("validate", 5, 5), ("save", 5, 5),
    ]  # fmt: skip


def test_the_best_validation_is_remembered() -> None:
    state = TrainState(step=3)
    assert state.improved(2.0)
    state.step = 4
    assert not state.improved(2.0)
    assert not state.improved(math.nan)
    assert (state.best_loss, state.best_step) == (2.0, 3)


# Resumption


def test_a_resumed_run_is_bit_identical_with_dropout() -> None:
    whole = Run(dropout=0.2).go(7)
    first = Run(dropout=0.2).go(3)
    values = json.loads(json.dumps(first.state.values()))
    optimizer = {name: tensor.clone() for name, tensor in state_tensors(first.optimizer).items()}

    second = Run(dropout=0.2)
    second.model.load_state_dict(first.model.state_dict())
    load_state_tensors(second.optimizer, optimizer)
    second.state = TrainState.from_values(values)
    torch.manual_seed(999)  # the state of torch's generator plays no part
    second.go(7)

    assert second.state == whole.state
    assert same_bits(bits(second.model), bits(whole.model))
    assert first.exact() + second.exact() == whole.exact()


def test_dropout_is_a_function_of_seed_step_and_micro_batch() -> None:
    assert (
        len({seed_for(seed, step, micro) for seed in range(5) for step in range(5) for micro in range(5)})
        == 125
    )
    losses = [Run(dropout=0.2).go(2).records[1]["loss"] for _ in range(2)]
    assert losses[0] == losses[1] != Run(dropout=0.0).go(2).records[1]["loss"]


def test_a_checkpoint_written_at_an_interval_does_not_call_it_again() -> None:
    called: list[int] = []
    values: dict[str, Any] = {}
    run = Run()
    run.go(2, every=[(1, lambda state: called.append(state.step)), (2, lambda s: values.update(s.values()))])
    run.state = TrainState.from_values(values)
    run.go(3, every=[(1, lambda state: called.append(state.step))])
    assert called == [0, 1, 2, 3]


# What never reaches the weights


@pytest.mark.parametrize(
    ("then", "reason"),
    [(nan_loss, "the loss is nan"), (infinite_gradient, "the gradient's norm is (nan|inf)")],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(
    then: Callable[[Llama, Tensor], Tensor], reason: str
) -> None:
    run = Run(objective=at_steps({2}, then)).go(2)
    before = bits(run.model), {n: t.clone() for n, t in state_tensors(run.optimizer).items()}
    run.go(3)
    assert same_bits(before[0], bits(run.model))
    assert same_bits(before[1], state_tensors(run.optimizer))

    run.go(4)
    assert not same_bits(before[0], bits(run.model))
    assert run.kinds() == ["train", "train", "skipped", "train"]
    record = run.records[2]
    assert (record["step"], record["position"]) == (3, 3 * ROWS)
    assert re.fullmatch(reason, record["reason"])
    assert record["documents"] == [f"row {position}" for position in range(2 * ROWS, 3 * ROWS)]
    assert "row 16, row 17, row 18 and 5 more" in run.said[0]
    assert (run.state.skipped, run.state.skipped_in_row, run.state.step) == (1, 0, 4)


def test_a_batch_with_nothing_to_learn_is_skipped() -> None:
    run = Run()
    run.source.barren = {0}
    before = bits(run.model)
    run.go(1)
    assert same_bits(before, bits(run.model))
    assert run.records[0]["reason"] == "no token of the batch is trained"
    run.go(2)
    assert run.kinds() == ["skipped", "train"]


def test_too_many_in_a_row_stop_the_run_after_saving() -> None:
    run = Run(objective=at_steps({1, 3, 4, 5}, nan_loss))
    with pytest.raises(
        PunaError, match=r"stopped at step 6 after skipping 3 steps in a row, .* the loss is nan"
    ):
        run.go(20, max_skipped=3)
    assert [state.step for state in run.saved] == [6]
    assert run.kinds() == ["train", "skipped", "train", "skipped", "skipped", "skipped"]


def test_float16_overflow_lowers_the_scale_and_does_not_count_as_a_bad_step() -> None:
    run = Run()
    run.state.loss_scale.scale = 2.0**60  # every gradient leaves float16's range
    run.go(45, dtype=torch.float16, max_skipped=1)
    assert run.state.overflows > 20
    assert run.state.skipped == 0
    assert run.kinds()[0] == "event"
    assert run.records[0]["text"] == "gradients left float16's range; loss scale is now 5.76461e+17"
    assert run.kinds()[-1] == "train"
    losses = [record["loss"] for record in run.records if record["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_float16_follows_float32() -> None:
    half, single = Run().go(5, dtype=torch.float16), Run().go(5)
    for ours, wanted in zip(half.records, single.records, strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=2e-3)


# Stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_stops(number: int, code: int) -> None:
    before = signal.getsignal(number)

    asked: list[int] = []

    def ask(model: Llama, loss: Tensor) -> Tensor:
        if not asked:
            asked.append(number)
            os.kill(os.getpid(), number)
        return loss

    run = Run(objective=at_steps({2}, ask))
    with pytest.raises(Interrupted) as stopped:
        run.go(10)
    assert stopped.value.exit_code == code
    assert [state.step for state in run.saved] == [3]
    assert run.kinds() == ["train"] * 3
    assert signal.getsignal(number) == before
    assert same_bits(bits(run.model), bits(Run().go(3).model))


def test_a_second_signal_does_not_wait() -> None:
    def ask_twice(model: Llama, loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    run = Run(objective=at_steps({1}, ask_twice))
    with pytest.raises(Interrupted, match="stopped at once"):
        run.go(10)
    assert (run.state.step, run.saved) == (1, [])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce] can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),  # memory that copies of layers are to be pinned in
    ],
)
def test_out_of_memory_says_what_to_lower(error: Exception) -> None:
    def exhaust(model: Llama, loss: Tensor) -> Tensor:
        raise error

    run = Run(objective=at_steps({0}, exhaust))
    with pytest.raises(ResourceError, match=r"training on 4 rows of 16 tokens at once; lower micro_rows"):
        run.go(1)


def test_memory_that_really_runs_out_is_recognised() -> None:
    def exhaust(model: Llama, loss: Tensor) -> Tensor:
        return loss + torch.empty(1 << 60).sum()

    with pytest.raises(ResourceError, match="out of memory"):
        Run(objective=at_steps({0}, exhaust)).go(1)


def test_other_errors_pass_through() -> None:
    def fail(model: Llama, loss: Tensor) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        Run(objective=at_steps({0}, fail)).go(1)


def test_a_rehearsal_leaves_nothing_behind() -> None:
    model = tiny_model()
    before = bits(model)
    rehearse(language_modelling, model, next(TinySource().steps(0)).batches[0], precision())
    assert same_bits(before, bits(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_table_of_objectives() -> None:
    assert OBJECTIVES["language_modelling"] is language_modelling
