"""Which model a command works on, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import puna
from puna import formats
from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelChoice:
    """A path or hub id, with what the command line says about it."""

    name: str
    revision: str | None = None
    cache_dir: Path | None = None
    tokenizer: Path | None = None

    def source(self) -> formats.Source:
        """The model, opened; no tensor read.

        Raises:
            ModelError: it is none, or a damaged or unsupported one.
        """
        path = formats.resolve(self.name, revision=self.revision, cache_dir=self.cache_dir)
        return formats.open_model(path)

    def llm(self, device: str, dtype: str, say: Say, engine: EngineSettings | None = None) -> LLM:
        """The model in memory; what its files leave unsaid is told.

        Raises:
            InputError: as `puna.load`.
        """
        llm = puna.load(
            self.name,
            device=device,
            dtype=dtype,
            tokenizer=self.tokenizer,
            revision=self.revision,
            cache_dir=self.cache_dir,
            engine=engine,
        )
        for note in llm.notes:
            say(f"note: {note}")
        return llm
