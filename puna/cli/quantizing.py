"""The command that makes a model smaller: quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puna.cli.options import (
    CacheDir,
    Json,
    Model,
    Revision,
    Tokenizer,
    given,
)
from puna.cli.printing import emit


def quantize(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="A directory, which transformers opens too.")],
    scheme: Annotated[
        str | None,
        typer.Option(help="int8, int4, gptq or nf4; or with a group, as int8:32.", show_default="int8"),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale, 32 or 128; by default 32 for int4 and gptq, and for int8 "
            "all of an output's. Not for nf4.",
            show_default=False,
        ),
    ] = None,
    exceptions: Annotated[
        list[str] | None,
        typer.Option(
            "--except",
            help="PATTERN=SCHEME: other matrices otherwise, such as '*.down_proj=int8' or 'lm_head=keep'.",
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text (plain, .jsonl, .parquet) or ids (.npy, a token shard) to measure on, and with gptq "
            "to fit to. Without it the source of Python's library is measured on; gptq needs it.",
            show_default=False,
        ),
    ] = None,
    measure_on: Annotated[
        list[Path] | None,
        typer.Option(
            help="The same, to measure on; the first of --calibration without it.", show_default=False
        ),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run text through both models, and so know what was lost; done unless said otherwise.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="A TOML file of settings.", show_default=False)
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Another setting as key=value, such as embeddings=int8 or calibration.sequences=32."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what a stopped run left, by its options.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that is there; begin a stopped run again.")
    ] = False,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Make a model smaller, and tell what that costs it, layer by layer.

    One layer is in memory at a time. A stopped run is gone on with by --resume, bit for bit.
    """
    from puna.progress import on_stderr
    from puna.recipes.models import ModelChoice
    from puna.recipes.quantization.run import quantize as run
    from puna.recipes.quantization.settings import read_quantize_settings

    options = given(scheme=scheme, group=group, measure=measure)
    chosen = read_quantize_settings(settings, options, exceptions or (), change or ())
    choice = ModelChoice(source, revision, cache_dir)
    result = run(
        choice.source(),
        destination,
        chosen,
        calibration=calibration or (),
        measure_on=measure_on or (),
        tokenizer=tokenizer,
        resume=resume,
        force=force,
        origin=choice.origin,
        say=print,
        track=on_stderr,
    )
    emit(result, as_json)
