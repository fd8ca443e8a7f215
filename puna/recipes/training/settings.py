"""The settings of a training run: what a RUN.toml may say."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from puna.errors import ModelError, SettingsError
from puna.model.config import ModelConfig
from puna.model.presets import PAPER_TRAINING, preset
from puna.settings import Settings, layout, neutral, parse
from puna.tokenizer.train import TokenizerSettings
from puna.train.checkpoint import CheckpointSettings
from puna.train.compile import CompileSettings
from puna.train.determinism import DeterminismSettings
from puna.train.objectives import LossSettings
from puna.train.optimizer import OptimizerSettings
from puna.train.policies import MemorySettings
from puna.train.precision import PrecisionSettings
from puna.train.schedule import ScheduleSettings
from puna.train.schedule import check as check_schedule


class ModelSettings(Settings):
    """A preset, some of its fields changed, or every field given; the vocabulary comes from the tokenizer."""

    preset: str | None = None
    fields: dict[str, Any] = {}

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        """Found first: a paper's model misspelt would bring no recipe, and its settings be missed instead."""
        try:
            if name is not None:
                preset(name)
        except ModelError as error:
            raise ValueError(str(error)) from None
        return name

    def config(self, vocab_size: int, row_length: int) -> ModelConfig:
        """The config these settings make; its context holds a training row.

        Raises:
            SettingsError: the fields do not make a model.
        """
        if self.preset is None and not self.fields:
            raise SettingsError("model: give model.preset, model.fields, or init_from (a model directory)")
        if "vocab_size" in self.fields:
            raise SettingsError("model.fields: the tokenizer decides the vocab_size; leave it out")
        base = _given(preset(self.preset)) if self.preset else {}
        context = max(row_length, base.get("max_position_embeddings", 0))
        fields = {**base, "max_position_embeddings": context, **self.fields, "vocab_size": vocab_size}
        config = parse(ModelConfig, fields, "model.fields")
        if config.max_position_embeddings < row_length:
            raise SettingsError(
                f"model.fields: max_position_embeddings {config.max_position_embeddings} is below "
                f"data.row_length {row_length}; leave it out, or lower the row length"
            )
        return config


class TokenizerChoice(Settings):
    """A tokenizer that exists (`path`), or one to train on the run's own text."""

    path: str | None = None
    train: TokenizerSettings | None = None

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.path is not None and self.train is not None:
            raise ValueError("give tokenizer.path (use one) or tokenizer.train (make one), not both")
        return self


class DataSettings(Settings):
    """Where text comes from, and how it becomes rows of tokens."""

    train: list[str] = []
    validation: list[str] = []
    corpus: str | None = None
    holdout: float = Field(0.05, gt=0.0, lt=1.0)
    field: str = "text"
    separator: str | None = None
    row_length: int = Field(512, ge=2)
    cross_documents: bool = False
    workers: int | None = neutral(None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.train) == (self.corpus is not None):
            raise ValueError("give data.train (files, directories, globs) or data.corpus, and not both")
        if self.corpus is not None and self.validation:
            raise ValueError("data.corpus holds out its own validation text; leave data.validation out")
        return self


class BatchSettings(Settings):
    """How many rows one update learns from, and how many go through the model at once on one device."""

    rows: int = Field(default=16, ge=1)
    micro_rows: int | None = layout(None, ge=1)


class LengthSettings(Settings):
    """How long to train: one of four; `steps` is filled in from the others when the run begins.

    `minutes` is for all of it, preparation and the last scoring included, as far as that can be foreseen.
    """

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not any((self.steps, self.epochs, self.tokens, self.minutes)):
            raise ValueError("say how long to train: one of length.steps, epochs, tokens or minutes")
        given = [name for name in ("epochs", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"length.{given[0]} and length.{given[1]} are both given; to replace the length of a "
                f"settings file on the command line write 'length={{{given[1]}=...}}'"
            )
        return self


class ValidationSettings(Settings):
    """How often to score held-out text (ten times unless said), and on how many tokens (all at the end)."""

    every: int | None = neutral(None, ge=1)
    tokens: int = layout(200_000, ge=1)  # another sample gives scores that are near, and not the same


class SampleSettings(Settings):
    """What to let the model write while it learns, and how often (five times unless said)."""

    every: int | None = neutral(None, ge=1)
    prompts: list[str] = neutral([""], min_length=1)
    new_tokens: int = neutral(60, ge=1)
    temperature: float = neutral(0.8, ge=0.0)


class PretrainSettings(Settings):
    """A whole run. Paths are relative to the directory the command is started in."""

    out: str = neutral(...)
    seed: int = Field(0, ge=0, lt=2**63)
    init_from: str | None = None
    device: str = layout("auto")
    clip_norm: float = Field(1.0, gt=0)
    max_skipped: int = neutral(10, ge=1)
    length: LengthSettings
    data: DataSettings
    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerChoice = TokenizerChoice()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    precision: PrecisionSettings = PrecisionSettings()
    determinism: DeterminismSettings = DeterminismSettings()
    compile: CompileSettings = CompileSettings()
    memory: MemorySettings = MemorySettings()
    loss: LossSettings = LossSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    samples: SampleSettings = SampleSettings()

    @model_validator(mode="before")
    @classmethod
    def _paper_recipe(cls, values: Any) -> Any:
        """One of the paper's four models brings the paper's training settings, beneath those given."""
        match values:
            case {"model": {"preset": str(name)}} if name in PAPER_TRAINING:
                return _merged(paper_recipe(name), values)
        return values

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        given = self.model != ModelSettings() or self.tokenizer != TokenizerChoice()
        if self.init_from is not None and given:
            raise ValueError(
                "init_from brings its own model and tokenizer; leave out [model] and [tokenizer]"
            )
        if self.init_from is None and self.tokenizer == TokenizerChoice():
            raise ValueError("give tokenizer.path, or tokenizer.train.vocab_size to train one on the text")
        return self

    def check(self) -> None:
        """Find before the text is read, which may take hours, what the text has no say in.

        Raises:
            SettingsError: the fields do not make a model, or warm-up takes the whole run.
        """
        if self.init_from is None:
            self.model.config(1, self.data.row_length)  # whatever the vocabulary comes to
        if self.length.steps is not None:
            check_schedule(self.schedule, self.length.steps)


def paper_recipe(name: str) -> dict[str, Any]:
    """Section 2.2 and Table 2 of the paper for one of its models, as values of `PretrainSettings`."""
    paper, context = PAPER_TRAINING[name], preset(name).max_position_embeddings
    return {
        "optimizer": {"learning_rate": paper.learning_rate},
        "schedule": {"warmup_steps": paper.warmup_steps},
        # "4M tokens": a power of two of rows, which divides among micro-batches and devices
        "batch": {"rows": 2 ** round(math.log2(paper.batch_tokens / context))},
        "data": {"row_length": context},
        "length": {"tokens": paper.tokens},
    }


def _given(config: ModelConfig) -> dict[str, Any]:
    """The fields a config was made with: what it derives from them is derived anew when one changes."""
    return {name: getattr(config, name) for name in config.model_fields_set}


def _merged(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested tables joined; a length given above replaces the one beneath, since only one counts."""
    merged = dict(beneath)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "length"
        merged[key] = _merged(merged[key], value) if nested else value
    return merged
