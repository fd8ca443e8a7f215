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
    context: typer.Context,
    what: Annotated[
        str | None, typer.Argument(help="train, decode, prefill or serve.", show_default=False)
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [KEY=VALUE]...",
            help="A model (a preset has random weights; puna-110m without it), then settings to change.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    as_json: Json = False,
    ask_help: Annotated[
        bool, typer.Option("--help", help="Show this; after one of them its settings and columns too.")
    ] = False,
) -> None:
    """Measure speed on this machine, beside the most that it could do.

    The limits (reading memory, multiplying matrices) are measured around every repeat. For example:
    puna bench decode tinyllama-1.1b dtype=bfloat16 quantize=int8 'streams=[1, 16]'
    """
    if ask_help:
        print(context.get_help())
        if what is None:
            return
    from puna.progress import on_stderr
    from puna.recipes.bench.command import bench as run
    from puna.recipes.bench.command import explain

    if ask_help:
        print(explain(what))
        return
    emit(run(what, arguments or (), settings, print, on_stderr), as_json)
