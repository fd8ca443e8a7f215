"""The commands that train: demo, pretrain, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puna.cli.options import (
    Json,
    Overrides,
)
from puna.cli.printing import emit


def demo(
    minutes: Annotated[float, typer.Option(help="How long all of it may take, at most.")] = 10.0,
    dir: Annotated[Path, typer.Option(help="Where the run lives.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """From raw text to a talking model, on this machine.

    Cleans the standard library's source, trains a tokenizer, pretrains, scores, writes, and leaves a report.
    """
    from puna.progress import on_stderr
    from puna.recipes.demo import run_demo

    emit(run_demo(dir, minutes, print, on_stderr), as_json)


def pretrain(
    settings: Annotated[Path, typer.Argument(help="The run's settings, a TOML file.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue, or start where nothing is there.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even though settings that change results differ.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a Llama on your own text.

    From scratch, or from a model directory (init_from). configs/ has commented settings to begin with.
    """
    from puna.progress import on_stderr
    from puna.recipes.training.pretrain import pretrain as run
    from puna.recipes.training.settings import PretrainSettings
    from puna.settings import read_settings

    chosen = read_settings(PretrainSettings, settings, overrides or ())
    emit(run(chosen, resume=resume, allow_changes=allow_changes, say=print, track=on_stderr), as_json)


def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Write one HTML page about a run.

    It needs nothing but itself; the run may still be going on.
    """
    from puna.train.report import write_report

    path = write_report(run)
    print(f"Report: {path}")
    emit({"report": str(path)}, as_json)
