"""Puna: the LLaMA system, whole, from raw text to a served model.

Importing the package loads nothing heavy; each name below loads its room at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puna import tokenizer
    from puna.engine.completion import Completion
    from puna.engine.llm import LLM
    from puna.engine.loading import load

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "__version__", "load", "tokenizer"]

_HOMES = {"load": "puna.engine.loading", "LLM": "puna.engine.llm", "Completion": "puna.engine.completion"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "tokenizer":
        return importlib.import_module("puna.tokenizer")
    raise AttributeError(f"module 'puna' has no attribute {name!r}")
