from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from contextlib import contextmanager

import pytest

import puna.tokenizer
from puna.data import holdout
from puna.data import prepare as preparing
from puna.data.holdout import split
from puna.data.prepare import open_prepared, prepare, prepare_documents
from puna.data.readers import Document
from puna.data.shards import TokenSet
from puna.errors import DataError, ResourceError

TEXTS = [f"document {i} " + "word " * (i % 7) + "ü" * (i % 3) for i in range(400)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


class Said:
    """A Track that remembers."""

    def __init__(self):
        self.lines, self.advanced, self.totals = [], 0, []

    @contextmanager
    def __call__(self, label, total, unit):
        self.totals.append(total)
        yield self

    def advance(self, amount, note=""):
        self.advanced += amount

    def say(self, text):
        self.lines.append(text)


def texts_of(tokens: TokenSet) -> list[str]:
    found = []
    for number in range(tokens.documents_total):
        ids = tokens.document(number).ids.tolist()
        assert (ids[0], ids[-1]) == (256, 257)
        found.append(bytes(ids[1:-1]).decode())
    return found


def files_of(directory):
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_document_lands_on_one_side_in_order(corpus, tmp_path, byte_tokenizer):
    track = Said()
    made = prepare([corpus], byte_tokenizer(), tmp_path / "out", holdout=0.1, shard_tokens=700, track=track)
    train, held = texts_of(made.train), texts_of(made.validation)
    assert sorted(train + held) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 20 <= len(held) <= 60
    assert made.train.bytes_total == sum(len(text.encode()) for text in train)
    assert made.validation.source(0) == f"corpus.jsonl:{TEXTS.index(held[0]) + 1}"
    assert made.report == ["400 documents from 1 file"]
    assert track.advanced == track.totals[0] == corpus.stat().st_size
    made.train.verify()


@pytest.mark.parametrize("workers", [2, 5])
def test_the_bytes_do_not_depend_on_the_workers(corpus, tmp_path, byte_tokenizer, workers, monkeypatch):
    monkeypatch.setattr("puna.data.encoding.TASK_BYTES", 200)
    for number, count in enumerate([1, workers]):
        prepare([corpus], byte_tokenizer(), tmp_path / str(number), workers=count, shard_tokens=900)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1")
    assert len(files_of(tmp_path / "0")) > 8


def test_a_second_call_opens_what_the_first_made(corpus, tmp_path, byte_tokenizer):
    prepare([corpus], byte_tokenizer(), tmp_path / "out")
    tokenizer = byte_tokenizer()
    again = prepare([corpus], tokenizer, tmp_path / "out")
    assert tokenizer.encoded == []
    assert again.report == ["400 documents from 1 file"]
    assert (
        open_prepared(tmp_path / "out", tokenizer.fingerprint).train.tokens_total == again.train.tokens_total
    )


def test_killed_anywhere_it_goes_on_to_the_same_bytes(corpus, tmp_path, byte_tokenizer, monkeypatch):
    """Stops at every write, as a kill would: what is half written stays beside, nothing is cleaned up."""
    arguments = {"holdout": 0.1, "shard_tokens": 1500}
    monkeypatch.setattr("puna.data.encoding.TASK_BYTES", 500)
    prepare([corpus], byte_tokenizer(), tmp_path / "whole", **arguments)
    expected = files_of(tmp_path / "whole")

    class Killed(BaseException):
        pass

    replace = os.replace
    for stop in range(len(expected)):
        writes = iter(range(1000))

        def dying(source, target, stop=stop, writes=writes):
            if next(writes) == stop:
                raise Killed
            replace(source, target)

        out = tmp_path / f"killed{stop}"
        with monkeypatch.context() as patched:
            patched.setattr("pathlib.os.replace", dying)
            patched.setattr("puna.files.Path.unlink", lambda *_, **__: None)
            with pytest.raises(Killed):
                prepare([corpus], byte_tokenizer(), out, **arguments)
        with pytest.raises(DataError):
            open_prepared(out)
        tokenizer, track = byte_tokenizer(), Said()
        prepare([corpus], tokenizer, out, track=track, **arguments)
        assert files_of(out) == expected
        if stop > 2:
            assert len(tokenizer.encoded) < 400
            assert track.lines[0].startswith("going on after")


def test_a_damaged_shard_is_made_again(corpus, tmp_path, byte_tokenizer):
    out = tmp_path / "out"
    prepare([corpus], byte_tokenizer(), out, shard_tokens=1500)
    expected = files_of(out)
    (out / "train" / "manifest.json").unlink()
    shard = out / "train" / "shard-00002.bin"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    prepare([corpus], byte_tokenizer(), out, shard_tokens=1500)
    assert files_of(out) == expected


def test_changes_start_anew_with_a_word(corpus, tmp_path, byte_tokenizer):
    out = tmp_path / "out"
    prepare([corpus], byte_tokenizer(), out, holdout=0.1)
    track = Said()
    made = prepare([corpus], byte_tokenizer(), out, holdout=0.2, track=track)
    assert "holdout changed since it was prepared" in track.lines[0]
    assert made.validation.documents_total > 50
    corpus.write_text(corpus.read_text() + json.dumps({"text": "one more"}) + "\n")
    made = prepare([corpus], byte_tokenizer(), out, holdout=0.2, track=track)
    assert "inputs changed" in track.lines[1]
    assert made.train.documents_total + made.validation.documents_total == 401


def test_another_tokenizer_and_foreign_directories_are_refused(corpus, tmp_path, byte_tokenizer):
    out = tmp_path / "out"
    prepare([corpus], byte_tokenizer(), out)
    before = files_of(out)
    with pytest.raises(DataError, match=r"holds the tokens of tokenizer .* choose another directory"):
        prepare([corpus], byte_tokenizer("other"), out)
    assert files_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty, and not made by preparing data"):
        prepare([corpus], byte_tokenizer(), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_bad_input_leaves_nothing_behind(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 50)
    (tmp_path / "b.jsonl").write_text('{"body": "other"}\n')
    with pytest.raises(DataError, match="no field 'text'; its fields are 'body'"):
        prepare(
            [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], byte_tokenizer(), tmp_path / "out", shard_tokens=9
        )
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_whole_shards(corpus, tmp_path, byte_tokenizer, monkeypatch):
    fsync = os.fsync
    calls = iter(range(100))

    def filling(descriptor):
        if next(calls) == 8:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("puna.files.os.fsync", filling)
        with pytest.raises(ResourceError, match=r"No space left on device while writing .*shard"):
            prepare([corpus], byte_tokenizer(), tmp_path / "out", shard_tokens=1500)
    assert not [name for name in files_of(tmp_path / "out") if "tmp" in name]
    tokenizer = byte_tokenizer()
    prepare([corpus], tokenizer, tmp_path / "out", shard_tokens=1500)
    assert 0 < len(tokenizer.encoded) < 400


def test_held_out_files_of_ones_own(corpus, tmp_path, byte_tokenizer):
    held = tmp_path / "held.txt"
    held.write_text(TEXTS[7])
    made = prepare([corpus], byte_tokenizer(), tmp_path / "out", validation=[held])
    assert texts_of(made.validation) == [TEXTS[7]]
    assert texts_of(made.train) == [text for text in TEXTS if text != TEXTS[7]]
    assert "1 document left out of training: held out as well" in made.report
    nothing = prepare([corpus], byte_tokenizer(), tmp_path / "all", holdout=0.0)
    assert nothing.validation is None
    assert texts_of(nothing.train) == TEXTS


def test_documents_in_memory(tmp_path, byte_tokenizer):
    train = [Document(text, f"t{i}") for i, text in enumerate(TEXTS)]
    held = [Document(TEXTS[3], "h0"), Document("new", "h1")]
    made = prepare_documents(train, held, byte_tokenizer(), tmp_path / "out")
    assert texts_of(made.validation) == [TEXTS[3], "new"]
    assert made.train.documents_total == 399
    tokenizer = byte_tokenizer()
    prepare_documents(train, held, tokenizer, tmp_path / "out")
    assert tokenizer.encoded == []
    track = Said()
    prepare_documents(train[1:], held, tokenizer, tmp_path / "out", track=track)
    assert "inputs changed" in track.lines[0]


def test_holding_out_is_stable_and_keeps_copies_together():
    documents = [Document(text, str(i)) for i, text in enumerate(TEXTS * 2)]
    sides = {d.source: side for side, d in split(documents, 0.1, 10**9)}
    assert all(sides[str(i)] == sides[str(i + 400)] for i in range(400))
    fewer = {d.source: side for side, d in split(documents[:100], 0.1, 10**9)}
    assert all(sides[source] == side for source, side in fewer.items())
    more = {d.source: side for side, d in split(documents, 0.2, 10**9)}
    assert all(more[source] == "validation" for source, side in sides.items() if side == "validation")
    assert Counter(sides.values())["validation"] / 800 == pytest.approx(0.1, abs=0.04)


def test_of_a_single_text_the_end_is_held_out():
    text = "".join(f"line {i} of a long book\n" for i in range(1000))
    (one, head), (two, tail) = split([Document(text, "book.txt")], 0.05, len(text))
    assert (one, two) == ("train", "validation")
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert len(tail.text) / len(text) == pytest.approx(0.05, abs=0.002)
    assert (head.source, tail.source) == ("book.txt", "book.txt (end)")


@pytest.mark.parametrize("text", ["x", "xy", "a b", "x" * 1000, "\n" * 10 + "x", "word " * 100])
def test_dividing_loses_nothing(text):
    parts = list(split([Document(text, "s")], 0.05, 1))
    assert "".join(document.text for _, document in parts) == text
    assert parts[-1][0] == "validation"
    assert all(document.text for _, document in parts)


def test_nothing_left_for_a_side_is_said_with_numbers(tmp_path, byte_tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(holdout, "COARSE", 2.0)
    with pytest.raises(
        DataError, match=r"nothing was held out of 400 documents, .* raise holdout, name validation"
    ):
        prepare([corpus], byte_tokenizer(), tmp_path / "out", holdout=1e-9)
    with pytest.raises(DataError, match="nothing is left to train on of 400 documents"):
        prepare([corpus], byte_tokenizer(), tmp_path / "out", holdout=1.0)
    assert not (tmp_path / "out").exists()
    assert preparing.SIDES[-1] == "train"


def test_with_a_real_tokenizer(assets, tmp_path):
    tokenizer = puna.tokenizer.load(assets / "weights/stories260K/tok512.model")
    made = prepare(
        [assets / "corpora/tinystories"], tokenizer, tmp_path / "out", separator="<|endoftext|>", workers=2
    )
    document = made.train.document(5)
    assert document.ids.tolist() == tokenizer.encode(tokenizer.decode(document.ids), bos=True, eos=True)
    assert document.size == len(tokenizer.decode(document.ids).encode())
    assert made.validation.bytes_total / made.train.bytes_total == pytest.approx(0.05, abs=0.01)
