"""Any model in memory, whatever form it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from puna import formats
from puna import tokenizer as tokenizers
from puna.devices import choose_device, choose_dtype, total_memory
from puna.engine.arriving import Arriving, quantization
from puna.engine.llm import LLM
from puna.engine.settings import EngineSettings
from puna.errors import SettingsError
from puna.model.llama import Llama
from puna.model.weights import Weights
from puna.progress import quantity
from puna.quantize.loading import load_quantized
from puna.quantize.recipe import Recipe
from puna.settings import parse
from puna.tokenizer.tokenizer import Tokenizer


def load(
    path: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | Recipe | Mapping[str, Any] | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    engine: EngineSettings | Mapping[str, Any] | None = None,
) -> LLM:
    """Open a model: a directory, a file, a run directory (its best export), or an id on the Hugging Face hub.

    Weights stay in the mapped file where type and device allow it, until the first answer is asked for: then
    they are laid out as this processor multiplies by them (`LLM.pack`, which `LLM.unpack` undoes). Quantized
    matrices are laid out at once, one after another, and run as they are; those that nothing here multiplies
    by are expanded, and a note says so.

    Args:
        path: where the model is.
        dtype: float32, bfloat16, float16, float64; auto takes bfloat16 where the hardware multiplies in it.
        device: auto, cpu, cuda or mps.
        quantize: int8, int4 (by groups: int8:32, int4:128) or nf4 rounds the matrices to the nearest as they
            are read, none of which needs memory for more than one in full precision; or a recipe, as
            `puna quantize` takes it.
        tokenizer: takes the place of the model's own.
        revision: of a hub id: a branch, tag or commit.
        cache_dir: where downloads from the hub are kept; its usual place unless given.
        engine: memory for answers and how many are made at once: EngineSettings, or its fields.

    Raises:
        ModelError: it is no model, or a damaged or unsupported one; it is quantized already; or its shapes do
            not allow the scheme.
        TokenizerError: its tokenizer is damaged.
        SettingsError: dtype, device or scheme is unknown or needs calibration, or an engine setting is wrong.
    """
    recipe = quantization(quantize)
    serving = engine if isinstance(engine, EngineSettings) else parse(EngineSettings, engine or {}, "engine")
    target = choose_device(device)
    _check_memory(serving, target)
    kind = choose_dtype(dtype, target)
    source = formats.open_model(formats.resolve(path, revision=revision, cache_dir=cache_dir))
    arriving = Arriving(source, target, kind, recipe)
    chosen = source.tokenizer() if tokenizer is None else tokenizer
    if isinstance(chosen, str | Path):
        chosen = tokenizers.load(chosen)
    with torch.device("meta"):
        model = Llama(source.config).to(kind)
    load_quantized(model, Weights(source.config, arriving))
    ends = source.end_ids if chosen is None else (*source.end_ids, *chosen.end_ids)
    notes = (*source.notes, *arriving.notes)
    return LLM(model.eval(), chosen, tuple(dict.fromkeys(ends)), str(path), notes, serving, packs=True)


def _check_memory(settings: EngineSettings, device: torch.device) -> None:
    """Told before a model is read: main memory that is not there would end the process as it is used."""
    asked, there = settings.cache_memory or 0, total_memory(device)
    if asked > there:
        raise SettingsError(
            f"engine.cache_memory asks for {quantity(asked)}B, and {device} has {quantity(there)}B in all; "
            "give less, or leave it out"
        )
