"""What decides a model's answers, as one number: equal ones answer alike."""

from __future__ import annotations

import hashlib

from torch import Tensor

from puna.engine.llm import LLM
from puna.formats.huggingface.safetensors_writer import payload
from puna.model.weights import weights_of

PROBED = 256  # elements of each tensor that tell two models apart


def fingerprint(llm: LLM) -> str:
    """SHA-256, in hex, of what decides a model's answers.

    Its shape, tokenizer and end tokens, and of every tensor the number type and elements spread over it: they
    are read in no time, and training, merging or rounding leaves none of them as it was.
    """
    tokenizer = None if llm.tokenizer is None else llm.tokenizer.fingerprint
    digest = hashlib.sha256(f"{llm.config.model_dump_json()} {tokenizer} {llm.end_ids}".encode())
    for name, tensor in weights_of(llm.model):
        assert isinstance(tensor, Tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(payload(tensor.flatten()[:: max(1, tensor.numel() // PROBED)]))
    return digest.hexdigest()
