"""llama2.c's tokenizer.bin: byte for byte what llama2.c writes, and the ids of the tokenizer it came from."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from puna.errors import TokenizerError
from puna.tokenizer.llama2c_vocabulary import looks_like_vocabulary, read, write
from puna.tokenizer.protobuf import USER_DEFINED
from puna.tokenizer.reading import load
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.sentencepiece_writer import model_bytes
from puna.tokenizer.tokenizer import Tokenizer
from tests.formats.damage import bounded, cut_or_flipped
from tests.tokenizer.conftest import HARD
from tests.tokenizer.test_sentencepiece_writer import MODELS, STRINGS, strings


@pytest.fixture(scope="module")
def directory(assets: Path) -> Path:
    return assets / MODELS["tok512"].parent


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest, assets: Path) -> SentencePieceCodec:
    return SentencePieceCodec((assets / MODELS[request.param]).read_bytes())


def codec_of(tokenizer: Tokenizer) -> SentencePieceCodec:
    assert isinstance(tokenizer.codec, SentencePieceCodec)
    return tokenizer.codec


def test_the_published_file_is_reproduced(directory: Path) -> None:
    codec = SentencePieceCodec((directory / "tok512.model").read_bytes())
    assert write(codec) == (directory / "tok512.bin").read_bytes()


def test_written_and_read_it_gives_the_same_ids(original: SentencePieceCodec, assets: Path) -> None:
    again = read(write(original))
    texts = strings(assets, STRINGS)
    assert again.encode_batch(texts, 2) == original.encode_batch(texts, 2)
    assert again.identity() == original.identity()


def test_the_published_file_opens_like_its_original(directory: Path, assets: Path) -> None:
    ours, theirs = load(directory / "tok512.bin"), load(directory / "tok512.model")
    assert ours.fingerprint == theirs.fingerprint
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.end_ids) == (1, 2, 0, (2,))
    for text in strings(assets, 500):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_a_trained_tokenizer_keeps_its_spaces(small: Tokenizer) -> None:
    """Whether or not it has pieces with two spaces, which alone would tell."""
    codec = codec_of(small)
    rows = [(piece.text.replace("▁▁", "▁¤"), piece.score, piece.type) for piece in codec.model.pieces]
    for pieces in (rows, [(piece.text, piece.score, piece.type) for piece in codec.model.pieces]):
        for superfluous in (False, True):
            if superfluous and any("▁▁" in text for text, _, _ in pieces):
                continue  # such a model never joins them, and no training makes it
            data = model_bytes(pieces, bos_id=1, eos_id=2, unk_id=0, remove_extra_whitespaces=superfluous)
            given = SentencePieceCodec(data)
            again = read(write(given))
            assert again.identity() == given.identity()
            assert [again.encode(text, True) for text in HARD] == [given.encode(text, True) for text in HARD]


def test_ids_beyond_the_vocabulary_are_filled_and_dropped(small: Tokenizer) -> None:
    codec = codec_of(small)
    size = len(codec.model.pieces)
    data = write(codec, size + 3)
    assert data.endswith(f"[PAD{size + 2}]".encode())
    assert read(data).identity() == codec.identity()
    with pytest.raises(TokenizerError, match=f"{size} tokens for a model with {size - 1} ids"):
        write(codec, size - 1)


def test_plain_names_of_begin_and_end_are_read(directory: Path) -> None:
    data = (directory / "tok512.bin").read_bytes()
    for name in (b"<s>", b"</s>"):
        long = struct.pack("<i", len(name) + 2) + b"\n" + name + b"\n"
        data = data.replace(long, struct.pack("<i", len(name)) + name)
    assert read(data).identity() == load(directory / "tok512.model").codec.identity()


@pytest.mark.parametrize("change", ["other special tokens", "no leading space"])
def test_what_the_file_cannot_say_is_refused(small: Tokenizer, change: str) -> None:
    rows = [(piece.text, piece.score, piece.type) for piece in codec_of(small).model.pieces]
    if change == "other special tokens":
        rows.append(("<|user|>", 0.0, USER_DEFINED))
    data = model_bytes(
        rows,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        add_dummy_prefix=change != "no leading space",
    )
    with pytest.raises(TokenizerError, match="cannot hold it"):
        write(SentencePieceCodec(data))


def test_only_vocabularies_look_like_one(assets: Path, directory: Path) -> None:
    for path in (*directory.iterdir(), *(assets / "tokenizers").glob("*/*")):
        assert looks_like_vocabulary(path.read_bytes()) == (path.name == "tok512.bin"), path.name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no token"),
        (b"\7\0", "no token"),
        (struct.pack("<i", 7), "no token"),
        (struct.pack("<ifi", 7, 0.0, 2**31 - 1) + b"abc", "token 0 is damaged"),
        (struct.pack("<ifi", 2**31 - 1, 0.0, 2**31 - 1) + b"abc", "token 0 is damaged"),
        (struct.pack("<ifi", 7, 0.0, -1) + b"abc", "token 0 is damaged"),
        (struct.pack("<ifi", 7, 0.0, 0), "token 0 is damaged"),
        (struct.pack("<ifi", 7, float("nan"), 3) + b"abc", "token 0 is damaged"),
        (struct.pack("<ifi", 7, 0.0, 3) + b"\xff\xfe\xfd", "not UTF-8"),
        (struct.pack("<ifi", 7, 0.0, 3) + b"abc", "expected <unk>, <s> and </s>"),
        ((struct.pack("<ifi", 7, 0.0, 5) + b"<unk>") * 2, "damaged"),
    ],
)
def test_what_is_no_vocabulary_is_said_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def damaged(draw: random.Random, data: bytes) -> bytes:
    """The file cut or flipped, or one of its lengths, scores or texts replaced."""
    if draw.random() < 0.3:
        return cut_or_flipped(draw, data)
    places, at = [], 4
    while at < len(data):
        places.append(at)
        at += 8 + struct.unpack_from("<i", data, at + 4)[0]
    changed, at = bytearray(data), draw.choice([-4, *draw.sample(places, 3)])
    kind = draw.choice(["length", "score", "text", "swap", "repeat"])
    if kind == "length" or at < 0:
        old = struct.unpack_from("<i", data, at + 4)[0]
        new = draw.choice([0, 1, -1, old + 1, old - 1, old + 8, 2**31 - 1, -(2**31), 65536])
        struct.pack_into("<i", changed, at + 4, new)
    elif kind == "score":
        changed[at : at + 4] = struct.pack("<I", draw.choice([0, 0x7F800000, 0x7FC00000, 0xFF7FFFFF, 1]))
    elif kind == "text":
        changed[at + 8] = draw.choice([0, 10, 32, 60, 128, 255])
    elif kind == "swap":
        other = draw.choice(places)
        return bytes(changed[:at] + data[other : other + 14] + changed[at:])
    else:
        return bytes(changed[:at] + data[at : draw.choice(places)] + changed[at:])
    return bytes(changed)


@pytest.mark.parametrize(
    "rounds", [pytest.param(300, id="quick"), pytest.param(3000, id="whole", marks=pytest.mark.slow)]
)
def test_damaged_files(directory: Path, rounds: int, tmp_path: Path) -> None:
    data, path = (directory / "tok512.bin").read_bytes(), tmp_path / "tok.bin"
    opened = 0
    for seed in range(rounds):
        path.write_bytes(damaged(random.Random(seed), data))
        try:
            with bounded():
                tokenizer = load(path)
                tokenizer.decode(tokenizer.encode("Once upon a time  <s>\n\0é"))
            opened += 1
        except TokenizerError as error:
            assert "\n" not in str(error), seed
    assert 0 < opened < rounds
