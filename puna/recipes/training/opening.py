"""From a run's settings to a session that can train: text read, model made, tried out and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from puna.data.loader import Loader, check_division
from puna.errors import Interrupted
from puna.model.counts import parameters
from puna.model.llama import Llama
from puna.parallel import World
from puna.plan.measure import measure_peak
from puna.progress import Track, counted, quantity
from puna.recipes.training import parts
from puna.recipes.training.corpus import open_corpus
from puna.recipes.training.length import Pace, seconds_per_update, steps_for
from puna.recipes.training.samples import check_prompts
from puna.recipes.training.session import Session
from puna.recipes.training.settings import PretrainSettings
from puna.train import optimizer as optimizers
from puna.train.compile import Layers, prepare_layers
from puna.train.footprint import check_fits
from puna.train.loop import TrainState, rehearse, train
from puna.train.memory import memory_errors
from puna.train.policies import Policy
from puna.train.precision import Precision
from puna.train.run import RunDirectory, stopped
from puna.train.schedule import check as check_schedule

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a run works, whom it tells, and when it began, on `time.monotonic`."""

    run: RunDirectory
    world: World
    device: torch.device
    precision: Precision
    say: Say
    track: Track
    began: float


def open_session(settings: PretrainSettings, place: Place, policy: Policy) -> Session:
    """Tokenizer, tokens, model, and the number of steps.

    Raises:
        InputError: text, tokenizer, model or settings do not fit together.
    """
    world, device, precision = place.world, place.device, place.precision
    settings.check()
    check_division(settings.batch.rows, parts.micro_rows(settings, world), world.size)
    corpus = open_corpus(settings, place.run.path, world, place.say, place.track)
    vocab_size = corpus.tokenizer.vocab_size
    check_fits(parts.needs(settings, vocab_size, world, precision), device)
    with memory_errors("making the model"):
        model = parts.build_model(settings, vocab_size)
        model.to(device, precision.stored)
    check_prompts(model, corpus.tokenizer, settings.samples.prompts)
    loader = parts.open_loader(settings, corpus.train, world)
    # Memory that does not suffice runs out here, where the run can still be undone.
    layers = _tried_layers(settings, place, policy, model, loader)
    optimizer = optimizers.build(model, settings.optimizer, precision, settings.seed)
    session = Session(
        settings,
        place.run,
        world,
        precision,
        corpus,
        model,
        layers,
        optimizer,
        loader,
        place.say,
        place.track,
    )
    session.settings = _with_steps(session, place.began)
    check_schedule(session.settings.schedule, session.steps)
    session.peak = measure_peak(device, precision.compute)
    _introduce(session, device)
    return session


def _tried_layers(
    settings: PretrainSettings, place: Place, policy: Policy, model: Llama, loader: Loader
) -> Layers:
    """The model's layers as they will run, after a first batch went through them, forth and back."""
    mode, float8 = settings.compile.mode, settings.precision.float8
    batch = next(iter(loader.steps(0))).batches[0].to(place.device)

    def trial() -> None:
        rehearse(parts.objective(settings), model, batch, place.precision)

    if mode != "off" and policy == "none":
        place.say("Compiling the layers, where there is a compiler; it is kept for the next run")
    return prepare_layers(model, policy, mode, place.device, trial, place.say, float8=float8)


def _with_steps(session: Session, began: float) -> PretrainSettings:
    """The settings with the number of steps that the length comes to, the same on every rank."""
    settings = session.settings
    if settings.length.steps is not None:
        return settings
    pace = Pace(
        rows=settings.batch.rows,
        tokens=session.tokens_per_step,
        rows_per_epoch=session.loader.rows,
        # ten validations and the one at step 0, then all of it, with half of each row read twice
        scored=11 * session.sampled.tokens_total + 2 * session.corpus.validation.tokens_total,
        began=began,
        seconds_per_step=lambda: _seconds_per_step(session),
    )
    steps = steps_for(settings.length, pace)
    steps = int(session.world.sum_scalars([float(steps) if session.world.leads else 0.0])[0])
    if settings.length.minutes is not None:  # asked for by the clock: a slow machine still makes a run
        steps = max(steps, settings.schedule.warmup_steps + 1)
    known = {"steps": steps}
    return settings.model_copy(update={"length": settings.length.model_copy(update=known)})


def _seconds_per_step(session: Session) -> float:
    """Measured on real updates of the real model, which is then put back as it was."""
    model, wanted, world = session.model, session.settings, session.world
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    seconds = seconds_per_update(
        lambda steps: _update_for_nothing(session, steps),
        lambda value: world.sum_scalars([value])[0] / world.size,
        session.track,
    )
    model.load_state_dict(weights)
    session.optimizer = optimizers.build(model, wanted.optimizer, session.precision, wanted.seed)
    return seconds


def _update_for_nothing(session: Session, steps: int) -> None:
    """Updates at a rate of zero, as a run would make them."""
    try:
        train(
            parts.objective(session.settings), session.model, session.optimizer, session.loader, TrainState(),
            settings=parts.loop_settings(session.settings, steps), rate=lambda step: 0.0,
            precision=session.precision, world=session.world,
        )  # fmt: skip
    except Interrupted as stop:  # the loop tells of its steps, and of state saved: here are neither
        raise stopped(stop.exit_code - 128) from None


def _introduce(session: Session, device: torch.device) -> None:
    data, batch = session.settings.data, session.settings.batch
    steps, held_out, sampled = session.steps, session.corpus.validation, session.sampled
    share = f"{sampled.tokens_total:,} of the {held_out.tokens_total:,}"
    every = f"Validation is on all {held_out.tokens_total:,} held-out tokens"
    some = f"Validation while training is on {share} held-out tokens, at the end on all"
    session.say(
        f"Model: {parameters(session.model.config).total:,} parameters; {counted(steps, 'update')} of "
        f"{batch.rows} × {data.row_length} tokens ({quantity(steps * session.tokens_per_step)} in all, "
        f"{steps * batch.rows / session.loader.rows:.2f} epochs)\n"
        f"Computing on {device} in {session.precision}, "
        f"{session.layers}; measured limit {session.peak}\n"
        f"{some if sampled.tokens_total < held_out.tokens_total else every}"
    )
