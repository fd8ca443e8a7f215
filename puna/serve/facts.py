"""What a server runs, for whoever started it: the model, its number type, the device, room for answers."""

from __future__ import annotations

from typing import Any

import torch

from puna.engine.cache import bytes_per_position
from puna.kernels.pages import BLOCK
from puna.progress import counted, quantity
from puna.serve.prompts import OWN, PLAIN, template_name
from puna.serve.state import ServerState


def model_facts(state: ServerState) -> dict[str, Any]:
    """Of the model and the engine, as `/status` has them; `cache_bytes` are those that the positions take."""
    llm, settings = state.llm, state.llm.engine_settings
    dtype = llm.dtype
    positions = state.worker.load.blocks * BLOCK
    each = bytes_per_position(llm.config, dtype, settings.cache_dtype == "int8")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(llm.device),
        "threads": torch.get_num_threads(),
        "context": llm.context,
        "cache_positions": positions,
        "cache_bytes": positions * each,
        "cache_dtype": settings.cache_dtype,
        "max_running": settings.max_running,
        "template": template_name(state),
    }


def described(state: ServerState, keys: int) -> list[str]:
    """The same in two lines; `keys` is how many API keys there are."""
    facts = model_facts(state)
    return [
        f"{state.model_id}: {facts['dtype']} on {facts['device']}, {counted(facts['threads'], 'thread')}, "
        f"context {facts['context']:,}, chat template: {_template(facts['template'], state)}",
        f"room for keys and values of {facts['cache_positions']:,} positions "
        f"({quantity(facts['cache_bytes'])}B), up to {counted(facts['max_running'], 'answer')} at once, "
        f"{counted(keys, 'API key') if keys else 'no API keys'}",
    ]


def _template(name: str | None, state: ServerState) -> str:
    if name == PLAIN and state.settings.template is None:
        return "plain, since the model has none"
    words = {None: "none, since there is no tokenizer", OWN: "its own", "custom": "the one given"}
    return words.get(name, str(name))
