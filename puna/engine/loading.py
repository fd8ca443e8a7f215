"""Any model in memory, whatever form it is kept in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import formats
from puna import tokenizer as tokenizers
from puna.devices import choose_device, choose_dtype, total_memory
from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.errors import InputError, SettingsError
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights
from puna.progress import quantity
from puna.settings import parse
from puna.tokenizer.tokenizer import Tokenizer


def load(
    path: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    engine: EngineSettings | Mapping[str, Any] | None = None,
) -> LLM:
    """Open a model: a directory, a file, a run directory (its best export), or an id on the Hugging Face hub.

    Weights stay in the mapped file where type and device allow it, until the first answer is asked for: then
    they are laid out as this processor multiplies by them (`LLM.pack`, which `LLM.unpack` undoes).

    Args:
        path: where the model is.
        dtype: float32, bfloat16, float16, float64; auto takes bfloat16 where the hardware multiplies in it.
        device: auto, cpu, cuda or mps.
        quantize: must be None; no scheme is available.
        tokenizer: takes the place of the model's own.
        revision: of a hub id: a branch, tag or commit.
        cache_dir: where downloads from the hub are kept; its usual place unless given.
        engine: memory for answers and how many are made at once: EngineSettings, or its fields.

    Raises:
        ModelError: it is no model, or a damaged or unsupported one.
        TokenizerError: its tokenizer is damaged.
        SettingsError: dtype or device is unknown, or an engine setting is wrong.
        InputError: `quantize` names a scheme.
    """
    if quantize is not None:
        raise InputError(f"quantize={quantize!r}: no quantization scheme is available; leave it out")
    serving = engine if isinstance(engine, EngineSettings) else parse(EngineSettings, engine or {}, "engine")
    target = choose_device(device)
    _check_memory(serving, target)
    kind = choose_dtype(dtype, target)
    source = formats.open_model(formats.resolve(path, revision=revision, cache_dir=cache_dir))
    chosen = source.tokenizer() if tokenizer is None else tokenizer
    if isinstance(chosen, str | Path):
        chosen = tokenizers.load(chosen)
    with torch.device("meta"):
        model = Llama(source.config).to(kind)
    load_weights(model, _on(target, kind, formats.expanded(source.weights)))
    ends = source.end_ids if chosen is None else (*source.end_ids, *chosen.end_ids)
    return LLM(model.eval(), chosen, tuple(dict.fromkeys(ends)), str(path), source.notes, serving, packs=True)


def _check_memory(settings: EngineSettings, device: torch.device) -> None:
    """Told before a model is read: main memory that is not there would end the process as it is used."""
    asked, there = settings.cache_memory or 0, total_memory(device)
    if asked > there:
        raise SettingsError(
            f"engine.cache_memory asks for {quantity(asked)}B, and {device} has {quantity(there)}B in all; "
            "give less, or leave it out"
        )


def _on(device: torch.device, dtype: torch.dtype, weights: Weights) -> Weights:
    """The weights moved to a device, tensor by tensor, so that none is held twice."""

    def moved() -> Iterator[tuple[str, Tensor | Packed]]:
        for name, tensor in weights:
            yield name, tensor if isinstance(tensor, Packed) else tensor.to(device, dtype)

    return Weights(weights.config, moved())
