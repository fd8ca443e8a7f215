"""`puna bench`: what this machine does with a model, beside what it could do at most.

With `--json` the result is {"results": […]}, one for each row of the table: {what, settings, value, unit,
limit, ratio, environment, details}. `settings` are those that measure this row alone; `limit`, in the unit of
`value`, is what the machine could do at most.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import SettingsError, nearest
from puna.progress import Track
from puna.recipes.bench import generation, serving, training
from puna.recipes.bench.figures import Figure, Say
from puna.recipes.bench.generation import DecodeSettings, PrefillSettings, decode, prefill
from puna.recipes.bench.serving import ServeBenchSettings, serve
from puna.recipes.bench.training import train
from puna.recipes.bench.training_settings import TrainBenchSettings
from puna.settings import Settings, read_settings

NARROWEST = 30  # characters beside a name


@dataclass(frozen=True)
class Benchmark:
    """What can be measured: its settings, what its table's columns say, and what prints and returns it."""

    settings: type[Settings]
    columns: Mapping[str, str]
    run: Callable[[Any, Say, Track], list[Figure]]


WHATS = {
    "train": Benchmark(TrainBenchSettings, training.COLUMNS, train),
    "decode": Benchmark(DecodeSettings, generation.COLUMNS, decode),
    "prefill": Benchmark(PrefillSettings, generation.COLUMNS, prefill),
    "serve": Benchmark(ServeBenchSettings, serving.COLUMNS, serve),
}


def explain(what: str | None) -> str:
    """What can be set, with defaults, and what the columns of the table say.

    Raises:
        SettingsError: there is no such benchmark.
    """
    known = _known(what)
    lines = [f"Settings of {what}, as key=value:", *_rows(known.settings, ""), "", "Columns:"]
    return "\n".join([*lines, *(_folded(f"  {name:24}", text) for name, text in known.columns.items())])


def _folded(head: str, text: str) -> str:
    """What is said of something, beside its name, on as many lines of the terminal as it takes."""
    if not text:
        return head
    width = max(shutil.get_terminal_size().columns, len(head) + NARROWEST)
    return textwrap.fill(text, width, initial_indent=f"{head} ", subsequent_indent=" " * (len(head) + 1))


def _rows(cls: type[Settings], prefix: str) -> Iterator[str]:
    """A line for each setting; of settings inside settings those of the engine alone, the rest is told of."""
    for name, field in cls.model_fields.items():
        value, told = field.default, " ".join((field.description or "").split())
        if name == "engine":
            yield from _rows(type(value), f"{prefix}{name}.")
        elif isinstance(value, Settings):
            changed = ", ".join(f"{key}={item}" for key, item in value.model_dump(exclude_unset=True).items())
            yield _folded(f"  {f'{prefix}{name}.…':24} {changed:16}", told)
        else:
            yield _folded(f"  {prefix + name:24} {_shown(value):16}", told).rstrip()


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _known(what: str | None) -> Benchmark:
    if what is None:
        raise SettingsError(f"name what to measure: puna bench {' or '.join(WHATS)}")
    if what not in WHATS:
        raise SettingsError(f"what must be one of {', '.join(WHATS)}, got {what!r}.{nearest(what, WHATS)}")
    return WHATS[what]


def bench(
    what: str | None, arguments: Sequence[str], settings: Path | None, say: Say, track: Track
) -> dict[str, Any]:
    """Measure, and return what was found.

    Args:
        what: a name in WHATS.
        arguments: a model first, where one is named, then key=value.
        settings: a TOML file of settings.
        say: takes the lines of the table.
        track: shows progress.

    Raises:
        SettingsError: there is no such benchmark, or its settings are wrong.
        InputError: as the benchmark itself.
    """
    benchmark = _known(what)
    named = [f"model={json.dumps(argument)}" for argument in arguments[:1] if "=" not in argument]
    chosen = read_settings(benchmark.settings, settings, [*named, *arguments[len(named) :]])
    figures = benchmark.run(chosen, say, track)
    return {"results": [figure.as_dict() for figure in figures]}
