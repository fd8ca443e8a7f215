"""`puna bench train`: whole updates of the training loop, their parts and their memory, beside the limit."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from puna import errors
from puna.errors import InputError, PunaError, ResourceError
from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token, parameters
from puna.plan.measure import Peak, Reading
from puna.progress import Track, quantity
from puna.recipes.bench.figures import Figure, Limits, Repeat, Say
from puna.recipes.bench.training_settings import TrainBenchSettings, document_ends, shape_of

_COLUMNS = "{:>8} {:>7} {:>9} {:>7} {:>9} {:>8} {:>6} {:>9} {:>7} {:>8} {:>8} {:>8} {:>9}"
HEADINGS = (
    *("tokens/s", "spread", "ms/step", "forward", "loss", "backward", "update", "waiting"),
    *("limit", "reached", "memory"),
)
COLUMNS = {
    "policy, row": "what layers keep for the backward pass; tokens of a row",
    "tokens/s": "of whole updates: forward, backward, clipping, optimizer; the median of the repeats",
    "spread": "from the slowest to the fastest repeat, as a share of the median",
    "ms/step": "milliseconds of one update; the next four are its parts, in updates of their own",
    "forward": "milliseconds of embedding and layers, forward",
    "loss": "of the output layer and the loss, forward and backward",
    "backward": "of layers and embedding, backward",
    "update": "of clipping and the optimizer",
    "waiting": "share of an update in which the loop waited for rows",
    "limit": "tokens/s at which the model's own operations alone (6 for every weight of a matrix and token, "
    "attention to earlier tokens; nothing that is computed again) would take all the time at the measured "
    "rate of matrix products",
    "reached": "share of that limit, both measured at the same moment: model FLOPs utilisation",
    "memory": "the most that was held above weights, gradients and the optimizer's state",
}


def train(settings: TrainBenchSettings, say: Say, track: Track) -> list[Figure]:
    """Train each case in a process of its own; one that does not fit is told, and the others go on.

    Raises:
        InputError: settings that make no model; a policy or type that the device lacks.
        ResourceError: no case fits into memory.
    """
    config, cases = shape_of(settings), list(settings.cases())
    say(f"model: {settings.model}, {_described(config)}; updates of {settings.rows} rows")
    figures: list[Figure] = []
    with track("Training", len(cases), "cases") as progress:
        for case in cases:
            try:
                found = run_apart(case)
            except ResourceError as error:
                if not figures and case == cases[-1]:
                    raise
                say(f"  {case.policy[0]}, {case.row_length[0]}: {error}")
                continue
            finally:
                progress.advance(1)
            figures.append(_figure(case, config, found))
            if len(figures) == 1:
                _introduce(found, say)
            say(_line(figures[-1]))
    return figures


def _described(config: ModelConfig) -> str:
    tied = ", output tied to the embedding" if config.tie_word_embeddings else ""
    return f"{quantity(parameters(config).total)} parameters, {config.vocab_size:,} words{tied}"


def _introduce(found: dict[str, Any], say: Say) -> None:
    for note in found["notes"]:
        say(note)
    say(f"computing in {found['precision']}, {found['layers']}")
    say(f"limit: {found['peak']}; anew around every repeat")
    say(_COLUMNS.format("policy", "row", *HEADINGS))


def run_apart(case: TrainBenchSettings) -> dict[str, Any]:
    """What one case came to, as training_case.py tells it.

    Raises:
        PunaError: of the kind that the process told; ResourceError where it was killed.
    """
    command = [sys.executable, "-m", "puna.recipes.bench.training_case"]
    done = subprocess.run(command, input=case.model_dump_json(), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == -9:
        raise ResourceError("the process was killed, which is what happens where memory ends; lower rows")
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PunaError(f"measuring ended with status {done.returncode}: {said}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        kind = getattr(errors, found["error"], InputError)
        raise kind(found["message"])
    return found


def _figure(case: TrainBenchSettings, config: ModelConfig, found: dict[str, Any]) -> Figure:
    memory, tokens = found["memory"], case.rows * case.row_length[0]
    device, threads = torch.device(found["device"]), found["environment"]["threads"]
    reading = Reading(found["reading"], 0, device, threads)
    read = sum(memory[name] for name in ("weights", "gradients", "optimizer"))  # once, at the least
    repeats = []
    for one in found["repeats"]:
        limits = Limits(Peak(one["flops"], torch.float32, device, threads), reading)
        flops = tokens * flops_of_token(case, config)
        steps = one["steps"]
        repeats.append(Repeat(one["seconds"], steps * tokens, steps * read, steps * flops, limits))
    told = ("peak", "parts", "memory", "precision", "policy", "layers", "notes")
    details = {name: found[name] for name in told}
    details["waiting"] = found["parts"]["waiting"] / sum(found["parts"].values())
    return Figure("train", case.model_dump(mode="json"), "tokens/s", repeats, found["environment"], details)


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
