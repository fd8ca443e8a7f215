"""One case of `puna bench train`: a model trained by the real loop in a process of its own, and its figures.

    python -m puna.recipes.bench.training_case < settings.json

prints lines of JSON: {"doing": …, "done": …} as it goes on, at the end {"found": …}, or {"error": …,
"message": …}. A process of its own, because the most memory that a process held cannot be told apart by what
held it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from puna.data.loader import Loader, Step
from puna.data.shardfile import TokenDocument
from puna.data.shards import TokenSet, write_token_set
from puna.devices import choose_device
from puna.errors import PunaError
from puna.model.config import ModelConfig
from puna.model.initial import initialize
from puna.model.llama import Llama
from puna.plan.measure import Peak, measure_peak, measure_reading
from puna.progress import counted
from puna.recipes.bench.figures import SECONDS, PeakMemory
from puna.recipes.bench.training_settings import (
    TrainBenchSettings,
    document_ends,
    in_these_names,
    policy_of,
    precision_of,
    shape_of,
)
from puna.settings import parse
from puna.train import optimizer as optimizers
from puna.train.compile import Layers, prepare_layers
from puna.train.determinism import DeterminismSettings, make_deterministic
from puna.train.footprint import Run, check_fits
from puna.train.loop import LoopSettings, TrainState, rehearse, train
from puna.train.memory import keep_freed_memory, memory_errors
from puna.train.objectives import Objective, language_modelling
from puna.train.optimizer import Optimizer, OptimizerSettings
from puna.train.precision import Precision
from puna.train.run import environment

WARM = 2  # updates that do not count: memory is touched for the first time, libraries start up
ROOM = 2  # updates over which the most memory is taken
MARKED = 3  # updates whose parts are told apart
ROWS_HELD = 64  # rows of tokens to draw from, at least
AROUND = 2  # runs besides the repeats: one until the model is warm, one that tells the parts apart
Tell = Callable[[str, int], None]
"""What is done from now on, and how many runs ended."""
TOOK = ("forward", "loss", "backward", "updating", "waiting")


@dataclass(frozen=True)
class Continuing:
    """Steps of a loader that go on where the last caller stopped, the next of them made already."""

    loader: Loader
    ready: Iterator[Step]

    def steps(self, position: int) -> Iterator[Step]:
        """From `position` on, which is where it stands."""
        return self.ready

    def describe(self, step: Step) -> list[str]:
        """Where the documents of a step came from."""
        return self.loader.describe(step)


@dataclass
class Case:
    """A model in training, and what its loop recorded."""

    config: ModelConfig
    model: Llama
    optimizer: Optimizer
    source: Continuing
    precision: Precision
    layers: Layers
    settings: TrainBenchSettings
    notes: list[str] = field(default_factory=list)
    state: TrainState = field(default_factory=TrainState)
    timings: list[dict[str, float]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.precision.device

    def run(self, steps: int) -> float:
        """Make so many updates; seconds, to the end of the last one on the device."""
        began = time.perf_counter()
        wanted = LoopSettings(steps=self.state.step + steps, seed=self.settings.seed)
        train(
            _objective(self.settings), self.model, self.optimizer, self.source, self.state,
            settings=wanted, rate=lambda step: 1e-5, precision=self.precision, record=self._record,
        )  # fmt: skip
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until the device has done all it was asked for."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _record(self, kind: str, **values: Any) -> None:
        if kind == "train":
            self.timings.append(values["timing"])


@contextlib.contextmanager
def opened(settings: TrainBenchSettings) -> Iterator[Case]:
    """Model, optimizer and rows of random tokens as a run makes them, compiled and warm.

    Raises:
        InputError: settings that make no model, a type or policy the device lacks, memory that ran out.
    """
    device = choose_device(settings.device)
    make_deterministic(DeterminismSettings(threads=settings.threads), device)
    keep_freed_memory(device)
    precision = precision_of(settings, device)
    config = shape_of(settings)
    check_fits(_run(settings, config, precision), device)
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as place:
        model = Llama(config)
        initialize(model, settings.seed)
        model.to(device, precision.stored)
        loader = _loader(settings, _tokens(settings, config, Path(place)))
        batch = next(iter(loader.steps(0))).batches[0].to(device)
        notes: list[str] = []

        def trial() -> None:
            rehearse(_objective(settings), model, batch, precision)

        policy = policy_of(settings, model, precision)
        layers = prepare_layers(
            model, policy, settings.compile, device, trial, notes.append, float8=settings.float8
        )
        chosen = parse(OptimizerSettings, {"name": settings.optimizer})
        optimizer = optimizers.build(model, chosen, precision, settings.seed)
        source = Continuing(loader, loader.steps(0))
        case = Case(config, model, optimizer, source, precision, layers, settings, notes)
        case.run(WARM)
        yield case


def _objective(settings: TrainBenchSettings) -> Objective:
    return partial(language_modelling, z=settings.z)


def _run(settings: TrainBenchSettings, config: ModelConfig, precision: Precision) -> Run:
    (length,), (policy,) = settings.row_length, settings.policy
    micro = settings.rows_at_once
    state = optimizers.bytes_per_number(precision)["optimizer"]
    return Run(
        config, micro, length, "paper" if policy == "auto" else policy, precision.compute, precision.stored,
        state, max(1, settings.rows // micro),
    )  # fmt: skip


def _tokens(settings: TrainBenchSettings, config: ModelConfig, place: Path) -> TokenSet:
    """Random tokens, every row as many documents as asked for, of lengths that differ by one at most."""
    draw = np.random.default_rng(settings.seed)
    ends = document_ends(settings)
    lengths = np.diff([0, *ends]).tolist() * max(ROWS_HELD, 2 * settings.rows)
    documents = (
        TokenDocument(draw.integers(config.vocab_size, size=length), length, "random") for length in lengths
    )
    return write_token_set(place, documents, vocab_size=config.vocab_size, fingerprint="0" * 64)


def _loader(settings: TrainBenchSettings, tokens: TokenSet) -> Loader:
    (length,) = settings.row_length
    # A row that is one document needs no documents: attention covers all of it.
    return Loader(
        tokens, length, settings.rows, settings.rows_at_once, seed=settings.seed,
        cross_documents=settings.documents == 1,
    )  # fmt: skip


def measure(settings: TrainBenchSettings, tell: Tell = lambda doing, done: None) -> dict[str, Any]:
    """The figures of one case, as JSON: seconds of repeats beside the machine's limits, parts, memory."""
    tell("making the model, first updates", 0)
    reading = measure_reading(choose_device(settings.device), SECONDS).rate  # while there is room for it
    with opened(settings) as case:
        tell("memory", 0)
        memory = _memory(case)
        each = statistics.median(timing["seconds"] for timing in case.timings[WARM:])
        steps = settings.steps or max(1, round(settings.seconds / each))
        repeats, before = [], _peaks(case)
        for number in range(settings.repeats):
            tell(f"repeat {number + 1} of {settings.repeats}, {counted(steps, 'update')}", 1)
            seconds, after = case.run(steps), _peaks(case)
            best = [max(pair, key=lambda peak: peak.flops) for pair in zip(before, after, strict=True)]
            rates = [peak.flops for peak in best]
            repeats.append({"seconds": seconds, "steps": steps, "flops": rates})
            before = after
        tell("the parts of an update", 1)
        return {
            "repeats": repeats,
            "peaks": [str(peak) for peak in before],
            "reading": reading,
            "parts": _parts(case),
            "memory": memory,
            "precision": f"{case.precision}{', layers in float8' if settings.float8 else ''}",
            "policy": case.layers.policy,
            "layers": str(case.layers),
            "notes": case.notes,
            "environment": environment(case.device),
            "device": str(case.device),
        }


def _peaks(case: Case) -> list[Peak]:
    """That of the products' type; behind it that of the layers', where they have another."""
    types = [case.precision.compute, *([torch.float8_e4m3fn] if case.settings.float8 else [])]
    with memory_errors("measuring the limit of matrix products"):
        return [measure_peak(case.device, dtype, SECONDS) for dtype in types]


def _memory(case: Case) -> dict[str, int | None]:
    """Bytes of what a run must hold, and the most that some updates held above it.

    What stands between two updates is taken as the ground, so that libraries and compiled code are no part
    of the figure; gradients, which are gone by then, are subtracted.
    """
    parameters = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in parameters)
    room = PeakMemory(case.device)
    kept = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    room.restart()
    case.run(ROOM)
    most = room.most()
    return {
        "weights": sum(parameter.nbytes for parameter in case.model.parameters()),
        "gradients": gradients,
        "optimizer": sum(state.nbytes for state in _states(case.optimizer)),
        "above": None if most is None else most - (gradients - kept),
    }


def _states(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if value.dim())


def _parts(case: Case) -> dict[str, float]:
    """Seconds of an update by what took them, in updates of their own: the marks wait for the device."""
    rows = []
    for _ in range(MARKED):
        clock = _Clock(case)
        with clock.attached(case.model.model):
            case.run(1)
        rows.append(parts_of(case.timings[-1], clock.forward, clock.loss))
    return {name: statistics.median(row[name] for row in rows) for name in TOOK}


def parts_of(timing: dict[str, float], forward: float, loss: float) -> dict[str, float]:
    """A step's seconds by what took them; what is not named otherwise is the layers' backward pass.

    Args:
        timing: what the loop recorded of the step.
        forward: seconds inside the decoder.
        loss: seconds from there to the gradient of its result: the output layer and the loss, both ways.
    """
    seconds = timing["seconds"]
    waiting, updating = (timing[name] * seconds for name in ("waiting", "updating"))
    backward = seconds - forward - loss - waiting - updating
    return {
        "forward": forward,
        "loss": loss,
        "backward": backward,
        "updating": updating,
        "waiting": waiting,
    }


class _Clock:
    """Times the decoder's forward pass, and what follows up to the gradient of its result."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._mark = 0.0
        self.forward, self.loss = 0.0, 0.0

    @contextlib.contextmanager
    def attached(self, decoder: nn.Module) -> Iterator[None]:
        handles = [decoder.register_forward_pre_hook(self._enter), decoder.register_forward_hook(self._leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _since_mark(self) -> float:
        self._case.wait()
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._since_mark()

    def _leave(self, module: nn.Module, inputs: Any, hidden: Tensor) -> None:
        self.forward += self._since_mark()
        hidden.register_hook(self._loss_done)

    def _loss_done(self, gradient: Tensor) -> None:
        self.loss += self._since_mark()


def main() -> int:
    """Read settings, print what is done and figures; a fault is told as JSON too."""
    try:
        with in_these_names():
            found = measure(parse(TrainBenchSettings, json.loads(sys.stdin.read())), _tell)
        _print(found=found)
    except PunaError as error:
        _print(error=type(error).__name__, message=str(error))
    return 0


def _tell(doing: str, done: int) -> None:
    _print(doing=doing, done=done)


def _print(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main())
