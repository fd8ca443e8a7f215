"""llama.cpp as a reference: log-probabilities, greedy answers, token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

_FILES_OWN = -1.0  # not the library's defaults, which would overrule what the file says


@contextmanager
def opened(path: Path, context: int = 256, **options: Any) -> Iterator[Any]:
    """The file in llama.cpp, its cache in float32 (type 0) as everything else."""
    llama_cpp = pytest.importorskip("llama_cpp")
    yarn = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
    program = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        verbose=False,
        **dict.fromkeys(yarn, _FILES_OWN),
        **options,
    )
    try:
        yield program
    finally:
        program.close()


def log_probabilities(path: Path, ids: Tensor) -> Tensor:
    """(T, V) of one row of ids (T)."""
    with opened(path) as program:
        program.eval(ids.tolist())
        return torch.tensor(program.scores[: len(ids)]).log_softmax(dim=-1)


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """The `count` most probable next ids."""
    found: list[int] = []
    with opened(path, context=512) as program:
        program.eval(prompt)
        for _ in range(count):
            found.append(int(program.scores[program.n_tokens - 1].argmax()))
            program.eval(found[-1:])
    return found
