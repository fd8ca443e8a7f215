"""Training: LLaMA's rules, nothing skipped, the same bytes every time, limits told."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from puna.errors import SettingsError, TokenizerError
from puna.settings import read_settings
from puna.tokenizer import protobuf
from puna.tokenizer.inspect import fit
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import STRETCH, TokenizerSettings, sample, sentences, train

SMALL = TokenizerSettings(vocab_size=400)


def _pieces(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.piece(index) for index in range(tokenizer.vocab_size)}


def test_llamas_rules(small: Tokenizer, small_directory: Path) -> None:
    model = protobuf.parse_model((small_directory / "tokenizer.model").read_bytes())
    assert (model.model_type, model.byte_fallback, model.add_dummy_prefix) == (protobuf.BPE, True, True)
    assert (model.remove_extra_whitespaces, model.has_character_map) == (False, False)
    assert [piece.text for piece in model.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    pieces = _pieces(small)
    assert "▁▁▁▁" in pieces and "▁self" in pieces
    assert not any(any(c.isdigit() for c in piece) and len(piece) > 1 for piece in pieces - _byte_names())
    assert [small.piece(i) for i in small.encode("2024", bos=False)] == ["▁", "2", "0", "2", "4"]
    assert [small.piece(i) for i in small.encode("self\n", bos=False)] == ["▁self", "<0x0A>"]


def _byte_names() -> set[str]:
    return {f"<0x{byte:02X}>" for byte in range(256)}


def test_the_rules_are_those_of_the_published_file(assets: Path, small_directory: Path) -> None:
    published = protobuf.parse_model((assets / "tokenizers/llama2/tokenizer.model").read_bytes())
    ours = protobuf.parse_model((small_directory / "tokenizer.model").read_bytes())
    names = [name for name in published.__dataclass_fields__ if name != "pieces"]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(published, name) for name in names}
    assert [p.text for p in ours.pieces[:259]] == [p.text for p in published.pieces[:259]]


def test_the_same_bytes_every_time(source: str, small_directory: Path, tmp_path: Path) -> None:
    train(iter([source]), TokenizerSettings(vocab_size=600), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (small_directory / name).read_bytes()


def test_any_size(source: str) -> None:
    for size in (377, 1000, 1537):
        assert train([source], TokenizerSettings(vocab_size=size)).vocab_size == size


@pytest.mark.parametrize(
    "line", ["wxyzzy " * 150_000, "wxyzzy" * 170_000, "wxyzzy\0" * 1000, "wxyzzy▅" * 1000]
)
def test_long_lines_and_odd_characters_are_not_skipped(source: str, line: str) -> None:
    assert any("wxyz" in piece for piece in _pieces(train([source, line], SMALL)))
    assert not any("wxyz" in piece for piece in _pieces(train([source], SMALL)))


def test_learned_newlines_take_fewer_tokens(source: str) -> None:
    texts = [source]
    usual = fit(train(texts, SMALL), texts)
    learned_tokenizer = train(texts, TokenizerSettings(vocab_size=400, newlines="learned"))
    learned = fit(learned_tokenizer, texts)
    assert any("\n" in piece for piece in _pieces(learned_tokenizer))
    assert learned.bytes_per_token > 1.02 * usual.bytes_per_token
    assert usual.fallback_share > 0.02 > learned.fallback_share
    assert learned_tokenizer.decode(learned_tokenizer.encode(source)) == source


def test_a_sample_is_bounded_spread_and_repeatable() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab \n", k=draw.randint(1, 3000))) for _ in range(500)]
    total = sum(map(len, texts))
    assert sample(texts, total) == texts
    some = sample(texts, total // 4)
    assert some == sample(texts, total // 4)
    assert 0.9 * total / 4 < sum(map(len, some)) <= total // 4
    places = [texts.index(text) for text in some]
    assert places == sorted(places)
    assert min(places) < 50 and max(places) > 450


def test_sentences_hold_everything_but_the_spaces_at_cuts() -> None:
    text = ("word " * 3000 + "\n") * 3 + "x" * 10_000
    parts = list(sentences([text], "bytes"))
    assert max(map(len, parts)) <= STRETCH
    assert "".join(parts).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert "".join(sentences([text], "learned")).count("\n") == 3


def test_too_large_a_vocabulary_says_the_largest_that_works() -> None:
    texts = ["hello world, hello again"]
    with pytest.raises(TokenizerError, match=r"vocab_size 5000 .* lower it to (\d+)") as caught:
        train(texts, TokenizerSettings(vocab_size=5000))
    largest = int(str(caught.value).split("lower it to ")[1].split()[0])
    assert train(texts, TokenizerSettings(vocab_size=largest)).vocab_size == largest


def test_too_small_a_vocabulary_says_the_smallest_that_works(source: str) -> None:
    with pytest.raises(TokenizerError, match="too small: this text needs") as caught:
        train([source], TokenizerSettings(vocab_size=260))
    needed = int(str(caught.value).split("needs ")[1].split()[0])
    assert train([source], TokenizerSettings(vocab_size=needed)).vocab_size == needed


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"], ["\0", "▅"]])
def test_no_text(texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="there is no text"):
        train(texts, SMALL)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vocab_size=259", "greater than or equal to 260"),
        ("vocab_size=4096.5", "vocab_size"),
        ("character_coverage=1.5", "less than or equal to 1"),
        ("newlines=kept", "'bytes' or 'learned'"),
        ("vocabsize=1000", "Did you mean 'vocab_size'"),
    ],
)
def test_settings_are_checked(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(TokenizerSettings, overrides=[override])


def test_nothing_is_printed(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    train([source], SMALL)
    with pytest.raises(TokenizerError):
        train([source], TokenizerSettings(vocab_size=100_000))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_speed() -> None:
    """25 MB in well under a minute."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz_", k=draw.randint(1, 12))) for _ in range(60_000)
    ]
    texts = ["\n".join(" ".join(draw.choices(words, k=9)) for _ in range(4000)) for _ in range(100)]
    began = time.monotonic()
    train(texts, TokenizerSettings(vocab_size=4096))
    assert time.monotonic() - began < 60
