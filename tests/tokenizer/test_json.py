"""tokenizer.json files of both styles: the ids of the tokenizers library, and what stands beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from puna.tokenizer.reading import load
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def document(small_directory: Path) -> dict[str, Any]:
    return json.loads((small_directory / "tokenizer.json").read_text(encoding="utf-8"))


def _write(directory: Path, document: dict[str, Any], **config: Any) -> Tokenizer:
    (directory / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load(directory)


def test_a_bare_file(document: dict[str, Any], small: Tokenizer, tmp_path: Path) -> None:
    bare = _write(tmp_path, document)
    assert (bare.bos_id, bare.eos_id, bare.unk_id, bare.vocab_size) == (1, 2, 0, 600)
    assert load(tmp_path / "tokenizer.json").fingerprint == bare.fingerprint
    assert bare.encode("a </s>b") == small.encode("a </s>b")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace(document: dict[str, Any], scheme: str, tmp_path: Path, hard: list[str]) -> None:
    """How newer files write the leading space: none where the text brings its own."""
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    if scheme == "never":
        document["decoder"]["decoders"].pop()
    ours = _write(tmp_path, document)
    library = tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in hard[:400]:
        parsed = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False, specials=True) == parsed, text
        if not text.startswith(" ") or scheme == "never":
            assert ours.decode(ours.encode(text)) == text
    for text in ("<s>a</s>b", "a</s> b"):
        assert (
            ours.decode(ours.encode(text, bos=False, specials=True), specials=True) == text
            or scheme == "always"
        )


def test_byte_level(tmp_path: Path, source: str, hard: list[str]) -> None:
    """As GPT-2's relatives write it, with normal added tokens, and a BOS that is named but never used."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([source], trainer)
    library.add_tokens(["<tool>", "é日"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}})
    )
    ours = load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (None, 0, None)
    assert ours.encode("") == []
    assert set(ours.specials) == {"<|endoftext|>"}
    for text in [*hard, "a<tool>é日b"]:
        assert ours.encode(text, specials=True) == library.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert 0 not in ours.encode("<|endoftext|>")
    assert ours.encode("x<tool>")[-1] == 500  # not special: text becomes it
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": "<|endoftext|>"})
    )
    assert load(tmp_path).encode("") == [0]


def test_what_the_configuration_calls_special_is_special(document: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(document)
    for token in changed["added_tokens"]:
        token["special"] = False
    ours = _write(tmp_path, changed, bos_token="<s>", eos_token={"content": "</s>"}, unk_token="<unk>")
    assert set(ours.specials) == {"<unk>", "<s>", "</s>"}
    assert not {0, 1, 2} & set(ours.encode("<s></s><unk>", bos=False))


def test_special_tokens_that_take_the_space_beside_them(document: dict[str, Any], tmp_path: Path) -> None:
    flags = {"normalized": False, "special": True}
    document["added_tokens"] += [
        {"id": 600, "content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, **flags},
        {"id": 601, "content": "<end>", "lstrip": False, "rstrip": True, "single_word": False, **flags},
        {"id": 602, "content": "word", "lstrip": False, "rstrip": False, "single_word": True, **flags},
    ]
    ours = _write(tmp_path, document)
    library = tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in (
        "a <mask> b",
        "a <end>  b",
        "a  <mask><end> <s> c",
        "a word b words",
        "word",
        "swords",
        "<end>word.",
    ):
        parsed = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False, specials=True) == parsed, text


def test_truncation_and_padding_in_the_file_do_not_apply(document: dict[str, Any], tmp_path: Path) -> None:
    document["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    document["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    ours = _write(tmp_path, document)
    text = "a text of more than four tokens"
    assert ours.decode(ours.encode(text)) == text


def test_add_bos_token_false_is_kept(document: dict[str, Any], small_directory: Path, tmp_path: Path) -> None:
    ours = _write(tmp_path, document, bos_token="<s>", eos_token="</s>", add_bos_token=False)
    assert (ours.bos_id, ours.encode("")) == (None, [])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes((small_directory / "tokenizer.model").read_bytes())
    original = load(tmp_path)
    assert (original.kind, original.encode("")) == ("SentencePiece", [])
    original.save(tmp_path / "again")
    assert load(tmp_path / "again").encode("") == []


def test_normalizing_files_load(document: dict[str, Any], tmp_path: Path) -> None:
    document["normalizer"] = json.loads(
        tokenizers.Tokenizer(models.BPE())
        .to_str()
        .replace('"normalizer":null', '"normalizer":{"type":"NFKC"}')
    )["normalizer"]
    ours = _write(tmp_path, document)
    assert ours.encode("ﬁ") == ours.encode("fi")
    assert normalizers.NFKC().normalize_str("ﬁ") == "fi"
