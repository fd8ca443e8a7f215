"""Which model a command works on, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import puna
from puna import formats
from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.kernels.library import must_compile

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelChoice:
    """A path or hub id, with what the command line says about it."""

    name: str
    revision: str | None = None
    cache_dir: Path | None = None
    tokenizer: Path | None = None
    quantize: str | None = None

    @property
    def origin(self) -> str:
        """Where it came from, for the record of what is made of it."""
        return self.name if self.revision is None else f"{self.name} at revision {self.revision}"

    def source(self) -> formats.Source:
        """The model, opened; no tensor read.

        Raises:
            ModelError: it is none, or a damaged or unsupported one.
        """
        path = formats.resolve(self.name, revision=self.revision, cache_dir=self.cache_dir)
        return formats.open_model(path)

    def llm(self, device: str, dtype: str, say: Say, engine: EngineSettings | None = None) -> LLM:
        """The model in memory and its engine ready; what its files leave unsaid is told.

        Raises:
            InputError: as `puna.load`.
            ResourceError: there is too little memory for keys and values.
        """
        llm = puna.load(
            self.name,
            device=device,
            dtype=dtype,
            quantize=self.quantize,
            tokenizer=self.tokenizer,
            revision=self.revision,
            cache_dir=self.cache_dir,
            engine=engine,
        )
        if llm.device.type == "cpu" and must_compile():
            say("Compiling kernels for this processor: about ten seconds, once.")
        for note in (*llm.notes, *llm.engine.notes):
            say(f"note: {note}")
        return llm
