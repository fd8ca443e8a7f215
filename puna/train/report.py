"""The report of a run: one HTML page that needs nothing but itself, readable while the run still goes on."""

from __future__ import annotations

import importlib.resources
import itertools
import re
import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from puna.errors import CheckpointError
from puna.files import disk_errors, write_atomically
from puna.progress import counted, duration, quantity
from puna.train.charts import Chart, Curve, chart, number, smooth
from puna.train.history import History, read_history
from puna.train.run import RunDirectory

SAMPLED_STEPS = 16  # shown of a long run, spread evenly, first and last among them
SAMPLE_LIMIT = 3000  # characters of one sample
EVENT_LIMIT = 100
DOCUMENT_LIMIT = 8  # named of a skipped step's; metrics.jsonl names all
NAMED = (  # what has its own chart or figure; anything else that was recorded gets a chart of its name
    "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "utilisation", "seconds",
    "waiting", "updating", "bits_per_byte", "perplexity",
)  # fmt: skip

# What HTML forbids or what would rearrange the text around it.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    """A key figure: what it is, its value, and a line that puts it into proportion."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """What the model wrote at a step."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Event:
    """A line of the run's diary."""

    step: str
    text: str


def write_report(run: Path) -> Path:
    """Write `report.html` into a run directory, from what is there: finished, under way, or hardly begun.

    Raises:
        CheckpointError: the path is not a run directory, or cannot be written to.
        ResourceError: the disk is full; an earlier report stays.
    """
    directory = RunDirectory(run)
    if not directory.exists:
        raise CheckpointError(f"{run} is not a run directory: it holds no run.toml")
    page = _page(directory)
    advice = "free some space, then write the report again"
    with disk_errors(f"writing {directory.report}", run, CheckpointError, advice):
        write_atomically(directory.report, page)
    return directory.report


def _page(run: RunDirectory) -> str:
    history, settings = read_history(run.metrics), _settings(run.settings_file)
    template = importlib.resources.files("puna.train").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,  # text of models and files is nobody's markup
        finalize=showable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(template).render(
        name=run.path.resolve().name,
        path=str(run.path),
        state=_state(history, settings),
        done=_done(history, settings),
        figures=_figures(history),
        charts=_charts(history, settings),
        samples=_samples(history.records["sample"]),
        sampled=len({record.get("step") for record in history.records["sample"]}),
        events=_events(history),
        settings=settings,
        machine=run.machine(),
        places=_places(run),
        limit=SAMPLE_LIMIT,
        unreadable=history.unreadable,
    )


def showable(text: object) -> str:
    """Text that cannot break the page: control and direction characters become U+FFFD."""
    return _UNSHOWABLE.sub("\ufffd", str(text))


# Words and figures


def _state(history: History, settings: dict[str, dict[str, str]]) -> str:
    step, total = _last_step(history), _total_steps(settings)
    if step is None:
        return "No step recorded yet"
    of = f" of {total:,}" if total else ""
    if history.summary:
        return f"Finished after {counted(step, 'step')}"
    return f"Step {step:,}{of}, not finished"


def _done(history: History, settings: dict[str, dict[str, str]]) -> float:
    """Percent of the run that is done; 0 where its length is not known."""
    step, total = _last_step(history), _total_steps(settings)
    if history.summary:
        return 100.0
    return min(100.0, round(100 * step / total, 1)) if step and total else 0.0


def _last_step(history: History) -> int | None:
    ends = [column.steps[-1] for kind in history.columns.values() for column in kind.values() if len(column)]
    return int(max(ends)) if ends else None


def _total_steps(settings: dict[str, dict[str, str]]) -> int | None:
    steps = settings.get("length", {}).get("steps", "")
    return int(steps) if steps.isdigit() else None


def _figures(history: History) -> list[Figure]:
    candidates = (
        _bits(history),
        _validation(history),
        _training(history),
        _size(history),
        _tokens(history),
        _time(history),
    )
    return [figure for figure in candidates if figure is not None]


def _bits(history: History) -> Figure | None:
    bits = _final(history, "bits_per_byte")
    if bits is None:
        return None
    beside = [f"{name} {value:.3f}" for name, value in _compressors(history)]
    return Figure("Bits per byte", f"{bits:.3f}", " · ".join(beside) or "on held-out text")


def _validation(history: History) -> Figure | None:
    loss, perplexity = _final(history, "loss"), _final(history, "perplexity")
    if loss is None:
        return None
    return Figure("Validation loss", f"{loss:.4f}", f"perplexity {perplexity:.2f}" if perplexity else "")


def _training(history: History) -> Figure | None:
    losses = history.column("train", "loss").values
    if not losses:
        return None
    last = losses[-max(1, len(losses) // 50) :]
    return Figure("Training loss", f"{statistics.fmean(last):.4f}", f"from {losses[0]:.2f} at the start")


def _size(history: History) -> Figure | None:
    parameters = _number(history.summary.get("parameters"))
    return None if parameters is None else Figure("Parameters", quantity(parameters), f"{parameters:,.0f}")


def _tokens(history: History) -> Figure | None:
    tokens = _number(history.summary.get("tokens")) or history.column("train", "tokens").last
    return None if tokens is None else Figure("Tokens seen", quantity(tokens), f"{tokens:,.0f}")


def _time(history: History) -> Figure | None:
    seconds = _number(history.summary.get("seconds")) or sum(history.column("train", "seconds").values)
    speed = history.column("train", "tokens_per_s").values
    if not seconds and not speed:
        return None
    rate = f"{quantity(statistics.median(speed))} tokens/s" if speed else ""
    return Figure("Training time", duration(seconds), rate) if seconds else Figure("Speed", rate)


def _final(history: History, name: str) -> float | None:
    """The summary's figure; before there is one, the best validation's, which the exported model has."""
    if (value := _number(history.summary.get(name))) is not None:
        return value
    values = history.column("validation", name).values
    return min(values) if values else None


def _compressors(history: History) -> list[tuple[str, float]]:
    found = [(name, _number(history.summary.get(name))) for name in ("gzip", "xz")]
    return [(name, value) for name, value in found if value]


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# Charts


def _charts(history: History, settings: dict[str, dict[str, str]]) -> list[Chart]:
    end = float(_last_step(history) or 0)
    speed, share = history.column("train", "tokens_per_s"), history.column("train", "utilisation")
    clip = _setting(settings, "clip_norm")
    named = [
        chart("Loss", [*_noisy(history, "loss", "training"), *_dots(history, "loss")], end),
        chart(
            "Bits per byte, held-out text", _dots(history, "bits_per_byte"), end, marks=_compressors(history)
        ),
        chart("Learning rate", _line(history, "lr"), end, from_zero=True),
        chart(
            "Gradient norm",
            _noisy(history, "grad_norm", "before clipping"),
            end,
            log=True,
            marks=[("clip", clip)] if clip else [],
        ),
        chart(
            "Tokens per second",
            _noisy(history, "tokens_per_s", "all devices"),
            end,
            note=_speed_note(history),
            from_zero=True,
            right=share.values[-1] / speed.values[-1]
            if len(share) and len(speed) and speed.values[-1]
            else None,
        ),
    ]
    others = {name: None for kind in history.columns.values() for name in kind if name not in NAMED}
    return named + [
        chart(name.replace("_", " "), [*_noisy(history, name, "training"), *_dots(history, name)], end)
        for name in others
    ]


def _noisy(history: History, name: str, what: str) -> list[Curve]:
    column = history.column("train", name)
    smoothed = smooth(column.values)
    if smoothed == list(column.values):  # too few steps to smooth
        return [Curve(what, column.steps, column.values)]
    return [
        Curve(what, column.steps, column.values, "faint"),
        Curve(f"{what}, smoothed", column.steps, smoothed),
    ]


def _line(history: History, name: str) -> list[Curve]:
    column = history.column("train", name)
    return [Curve("", column.steps, column.values)]


def _dots(history: History, name: str) -> list[Curve]:
    column = history.column("validation", name)
    return [Curve("validation", column.steps, column.values, "dots", colour=2)]


def _speed_note(history: History) -> str:
    told = {
        "utilisation": "right: share of the measured matrix rate, median {:.1%}",
        "waiting": "waiting for data: {:.1%} of a step",
    }
    columns = {name: history.column("train", name).values for name in told}
    notes = [told[name].format(statistics.median(values)) for name, values in columns.items() if values]
    return "; ".join(notes)


# Samples, events, settings, places


def _samples(records: list[dict[str, Any]]) -> list[tuple[int, list[Sample]]]:
    """Samples by step, a few steps spread over the run."""
    samples = [
        Sample(record["step"], str(record.get("prompt", "")), str(record.get("text", "")))
        for record in records
        if isinstance(record.get("step"), int)
    ]
    by_step = [
        (step, list(group)) for step, group in itertools.groupby(samples, key=lambda sample: sample.step)
    ]
    if len(by_step) <= SAMPLED_STEPS:
        return by_step
    return [by_step[n * (len(by_step) - 1) // (SAMPLED_STEPS - 1)] for n in range(SAMPLED_STEPS)]


def _events(history: History) -> list[Event]:
    records = [record for kind in ("skipped", "event") for record in history.records[kind]]
    records.sort(key=lambda record: _number(record.get("step")) or 0)
    return [Event(str(record.get("step", "")), _tell(record)) for record in records[-EVENT_LIMIT:]]


def _tell(record: dict[str, Any]) -> str:
    if record["kind"] == "event":
        return str(record.get("text", ""))
    documents = record.get("documents")
    named = [str(document) for document in documents] if isinstance(documents, list) else []
    more = f" and {len(named) - DOCUMENT_LIMIT} more" if len(named) > DOCUMENT_LIMIT else ""
    told = f"skipped: {record.get('reason', 'not finite')}"
    return f"{told}; documents: {', '.join(named[:DOCUMENT_LIMIT])}{more}" if named else told


def _settings(path: Path) -> dict[str, dict[str, str]]:
    """The settings by table; those outside any table come first, under no name."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    tables: dict[str, dict[str, str]] = {"": {}}
    for table, key, value in _leaves(values):
        tables.setdefault(table, {})[key] = value
    return {table: leaves for table, leaves in tables.items() if leaves}


def _leaves(values: dict[str, Any], table: str = "") -> Iterator[tuple[str, str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{table}.{key}" if table else key)
        else:
            yield table, key, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return number(value) if float(number(value).replace("k", "e3")) == value else repr(value)
    if isinstance(value, list):
        return ", ".join(repr(item) if isinstance(item, str) else _shown(item) for item in value)
    return str(value)


def _setting(settings: dict[str, dict[str, str]], key: str) -> float | None:
    try:
        return float(settings[""][key])
    except (KeyError, ValueError):
        return None


def _places(run: RunDirectory) -> list[tuple[str, str]]:
    places = (
        (run.model, "the best model so far, for transformers and for puna generate, chat, info"),
        (run.checkpoints, "what --resume continues from"),
        (run.metrics, "every figure of this page, one record per line"),
        (run.tensorboard, "the same for TensorBoard"),
        (run.settings_file, "the resolved settings"),
        (run.environment_file, "versions and machine"),
    )
    return [(str(place.relative_to(run.path)), what) for place, what in places if place.exists()]
