"""Text ↔ ids over HTTP: the endpoints that llama.cpp's server has too, by the same names."""

from __future__ import annotations

from typing import Any

from puna.errors import TokenizerError
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
    tokenizer = _tokenizer(state, "content")
    ids = tokenizer.encode(asked.content, bos=bool(asked.add_special), specials=bool(asked.parse_special))
    if not asked.with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": token, "piece": _piece(tokenizer, token)} for token in ids]}


def detokenized(state: ServerState, raw: bytes) -> dict[str, Any]:
    """Which text ids become, special tokens by name.

    Raises:
        BadRequest: the body is at fault, an id is not in the vocabulary, or the model has no tokenizer.
    """
    asked, _ = parse_body(DetokenizeRequest, raw)
    try:
        return {"content": _tokenizer(state, "tokens").decode(asked.tokens, specials=True)}
    except TokenizerError as error:
        raise BadRequest(str(error), "tokens") from None


def _tokenizer(state: ServerState, param: str) -> Tokenizer:
    if state.llm.tokenizer is None:
        raise BadRequest("this model has no tokenizer; it takes and gives token ids", param)
    return state.llm.tokenizer


def _piece(tokenizer: Tokenizer, token: int) -> str | list[int]:
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
