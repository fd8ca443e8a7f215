"""`puna bench decode` and `prefill`: the engine's speed, and how near it is to what the machine can do."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, ConfigDict, Field

from puna.devices import choose_device, choose_dtype
from puna.engine.answer import Answer, Request
from puna.engine.cache import bytes_per_position
from puna.engine.engine import Engine
from puna.engine.params import SamplingParams
from puna.engine.settings import EngineSettings
from puna.errors import ResourceError, SettingsError
from puna.kernels.pages import BLOCK
from puna.model.config import ModelConfig
from puna.progress import Track, Tracker, quantity
from puna.quantize.recipe import Recipe
from puna.recipes.bench.figures import Figure, PeakMemory, Repeat, Say, measure_limits
from puna.recipes.bench.model import Subject, flops_of, open_subject, random_model
from puna.recipes.bench.work import bits_per_weight, has_whole_numbers, whole_operations
from puna.settings import Settings, parse
from puna.train.run import environment

WARM = 4  # steps of the first run, which does not count: threads, libraries and kernels start up
TINY = ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
)
_COLUMNS = "{:>8} {:>9} {:>8} {:>9} {:>7} {:>8} {:>9} {:>7} {:>8} {:>7}"
HEADINGS = ("tokens/s", "each", "ms/step", "spread", "outside", "limit", "by", "reached", "memory")
COLUMNS = {
    "streams, prompt": "sequences at once; tokens of the prompt",
    "tokens/s": "of all streams together, the median of the repeats",
    "each": "tokens/s of one stream",
    "ms/step": "milliseconds of one pass of the engine",
    "spread": "from the slowest to the fastest repeat, as a share of the median",
    "outside": "share of the time that is not the model's pass: scheduling, choosing tokens, making text",
    "limit": "tokens/s at which reading memory, or multiplying matrices, would take all the time",
    "by": "which of the two: memory or matrix",
    "reached": "share of that limit, both measured at the same moment",
    "memory": "the most that was held, as a multiple of weights and cache",
}
OUTSIDE = ("schedule", "sample", "text")  # what an engine does besides the model's pass


def _recipe(value: Any) -> Any:
    """A scheme's name alone is a recipe too."""
    return None if value == "none" else {"scheme": value} if isinstance(value, str) else value


class GenerationSettings(Settings):
    """What both have: a model, where and how it runs, and how often to measure."""

    model_config = ConfigDict(use_attribute_docstrings=True)  # `puna bench decode --help` shows them

    model: str = "puna-110m"
    """A preset, whose weights are then random, a path, or a hub id."""
    dtype: str = "auto"
    """Of weights and cache: float32, bfloat16 or float16; auto: what suits the device."""
    quantize: Annotated[Recipe | None, BeforeValidator(_recipe)] = None
    """int8 or int4: round the matrices so; or the fields of a recipe, such as quantize.output=int8."""
    device: str = "auto"
    """cpu, cuda or mps."""
    threads: int | None = Field(None, ge=1)
    """Of a CPU; none: as many as torch takes."""
    context: int | None = Field(None, ge=2)
    """Of a preset: positions to allow; none: its own, or as many as are needed."""
    repeats: int = Field(3, ge=1)
    """How often each row is measured; its figures are those of the median."""
    engine: EngineSettings = parse(EngineSettings, {})
    """`cache_memory` None is here as much as is needed, so that memory can be compared."""


class DecodeSettings(GenerationSettings):
    """Sequences that all have a prompt behind them, and get a token each in every step."""

    streams: list[int] = Field([1, 4, 16, 64], min_length=1)
    """How many at once; one row of the table each."""
    prompt: int = Field(64, ge=1)
    """Tokens behind each stream when the time begins."""
    new: int = Field(64, ge=1)
    """Steps that are timed."""
    sampling: SamplingParams = SamplingParams(temperature=0.0)
    """How tokens are chosen; as soon as one of its settings is given the others are those of `generate`."""


class PrefillSettings(GenerationSettings):
    """One prompt after another, each computed to the first token of its answer."""

    prompt: list[int] = Field([128, 512], min_length=1)
    """Tokens; one row of the table each."""


@dataclass(frozen=True)
class _Work:
    """What was timed: its steps and tokens, what it had to read and compute, seconds by what took them.

    `flops` are operations on floating-point numbers, `whole` those on whole ones.
    """

    seconds: float
    steps: int
    tokens: int
    read: float
    flops: float
    whole: float
    parts: dict[str, float]


@dataclass(frozen=True)
class _Bench:
    """What stays the same while the rows of the table are measured."""

    settings: GenerationSettings
    subject: Subject
    device: torch.device
    dtype: torch.dtype
    memory: PeakMemory

    @property
    def position_bytes(self) -> int:
        """What a position of a sequence takes in the cache."""
        quantized = self.settings.engine.cache_dtype == "int8"
        return bytes_per_position(self.subject.model.config, self.dtype, quantized)

    def new_engine(self, sequences: int, positions: int) -> Engine:
        """With the memory that so many sequences of this length need, where the settings leave it open."""
        wanted = self.settings.engine
        if wanted.cache_memory is None:
            needed = sequences * math.ceil(positions / BLOCK) * BLOCK * self.position_bytes
            wanted = wanted.model_copy(update={"cache_memory": needed})
        return Engine(self.subject.model, self.subject.tokenizer, self.subject.context, wanted)

    def prompts(self, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
        """Random ids, others for every seed, so that no prompt begins like an earlier one."""
        draw, size = random.Random(seed), self.subject.model.config.vocab_size
        return [tuple(draw.choices(range(size), k=length)) for _ in range(count)]


def decode(settings: DecodeSettings, say: Say, track: Track) -> list[Figure]:
    """Time steps in which every stream gets a token, all prompts computed before.

    Raises:
        SettingsError: more streams than may run at once, or more positions than the context has.
        ResourceError: too little memory.
    """
    most, running = max(settings.streams), settings.engine.max_running
    if min(settings.streams) < 1 or most > running:
        raise SettingsError(
            f"streams must be from 1 to engine.max_running, {running}, got {settings.streams}; raise it, and "
            "engine.step_tokens with it"
        )
    if settings.sampling.answers > 1:
        raise SettingsError("sampling.n and best_of must be 1 here; more streams do what more answers would")
    bench = _begin(settings, _decode_length(settings, most), say)
    say(_COLUMNS.format("streams", *HEADINGS))
    with track("Decoding", len(settings.streams) * (settings.repeats + 1), "runs") as progress:
        return [_decode_row(bench, settings, streams, say, progress) for streams in settings.streams]


def prefill(settings: PrefillSettings, say: Say, track: Track) -> list[Figure]:
    """Time prompts, from their arrival to the first token after them.

    Raises:
        SettingsError: a prompt that the context does not hold.
        ResourceError: too little memory.
    """
    if min(settings.prompt) < 1:
        raise SettingsError(f"prompt must name lengths of at least 1, got {settings.prompt}")
    bench = _begin(settings, max(settings.prompt) + 1, say)
    say(_COLUMNS.format("prompt", *HEADINGS))
    with track("Prefilling", len(settings.prompt) * (settings.repeats + 1), "runs") as progress:
        return [_prefill_row(bench, settings, length, say, progress) for length in settings.prompt]


def _begin(settings: GenerationSettings, needed: int, say: Say) -> _Bench:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    measure_limits(device, dtype, device.type == "cpu")  # what libraries take is not the memory of a model
    _load_libraries(device, dtype, settings.engine)
    memory = PeakMemory(device)
    subject = open_subject(settings.model, dtype, device, settings.context, needed, settings.quantize)
    limits = measure_limits(device, dtype, has_whole_numbers(subject.model))
    say(f"model: {settings.model}, {described(subject, dtype)}")
    for limit in filter(None, (limits.reading, limits.peak, limits.narrow)):
        say(f"limit: {limit}; anew around every repeat")
    return _Bench(settings, subject, device, dtype, memory)


def described(subject: Subject, dtype: torch.dtype) -> str:
    """What a model takes, as the head of a table says it."""
    bits = f"{bits_per_weight(subject):.2f} bits per weight read"
    return f"{quantity(subject.weight_bytes)}B, {bits}, computing in {str(dtype).removeprefix('torch.')}"


def _load_libraries(device: torch.device, dtype: torch.dtype, settings: EngineSettings) -> None:
    """Let a tiny model answer: what programs and libraries take is not the memory of a model."""
    engine = Engine(random_model(TINY, dtype, device), None, TINY.max_position_embeddings, settings)
    engine.submit(Request((0,) * 32, SamplingParams(temperature=0.0, max_new_tokens=2)))
    while engine.step():
        pass


def _decode_row(bench: _Bench, settings: DecodeSettings, streams: int, say: Say, progress: Tracker) -> Figure:
    engine = bench.new_engine(streams, _decode_length(settings, streams))

    def run(seed: int) -> _Work:
        return _decode_run(bench, engine, settings, streams, seed)

    row = settings.model_copy(update={"streams": [streams]})
    figure = _measured(bench, row, engine, run, progress)
    say(_line(streams, figure, streams))
    return figure


def _prefill_row(
    bench: _Bench, settings: PrefillSettings, length: int, say: Say, progress: Tracker
) -> Figure:
    engine = bench.new_engine(1, length + 1)
    row = settings.model_copy(update={"prompt": [length]})
    figure = _measured(bench, row, engine, lambda seed: _prefill_run(bench, engine, length, seed), progress)
    say(_line(length, figure, 1))
    return figure


def _measured(
    bench: _Bench,
    settings: GenerationSettings,
    engine: Engine,
    run: Callable[[int], _Work],
    progress: Tracker,
) -> Figure:
    """One row of the table: a run to warm up, then those that count, the machine's limits around each."""
    run(0)
    progress.advance(1)
    works, repeats, most = [], [], 0
    whole = has_whole_numbers(bench.subject.model)
    before = measure_limits(bench.device, bench.dtype, whole)
    for seed in range(1, settings.repeats + 1):
        bench.memory.restart()
        work = run(seed)
        most = max(most, bench.memory.most() or 0)
        after = measure_limits(bench.device, bench.dtype, whole)
        limits = before.better(after)
        repeats.append(Repeat(work.seconds, work.tokens, work.read, work.flops, limits, work.whole))
        works.append(work)
        before = after
        progress.advance(1)
    what = "decode" if isinstance(settings, DecodeSettings) else "prefill"
    return Figure(
        what,
        settings.model_dump(mode="json"),
        "tokens/s",
        repeats,
        environment(bench.device),
        {
            **_details(works),
            "bits_per_weight": bits_per_weight(bench.subject),
            "memory": _memory(bench, engine, most),
            "notes": list(engine.notes),
        },
    )


def _decode_run(bench: _Bench, engine: Engine, settings: DecodeSettings, streams: int, seed: int) -> _Work:
    """Steps in which every stream gets a token; the work of seed 0 is a short one, to warm up."""
    steps = settings.new if seed else min(WARM, settings.new)
    longest = _decode_length(settings, streams) - settings.prompt
    params = settings.sampling.model_copy(update={"max_new_tokens": longest})
    prompts = bench.prompts(streams, settings.prompt, seed)
    answers = [engine.submit(Request(prompt, params)) for prompt in prompts]
    sequences = [track.sequence for answer in answers for track in answer.tracks]
    while not all(sequence.tokens for sequence in sequences):
        _step(engine, answers)
    held = [len(sequence.ids) for sequence in sequences]
    earlier, began = dict(engine.times.seconds), time.perf_counter()
    for _ in range(steps):
        _step(engine, answers)
    seconds = time.perf_counter() - began
    # A step's row is that of the newest token, which has no keys and values yet.
    config, rows = bench.subject.model.config, steps * len(sequences)
    whole = whole_operations(bench.subject.model, rows, heads=rows)
    flops = sum(flops_of(config, have - 1, steps, heads=steps) for have in held) - whole
    read = steps * bench.subject.step_bytes + _cache_read(bench, held, steps)
    parts = _since(engine, earlier)
    for answer in answers:
        engine.cancel(answer)
    return _Work(seconds, steps, rows, read, flops, whole, parts)


def _prefill_run(bench: _Bench, engine: Engine, length: int, seed: int) -> _Work:
    """A prompt and the first token after it. The weights must be read once, however many the steps are."""
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    answers = [engine.submit(Request(prompt, params)) for prompt in bench.prompts(1, length, seed)]
    steps = engine.times.steps
    earlier, began = dict(engine.times.seconds), time.perf_counter()
    while not answers[0].finished:
        _step(engine, answers)
    seconds = time.perf_counter() - began
    whole = whole_operations(bench.subject.model, length, heads=1)
    flops = flops_of(bench.subject.model.config, 0, length, heads=1) - whole
    parts, read = _since(engine, earlier), bench.subject.step_bytes
    return _Work(seconds, engine.times.steps - steps, length, read, flops, whole, parts)


def _since(engine: Engine, earlier: dict[str, float]) -> dict[str, float]:
    """Seconds of each part of its steps since then."""
    return {name: seconds - earlier[name] for name, seconds in engine.times.seconds.items()}


def _step(engine: Engine, answers: list[Answer]) -> None:
    """One step; whatever keeps an answer from going on would make the figure one of something else.

    Raises:
        ResourceError: a sequence was preempted.
        SettingsError: an answer ended before the time was over.
    """
    ended = any(track.sequence.finish_reason for answer in answers for track in answer.tracks)
    if engine.load.preemptions or (ended and engine.load.waiting):
        raise ResourceError(
            "too little memory for all streams at once, so that some waited for others; raise "
            "engine.cache_memory, or lower streams, prompt or new"
        )
    if ended:
        raise SettingsError(
            "an answer ended before all steps were timed; take sampling settings that do not end it, or "
            "fewer steps (new)"
        )
    engine.step()
    for answer in answers:
        if answer.error is not None:
            raise answer.error


def _decode_length(settings: DecodeSettings, streams: int) -> int:
    """The positions of a stream: while the last prompts are computed, the first answers grow already."""
    room = max(settings.engine.step_tokens - streams, 1)  # beside a row for each answer that has begun
    return settings.prompt + math.ceil(streams * settings.prompt / room) + settings.new + 1


def _cache_read(bench: _Bench, held: list[int], steps: int) -> float:
    """Bytes of keys and values that `steps` steps read: each sequence all it has, or its window."""
    window = bench.subject.model.config.sliding_window
    lengths = (have + step for have in held for step in range(steps))
    seen = sum(length if window is None else min(length, window) for length in lengths)
    return float(seen * bench.position_bytes)


def _details(works: list[_Work]) -> dict[str, Any]:
    """Milliseconds of a step, and which shares of it are not the model's pass."""
    seconds = sum(work.seconds for work in works)
    shares = {name: sum(work.parts[name] for work in works) / seconds for name in OUTSIDE}
    return {
        "ms_per_step": statistics.median(1000 * work.seconds / work.steps for work in works),
        "outside_the_model": {**shares, "all": sum(shares.values())},
    }


def _memory(bench: _Bench, engine: Engine, most: int | None) -> dict[str, Any]:
    """Bytes of weights, of the cache, and the most that was held, as a multiple of the two."""
    weights, cache = bench.subject.weight_bytes, engine.load.blocks * BLOCK * bench.position_bytes
    return {
        "weights": weights,
        "cache": cache,
        "peak": most,
        "ratio": None if most is None else most / (weights + cache),
    }


def _line(first: int, figure: Figure, streams: int) -> str:
    limit, by = figure.limit
    memory = figure.details["memory"]["ratio"]
    return _COLUMNS.format(
        first,
        f"{figure.rate:,.1f}",
        f"{figure.rate / streams:,.1f}",
        f"{figure.details['ms_per_step']:,.2f}",
        f"{figure.spread:.0%}",
        f"{figure.details['outside_the_model']['all']:.1%}",
        f"{limit:,.0f}",
        by,
        f"{figure.typical.ratio:.0%}",
        "?" if memory is None else f"{memory:.2f}×",
    )
