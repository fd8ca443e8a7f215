"""The commands about a model as a thing: convert, verify, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puna.cli.options import (
    CacheDir,
    Json,
    LowMemory,
    Model,
    Revision,
    Tokenizer,
    given,
)
from puna.cli.printing import emit


def convert(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="A directory (hf, meta) or a file (gguf, llama2c).")],
    to: Annotated[
        str | None,
        typer.Option(
            help="hf, meta, gguf or llama2c; by DESTINATION's ending without it.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="The type to store: float32, bfloat16, float16; for gguf also q8_0, q4_0, q4_1, q5_0, q5_1; "
            "for llama2c float32 or int8. Each tensor's own without it.",
            show_default=False,
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(help="meta: how many model-parallel files.", show_default=False)
    ] = None,
    shard_bytes: Annotated[
        int | None,
        typer.Option(help="hf: the largest a file may be, 5000000000 without it.", show_default=False),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another setting of the format as key=value, such as version=1."),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave out what the format cannot hold.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove the result equal to its source.")
    ] = True,
    low_memory: LowMemory = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format, and prove it equal.

    Nothing is left at the destination unless it is whole and shown to be the same model (--no-verify: whole).
    """
    from puna.formats.proof.verify import VerifySettings
    from puna.progress import on_stderr
    from puna.recipes.convert import convert as run
    from puna.recipes.convert import format_of
    from puna.recipes.models import ModelChoice
    from puna.settings import overridden

    choice = ModelChoice(source, revision, cache_dir)
    result = run(
        choice.source(),
        destination,
        to or format_of(destination),
        overridden(given(dtype=dtype, shards=shards, shard_bytes=shard_bytes), change or ()),
        origin=choice.origin,
        tokenizer=tokenizer,
        weights_only=weights_only,
        verify=VerifySettings(low_memory=low_memory) if verify else None,
        force=force,
        say=print,
        track=on_stderr,
    )
    emit(result, as_json)


def verify(
    first: Model,
    second: Model,
    low_memory: LowMemory = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Compare two models, in any formats: logits, KL divergence, greedy text, tokenizer, template.

    Exit code 0: equal, within what their number types allow. 3: different. 2: they cannot be compared.
    """
    from puna.errors import CheckFailed
    from puna.formats.proof.verify import VerifySettings
    from puna.progress import on_stderr
    from puna.recipes.convert import verify as run
    from puna.recipes.models import ModelChoice

    a, b = (ModelChoice(name, None, cache_dir).source() for name in (first, second))
    result = run(a, b, VerifySettings(low_memory=low_memory), print, on_stderr)
    emit(result, as_json)
    if not result["equal"]:
        raise CheckFailed("the models differ; the verdict above says in what")


def info(model: Model, revision: Revision = None, cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Print what a model is.

    Config, parameters by part, how it is stored, tokenizer, provenance.
    """
    from puna.recipes.describe import describe
    from puna.recipes.models import ModelChoice

    emit(describe(ModelChoice(model, revision, cache_dir).source(), print), as_json)
