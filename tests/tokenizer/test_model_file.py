"""tokenizer.model made of a tokenizer.json: the same ids, or a refusal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import load
from puna.tokenizer.codec import Codec
from puna.tokenizer.json_reader import JsonCodec
from puna.tokenizer.model_file import model_file
from puna.tokenizer.tiktoken_reader import TiktokenCodec
from tests.tokenizer.hard_strings import drawn

Document = dict[str, Any]


def as_published(document: Document) -> Document:
    """The pairs of one token by the ids of their parts: the order in which published files have them."""
    vocab = document["model"]["vocab"]
    rank = {
        token: place
        for place, token in enumerate(dict.fromkeys(a + b for a, b in document["model"]["merges"]))
    }
    changed = copy.deepcopy(document)
    changed["model"]["merges"].sort(key=lambda pair: (rank["".join(pair)], vocab[pair[0]], vocab[pair[1]]))
    return changed


def codec_of(document: Document) -> Codec:
    return JsonCodec(json.dumps(document).encode())


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def original(request: pytest.FixtureRequest, assets: Path) -> Path:
    path: Path = assets / "tokenizers" / request.param / "tokenizer.model"
    return path


def test_the_ids_are_those_of_the_original(original: Path) -> None:
    codec = load(original).codec
    document = as_published(codec.definition())
    assert document["model"]["merges"] != codec.definition()["model"]["merges"]
    made = model_file(codec_of(document))
    assert set(made.originals()) == {"tokenizer.model"}
    texts = drawn(6000, list(load(original).specials)[:40])
    assert [made.encode(text, True) for text in texts] == [codec.encode(text, True) for text in texts]


@pytest.mark.slow
def test_ranks_come_back_byte_for_byte(assets: Path) -> None:
    path = assets / "tokenizers" / "llama3" / "tokenizer.model"
    made = model_file(codec_of(as_published(load(path).codec.definition())))
    assert made.originals()["tokenizer.model"].split() == path.read_bytes().split()


def test_an_original_stays_as_it_is(original: Path) -> None:
    codec = load(original).codec
    assert model_file(codec) is codec


CHANGES: dict[str, Callable[[Document], object]] = {
    "merges in another order": lambda d: d["model"]["merges"].reverse(),
    "ids of its tokens have gaps": lambda d: d["model"]["vocab"].update(extra=9000),
    "256 special tokens": lambda d: d["added_tokens"].pop(),
    "cuts text in another way": lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x"),
    "changes text before": lambda d: d.update(normalizer={"type": "NFC"}),
    "whole words": lambda d: d["model"].update(ignore_merges=False),
}


@pytest.fixture(scope="module")
def ranks(assets: Path) -> Document:
    lines = (assets / "tokenizers" / "llama3" / "tokenizer.model").read_bytes().splitlines(keepends=True)
    return TiktokenCodec(b"".join(lines[:3000])).definition()


@pytest.mark.parametrize("message", CHANGES)
def test_what_ranks_cannot_say_is_refused(ranks: Document, message: str) -> None:
    changed = copy.deepcopy(ranks)
    CHANGES[message](changed)
    with pytest.raises(TokenizerError, match=message):
        model_file(codec_of(changed))
