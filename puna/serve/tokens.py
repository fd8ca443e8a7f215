"""Text ↔ ids over HTTP: the endpoints that llama.cpp's server has too, by the same names."""

from __future__ import annotations

from typing import Any

from puna.serve.bodies import parse_body
from puna.serve.faults import BadRequest
from puna.serve.schema import DetokenizeRequest, TokenizeRequest
from puna.serve.state import ServerState
from puna.tokenizer.tokenizer import Tokenizer


def tokenized(state: ServerState, raw: bytes) -> dict[str, Any]:
    """Which ids a text becomes, each with its piece where that is asked for.

    Raises:
        BadRequest: the body is at fault, or the model has no tokenizer.
    """
    asked, _ = parse_body(TokenizeRequest, raw)
    tokenizer = _tokenizer(state)
    ids = tokenizer.encode(asked.content, bos=bool(asked.add_special), specials=bool(asked.parse_special))
    if not asked.with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": token, "piece": _piece(tokenizer, token)} for token in ids]}


def detokenized(state: ServerState, raw: bytes) -> dict[str, Any]:
    """Which text ids become, special tokens by name.

    Raises:
        BadRequest: the body is at fault, or the model has no tokenizer.
        TokenizerError: an id is not in the vocabulary.
    """
    asked, _ = parse_body(DetokenizeRequest, raw)
    return {"content": _tokenizer(state).decode(asked.tokens, specials=True)}


def _tokenizer(state: ServerState) -> Tokenizer:
    if state.llm.tokenizer is None:
        raise BadRequest("this model has no tokenizer; it takes and gives token ids")
    return state.llm.tokenizer


def _piece(tokenizer: Tokenizer, token: int) -> str | list[int]:
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
