"""tiktoken files, by Llama 3's rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from puna.tokenizer.reading import load
from puna.tokenizer.tiktoken_reader import LONGEST_SPACE, PATTERN
from puna.tokenizer.tokenizer import Tokenizer


def _library(path: Path) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
    )


def test_ids_and_text_are_the_librarys(ranked: Tokenizer, ranked_directory: Path, hard: list[str]) -> None:
    library = _library(ranked_directory / "tokenizer.model")
    for text in hard:
        ids = library.encode(text, disallowed_special=())
        assert ranked.encode(text, bos=False) == ids, text
        for cut in (ids[1:], ids[:-1]):  # may begin or end within a character
            assert ranked.decode(cut) == library.decode(cut), text


def test_llama3_ids(assets: Path) -> None:
    """The first two rows are from the tests of Meta's own llama3."""
    llama3 = load(assets / "tokenizers/llama3/tokenizer.model")
    expected = {
        "This is a test sentence.": [128000, 2028, 374, 264, 1296, 11914, 13, 128001],
        "This is a response.": [128000, 2028, 374, 264, 2077, 13, 128001],
        "": [128000, 128001],
        "1234": [128000, 4513, 19, 128001],
    }
    assert {text: llama3.encode(text, eos=True) for text in expected} == expected
    assert llama3.end_ids == (128001, 128009)
    assert llama3.vocab_size == 128_256


def test_llama3_special_tokens(assets: Path) -> None:
    """All 256 names and ids, as the published configuration lists them."""
    llama3 = load(assets / "tokenizers/llama3/tokenizer.model")
    table = json.loads((assets / "tokenizers/llama3/tokenizer_config.json").read_text())[
        "added_tokens_decoder"
    ]
    assert {token["content"]: int(index) for index, token in table.items()} == llama3.specials
    assert max(llama3.encode("<|eot_id|>", bos=False)) < 128_000
    assert llama3.encode("a<|eot_id|>", specials=True) == [128000, 64, 128009]


def test_llama3_is_the_library_on_real_text(assets: Path, hard: list[str], real_lines: list[str]) -> None:
    path = assets / "tokenizers/llama3/tokenizer.model"
    library, texts = _library(path), hard + real_lines
    rows = load(path).encode_batch(texts, bos=False)
    assert rows == [library.encode_ordinary(text) for text in texts]


def test_names_from_the_configuration(ranked_directory: Path, ranked: Tokenizer, tmp_path: Path) -> None:
    """Llama 3.1 names tokens that Llama 3 had reserved."""
    first = ranked.vocab_size - 256
    (tmp_path / "tokenizer.model").write_bytes((ranked_directory / "tokenizer.model").read_bytes())
    config = {"added_tokens_decoder": {str(first + 8): {"content": "<|eom_id|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = load(tmp_path)
    assert named.specials["<|eom_id|>"] == first + 8
    assert "<|reserved_special_token_4|>" not in named.specials
    assert named.end_ids == (first + 1, first + 9, first + 8)
    assert named.fingerprint != ranked.fingerprint


@pytest.mark.parametrize("space", [" ", "\n", " \t"])
def test_runs_of_space_that_the_library_gives_up_on(ranked: Tokenizer, space: str) -> None:
    for text in (space * 600_000, "a" + space * LONGEST_SPACE + "b", space * (2 * LONGEST_SPACE + 1) + "x"):
        assert ranked.decode(ranked.encode(text)) == text


def test_space_is_cut_where_metas_code_cuts_it(ranked: Tokenizer, ranked_directory: Path) -> None:
    library = _library(ranked_directory / "tokenizer.model")
    tail = " " * 7 + "b"
    whole = ranked.encode("a" + " " * LONGEST_SPACE + tail, bos=False)
    assert whole == library.encode_ordinary("a" + " " * LONGEST_SPACE) + library.encode_ordinary(tail)
