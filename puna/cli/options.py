"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable result as the last line.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A model directory, a run directory (its best export), a file (.gguf, .bin, .pt), or a hub id."
    ),
]
Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", help="A tokenizer to take in place of the model's own.")
]
Revision = Annotated[str | None, typer.Option(help="Of a hub id: a branch, tag or commit.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads from the hub are kept.")]
LowMemory = Annotated[
    bool | None,
    typer.Option(
        "--low-memory/--in-memory",
        help="Compare layer by layer, or with both models in memory; chosen by the memory at hand.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float64, float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8, int4 or nf4: round the matrices to it as they are read.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as key=value.", show_default=False)
]
Seed = Annotated[
    int | None, typer.Option(help="Makes sampling repeatable: answer k, from 1, is drawn with SEED + k - 1.")
]
Sampling = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other sampling setting as key=value, such as typical_p=0.9; or one of the engine's, such "
        "as engine.cache_dtype=int8.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="A chat template in place of the model's own: llama2, llama3, vicuna, alpaca, chatml, plain, or "
        "the text of one."
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """The options the user gave; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}
