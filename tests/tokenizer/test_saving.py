"""Saved directories: the same ids in transformers, and in Puna again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from puna.errors import TokenizerError
from puna.tokenizer.reading import load
from puna.tokenizer.tokenizer import Tokenizer


def _check_against_transformers(ours: Tokenizer, directory: Path, texts: list[str]) -> None:
    theirs = AutoTokenizer.from_pretrained(directory)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (
        ours.bos_id,
        ours.eos_id,
        ours.unk_id,
    )
    parsed = theirs(texts, add_special_tokens=False)["input_ids"]
    assert parsed == ours.encode_batch(texts, bos=False, specials=True)
    ordinary = theirs(texts, split_special_tokens=True)["input_ids"]
    assert ordinary == ours.encode_batch(texts)
    assert [theirs.decode(ids, skip_special_tokens=True) for ids in ordinary] == [
        ours.decode(ids) for ids in ordinary
    ]


@pytest.mark.parametrize("name", ["small", "ranked"])
def test_transformers_gives_the_same_ids(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, hard: list[str]
) -> None:
    ours = request.getfixturevalue(name)
    ours.save(tmp_path)
    _check_against_transformers(ours, tmp_path, hard)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_transformers_gives_the_same_ids_for_published_vocabularies(
    name: str, assets: Path, tmp_path: Path, hard: list[str], real_lines: list[str]
) -> None:
    ours = load(assets / f"tokenizers/{name}/tokenizer.model")
    ours.save(tmp_path)
    _check_against_transformers(ours, tmp_path, hard + real_lines)


def test_extra_spaces_go_in_tokenizer_json_too(assets: Path, tmp_path: Path, hard: list[str]) -> None:
    stories = load(assets / "weights/stories260K/tok512.model")
    stories.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*hard, "▁a▁ ▁", "  ▁  ", "a▁"]
    assert theirs(texts, split_special_tokens=True)["input_ids"] == stories.encode_batch(texts)


def test_saved_and_loaded_is_the_same(each: Tokenizer, tmp_path: Path, hard: list[str]) -> None:
    each.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.fingerprint == each.fingerprint
    assert (again.kind, again.end_ids, again.specials) == (each.kind, each.end_ids, each.specials)
    assert again.encode_batch(hard) == each.encode_batch(hard)
    again.save(tmp_path / "b")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_chat_template_travels(small: Tokenizer, tmp_path: Path) -> None:
    templated = Tokenizer(small._codec, chat_template="{{ messages[0].content }}")
    templated.save(tmp_path)
    assert load(tmp_path).chat_template == "{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert load(tmp_path).chat_template == "newer"


def test_added_tokens_win_over_the_original_file(small_directory: Path, tmp_path: Path) -> None:
    """Fine-tuned models add tokens to tokenizer.json, while tokenizer.model stays as it was."""
    for path in small_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert load(tmp_path).kind == "SentencePiece"
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 600, "content": "<|im_end|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [600, 2, 99999]}')
    extended = load(tmp_path)
    assert (extended.kind, extended.vocab_size, extended.end_ids) == ("tokenizer.json", 601, (2, 600))
    assert 600 not in extended.encode("<|im_end|>")
    assert extended.encode("<|im_end|>", specials=True) == [1, 600]


def test_a_directory_that_cannot_be_written(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match=r"while saving the tokenizer to .*file"):
        small.save(tmp_path / "file")
