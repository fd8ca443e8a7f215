"""Pretraining: settings in, a trained model directory out.

Hold the run directory, refuse what changed, open text and model, train, and undo what bad input began.
What is between is in opening.py and session.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from puna import parallel
from puna.devices import choose_device
from puna.errors import InputError
from puna.parallel import World
from puna.progress import Track, silent
from puna.recipes.training import parts
from puna.recipes.training.opening import Place, open_session
from puna.recipes.training.settings import PretrainSettings
from puna.train.determinism import make_deterministic
from puna.train.memory import keep_freed_memory
from puna.train.precision import Precision
from puna.train.run import RunDirectory, environment, stopped

Say = Callable[[str], None]


def pretrain(
    settings: PretrainSettings,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    say: Say = print,
    track: Track = silent,
) -> dict[str, Any]:
    """Train as the settings say, or go on where an earlier run stopped.

    Returns:
        The last validation and where everything lies: run, model, report, steps, tokens, loss, perplexity,
        bits_per_byte, gzip, xz.

    Raises:
        InputError: settings, text, tokenizer, model or run directory cannot be used.
        Interrupted: a signal came; what was done so far is saved.
        PunaError: too many steps in a row were not finite; state was saved.
    """
    world = parallel.start()
    if not world.leads:
        say, track = _nothing, silent
    try:
        return _run(settings, world, resume, allow_changes, say, track)
    except (KeyboardInterrupt, SystemExit) as stop:  # outside the loop, which finishes its step and saves
        if not RunDirectory(Path(settings.out)).exists:
            raise
        raise stopped(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM) from None
    finally:
        parallel.stop()


def _run(
    settings: PretrainSettings, world: World, resume: bool, allow_changes: bool, say: Say, track: Track
) -> dict[str, Any]:
    began = time.monotonic()
    run = RunDirectory(Path(settings.out))
    device = choose_device(settings.device, world.local_rank)
    precision = Precision.of(settings.precision, device)
    place = Place(run, world, device, precision, say, track, began)
    make_deterministic(settings.determinism, device)
    keep_freed_memory(device)
    with run.hold(resume=resume) if world.leads else nullcontext():
        settings = _with_stored_length(settings, run)
        with _undone_on_bad_input(run) if world.leads else nullcontext():
            policy = parts.memory_policy(settings, device, precision)
            machine = environment(device) | {"memory_policy": policy}
            changes = run.begin(settings, machine, allow_changes=allow_changes) if world.leads else []
            world.barrier()
            session = open_session(settings, place, policy)
            offset = session.take_up_newest() if resume else None
        for line in changes:
            say(line)
        return session.train_and_finish(offset, changes)


def _with_stored_length(settings: PretrainSettings, run: RunDirectory) -> PretrainSettings:
    """A length in epochs, tokens or minutes was turned into steps when the run began: those steps stay."""
    if not run.exists or settings.length.steps is not None:
        return settings
    stored = run.settings(PretrainSettings).length
    if stored.model_copy(update={"steps": None}) != settings.length:
        return settings
    return settings.model_copy(update={"length": stored})


@contextmanager
def _undone_on_bad_input(run: RunDirectory) -> Iterator[None]:
    """A run that could not begin because of its input leaves nothing behind, so that the mended one can; one
    that could not go on keeps the settings it had.
    """
    fresh, known = not run.exists, run.known()
    try:
        yield
    except InputError:
        if fresh:
            run.forget()
        else:
            run.put_back(known)
        raise


def _nothing(text: str) -> None:
    pass
