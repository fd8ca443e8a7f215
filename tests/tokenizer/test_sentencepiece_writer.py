"""Model files built from pieces, and from tokenizer.json: the ids of the original, or a refusal."""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from puna.errors import TokenizerError
from puna.tokenizer.protobuf import CONTROL, UNUSED, USER_DEFINED, parse_model
from puna.tokenizer.reading import load
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.sentencepiece_writer import from_json, model_bytes
from puna.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import HARD

Document = dict[str, Any]
STRINGS = 10_000
MODELS = {
    "llama2": Path("tokenizers") / "llama2" / "tokenizer.model",
    "tok512": Path("weights") / "stories260K" / "tok512.model",
}


def strings(assets: Path, count: int) -> list[str]:
    """Stretches of prose from any character on, with spaces and rare characters thrown in."""
    text = next((assets / "corpora" / "wikitext-2").glob("*")).read_text(encoding="utf-8", errors="replace")
    draw = random.Random(0)
    return [*HARD, *(_one(draw, text) for _ in range(count))]


def _one(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text))
    part = text[at : at + draw.randrange(1, 60)]
    rare = "".join(draw.choice(["  ", "\n", "\t", "é", "日", "🙂", "▁", "\0", "0"]) for _ in range(3))
    cut = draw.randrange(len(part))
    return part if draw.random() < 0.5 else part[:cut] + rare + part[cut:]


def rebuilt(codec: SentencePieceCodec) -> bytes:
    """The model file again, from its tables alone."""
    model, known = codec.model, codec.vocabulary
    assert known.bos_id is not None and known.eos_id is not None and known.unk_id is not None
    return model_bytes(
        [(piece.text, piece.score, piece.type) for piece in model.pieces],
        bos_id=known.bos_id,
        eos_id=known.eos_id,
        unk_id=known.unk_id,
        add_dummy_prefix=model.add_dummy_prefix,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
        byte_fallback=model.byte_fallback,
    )


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest, assets: Path) -> SentencePieceCodec:
    return SentencePieceCodec((assets / MODELS[request.param]).read_bytes())


def ids(codec: SentencePieceCodec, texts: list[str]) -> list[list[int]]:
    return codec.encode_batch(texts, 2)


def test_rebuilt_from_its_pieces_it_gives_the_same_ids(original: SentencePieceCodec, assets: Path) -> None:
    again = SentencePieceCodec(rebuilt(original))
    texts = strings(assets, STRINGS)
    assert ids(again, texts) == ids(original, texts)
    assert again.identity() == original.identity()
    ours, theirs = again.vocabulary, original.vocabulary
    assert (ours.specials, ours.bos_id, ours.eos_id, ours.unk_id) == (
        theirs.specials,
        theirs.bos_id,
        theirs.eos_id,
        theirs.unk_id,
    )
    assert ours.raw == theirs.raw
    assert ours.texts[1:] == theirs.texts[1:]  # what unknown characters show as is not an id


def test_through_json_it_gives_the_same_ids(original: SentencePieceCodec, assets: Path) -> None:
    document = original.definition()
    again = SentencePieceCodec(from_json(document))
    assert again.definition() == document
    texts = strings(assets, STRINGS)
    assert ids(again, texts) == ids(original, texts)


def test_the_same_arguments_give_the_same_bytes(small: Tokenizer) -> None:
    codec = small.codec
    assert isinstance(codec, SentencePieceCodec)
    assert rebuilt(codec) == rebuilt(SentencePieceCodec(rebuilt(codec)))


def test_a_negative_id_says_that_there_is_no_such_token() -> None:
    rows = [("<unk>", 0.0, 2), ("a", -1.0, 1), ("b", -2.0, 1), ("ab", 0.0, 1)]
    codec = SentencePieceCodec(
        model_bytes(rows, bos_id=-1, eos_id=-1, unk_id=0, add_dummy_prefix=False, byte_fallback=False)
    )
    assert (codec.vocabulary.bos_id, codec.vocabulary.eos_id, codec.vocabulary.unk_id) == (None, None, 0)
    assert codec.encode("aabbx", True) == [1, 3, 2, 0]


def test_a_flag_is_part_of_the_identity(small: Tokenizer) -> None:
    codec = small.codec
    assert isinstance(codec, SentencePieceCodec)
    rows = [(piece.text, piece.score, piece.type) for piece in codec.model.pieces]
    places: dict[str, Any] = {"bos_id": 1, "eos_id": 2, "unk_id": 0}
    plain = SentencePieceCodec(model_bytes(rows, **places)).identity()
    assert plain == codec.identity()
    last = [*rows[:-1], ("\u2581unheard", *rows[-1][1:])]
    joined = [index for index, row in enumerate(rows) if row[2] == 1 and len(row[0]) > 1]
    swapped = list(rows)
    a, b = joined[3], joined[40]
    swapped[a], swapped[b] = (rows[a][0], rows[b][1], 1), (rows[b][0], rows[a][1], 1)
    others = [
        model_bytes(rows, **places, add_dummy_prefix=False),
        model_bytes(rows, **places, remove_extra_whitespaces=True),
        model_bytes(last, **places),
        model_bytes(swapped, **places),
    ]
    assert len({plain, *(SentencePieceCodec(data).identity() for data in others)}) == 5
    lowered = [(text, score / 2 - 7, kind) for text, score, kind in rows]  # the same order
    assert SentencePieceCodec(model_bytes(lowered, **places)).identity() == plain


def test_fingerprints_tell_begin_and_end_apart(small: Tokenizer) -> None:
    codec = small.codec
    assert isinstance(codec, SentencePieceCodec)
    rows = [(piece.text, piece.score, piece.type) for piece in codec.model.pieces]
    other = Tokenizer(SentencePieceCodec(model_bytes(rows, bos_id=1, eos_id=-1, unk_id=0)))
    assert other.fingerprint != small.fingerprint


@pytest.fixture
def document(small: Tokenizer) -> Document:
    return small.codec.definition()


def test_added_tokens_become_symbols_and_gaps_stay_unused(document: Document) -> None:
    size = len(document["model"]["vocab"])
    document["added_tokens"] += [
        {"id": size + 1, "content": "<|user|>", "special": True},
        {"id": size + 2, "content": "[PAD]", "special": False},
    ]
    pieces = parse_model(from_json(document)).pieces
    assert [(piece.text, piece.type) for piece in pieces[size:]] == [
        (f"<unused{size}>", UNUSED),
        ("<|user|>", CONTROL),
        ("[PAD]", USER_DEFINED),
    ]


def test_merges_may_be_written_as_text(document: Document) -> None:
    expected = from_json(document)
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    assert from_json(document) == expected


def test_a_metaspace_that_puts_nothing_before_a_text(document: Document) -> None:
    """The one such step that a model file can express; the library says whether it does."""
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "never",
        "split": False,
    }
    codec = SentencePieceCodec(from_json(document))
    library = tokenizers.Tokenizer.from_str(json.dumps({**document, "added_tokens": []}))
    # What the library does with special tokens in text is not at issue here.
    texts = [text for text in HARD if not any(mark in text for mark in ("<s>", "</s>", "<unk>"))]
    for text in texts:
        assert codec.encode(text, True) == library.encode(text, add_special_tokens=False).ids, text


def torn_apart(merges: list[list[str]]) -> None:
    """The pairs of one token in two places of the order."""
    place = next(i for i, pair in enumerate(merges) if "".join(pair) == "".join(merges[i + 1]))
    merges.append(merges.pop(place))


CHANGES: dict[str, Callable[[Document], object]] = {
    "no scores give its merges in their order": lambda d: torn_apart(d["model"]["merges"]),
    "scores give its merges": lambda d: d["model"]["merges"].pop(),
    "BPE": lambda d: d["model"].update(type="Unigram"),
    "no token for what is unknown": lambda d: d["model"].update(unk_token=None),
    "at random": lambda d: d["model"].update(dropout=0.1),
    "whole words": lambda d: d["model"].update(ignore_merges=True),
    "bytes are incomplete": lambda d: d["model"]["vocab"].pop("<0x41>"),
    "share an id": lambda d: d["model"]["vocab"].update(zzzz=7),
    "out of range": lambda d: d["model"]["vocab"].update(zzzz=2**40),
    "changes or splits text": lambda d: d.update(normalizer={"type": "NFKC"}),
    "splits text": lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
    "before text that has none": lambda d: d.update(
        normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    ),
    "splits words": lambda d: d.update(
        normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}
    ),
    "stands beside it": lambda d: d["added_tokens"].append(
        {"id": 600, "content": "<x>", "special": True, "lstrip": True}
    ),
    "must name two": lambda d: d["model"]["merges"].append(["a"]),
    "missing or of the wrong type": lambda d: d.update(added_tokens=[3]),
    "of the wrong type": lambda d: d["model"].update(merges=7),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_a_model_file_cannot_say_is_refused(document: Document, message: str) -> None:
    changed = copy.deepcopy(document)
    CHANGES[message](changed)
    with pytest.raises(TokenizerError, match=message) as caught:
        from_json(changed)
    assert "\n" not in str(caught.value)


def test_byte_level_vocabularies_are_refused(assets: Path) -> None:
    llama3 = load(assets / "tokenizers" / "llama3" / "tokenizer.model")
    with pytest.raises(TokenizerError, match="cannot be written as a SentencePiece model"):
        from_json(llama3.codec.definition())


def bent(draw: random.Random, value: Any) -> Any:
    """A document with one of its parts replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.95:
        key = draw.choice(list(value))
        return {**value, key: bent(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return [*value[:at], bent(draw, value[at]), *value[at + 1 :]]
    return draw.choice([None, True, 0, -1, 2**40, 1.5, "", "a", "\ud800", "<s>", [], [[]], {}, {"type": 3}])


def _documents(document: Document, rounds: int) -> Iterator[Document]:
    for seed in range(rounds):
        yield bent(random.Random(seed), document)


@pytest.mark.parametrize(
    "rounds", [pytest.param(300, id="quick"), pytest.param(3000, id="whole", marks=pytest.mark.slow)]
)
def test_bent_documents_are_refused_or_read(document: Document, rounds: int) -> None:
    for changed in _documents(document, rounds):
        if not isinstance(changed, dict):
            continue
        try:
            codec = SentencePieceCodec(from_json(changed))
        except TokenizerError as error:
            assert "\n" not in str(error)
        else:
            codec.encode(string.printable, True)
