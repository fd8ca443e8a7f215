from __future__ import annotations

import json

import numpy as np
import pytest

from puna.data.shardfile import HEADER, TokenDocument, join, map_shard, write_shard
from puna.data.shards import MANIFEST, TokenSet, shard_name, write_token_set
from puna.errors import DataError, ResourceError

LENGTHS = [5, 1, 9, 3, 20, 2, 7]


@pytest.fixture(params=[1, 6, 10, 1 << 20], ids=lambda size: f"shards of {size}")
def tokens(request, token_set):
    return token_set(LENGTHS, shard_tokens=request.param)


def sequence():
    """The same tokens, built by a loop."""
    ids, value = [], 10
    for length in LENGTHS:
        ids += [1, *range(value, value + length - 1)]
        value += length - 1
    return ids


def test_any_slice_is_that_of_the_whole_sequence(tokens):
    whole = sequence()
    assert tokens.tokens_total == len(whole)
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 3):
            assert tokens.slice(start, stop).tolist() == whole[start:stop]
    assert tokens.slice(0, 4).dtype == np.int64


def test_document_starts_are_found_in_any_stretch(tokens):
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    for begin in range(sum(LENGTHS) + 1):
        for end in range(begin, sum(LENGTHS) + 3):
            assert tokens.document_starts(begin, end).tolist() == [s for s in starts if begin <= s < end]


def test_every_token_knows_its_document_and_source(tokens):
    owners = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    assert [tokens.document_at(offset) for offset in range(tokens.tokens_total)] == owners
    assert tokens.source_at(6) == "doc2"
    with pytest.raises(DataError, match="expected a token from 0 to 46, got 47"):
        tokens.source_at(47)


def test_documents_come_back_whole(tokens):
    assert tokens.documents_total == len(LENGTHS)
    assert tokens.bytes_total == 3 * sum(LENGTHS)
    whole = sequence()
    for number, length in enumerate(LENGTHS):
        document = tokens.document(number)
        start = sum(LENGTHS[:number])
        assert document.ids.tolist() == whole[start : start + length]
        assert (document.size, document.source) == (3 * length, f"doc{number}")


def test_a_sample_is_whole_documents_with_their_own_totals(tokens):
    for limit in range(1, sum(LENGTHS) + 5):
        sample = tokens.sample(limit)
        count = min(max(1, len(LENGTHS) * limit // sum(LENGTHS)), len(LENGTHS))
        chosen = [number * len(LENGTHS) // count for number in range(count)]
        documents = [tokens.document(number) for number in chosen]
        assert sample.documents_total == count
        assert sample.bytes_total == sum(document.size for document in documents)
        assert sample.slice(0, 1000).tolist() == [i for document in documents for i in document.ids.tolist()]
        assert len(sample.document_starts(0, 1000)) == count
        assert [sample.source(n) for n in range(count)] == [f"doc{number}" for number in chosen]
    assert tokens.tokens_total == sum(LENGTHS)


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_width_follows_the_vocabulary(tmp_path, vocab_size, width):
    ids = np.array([0, 7, vocab_size - 1])
    path = tmp_path / "shard"
    header = write_shard(path, join([TokenDocument(ids, 1, "ü/x.txt")], vocab_size))
    assert header.token_bytes == width
    raw = path.read_bytes()
    assert raw[HEADER.size + 2 * width : HEADER.size + 3 * width] == (vocab_size - 1).to_bytes(
        width, "little"
    )
    _, shard = map_shard(path)
    assert shard.tokens.tolist() == ids.tolist()
    assert shard.source(0) == "ü/x.txt"


def test_the_format_is_the_one_written_down(tmp_path):
    """Version 1, byte for byte: a change here must change VERSION."""
    documents = [TokenDocument(np.array([1, 2]), 10, "a"), TokenDocument(np.array([3]), 4, "bc")]
    write_shard(tmp_path / "s", join(documents, vocab_size=100))
    raw = (tmp_path / "s").read_bytes()
    assert raw[:40].hex() == (
        "50554e41544f4b0a" "01000000" "02000000" "0300000000000000" "0200000000000000" "0300000000000000"
    )  # fmt: skip
    words = [0, 2, 3, 10, 4, 0, 1, 3]
    assert (
        raw[80:]
        == bytes([1, 0, 2, 0, 3, 0, 0, 0]) + b"".join(w.to_bytes(8, "little") for w in words) + b"abc"
    )


@pytest.mark.parametrize("keep", [0, 7, 79, 80, 100, -1])
def test_a_truncated_shard_is_refused(token_set, keep):
    tokens = token_set(LENGTHS)
    path = tokens.directory / shard_name(0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="prepare the data again"):
        TokenSet(tokens.directory)


def test_every_flipped_header_bit_is_noticed_at_once_and_every_other_by_verify(token_set):
    tokens = token_set([3, 4])
    path = tokens.directory / shard_name(0)
    good = path.read_bytes()
    for index in range(len(good)):
        path.write_bytes(good[:index] + bytes([good[index] ^ 4]) + good[index + 1 :])
        try:
            opened = TokenSet(tokens.directory)
        except DataError:
            continue
        assert index >= 76, "a header that was changed was accepted"
        if index >= HEADER.size:
            with pytest.raises(DataError, match="checksum"):
                opened.verify()
    path.write_bytes(good)
    TokenSet(tokens.directory).verify()


def test_another_tokenizer_is_refused(token_set):
    directory = token_set(LENGTHS).directory
    TokenSet(directory, fingerprint="f" * 64)
    with pytest.raises(DataError, match="made with tokenizer ffffffffffff, not with 000000000000"):
        TokenSet(directory, fingerprint="0" * 64)


def test_unfinished_foreign_and_newer_directories_are_refused(tmp_path, token_set):
    with pytest.raises(DataError, match="not a directory of prepared tokens, or not finished"):
        TokenSet(tmp_path / "nowhere")
    directory = token_set(LENGTHS).directory
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(DataError, match="version 2, this Puna reads 1"):
        TokenSet(directory)
    (directory / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        TokenSet(directory)


def test_a_shard_from_elsewhere_is_noticed(token_set):
    one, two = token_set(LENGTHS, name="one"), token_set([4, 4], name="two")
    (two.directory / shard_name(0)).replace(one.directory / shard_name(0))
    with pytest.raises(DataError, match=r"not the shard that manifest\.json names"):
        TokenSet(one.directory)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("puna.files.os.fsync", full)
    documents = [TokenDocument(np.array([1, 2, 3]), 3, "a")]
    with pytest.raises(ResourceError, match="No space left"):
        write_token_set(tmp_path / "set", documents, vocab_size=10, fingerprint="f")
    assert list((tmp_path / "set").iterdir()) == []
