"""A small text, and a run on it that every test of the recipes shares."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from puna.recipes.training.pretrain import pretrain
from puna.recipes.training.settings import PretrainSettings
from puna.settings import parse

WORDS = "the llama walks over high plain and eats grass while small winds move slow clouds to far white hills"


def write_text(directory: Path, documents: int = 60, seed: int = 3) -> Path:
    """Documents of sentences over a small vocabulary, enough to learn from in seconds."""
    directory.mkdir(parents=True)
    words = random.Random(seed)
    for number in range(documents):
        lines = [" ".join(words.choices(WORDS.split(), k=words.randint(4, 14))) for _ in range(40)]
        (directory / f"{number:03}.txt").write_text(".\n".join(lines))
    return directory


def tiny(out: Path, text: Path, **changes: Any) -> PretrainSettings:
    """Settings of a run that takes seconds on one core."""
    values: dict[str, Any] = {
        "out": str(out),
        "device": "cpu",
        "length": {"steps": 30},
        "data": {"train": [str(text)], "row_length": 64, "holdout": 0.1},
        "tokenizer": {"train": {"vocab_size": 384}},
        "batch": {"rows": 8, "micro_rows": 4},
        "precision": {"dtype": "float32"},
        "determinism": {"threads": 1},
        "compile": {"mode": "off"},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"every": 10},
        "validation": {"every": 10, "tokens": 2000},
        "samples": {"every": 15, "new_tokens": 8, "prompts": ["the llama"]},
        "model": {
            "fields": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "residual_dropout": 0.1,
            }
        },
    }
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = _present({**values[key], **value}) if nested else value
    return parse(PretrainSettings, _present(values))


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """Without what was set to None: that takes a setting away."""
    return {key: value for key, value in values.items() if value is not None}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, dict[str, Any]]:
    """A run that went to its end, and what `pretrain` returned."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, pretrain(tiny(out, text), say=lambda line: None)
