"""Saved directories: the same ids in transformers, and in Puna again."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

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


EXTRAS = {
    "pad_token": "<pad>",
    "additional_special_tokens": ["<|a|>", "<|b|>"],
    "add_eos_token": False,
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 2048,
    "chat_templates": {"rag": "R", "tool_use": "T"},
}
CONFIG = {
    **{key: value for key, value in EXTRAS.items() if key != "chat_templates"},
    "pad_token": {"content": "<pad>", "lstrip": False, "__type": "AddedToken"},
    "chat_template": [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "R"},
    ],
}
ADDED = {"<pad>": 600, "<|a|>": 601, "<|b|>": 602}


@pytest.fixture
def fine_tuned(small_directory: Path, tmp_path: Path) -> Path:
    """tokenizer.model as it was, and what was added to it in files beside."""
    directory = tmp_path / "fine-tuned"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes((small_directory / "tokenizer.model").read_bytes())
    (directory / "added_tokens.json").write_text(json.dumps(ADDED))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return directory


def test_what_decides_no_ids_travels_too(fine_tuned: Path, tmp_path: Path) -> None:
    ours = load(fine_tuned)
    assert (dict(ours.extras), ours.chat_template) == (EXTRAS, "D")
    ours.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert (again.extras, again.chat_template, again.fingerprint) == (ours.extras, "D", ours.fingerprint)
    assert pickle.loads(pickle.dumps(again)).extras == ours.extras
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (theirs.pad_token, theirs.pad_token_id, theirs.padding_side) == ("<pad>", 600, "left")
    assert (theirs.truncation_side, theirs.model_max_length) == ("left", 2048)
    assert theirs.chat_template == {"default": "D", "rag": "R", "tool_use": "T"}
    assert set(EXTRAS["additional_special_tokens"]) <= set(theirs.all_special_tokens)
    rows = theirs(["a b", "a"], padding=True)["input_ids"]
    assert rows[1] == [*[600] * (len(rows[0]) - len(ours.encode("a"))), *ours.encode("a")]
    again.save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_they_change_no_ids(fine_tuned: Path, hard: list[str]) -> None:
    with_them = load(fine_tuned)
    (fine_tuned / "tokenizer_config.json").unlink()
    without = load(fine_tuned)
    assert not without.extras
    assert without.fingerprint == with_them.fingerprint
    assert without.encode_batch(hard) == with_them.encode_batch(hard)


def test_templates_in_files_of_their_own(fine_tuned: Path) -> None:
    """As transformers writes several today."""
    (fine_tuned / "chat_template.jinja").write_text("D2")
    (fine_tuned / "additional_chat_templates").mkdir()
    (fine_tuned / "additional_chat_templates" / "rag.jinja").write_text("R2")
    ours = load(fine_tuned)
    assert (ours.chat_template, ours.extras["chat_templates"]) == ("D2", {"rag": "R2", "tool_use": "T"})


def test_what_transformers_saves_is_read(fine_tuned: Path, tmp_path: Path) -> None:
    load(fine_tuned).save(tmp_path / "a")
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    assert (again.chat_template, again.extras["chat_templates"]) == ("D", EXTRAS["chat_templates"])
    expected = {"extra_special_tokens": EXTRAS["additional_special_tokens"], **EXTRAS}
    assert {key: expected[key] for key in again.extras} == dict(again.extras)
    assert {"pad_token", "extra_special_tokens", "padding_side", "model_max_length"} <= set(again.extras)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pad_token", 5, "pad_token must be the name of a token, found 5"),
        ("pad_token", {"content": 5}, "pad_token must be the name of a token"),
        ("padding_side", "up", "padding_side must be 'left' or 'right', found 'up'"),
        ("padding_side", ["left"], "padding_side must be 'left' or 'right'"),
        ("model_max_length", "long", "model_max_length must be a number"),
        ("model_max_length", True, "model_max_length must be a number"),
        ("model_max_length", 10**400, "model_max_length must be a number"),
        ("add_eos_token", 1, "add_eos_token must be true or false"),
        ("additional_special_tokens", ["a", 1], "additional_special_tokens must be a list of tokens"),
        (
            "extra_special_tokens",
            {"a": [1]},
            "extra_special_tokens must be a list of tokens, or tokens by name",
        ),
        ("additional_special_tokens", ["a" * 2**20], "are longer than 1048576 characters"),
    ],
)
def test_values_of_the_wrong_type(key: str, value: Any, message: str, fine_tuned: Path) -> None:
    (fine_tuned / "tokenizer_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(TokenizerError) as caught:
        load(fine_tuned)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [None, "", []])
def test_what_is_empty_is_as_if_absent(value: Any, fine_tuned: Path) -> None:
    (fine_tuned / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": value, "additional_special_tokens": value, "model_max_length": value})
    )
    assert not load(fine_tuned).extras
