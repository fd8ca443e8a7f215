"""What users give as prompts: text, ids, conversations, or several of them, told apart."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor

from puna.errors import InputError

Prompt = str | Items[int]
"""Text, or token ids."""
Messages = Items[Mapping[str, Any]]
"""A conversation: `[{"role": "user", "content": "Hello"}, …]`."""


def pair(asked: Any) -> tuple[Any, Mapping[str, Any]]:
    """A prompt and its settings, as `LLM.completions` takes them.

    Raises:
        InputError: it is no such pair.
    """
    if not isinstance(asked, tuple) or len(asked) != 2 or not isinstance(asked[1], Mapping):
        raise InputError(
            f"a request must be a pair of a prompt and its sampling settings, such as ('Once', {{}}), got "
            f"{asked!r:.60}"
        )
    return asked


def is_conversation(prompt: Any) -> TypeGuard[Messages]:
    """Whether it is a list of messages. An empty list is taken for an empty prompt."""
    is_list = isinstance(prompt, Items) and not isinstance(prompt, str) and len(prompt) > 0
    return is_list and isinstance(prompt[0], Mapping)


def is_batch(prompt: Any) -> bool:
    """Whether it is a list of prompts, of texts or of ids. An empty list is taken for an empty prompt."""
    if isinstance(prompt, Tensor | np.ndarray):
        return prompt.ndim > 1
    is_list = isinstance(prompt, Items) and not isinstance(prompt, str) and len(prompt) > 0
    return is_list and isinstance(prompt[0], Items | Tensor | np.ndarray)


def as_ids(prompt: Any) -> list[int]:
    """Token ids, however they are kept.

    Raises:
        InputError: they are none, or there are none.
    """
    try:
        ids = [operator.index(item) for item in prompt]
    except TypeError:
        raise InputError(
            f"a prompt must be text or token ids, got {type(prompt).__name__}: {prompt!r:.60}"
        ) from None
    if not ids:
        raise InputError("the prompt is empty; give text, or at least one token id")
    return ids
