"""Options that several commands take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli.importing import quickly

if TYPE_CHECKING:
    from puna.engine.llm import LLM
    from puna.engine.settings import EngineSettings

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
        help="int8, int4 (by groups: int8:32, int4:128) or nf4: round the matrices to it as they are read.",
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


@dataclass(frozen=True)
class Opening:
    """How a command opens the model that it is to run."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = None
    tokenizer: Tokenizer = None
    revision: Revision = None
    cache_dir: CacheDir = None

    def llm(self, model: str, say: Callable[[str], None], engine: EngineSettings) -> LLM:
        """That model in memory; what its files leave unsaid is told."""
        with quickly():
            from puna.recipes.models import ModelChoice

        choice = ModelChoice(model, self.revision, self.cache_dir, self.tokenizer, self.quantize)
        return choice.llm(self.device, self.dtype, say, engine)


def opens_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with an option for each field of `Opening` in place of its parameter `opening`."""
    fields = inspect.signature(Opening, eval_str=True).parameters

    def spread(**values: Any) -> None:
        opening = Opening(**{name: values.pop(name) for name in fields})
        command(**values, opening=opening)

    own = inspect.signature(command, eval_str=True)
    parameters = [
        each
        for name, parameter in own.parameters.items()
        for each in (fields.values() if name == "opening" else (parameter,))
    ]
    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
    return spread


def given(**options: Any) -> dict[str, Any]:
    """The options the user gave; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}
