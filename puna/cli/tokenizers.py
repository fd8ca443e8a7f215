"""The commands about tokenizers: train, encode, decode, inspect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from puna.cli.options import (
    Json,
)
from puna.cli.printing import emit
from puna.errors import InputError


def train(
    inputs: Annotated[list[str], typer.Argument(help="Files, directories or globs of text.")],
    out: Annotated[Path, typer.Option(help="Directory to write the tokenizer to.")],
    vocab_size: Annotated[int, typer.Option(help="How many tokens.")] = 32_000,
    field: Annotated[
        str, typer.Option(help="The field that holds the text, in JSON lines and Parquet.")
    ] = "text",
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another setting as key=value, such as newlines=learned."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a byte-pair encoding by LLaMA's rules."""
    from puna.progress import on_stderr
    from puna.recipes.tokenizers import train
    from puna.settings import read_settings
    from puna.tokenizer.train import TokenizerSettings

    settings = read_settings(TokenizerSettings, None, [f"vocab_size={vocab_size}", *(change or ())])
    emit(train(inputs, out, settings, field, print, on_stderr), as_json)


def encode(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer file, or a directory that holds one.")],
    text: Annotated[str | None, typer.Argument(help="The text; standard input without it.")] = None,
    bos: Annotated[bool, typer.Option(help="Begin with BOS.")] = True,
    specials: Annotated[bool, typer.Option(help="Let special tokens in the text mean themselves.")] = False,
    as_json: Json = False,
) -> None:
    """Print the ids of a text."""
    from puna.tokenizer import load

    ids = load(tokenizer).encode(sys.stdin.read() if text is None else text, bos=bos, specials=specials)
    print(*ids)
    emit({"ids": ids}, as_json)


def decode(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer file, or a directory that holds one.")],
    ids: Annotated[list[int] | None, typer.Argument(help="The ids; standard input without them.")] = None,
    as_json: Json = False,
) -> None:
    """Print the text of ids."""
    from puna.tokenizer import load

    text = load(tokenizer).decode(ids if ids else _ids_from(sys.stdin.read()))
    print(text)
    emit({"text": text}, as_json)


def inspect(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer file, or a directory that holds one.")],
    text: Annotated[Path | None, typer.Option(help="A text file to try it on.")] = None,
    as_json: Json = False,
) -> None:
    """Show pieces, bytes per token, and the longest tokens."""
    from puna.recipes.tokenizers import inspect

    emit(inspect(tokenizer, text, print), as_json)


def _ids_from(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split()]
    except ValueError:
        raise InputError(f"expected ids separated by spaces, got {text.strip()[:40]!r}") from None
