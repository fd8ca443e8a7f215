"""What `puna bench train` is told to measure: a shape, how it is trained, and how long to look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from puna import formats
from puna.model.config import ModelConfig
from puna.model.presets import PRESETS
from puna.settings import Settings
from puna.train.compile import Mode

Choice = Literal["auto", "none", "paper", "block", "offload"]


def _several(value: Any) -> Any:
    """One value is a list of one; names may stand between commas, without the quotes that TOML wants."""
    if isinstance(value, str):
        return [name.strip() for name in value.strip("[] ").split(",")]
    return value if isinstance(value, list) else [value]


class TrainBenchSettings(Settings):
    """Updates of a model with random weights on random tokens; a row for each policy and row length."""

    model_config = ConfigDict(use_attribute_docstrings=True)  # `puna bench train --help` shows them

    model: str = "puna-110m"
    """A preset, or a model, of which only the shape is taken: weights are random."""
    vocab: int | None = Field(None, ge=2)
    """Words, in place of its own."""
    tied: bool | None = None
    """Whether embedding and output layer are one matrix; none: as the model has it."""
    rows: int = Field(8, ge=1)
    """Rows that an update learns from."""
    micro_rows: int | None = Field(None, ge=1)
    """Rows that go through the model at once; none: all."""
    row_length: Annotated[list[int], BeforeValidator(_several)] = Field([256], min_length=1)
    """Tokens of a row; one row of the table each."""
    documents: int = Field(1, ge=1)
    """Documents in a row, of equal length; attention stays inside each."""
    dtype: str = "auto"
    """Of matrix products: float32, bfloat16 or float16; auto: what suits the device."""
    weights: str = "float32"
    """Of the weights; see precision.weights of a run."""
    policy: Annotated[list[Choice], BeforeValidator(_several)] = Field(["auto"], min_length=1)
    """What layers keep for the backward pass: auto, none, paper, block or offload; one row each."""
    optimizer: str = "adamw"
    """Its name."""
    compile: Mode = "auto"
    """auto, on or off."""
    device: str = "auto"
    """cpu, cuda or mps."""
    threads: int | None = Field(None, ge=1)
    """Of a CPU; none: as many as torch takes."""
    repeats: int = Field(3, ge=1)
    """How often each row is measured; its figures are those of the median."""
    steps: int | None = Field(None, ge=1)
    """Updates of a repeat; none: as many as fit into `seconds`."""
    seconds: float = Field(5.0, gt=0)
    """Of a repeat."""
    seed: int = Field(0, ge=0)
    """Of weights and tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        shortest = min(self.row_length)
        if shortest < 2:
            raise ValueError(f"row_length must name lengths of at least 2, got {self.row_length}")
        if self.documents > shortest // 2:
            raise ValueError(
                f"documents must be at most {shortest // 2}, two tokens each in a row of {shortest}, got "
                f"{self.documents}"
            )
        return self

    def cases(self) -> Iterator[TrainBenchSettings]:
        """The settings of each row of the table."""
        for policy in self.policy:
            for length in self.row_length:
                yield self.model_copy(update={"policy": [policy], "row_length": [length]})


def shape_of(settings: TrainBenchSettings) -> ModelConfig:
    """The config of the preset or model that is named, with the changes asked for.

    Raises:
        ModelError: it is neither.
    """
    name = settings.model
    own = PRESETS[name] if name in PRESETS else formats.open_model(Path(name)).config
    changes: dict[str, Any] = {
        "max_position_embeddings": max(own.max_position_embeddings, *settings.row_length)
    }
    if settings.vocab is not None:
        changes["vocab_size"] = settings.vocab
    if settings.tied is not None:
        changes["tie_word_embeddings"] = settings.tied
    return own.model_copy(update=changes)


def document_ends(settings: TrainBenchSettings) -> list[int]:
    """Where the documents of a row end."""
    (length,), count = settings.row_length, settings.documents
    return [length * (number + 1) // count for number in range(count)]
