from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from puna.data import readers
from puna.data.readers import Document, ReadReport, read
from puna.errors import DataError


def pairs(*inputs, **arguments):
    return [(document.source, document.text) for document in read(inputs, **arguments)]


def json_lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_text_is_kept_as_it_is_but_for_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n two \r\n")
    (tmp_path / "b.md").write_text("  # é\n\n")
    (tmp_path / "c.rs").write_text("fn main() {}\n")
    assert pairs(tmp_path / "a.txt") == [("a.txt", "one\r\n two \r\n")]
    assert pairs(tmp_path / "b.md", tmp_path / "c.rs") == [("b.md", "  # é\n\n"), ("c.rs", "fn main() {}\n")]


def test_a_directory_is_read_in_the_order_of_paths_without_hidden_files(tmp_path):
    root = tmp_path / "texts"
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", ".hidden", ".git/config", "B.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    expected = ["B.txt", "a/b/c.txt", "a/z.txt", "a.txt", "b.txt"]
    assert pairs(root) == [(f"texts/{name}", name) for name in expected]
    assert pairs(f"{root}/**/*.txt") == pairs(f"{root}/*", f"{root}/**/*") == pairs(root)
    assert [source for source, _ in pairs(f"{root}/?.txt")] == ["texts/B.txt", "texts/a.txt", "texts/b.txt"]


def test_a_file_reached_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert len(pairs(tmp_path, tmp_path / "a.txt", f"{tmp_path}/*.txt")) == 1


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(pairs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".zst", lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:])),
    ],
)
def test_json_lines_and_text_also_compressed(tmp_path, suffix, pack):
    lines = json_lines({"text": "one", "id": 1}, {"text": "zwei ü", "id": 2})
    (tmp_path / f"x.jsonl{suffix}").write_bytes(pack(b"\xef\xbb\xbf" + lines))
    (tmp_path / f"y.txt{suffix}").write_bytes(pack("drei ü\n".encode()))
    assert pairs(tmp_path / f"x.jsonl{suffix}") == [
        (f"x.jsonl{suffix}:1", "one"),
        (f"x.jsonl{suffix}:2", "zwei ü"),
    ]
    assert pairs(tmp_path / f"y.txt{suffix}") == [(f"y.txt{suffix}", "drei ü\n")]


def test_malformed_lines_are_counted_and_the_first_shown(tmp_path):
    good = json_lines({"text": "good"})
    bad = b'{"text": \n[1]\n\n{"text": 3}\n{"other": "x"}\n\xff\xfe\n{"text": null}\n'
    (tmp_path / "x.jsonl").write_bytes(good + bad + b"[" * 100_000 + b"\n" + good)
    report = ReadReport()
    assert pairs(tmp_path / "x.jsonl", report=report) == [("x.jsonl:1", "good"), ("x.jsonl:10", "good")]
    assert (report.malformed, report.documents, report.files) == (7, 2, 1)
    assert len(report.faults) == 3
    assert report.faults[0].startswith("x.jsonl:2: skipped: not JSON: Expecting value")
    assert report.faults[1] == "x.jsonl:3: skipped: expected an object, got list"
    assert report.faults[2] == "x.jsonl:5: skipped: no text in field 'text'"
    assert report.lines()[:2] == ["2 documents from 1 file", "7 malformed records skipped"]


def test_a_missing_field_names_those_present(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines({"content": "a", "id": 1}))
    with pytest.raises(DataError, match=r"x\.jsonl:1: no field 'text'; its fields are 'content', 'id'"):
        pairs(tmp_path)
    assert pairs(tmp_path, field="content") == [(f"{tmp_path.name}/x.jsonl:1", "a")]


def test_lone_surrogates_pass(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    (document,) = read([tmp_path])
    assert document.text == "a\ud800b 😀"
    assert len(document.encoded()) == 1 + 3 + 1 + 1 + 4


def test_lines_beyond_the_bound_are_skipped_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 50)
    (tmp_path / "x.jsonl").write_bytes(json_lines({"text": "x" * 500}, {"text": "next"}))
    report = ReadReport()
    assert pairs(tmp_path / "x.jsonl", report=report) == [("x.jsonl:2", "next")]
    assert report.malformed == 1


def test_parquet_is_read_a_column_at_a_time(tmp_path):
    texts = [f"text {i}" for i in range(1000)]
    table = pa.table({"id": range(1001), "body": pa.array([*texts, None], pa.large_string())})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=300)
    report = ReadReport()
    found = pairs(tmp_path / "x.parquet", field="body", report=report)
    assert found == [(f"x.parquet:{i + 1}", text) for i, text in enumerate(texts)]
    assert report.empty == 1
    with pytest.raises(DataError, match="no field 'text'; its fields are 'id', 'body'"):
        pairs(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="field 'id' holds int64, expected text"):
        pairs(tmp_path / "x.parquet", field="id")


def test_dictionary_encoded_parquet(tmp_path):
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert [text for _, text in pairs(tmp_path / "x.parquet")] == ["a", "b", "a"]


def test_what_is_not_text_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.bin").write_bytes(b"MZ\0\0")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": "kept"}) * 500)[:-20])
    (tmp_path / "f.txt.zst").write_bytes(b"not zstandard")
    (tmp_path / "g.txt").write_text(" \n")
    report = ReadReport()
    found = pairs(tmp_path, report=report)
    assert found[0][1] == "fine"
    assert {text for _, text in found[1:]} <= {"kept"}
    assert (report.files, report.skipped_files, report.empty) == (7, 5, 1)
    assert report.faults[0].endswith("b.txt: skipped: not UTF-8: byte 3")
    assert report.faults[1].endswith("c.bin: skipped: not text: it holds NUL bytes")
    assert report.bytes_read == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_zstandard_file_that_was_cut_is_no_whole_one(tmp_path):
    (tmp_path / "whole.txt").write_text("fine")
    whole = zstandard.compress(json_lines({"text": "kept"}) * 5000)
    for cut in (len(whole) - 3, len(whole) // 2):
        (tmp_path / "x.jsonl.zst").write_bytes(whole[:cut])
        report = ReadReport()
        pairs(tmp_path, report=report)
        assert "ends within a compressed frame" in report.faults[-1]


def test_a_separator_divides_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 5)  # so that separators straddle chunks
    text = "one\ntwo\n<|end|>\n\nthree ü\n<|end|><|end|>\nfour<|end|>\n"
    (tmp_path / "x.txt").write_text(text)
    assert pairs(tmp_path / "x.txt", separator="<|end|>") == [
        ("x.txt:1", "one\ntwo"),
        ("x.txt:5", "three ü"),
        ("x.txt:7", "four"),
    ]
    assert pairs(tmp_path / "x.txt", separator="\n") == [
        (f"x.txt:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line
    ]


def test_very_long_text_becomes_passages(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PASSAGE", 1000)
    monkeypatch.setattr(readers, "CHUNK", 64)
    text = "".join(f"line {i} ü\n" for i in range(500))
    (tmp_path / "x.txt").write_text(text)
    found = pairs(tmp_path / "x.txt")
    assert "".join(part for _, part in found) == text
    assert found[0][0] == "x.txt"
    assert all(len(part.encode()) <= 1064 and part.endswith("\n") for _, part in found)
    lines = text.split("\n")
    assert all(part.startswith(lines[int(source.split(":")[1]) - 1]) for source, part in found[1:])
    unbroken = "ü€😀x" * 600
    (tmp_path / "x.txt").write_text(unbroken)
    assert "".join(part for _, part in pairs(tmp_path / "x.txt")) == unbroken


def test_missing_and_empty_inputs_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n\n")
    for inputs, message in [
        ([], "no input was given"),
        ([tmp_path / "nowhere.txt"], "nowhere.txt: no such file or directory"),
        ([tmp_path / "empty"], "holds no file"),
        ([f"{tmp_path}/*.json"], r"\*\.json: matches no file"),
        ([tmp_path / "blank.txt"], "no documents in 1 file, the first .*blank.txt: all are empty"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            list(read(inputs))
        assert "\n" not in str(caught.value)


def test_real_texts(assets):
    corpora = assets / "corpora"
    c4 = list(read([corpora / "c4"]))
    assert len(c4) == 300
    stories = list(read([corpora / "tinystories"], separator="<|endoftext|>"))
    whole = next(path for path in (corpora / "tinystories").iterdir() if path.suffix == ".txt").read_text()
    assert [story.text.strip() for story in stories] == [
        story.strip() for story in whole.split("<|endoftext|>") if story.strip("\n")
    ]
    assert isinstance(c4[0], Document)
