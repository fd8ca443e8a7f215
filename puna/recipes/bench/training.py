"""`puna bench train`: whole updates of the training loop, their parts and their memory, beside the limit."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from subprocess import PIPE
from typing import IO, Any

import torch

from puna.errors import DataError, ModelError, PunaError, ResourceError, SettingsError
from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token, parameters
from puna.model.weights import shapes
from puna.plan.measure import Peak, Reading
from puna.progress import Track, Tracker, counted, quantity
from puna.recipes.bench.figures import Figure, Limits, Repeat, Say
from puna.recipes.bench.training_case import AROUND, Tell
from puna.recipes.bench.training_settings import (
    TrainBenchSettings,
    check,
    document_ends,
    in_these_names,
    shape_of,
)

_COLUMNS = "{:>8} {:>7} {:>9} {:>7} {:>9} {:>8} {:>6} {:>9} {:>7} {:>8} {:>8} {:>8} {:>9}"
HEADINGS = (
    *("tokens/s", "spread", "ms/step", "forward", "loss", "backward", "update", "waiting"),
    *("limit", "reached", "memory"),
)
COLUMNS = {
    "policy": "what layers keep for the backward pass; the one that auto chose",
    "row": "tokens of a row",
    "tokens/s": "tokens that whole updates (forward, backward, clipping, optimizer) learn from in a second; "
    "in the repeat whose share of its limit is the median",
    "spread": "from the slowest to the fastest repeat, as a share of their median",
    "ms/step": "milliseconds of one update; the next four columns are its parts, measured in updates of "
    "their own, so that they need not add up to it",
    "forward": "milliseconds of embedding and layers, forward",
    "loss": "milliseconds of the output layer and the loss, forward and backward",
    "backward": "milliseconds of layers and embedding, backward",
    "update": "milliseconds of clipping and the optimizer",
    "waiting": "share of an update in which the loop waited for rows",
    "limit": "tokens/s at which the model's own operations alone (6 for every weight of a matrix and token, "
    "attention to earlier tokens; nothing that is computed again) would take all the time, at the rate of "
    "large matrix products that is measured before and after every repeat; or reading weights, gradients and "
    "optimizer's state once an update, where that takes longer",
    "reached": "tokens/s as a share of that limit, both measured at the same moment: model FLOPs "
    "utilisation, where operations are the limit",
    "memory": "the most bytes that were held above weights, gradients and the optimizer's state; ? where the "
    "system does not tell",
}
FAULTS = {kind.__name__: kind for kind in (DataError, ModelError, ResourceError, SettingsError)}
"""What a case may tell of; anything else is a PunaError."""


def train(settings: TrainBenchSettings, say: Say, track: Track) -> list[Figure]:
    """Train each case in a process of its own; one that does not fit is told, and the others go on.

    Raises:
        InputError: settings that make no model; a policy or type that the device lacks.
        ResourceError: no case fits into memory.
    """
    config, cases = shape_of(settings), list(settings.cases())
    with in_these_names():
        check(settings, config)
    updates = f"updates of {counted(settings.rows, 'row')}, {settings.rows_at_once} at a time"
    say(f"model: {settings.model}, {_described(config)}; {updates}")
    figures: list[Figure] = []
    runs = settings.repeats + AROUND
    with track("Training", len(cases) * runs, "runs") as progress:
        for number, case in enumerate(cases, 1):
            title = f"{number} of {len(cases)}: {case.policy[0]}, row {case.row_length[0]}"
            try:
                with _shown(progress, title, runs) as tell:
                    found = run_apart(case, tell)
            except ResourceError as error:
                if not figures and case == cases[-1]:
                    raise
                say(f"  {case.policy[0]}, {case.row_length[0]}: {error}")
                continue
            figures.append(_figure(case, config, found))
            if len(figures) == 1:
                _introduce(found, figures[0], say)
            say(_line(figures[-1]))
    return figures


@contextlib.contextmanager
def _shown(progress: Tracker, title: str, runs: int) -> Iterator[Tell]:
    """Tells of a case; when it ends, for want of memory too, all its runs are over."""
    ended = 0

    def tell(doing: str, done: int) -> None:
        nonlocal ended
        ended += done
        progress.advance(done, f"{title}: {doing}")

    try:
        yield tell
    except BaseException as error:
        if isinstance(error, ResourceError):  # else it is all of the benchmark that ends
            progress.advance(runs - ended, title)
        raise
    progress.advance(runs - ended, title)


def _described(config: ModelConfig) -> str:
    tied = ", output tied to the embedding" if config.tie_word_embeddings else ""
    return f"{quantity(parameters(config).total)} parameters, {config.vocab_size:,} words{tied}"


def _introduce(found: dict[str, Any], figure: Figure, say: Say) -> None:
    for note in found["notes"]:
        say(note)
    say(f"computing in {found['precision']}, {found['layers']}")
    needed = quantity(figure.details["flops_per_token"])
    say(f"limit: {' and '.join(found['peaks'])}, anew around every repeat; a token needs {needed}FLOP")
    say(_COLUMNS.format("policy", "row", *HEADINGS))


def run_apart(case: TrainBenchSettings, tell: Tell = lambda doing, done: None) -> dict[str, Any]:
    """What one case came to, as training_case.py tells it.

    Raises:
        PunaError: of the kind that the process told; ResourceError where it was killed.
    """
    command = [sys.executable, "-m", "puna.recipes.bench.training_case"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # a pipe that nobody reads would fill up
        status = _talk(command, case.model_dump_json(), log, found, tell)
        log.seek(0)
        said = (log.read().strip().splitlines() or ["it said nothing"])[-1]
    if status == -signal.SIGKILL:
        raise ResourceError("the process was killed, which is what happens where memory ends; lower rows")
    if "error" in found:
        raise FAULTS.get(found["error"], PunaError)(found["message"])
    if status or "found" not in found:
        raise PunaError(f"measuring ended with status {status}: {said}")
    result: dict[str, Any] = found["found"]
    return result


def _talk(command: list[str], asked: str, log: IO[str], found: dict[str, Any], tell: Tell) -> int:
    """Let a process answer into `found`, line by line; its exit status."""
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=log, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as requests:
                requests.write(asked)
            for line in process.stdout:
                message = _message(line)
                if "doing" in message:
                    tell(message["doing"], message["done"])
                else:
                    found.update(message)
        except BaseException:
            process.kill()  # it would go on by itself
            raise
    return process.returncode


def _message(line: str) -> dict[str, Any]:
    """A line of the process; empty for what libraries print."""
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        return message if isinstance(message, dict) else {}
    return {}


def _figure(case: TrainBenchSettings, config: ModelConfig, found: dict[str, Any]) -> Figure:
    memory, tokens = found["memory"], case.rows * case.row_length[0]
    reading = Reading(found["reading"], 0, torch.device(found["device"]), found["environment"]["threads"])
    read = sum(memory[name] for name in ("weights", "gradients", "optimizer"))  # once, at the least
    needed = flops_of_token(case, config)
    narrow = flops_in_float8(config) if case.float8 else 0.0
    repeats = [
        Repeat(
            one["seconds"],
            one["steps"] * tokens,
            one["steps"] * read,
            one["steps"] * tokens * (needed - narrow),
            _limits(one["flops"], reading),
            one["steps"] * tokens * narrow,
        )
        for one in found["repeats"]
    ]
    told = ("peaks", "parts", "memory", "precision", "policy", "layers", "notes")
    details = {name: found[name] for name in told}
    details["flops_per_token"] = needed
    details["waiting"] = found["parts"]["waiting"] / sum(found["parts"].values())
    return Figure("train", case.model_dump(mode="json"), "tokens/s", repeats, found["environment"], details)


def _limits(rates: Sequence[float], reading: Reading) -> Limits:
    """Of the products' type, and of float8 where layers have it."""
    types = (torch.float32, torch.float8_e4m3fn)
    peaks = [
        Peak(rate, dtype, reading.device, reading.threads) for rate, dtype in zip(rates, types, strict=False)
    ]
    return Limits(peaks[0], reading, *peaks[1:])


def flops_in_float8(config: ModelConfig) -> float:
    """Of the operations of a token's training those within the layers' matrices, 6 for each weight."""
    matrices = (
        math.prod(shape) for name, shape in shapes(config).items() if ".layers." in name and len(shape) == 2
    )
    return 6.0 * sum(matrices)


def flops_of_token(case: TrainBenchSettings, config: ModelConfig) -> float:
    """Operations of training on one token, on average over a row: each document's attention is its own."""
    ends = document_ends(case)
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    whole = sum(length * flops_per_token(config, length, training=True) for length in lengths)
    return whole / case.row_length[0]


def _line(figure: Figure) -> str:
    parts, above = figure.details["parts"], figure.details["memory"]["above"]
    milliseconds = (f"{1000 * parts[name]:,.0f}" for name in ("forward", "loss", "backward", "updating"))
    return _COLUMNS.format(
        figure.details["policy"],
        figure.settings["row_length"][0],
        f"{figure.rate:,.0f}",
        f"{figure.spread:.0%}",
        f"{1000 * figure.typical.seconds * _tokens(figure) / figure.typical.units:,.0f}",
        *milliseconds,
        f"{figure.details['waiting']:.2%}",
        f"{figure.limit[0]:,.0f}",
        f"{figure.typical.ratio:.0%}",
        "?" if above is None else f"{quantity(above)}B",
    )


def _tokens(figure: Figure) -> int:
    """Of an update."""
    rows: int = figure.settings["rows"] * figure.settings["row_length"][0]
    return rows
