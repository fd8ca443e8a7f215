"""A hundred thousand distinct strings: the ids of the original libraries and of transformers, the text again.

By default a twentieth of them, drawn from all over; all of them in the slow tests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from transformers import AutoTokenizer

from puna.tokenizer.reading import load
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train
from tests.tokenizer.hard_strings import corpus_lines, drawn

WHOLE, SHARE = 100_000, 20
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FILES = {
    "llama2": "tokenizers/llama2/tokenizer.model",
    "llama3": "tokenizers/llama3/tokenizer.model",
    "stories": "weights/stories260K/tok512.model",
}


@dataclass(frozen=True)
class Case:
    """One tokenizer, saved and opened by transformers; the texts, and Puna's ids of them after BOS."""

    name: str
    ours: Tokenizer
    directory: Path
    texts: list[str]
    rows: list[list[int]]
    theirs: Any


def _tokenizer(name: str, assets: Path) -> Tokenizer:
    if name in FILES:
        return load(assets / FILES[name])
    text = (assets / "corpora/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    return train([text[:300_000]], TokenizerSettings(vocab_size=1000))


def _texts(ours: Tokenizer, assets: Path, share: int) -> list[str]:
    texts = list(dict.fromkeys([*drawn(60_000, list(ours.specials)[:12]), *corpus_lines(assets / "corpora")]))
    assert len(texts) >= WHOLE
    return texts if share == 1 else random.Random(0).sample(texts, len(texts) // share)


SCALES = [pytest.param(SHARE, id="sample"), pytest.param(1, id="whole", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=["llama2", "llama3", "stories", "trained"])
def name(request: pytest.FixtureRequest) -> str:
    """Published and trained vocabularies, of all kinds that can be saved."""
    return request.param


@pytest.fixture(scope="module", params=SCALES)
def case(
    request: pytest.FixtureRequest, name: str, assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    """One vocabulary at one scale."""
    ours, directory = _tokenizer(name, assets), tmp_path_factory.mktemp(name)
    ours.save(directory)
    texts = _texts(ours, assets, request.param)
    return Case(
        name, ours, directory, texts, ours.encode_batch(texts), AutoTokenizer.from_pretrained(directory)
    )


def _same(texts: list[str], ours: list[Any], theirs: list[Any]) -> None:
    """Says which text differs, instead of printing all of them."""
    assert len(texts) == len(ours) == len(theirs)
    different = [row for row in zip(texts, ours, theirs, strict=True) if row[1] != row[2]]
    assert not different, f"{len(different)} differ, first {different[:2]!a}"


def _library(case: Case) -> Any:
    """The library for which the file was made."""
    path = str(case.directory / "tokenizer.model")
    if case.name != "llama3":
        return sentencepiece.SentencePieceProcessor(model_file=path)
    ranks = load_tiktoken_bpe(path)
    return tiktoken.Encoding("reference", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_the_ids_of_the_original_library(case: Case) -> None:
    library = _library(case)
    if case.name == "llama3":
        theirs = [library.encode_ordinary(text) for text in case.texts]
    else:
        theirs = library.encode(case.texts)
    _same(case.texts, [row[1:] for row in case.rows], theirs)


def test_the_text_of_the_original_library(case: Case) -> None:
    library = _library(case)
    rows = [row[1:] for row in case.rows]
    theirs = [library.decode(row) for row in rows] if case.name == "llama3" else library.decode(rows)
    _same(case.texts, [case.ours.decode(row) for row in case.rows], theirs)


def test_bos_once_and_a_batch_is_its_texts(case: Case) -> None:
    ours = case.ours
    _same(case.texts, case.rows, [ours.encode(text) for text in case.texts])
    assert all(row[0] == ours.bos_id and row.count(ours.bos_id) == 1 for row in case.rows)
    assert not {*ours.specials.values()} & {index for row in case.rows for index in row[1:]}


def _restored(name: str, text: str) -> str:
    """What is left of a text: SentencePiece reads U+2581 as a space, and one file drops extra spaces."""
    if name == "llama3":
        return text
    if name != "stories":
        return text.replace("\u2581", " ")
    return re.sub(" {2,}", " ", text.rstrip(" \u2581")).replace("\u2581", " ").lstrip(" ")


def test_every_text_survives_whole_and_as_a_stream(case: Case) -> None:
    decoded = [case.ours.decode(row) for row in case.rows]
    _same(case.texts, decoded, [_restored(case.name, text) for text in case.texts])
    _same(case.texts, decoded, ["".join(_streamed(case.ours, row)) for row in case.rows])


def _streamed(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    stream = tokenizer.stream()
    for index in ids:
        yield stream.push(index)
    yield stream.flush()


def test_transformers_gives_the_same_ids_and_text(case: Case) -> None:
    theirs = case.theirs
    _same(case.texts, case.rows, theirs(case.texts, split_special_tokens=True)["input_ids"])
    decoded = theirs.batch_decode(case.rows, skip_special_tokens=True)
    _same(case.texts, [case.ours.decode(row) for row in case.rows], decoded)


def test_transformers_finds_the_same_special_tokens(case: Case) -> None:
    """And the one difference meant: transformers puts BOS before a text that begins with BOS already."""
    theirs = case.theirs
    bare = case.ours.encode_batch(case.texts, bos=False, specials=True)
    _same(case.texts, bare, theirs(case.texts, add_special_tokens=False)["input_ids"])
    bos = case.ours.bos_id
    assert bos is not None
    _same(case.texts, [[bos, *row] for row in bare], theirs(case.texts)["input_ids"])
    expected = [row if row[:1] == [bos] else [bos, *row] for row in bare]
    _same(case.texts, case.ours.encode_batch(case.texts, specials=True), expected)


def test_what_transformers_saves_gives_the_same_ids_here(case: Case, tmp_path: Path) -> None:
    case.theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    again = load(tmp_path)
    assert again.kind == "tokenizer.json"
    assert (again.bos_id, again.eos_id, again.unk_id) == (
        case.ours.bos_id,
        case.ours.eos_id,
        case.ours.unk_id,
    )
    assert again.specials == case.ours.specials
    _same(case.texts, case.rows, again.encode_batch(case.texts))
    _same(case.texts, [case.ours.decode(r) for r in case.rows], [again.decode(r) for r in case.rows])


def _cut_as_meta_does(text: str, longest: int) -> Iterator[str]:
    """Meta's rule for white space: a stretch ends after every `longest` such characters in a row."""
    start = at = 0
    for is_white, run in groupby(text, str.isspace):
        length = len(list(run))
        for cut in range(at + longest, at + length, longest) if is_white else ():
            yield text[start:cut]
            start = cut
        at += length
    yield text[start:]


@pytest.mark.parametrize("space", [" ", "\n", "\t ", "\u3000"])
def test_llama3_cuts_long_white_space_as_metas_code_does(space: str, assets: Path) -> None:
    """The one rule of Meta's that no tokenizer.json can hold: transformers takes such a run in one piece."""
    path = assets / FILES["llama3"]
    ranks = load_tiktoken_bpe(str(path))
    library = tiktoken.Encoding("reference", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = load(path)
    for count in (24_999, 25_000, 25_001, 50_000, 50_001, 80_003):
        text = "a" + (space * count)[:count] + "b  c"
        expected = [i for part in _cut_as_meta_does(text, 25_000) for i in library.encode_ordinary(part)]
        assert ours.encode(text, bos=False) == expected
        assert ours.decode(expected) == text
