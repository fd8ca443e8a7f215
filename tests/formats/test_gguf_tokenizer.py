"""Tokenizers through GGUF: the same ids as the original, and as llama.cpp's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel

import puna.tokenizer
from puna import formats
from puna.errors import TokenizerError
from puna.formats.content import Content
from puna.formats.gguf.file import GgufSettings, obstacles
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import weights_of
from puna.tokenizer.json_reader import JsonCodec
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.tiktoken_reader import TiktokenCodec
from puna.tokenizer.tokenizer import Tokenizer
from tests.formats import gguf_files, llama_cpp_program
from tests.model.shapes import CONFIGS, model_of
from tests.tokenizer.conftest import HARD
from tests.tokenizer.hard_strings import drawn

Written = Callable[[Tokenizer], Path]


def model_for(tokenizer: Tokenizer, more: int = 0) -> Llama:
    """A model as small as can be, with `more` ids than the tokenizer."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + more,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return model_of(config)


def through(path: Path, tokenizer: Tokenizer, more: int = 3) -> Tokenizer:
    """The tokenizer that a file gives back."""
    gguf_files.write(path, model_for(tokenizer, more), tokenizer)
    source = formats.open_model(path)
    again = source.tokenizer()
    assert again is not None
    assert (source.end_ids, source.bos_id) == (tokenizer.end_ids, tokenizer.bos_id)
    assert (again.end_ids, again.eos_id, again.bos_id) == (
        tokenizer.end_ids,
        tokenizer.eos_id,
        tokenizer.bos_id,
    )
    assert (again.vocab_size, again.unk_id) == (tokenizer.vocab_size, tokenizer.unk_id)
    assert again.specials == tokenizer.specials
    assert again.chat_template == tokenizer.chat_template
    return again


def check(again: Tokenizer, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Ids and texts are the same, special tokens parsed or not."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids, text
        assert again.decode(ids) == tokenizer.decode(ids), text
        assert again.encode(text, specials=True) == tokenizer.encode(text, specials=True), text


def check_llama_cpp(path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """llama.cpp's own tokenizer gives the same ids from the file."""
    with llama_cpp_program.opened(path, vocab_only=True) as program:
        differ = [
            text
            for text in texts
            if program.tokenize(text.encode(), add_bos=False, special=False)
            != tokenizer.encode(text, bos=False)
        ]
        assert differ == []
        with_bos = program.tokenize(b"llama", add_bos=True, special=False)
        assert with_bos == tokenizer.encode("llama")


def first_ranks(assets: Path, count: int) -> TiktokenCodec:
    """Llama 3's tokenizer with its first tokens only."""
    lines = (assets / "tokenizers" / "llama3" / "tokenizer.model").read_bytes().splitlines()
    return TiktokenCodec(b"\n".join(lines[:count]))


def test_llama_2(assets: Path, tmp_path: Path) -> None:
    tokenizer = puna.tokenizer.load(assets / "tokenizers" / "llama2" / "tokenizer.model")
    again = through(tmp_path / "m.gguf", tokenizer)
    check(again, tokenizer, [*HARD, *drawn(5000, list(tokenizer.specials))])
    assert again.fingerprint == tokenizer.fingerprint
    check_llama_cpp(tmp_path / "m.gguf", tokenizer, [*HARD, *drawn(400, list(tokenizer.specials))])


def test_llama_3_first_ranks(assets: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(first_ranks(assets, 6000), chat_template="{{ bos_token }}")
    again = through(tmp_path / "m.gguf", tokenizer)
    check(again, tokenizer, [*HARD, *drawn(5000, list(tokenizer.specials))])
    check_llama_cpp(tmp_path / "m.gguf", tokenizer, [*HARD, *drawn(400, list(tokenizer.specials))])


@pytest.mark.slow
def test_llama_3(assets: Path, tmp_path: Path) -> None:
    tokenizer = puna.tokenizer.load(assets / "tokenizers" / "llama3" / "tokenizer.model")
    again = through(tmp_path / "m.gguf", tokenizer)
    check(again, tokenizer, [*HARD, *drawn(10_000, list(tokenizer.specials))])
    check_llama_cpp(tmp_path / "m.gguf", tokenizer, [*HARD, *drawn(2000, list(tokenizer.specials))])


@pytest.mark.parametrize("kind", gguf_files.TOKENIZERS)
def test_small_tokenizers(kind: str, tmp_path: Path) -> None:
    tokenizer = gguf_files.TOKENIZERS[kind]()
    check(through(tmp_path / "m.gguf", tokenizer), tokenizer, HARD)
    check_llama_cpp(tmp_path / "m.gguf", tokenizer, HARD)


def test_a_sentencepiece_vocabulary_in_json(tmp_path: Path) -> None:
    original = gguf_files.small_tokenizer()
    tokenizer = Tokenizer(JsonCodec(json.dumps(original.codec.definition()).encode()))
    check(through(tmp_path / "m.gguf", tokenizer), tokenizer, HARD)
    check_llama_cpp(tmp_path / "m.gguf", original, HARD)


SPLITS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def byte_level(split: Any) -> bytes:
    """A small tokenizer.json trained by the tokenizers library."""
    library = Library(models.BPE())
    library.pre_tokenizer = split
    library.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["don't stop, it's 1234 llamas  that we're feeding\n\n"] * 3 + HARD, trainer)
    return library.to_str().encode()


@pytest.mark.parametrize("name", SPLITS)
def test_other_ways_to_cut(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(JsonCodec(byte_level(SPLITS[name])))
    again = through(tmp_path / "m.gguf", tokenizer)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    texts = [*HARD, *drawn(300, ["<|endoftext|>"])]
    check(again, tokenizer, texts)
    check_llama_cpp(tmp_path / "m.gguf", tokenizer, texts)


def test_added_tokens_that_are_not_special_stay_ordinary(tmp_path: Path) -> None:
    library = Library.from_str(byte_level(SPLITS["gpt-2"]).decode())
    library.add_tokens(["<tool>"])
    tokenizer = Tokenizer(JsonCodec(library.to_str().encode()))
    again = through(tmp_path / "m.gguf", tokenizer)
    assert tokenizer.encode("a<tool>b") == again.encode("a<tool>b")
    assert tokenizer.vocab_size - 1 in again.encode("a<tool>b")


def test_symbols_that_a_sidecar_calls_ordinary_stay_so(tmp_path: Path) -> None:
    from puna.tokenizer.sentencepiece_writer import model_bytes

    model = gguf_files.small_tokenizer().codec
    assert isinstance(model, SentencePieceCodec)
    rows = [(piece.text, piece.score, piece.type) for piece in model.model.pieces]
    data = model_bytes([*rows, ("<tool>", 0.0, 4), ("<call>", 0.0, 4)], bos_id=1, eos_id=2, unk_id=0)
    tokenizer = Tokenizer(SentencePieceCodec(data, plain=frozenset({"<tool>"})))
    again = through(tmp_path / "m.gguf", tokenizer)
    check(again, tokenizer, ["a<tool>b", "a<call>b", "<tool><call>"])
    assert len(rows) in again.encode("a<tool>b") and len(rows) + 1 not in again.encode("a<call>b")


def test_bos_is_added_exactly_where_it_was(tmp_path: Path) -> None:
    codec = gguf_files.small_tokenizer().codec
    assert isinstance(codec, SentencePieceCodec)
    without = Tokenizer(SentencePieceCodec(codec.originals()["tokenizer.model"], add_bos=False))
    model = model_for(without)
    gguf_files.write(tmp_path / "m.gguf", model, without)
    again = formats.open_model(tmp_path / "m.gguf").tokenizer()
    assert again is not None and again.bos_id is None and again.encode("a") == without.encode("a")


def test_more_end_tokens_than_llama_cpp_has_names_for(tmp_path: Path) -> None:
    tokenizer = gguf_files.byte_level_tokenizer()
    for ends in ([], [7], [4, 7], [1, 2, 3], [9, 1, 8, 3, 4]):
        content = Content(weights_of(model_for(tokenizer)), tokenizer, tuple(ends), tokenizer.bos_id)
        path = tmp_path / f"{len(ends)}.gguf"
        formats.FORMATS["gguf"].write(path, content, GgufSettings(), lambda name, value: None)
        assert sorted(formats.open_model(path).end_ids) == sorted(ends)


def refusal(tokenizer: Tokenizer, size: int = 100_000) -> str:
    """What of a tokenizer GGUF cannot hold."""
    config = CONFIGS["grouped"].model_copy(update={"vocab_size": size})
    content = Content(replace(weights_of(model_of(CONFIGS["grouped"])), config=config), tokenizer)
    (found,) = obstacles(content, GgufSettings())
    assert found.without is not None and found.without.tokenizer is None
    assert list(obstacles(found.without, GgufSettings())) == []
    return found.what


def test_what_gguf_cannot_hold() -> None:
    for make in gguf_files.TOKENIZERS.values():
        assert "more than the model's 100" in refusal(make(), size=100)
    own = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert "llama.cpp has no name for" in refusal(Tokenizer(JsonCodec(byte_level(own))))
    assert "llama.cpp has no name for" in refusal(
        Tokenizer(JsonCodec(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))))
    )
    document = json.loads(byte_level(SPLITS["gpt-2"]))
    lowered = {**document, "normalizer": {"type": "Lowercase"}}
    assert "changes text" in refusal(Tokenizer(JsonCodec(json.dumps(lowered).encode())))


def test_a_file_without_tokenizer(tmp_path: Path) -> None:
    _, notes = gguf_files.write(tmp_path / "m.gguf", model_of(CONFIGS["grouped"]))
    assert any("no tokenizer" in note for note in notes)
    assert formats.open_model(tmp_path / "m.gguf").tokenizer() is None


def changed(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of a file by as many others."""
    data = path.read_bytes()
    assert len(old) == len(new) and old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"llama-bpe", b"llama-xyz", "how that cuts text is not known"),
        (b"gpt2", b"bert", "supported: 'llama'"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "merges is missing"),
        (b"tokenizer.ggml.token_type", b"tokenizer.ggml.token_typo", "one number for each"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "tokens is missing"),
        (b"<|begin_of_text|>", b"<|begin_of_\xff\xff\xff\xff|>", "not UTF-8"),
        (b"<|begin_of_text|>", b"<|start_of_text|>"[:17], ""),
        (b"<|reserved_special_token_7|>", b"<|reserved_special_token_8|>", "a token twice"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_leaves_the_weights(
    old: bytes, new: bytes, message: str, tmp_path: Path
) -> None:
    tokenizer = gguf_files.byte_level_tokenizer()
    gguf_files.write(tmp_path / "m.gguf", model_for(tokenizer), tokenizer)
    changed(tmp_path / "m.gguf", old, new)
    source = formats.open_model(tmp_path / "m.gguf")
    assert len(list(source.weights)) == 12
    if not message:
        source.tokenizer()
        return
    with pytest.raises(TokenizerError, match=message):
        source.tokenizer()


@pytest.mark.parametrize("kind", gguf_files.TOKENIZERS)
def test_the_padding_token_goes_through(kind: str, tmp_path: Path) -> None:
    small = gguf_files.TOKENIZERS[kind]()
    name = next(reversed(small.specials))
    padded = Tokenizer(small.codec, small.end_ids, extras={"pad_token": name})
    again = through(tmp_path / "a.gguf", padded)
    assert (again.extras, again.fingerprint) == (
        {"pad_token": name},
        through(tmp_path / "b.gguf", small).fingerprint,
    )
    unknown = Tokenizer(small.codec, small.end_ids, extras={"pad_token": "<nothing>"})
    assert through(tmp_path / "c.gguf", unknown).extras == {}
