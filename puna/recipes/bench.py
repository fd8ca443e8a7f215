"""`puna bench`: what this machine does with a model, beside what it could do at most.

With `--json` the result is {"results": […]}, one for each row of the table: {what, settings, value, unit,
limit, ratio, environment, details}. `settings` are those that measure this row alone; `limit`, in the unit of
`value`, is what the machine could do at most.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.errors import SettingsError, nearest
from puna.progress import Track
from puna.recipes.bench_figures import Figure, Say
from puna.recipes.bench_generation import DecodeSettings, PrefillSettings, decode, prefill
from puna.settings import Settings, read_settings


@dataclass(frozen=True)
class Benchmark:
    """What can be measured: its settings, and a function that prints a table and gives its rows."""

    settings: type[Settings]
    run: Callable[[Any, Say, Track], list[Figure]]


WHATS = {
    "decode": Benchmark(DecodeSettings, decode),
    "prefill": Benchmark(PrefillSettings, prefill),
}


def bench(
    what: str, arguments: Sequence[str], settings: Path | None, say: Say, track: Track
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
    if what not in WHATS:
        raise SettingsError(f"what must be one of {', '.join(WHATS)}, got {what!r}.{nearest(what, WHATS)}")
    named = [f"model={json.dumps(argument)}" for argument in arguments[:1] if "=" not in argument]
    chosen = read_settings(WHATS[what].settings, settings, [*named, *arguments[len(named) :]])
    figures = WHATS[what].run(chosen, say, track)
    return {"results": [figure.as_dict() for figure in figures]}
