"""`puna bench serve`: what clients get of a server under load, and what serving adds to the engine's time."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ConfigDict, Field, model_validator

import puna
from puna import formats
from puna.devices import choose_device, choose_dtype
from puna.engine.cache import bytes_per_position
from puna.engine.llm import LLM, context_length
from puna.engine.settings import EngineSettings
from puna.formats.huggingface.directory import HuggingFaceSettings
from puna.model.initial import initial_weights
from puna.model.presets import PRESETS
from puna.progress import Track, Tracker
from puna.recipes.bench.figures import Figure, Limits, Repeat, Say, measure_limits, percentile
from puna.recipes.bench.generation import GenerationSettings, described
from puna.recipes.bench.load import Ask, Load, Served, put
from puna.recipes.bench.made_up_tokenizer import write_tokenizer
from puna.recipes.bench.model import Subject, check_context, check_room, flops_of, preset_config
from puna.recipes.bench.server_process import ServerProcess, free_port, running
from puna.recipes.bench.work import bits_per_weight, has_whole_numbers, whole_operations
from puna.recipes.models import ModelChoice
from puna.settings import parse, to_toml
from puna.train.run import environment

WARM = 4  # tokens of the answers that come first and do not count
SHARES = {"50": 0.5, "95": 0.95, "99": 0.99}
_COLUMNS = "{:>9} {:>9} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>7} {:>8} {:>7} {:>8}"
HEADINGS = (
    *("tokens/s", "spread", "first50", "first95", "first99", "next50", "next95", "next99"),
    *("batch", "outside", "added", "limit", "by", "reached"),
)
COLUMNS = {
    "load": "clients, each with one request at a time; or Poisson arrivals in a second, as 2.5/s",
    "tokens/s": "of answers, from the first request to the end of the last answer",
    "spread": "from the slowest to the fastest repeat, as a share of the median",
    "first50": "milliseconds from sending a request to the first text; half of the requests had it by then",
    "first95": "the same for 95 of 100 requests",
    "first99": "and for 99 of 100",
    "next50": "milliseconds from one token to the next, on average over an answer; half were as fast",
    "next95": "the same for 95 of 100 answers",
    "next99": "and for 99 of 100",
    "batch": "sequences in a step of the engine, on average",
    "outside": "share of the time with a request under way in which no step was computed",
    "added": "what serving adds to the time that the engine alone takes for the same requests",
    "limit": "tokens/s at which, with this batch, reading memory or multiplying would take all the time",
    "by": "which of the two: memory or matrix",
    "reached": "share of that limit, both measured at the same moment",
}


class ServeBenchSettings(GenerationSettings):
    """Requests with prompts and answers of mixed lengths, from clients that wait or at times of their own."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    clients: list[int] = [1, 4, 16, 64]
    """How many ask at once, each the next question as soon as it has an answer; a row of the table each."""
    rates: list[float] = []
    """Requests in a second that come at random, as from many people (Poisson arrivals); a row each."""
    requests: int = Field(64, ge=1)
    """How many of them are timed in each repeat; never fewer than two for each client."""
    prompt: list[int] = Field([16, 256], min_length=2, max_length=2)
    """Tokens of the shortest and the longest prompt; all lengths between are as likely."""
    new: list[int] = Field([16, 128], min_length=2, max_length=2)
    """Tokens of the shortest and the longest answer; all lengths between are as likely."""
    seed: int = Field(0, ge=0)
    """Of prompts, lengths and arrivals."""
    engine: EngineSettings = parse(EngineSettings, {})
    """Of the server, and of the engine alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("prompt", "new"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} must be [shortest, longest], both at least 1, got {[least, most]}")
        if not (self.clients or self.rates):
            raise ValueError("clients or rates must name a load, such as clients=[1, 16] or rates=[2.5]")
        if any(clients < 1 for clients in self.clients) or any(rate <= 0 for rate in self.rates):
            raise ValueError(f"clients and rates must be above 0, got {self.clients} and {self.rates}")
        return self


@dataclass(frozen=True)
class _Bench:
    """What stays the same while the rows of the table are measured."""

    settings: ServeBenchSettings
    server: ServerProcess
    llm: LLM
    device: torch.device
    dtype: torch.dtype

    @property
    def subject(self) -> Subject:
        return Subject(self.llm.model, self.llm.tokenizer, self.llm.context)

    def limits(self) -> Limits:
        return measure_limits(self.device, self.dtype, has_whole_numbers(self.llm.model))


def serve(settings: ServeBenchSettings, say: Say, track: Track) -> list[Figure]:
    """Start a server, put each load on it, and give the engine alone the same requests, in turn.

    Raises:
        SettingsError: prompts and answers that the context does not hold.
        CheckFailed: a request failed, or its answer was not as long as asked.
        PunaError: the server did not start.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    loads = [*(Load(clients=count) for count in settings.clients), *(Load(rate=r) for r in settings.rates)]
    with tempfile.TemporaryDirectory(prefix="puna-bench-") as place:
        choice = _prepared(settings, Path(place))
        with _server(settings, choice, device, dtype, Path(place)) as server:
            kind = str(dtype).removeprefix("torch.")
            llm = choice.llm(str(device), kind, lambda line: None, settings.engine)
            bench = _Bench(settings, server, llm, device, dtype)
            _introduce(bench, say)
            with track("Serving", len(loads) * settings.repeats, "runs") as progress:
                return [_row(bench, load, say, progress) for load in loads]


def _prepared(settings: ServeBenchSettings, place: Path) -> ModelChoice:
    """A model on disk that holds the longest request, and a tokenizer: one is made up where there is none."""
    check_context(settings.model, settings.context)
    needed = settings.prompt[1] + settings.new[1]
    name = str(_saved(settings, needed, place)) if settings.model in PRESETS else settings.model
    source = ModelChoice(name).source()
    check_room(settings.model, context_length(source.config), needed)
    path = source.path if settings.quantize is None else _quantized(settings, source.path, place)
    if source.open_tokenizer is not None:
        return ModelChoice(str(path))
    write_tokenizer(place / "tokenizer", source.config.vocab_size)
    return ModelChoice(str(path), tokenizer=place / "tokenizer")


def _saved(settings: ServeBenchSettings, needed: int, place: Path) -> Path:
    """A preset with random weights, as a model directory."""
    weights = initial_weights(preset_config(settings.model, settings.context, needed), seed=0)
    formats.save(place / settings.model, weights, settings=HuggingFaceSettings(dtype="bfloat16"))
    return place / settings.model


def _quantized(settings: ServeBenchSettings, source: Path, place: Path) -> Path:
    """A model directory whose matrices are rounded as the settings say: server and engine share it."""
    llm = puna.load(source, settings.dtype, settings.device, settings.quantize)
    llm.save(place / "quantized")
    return place / "quantized"


@contextlib.contextmanager
def _server(
    settings: ServeBenchSettings, choice: ModelChoice, device: torch.device, dtype: torch.dtype, place: Path
) -> Iterator[ServerProcess]:
    """`puna serve`, with room for all requests of a row at once."""
    port, file = free_port(), place / "serve.toml"
    file.write_text(
        f"port = {port}\nmax_waiting = {_count(settings, None)}\n[engine]\n{to_toml(settings.engine)}",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "puna", "serve", choice.name, "--settings", str(file)]
    command += ["--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
    if choice.tokenizer is not None:
        command += ["--tokenizer", str(choice.tokenizer)]
    threads = {} if settings.threads is None else {"OMP_NUM_THREADS": str(settings.threads)}
    open_to_all = {name: value for name, value in os.environ.items() if name != "PUNA_API_KEYS"}
    with running(command, port, place / "serve.log", {**open_to_all, **threads}) as server:
        yield server


def _introduce(bench: _Bench, say: Say) -> None:
    settings = bench.settings
    say(f"model: {settings.model}, {described(bench.subject, bench.dtype)}")
    (short, long), (few, many) = settings.prompt, settings.new
    say(f"requests: prompts of {short} to {long} tokens, answers of {few} to {many}; times in milliseconds")
    say(_COLUMNS.format("load", *HEADINGS))


def _row(bench: _Bench, load: Load, say: Say, progress: Tracker) -> Figure:
    """One row of the table: short answers to warm up, then the repeats, the limits around each."""
    settings = bench.settings
    changed = {"clients": [load.clients] if load.clients else [], "rates": [load.rate] if load.rate else []}
    first = _asks(bench, load, 0)[: 2 * (load.clients or WARM)]
    _put(bench, load, [Ask(ask.prompt, min(WARM, ask.new)) for ask in first], 0)
    served, repeats = [], []
    before = bench.limits()
    for number in range(1, settings.repeats + 1):
        one = _put(bench, load, _asks(bench, load, number), number)
        after = bench.limits()
        repeats.append(_repeat(bench, one, before.better(after)))
        served.append(one)
        before = after
        progress.advance(1)
    row = settings.model_copy(update=changed)
    figure = Figure(
        "serve",
        row.model_dump(mode="json"),
        "tokens/s",
        repeats,
        environment(bench.device),
        {**_details(served), "bits_per_weight": bits_per_weight(bench.subject)},
    )
    say(_line(load, figure))
    return figure


def _count(settings: ServeBenchSettings, load: Load | None) -> int:
    """Requests of a repeat; the most of any load without one."""
    clients = max(settings.clients, default=1) if load is None else load.clients or 1
    return max(settings.requests, 2 * clients)


def _asks(bench: _Bench, load: Load, number: int) -> list[Ask]:
    """Random ids, others for every repeat, so that no prompt begins like an earlier one."""
    settings, size = bench.settings, bench.llm.config.vocab_size
    draw = random.Random(f"{settings.seed} {load} {number}")
    return [
        Ask(tuple(draw.choices(range(size), k=draw.randint(*settings.prompt))), draw.randint(*settings.new))
        for _ in range(_count(settings, load))
    ]


def _put(bench: _Bench, load: Load, asks: list[Ask], number: int) -> Served:
    seed = f"{bench.settings.seed} arrivals {number}"
    return put(bench.server, load, asks, seed, bench.llm.engine)


def _repeat(bench: _Bench, served: Served, limits: Limits) -> Repeat:
    """What must be read at this batch, each step the weights, each token what it attends to; and computed."""
    config, subject = bench.llm.config, bench.subject
    quantized = bench.settings.engine.cache_dtype == "int8"
    window = config.sliding_window or config.max_position_embeddings
    lengths = (len(ask.prompt) + new for ask in served.asks for new in range(ask.new))
    positions = sum(min(length, window) for length in lengths)
    read = served.tokens / served.batch * subject.step_bytes
    read += positions * bytes_per_position(config, bench.dtype, quantized)
    rows = [(len(ask.prompt) + ask.new - 1, ask.new) for ask in served.asks]  # all, and those with logits
    whole = sum(whole_operations(subject.model, count, heads) for count, heads in rows)
    flops = sum(flops_of(config, 0, count, heads) for count, heads in rows) - whole
    return Repeat(served.seconds, served.tokens, read, flops, limits, whole)


def _details(served: Sequence[Served]) -> dict[str, Any]:
    """Seconds at each share of all requests, what the server's steps took, and the engine alone."""
    outcomes = [outcome for one in served for outcome in one.outcomes]
    alone = [one.seconds / one.alone - 1 for one in served if one.alone is not None]
    return {
        "seconds_to_first_text": _percentiles([one.first for one in outcomes]),
        "seconds_per_next_token": _percentiles([one.each for one in outcomes]),
        "seconds_to_end": _percentiles([one.ended - one.sent for one in outcomes]),
        "requests": len(outcomes),
        "requests_per_s": statistics.median(len(one.outcomes) / one.seconds for one in served),
        "mean_batch": statistics.median(one.batch for one in served),
        "outside_the_engine": statistics.median(1 - one.step_seconds / one.busy for one in served),
        "added_to_the_engine_alone": statistics.median(alone) if alone else None,
    }


def _percentiles(values: Sequence[float | None]) -> dict[str, float | None]:
    """Answers of one token have no next one, and some begin with tokens that are no text."""
    known = [value for value in values if value is not None]
    return {name: percentile(known, share) if known else None for name, share in SHARES.items()}


def _line(load: Load, figure: Figure) -> str:
    details, (limit, by) = figure.details, figure.limit
    first, following = details["seconds_to_first_text"], details["seconds_per_next_token"]
    added = details["added_to_the_engine_alone"]
    return _COLUMNS.format(
        str(load),
        f"{figure.rate:,.1f}",
        f"{figure.spread:.0%}",
        *(
            "-" if value is None else f"{1000 * value:,.1f}"
            for value in (*first.values(), *following.values())
        ),
        f"{details['mean_batch']:.1f}",
        f"{details['outside_the_engine']:.1%}",
        "-" if added is None else f"{added:+.1%}",
        f"{limit:,.0f}",
        by,
        f"{figure.typical.ratio:.0%}",
    )
