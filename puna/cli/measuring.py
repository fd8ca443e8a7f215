"""The command that measures: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puna.cli.options import (
    Json,
)
from puna.cli.printing import emit


def bench(
    what: Annotated[str, typer.Argument(help="decode or prefill.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [KEY=VALUE]...",
            help="A model (a preset has random weights), then settings to change.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    as_json: Json = False,
) -> None:
    """Measure speed on this machine, beside the most that it could do.

    The limits (reading memory, multiplying matrices) are measured around every repeat. For example:
    puna bench decode tinyllama-1.1b dtype=bfloat16 'streams=[1, 16]'
    """
    from puna.progress import on_stderr
    from puna.recipes.bench import bench as run

    emit(run(what, arguments or (), settings, print, on_stderr), as_json)
