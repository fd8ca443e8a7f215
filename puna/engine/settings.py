"""What an engine is given: memory for keys and values, rows a step may have, how many run at once."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from puna.settings import Bytes, Settings


class EngineSettings(Settings):
    """How requests are served; none of it changes an answer, `cache_dtype` excepted.

    Raises:
        SettingsError: through `puna.settings.parse`, in one line.
    """

    cache_memory: Bytes | None = Field(None, gt=0)
    """Bytes for keys and values, such as 2GB. None: a quarter of the free memory (half of a GPU's), and no
    more than `max_running` sequences can use. Main memory is taken as it is used."""
    cache_dtype: Literal["auto", "int8"] = "auto"
    """auto: the model's own type; int8: each key and value of a head in eight bits and a scale."""
    step_tokens: int = Field(512, ge=1, le=32_768)
    """Rows of one pass, at most: longer prompts are computed in chunks, between the steps of the others."""
    max_running: int = Field(64, ge=1, le=4096)
    """Sequences that are computed together, at most; the others wait."""
    prefix_sharing: bool = True
    """Prompts that begin alike share keys and values."""
    deterministic: bool = True
    """An answer has the same bits whatever is computed beside it; off, a step has just the rows it needs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.step_tokens < self.max_running:
            raise ValueError(
                f"step_tokens {self.step_tokens} is below max_running {self.max_running}: every running "
                "sequence has a row in each step"
            )
        return self
