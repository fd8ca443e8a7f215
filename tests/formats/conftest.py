"""A saved model to read, bend and break."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from puna import formats
from puna.model.llama import Llama
from puna.model.weights import load_weights, weights_of
from tests.model.shapes import CONFIGS, model_of

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def model() -> Llama:
    """Two layers, grouped heads, untied."""
    return model_of(CONFIGS["grouped"])


@pytest.fixture
def saved(model: Llama, tmp_path: Path) -> Path:
    """The model as a directory."""
    formats.save(tmp_path / "saved", weights_of(model), end_ids=[2, 7], bos_id=1)
    return tmp_path / "saved"


def edit(path: Path, change: Edit) -> None:
    """Change a JSON file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def reopened(path: Path) -> Llama:
    """A model in memory from a directory."""
    source = formats.open_model(path)
    model = Llama(source.config)
    load_weights(model, source.weights)
    return model


def same(first: Llama, second: Llama) -> bool:
    """Whether config and every bit are equal."""
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    return first.config == second.config and all(
        one == other and torch.equal(a, b) for (one, a), (other, b) in pairs
    )
