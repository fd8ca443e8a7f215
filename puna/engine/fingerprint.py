"""What decides a model's answers, as one number: equal ones answer alike."""

from __future__ import annotations

import hashlib

from torch import Tensor

from puna.engine.llm import LLM
from puna.formats.huggingface.safetensors_layout import payload
from puna.model.weights import Packed, sampled

ROWS = 8  # of each tensor that tell two models apart


def fingerprint(llm: LLM) -> str:
    """SHA-256, in hex, of what decides a model's answers.

    Its shape, tokenizer and end tokens, and of every tensor the number type and rows spread over it: they
    are read in no time, packed or not, and training, merging or rounding leaves none of them as it was.
    """
    tokenizer = None if llm.tokenizer is None else llm.tokenizer.fingerprint
    digest = hashlib.sha256(f"{llm.config.model_dump_json()} {tokenizer} {llm.end_ids}".encode())
    for name, value in sampled(llm.model, ROWS):
        digest.update(name.encode())
        for part in (value.data, value.scales) if isinstance(value, Packed) else (value,):
            if part is not None:
                digest.update(_told(part))
    return digest.hexdigest()


def _told(tensor: Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bytes(payload(tensor))
