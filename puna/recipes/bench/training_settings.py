"""What `puna bench train` is told to measure: a shape, how it is trained, and how long to look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from puna import formats
from puna.data.loader import check_division
from puna.devices import choose_device
from puna.errors import PunaError, nearest
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.presets import PRESETS
from puna.recipes.bench.model import check_name
from puna.settings import Settings, parse
from puna.train.compile import Mode
from puna.train.optimizer import OPTIMIZERS
from puna.train.policies import Circumstances, MemorySettings, Policy, choose_policy
from puna.train.precision import Kept, Precision, PrecisionSettings

Choice = Literal["auto", "none", "paper", "block", "offload"]
NAMES = {
    "precision.dtype": "dtype",
    "precision.weights": "weights",
    "precision.float8": "float8",
    "memory.policy": "policy",
    "compile.mode": "compile",
    "batch.micro_rows": "micro_rows",
    "data.row_length": "row_length",
}
"""What messages may name: the settings of a run, and what they are called here."""


@contextmanager
def in_these_names() -> Iterator[None]:
    """Let errors name settings as this benchmark has them, whatever a run calls them."""
    try:
        yield
    except PunaError as error:
        message = str(error)
        for name, here in NAMES.items():
            message = message.replace(name, here)
        error.args = (message,)
        raise


def _several(value: Any) -> Any:
    """One value is a list of one; names may stand between commas, without the quotes that TOML wants."""
    if isinstance(value, str):
        return [name.strip() for name in value.strip("[] ").split(",")]
    return value if isinstance(value, list) else [value]


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"expected one of {known}, got {name!r}.{nearest(name, OPTIMIZERS)}")
    return name


class TrainBenchSettings(Settings):
    """Updates of a model with random weights on random tokens; a line for each policy and row length."""

    model_config = ConfigDict(use_attribute_docstrings=True)  # `puna bench train --help` shows them

    model: str = "puna-110m"
    """A preset, or a model, of which only the shape is taken: weights are random."""
    vocab: int | None = Field(None, ge=2)
    """Words of the vocabulary; none: as many as the model has."""
    tied: bool | None = None
    """Whether embedding and output layer are one matrix; none: as the model has it."""
    rows: int = Field(8, ge=1)
    """Rows of tokens that one update learns from."""
    micro_rows: int | None = Field(None, ge=1)
    """Rows that go through the model at once; none: all."""
    row_length: Annotated[list[int], BeforeValidator(_several)] = Field([256], min_length=1)
    """Tokens of a row; several, such as [256, 1024], are measured one after the other."""
    documents: int = Field(1, ge=1)
    """Documents in a row, of equal length; attention stays inside each."""
    dtype: str = "auto"
    """Type of matrix products: float32, bfloat16 or float16; auto: what suits the device."""
    weights: Kept = "float32"
    """Type of the weights: float32; or, with products in bfloat16, bfloat16+float32 (a float32 copy beside
    them) or bfloat16 (no copy)."""
    float8: bool = False
    """Whether layers multiply in float8, on a device that does (CUDA from Ada on); other products stay in
    bfloat16."""
    policy: Annotated[list[Choice], BeforeValidator(_several)] = Field(["auto"], min_length=1)
    """What layers keep for the backward pass: none (all), paper (results of products), block (their input),
    offload (as paper, in main memory), auto (what is fastest); several are measured one after the other."""
    z: float = Field(0.0, ge=0.0)
    """Weight of the penalty z · (log Σ e^logits)² in the loss; 0.0001 is usual, 0 is none."""
    optimizer: Annotated[str, AfterValidator(_optimizer)] = "adamw"
    """adamw or muon."""
    compile: Mode = "auto"
    """Whether torch.compile is given the layers: on, off; auto: where it makes them faster."""
    device: str = "auto"
    """cpu, cuda or mps; auto: a GPU, where there is one."""
    threads: int | None = Field(None, ge=1)
    """Threads of a CPU; none: as many as torch takes."""
    repeats: int = Field(3, ge=1)
    """How often each line is measured; its figures are those of the median."""
    steps: int | None = Field(None, ge=1)
    """Updates of a repeat; none: as many as fit into `seconds`."""
    seconds: float = Field(5.0, gt=0)
    """How long a repeat takes, about."""
    seed: int = Field(0, ge=0)
    """Of the random weights and tokens."""

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

    @property
    def rows_at_once(self) -> int:
        """Rows that go through the model together."""
        return self.micro_rows or self.rows

    def cases(self) -> Iterator[TrainBenchSettings]:
        """The settings of each line of the table."""
        for policy in self.policy:
            for length in self.row_length:
                yield self.model_copy(update={"policy": [policy], "row_length": [length]})


def shape_of(settings: TrainBenchSettings) -> ModelConfig:
    """The config of the preset or model that is named, with the changes asked for.

    Raises:
        ModelError: it is neither.
        SettingsError: it is nearly a preset.
    """
    name = settings.model
    check_name(name)
    own = PRESETS[name] if name in PRESETS else formats.open_model(Path(name)).config
    changes: dict[str, Any] = {
        "max_position_embeddings": max(own.max_position_embeddings, *settings.row_length)
    }
    if settings.vocab is not None:
        changes["vocab_size"] = settings.vocab
    if settings.tied is not None:
        changes["tie_word_embeddings"] = settings.tied
    return own.model_copy(update=changes)


def precision_of(settings: TrainBenchSettings, device: torch.device) -> Precision:
    """The types of a device's numbers.

    Raises:
        SettingsError: they do not go together.
    """
    types = {"dtype": settings.dtype, "weights": settings.weights, "float8": settings.float8}
    return Precision.of(parse(PrecisionSettings, types), device)


def policy_of(settings: TrainBenchSettings, model: Llama, precision: Precision) -> Policy:
    """What the layers of a case keep.

    Raises:
        SettingsError: the policy, or float8, does not suit model or device.
    """
    (policy,), compiling = settings.policy, settings.compile == "on"
    at = Circumstances(precision.device, precision.compute, settings.float8, compiling)
    return choose_policy(parse(MemorySettings, {"policy": policy}), model, at)


def check(settings: TrainBenchSettings, config: ModelConfig) -> None:
    """Refuse what cannot be measured, before any of it is.

    Raises:
        SettingsError: a policy or type that the device lacks, or rows that cannot be divided.
    """
    check_division(settings.rows, settings.rows_at_once, world=1)
    precision = precision_of(settings, choose_device(settings.device))
    with torch.device("meta"):
        outline = Llama(config)
    for case in settings.cases():
        policy_of(case, outline, precision)


def document_ends(settings: TrainBenchSettings) -> list[int]:
    """Where the documents of a row end."""
    (length,), count = settings.row_length, settings.documents
    return [length * (number + 1) // count for number in range(count)]
