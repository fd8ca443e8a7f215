"""What torch saves is read as torch reads it, what is written torch opens, and a pickle never runs."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.errors import ModelError
from puna.formats.archives.torch_archive import read_archive, read_tensors, recognises
from puna.formats.archives.torch_writer import TorchWriter
from tests.formats.damage import bounded, fuzz
from tests.formats.torch_damage import (
    HOSTILE,
    bent_archive,
    described,
    description_of,
    from_description,
    repacked,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 10, generator=generator)
    return {
        "matrix": matrix,
        "tied": matrix,
        "turned": matrix.T,
        "inner": matrix[1:4, 2:9:3],
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
    }


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    return type(ours) is type(theirs) and ours == theirs


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three tensors, two of them over one storage."""
    torch.save({name: tensors()[name] for name in ("matrix", "tied", "scalar")}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


# As torch reads


def test_everything_that_torch_saves_comes_back(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "a.pth")
    found = read_archive(tmp_path / "a.pth")
    assert same(found, torch.load(tmp_path / "a.pth", weights_only=True))
    assert found["matrix"].data_ptr() == found["tied"].data_ptr() == found["turned"].data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(7).to(dtype)}, tmp_path / "a.pth")
    assert same(read_archive(tmp_path / "a.pth"), {"a": torch.arange(7).to(dtype)})


def test_a_whole_training_checkpoint(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    value = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {"dim": 288, "n_kv_heads": None, "dropout": 0.0, "big": 2**40, "negative": -(2**70)},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"wandb_log": False, "device": "cuda", "betas": (0.9, 0.95), "list": [1, "é", []]},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }
    torch.save(value, tmp_path / "ckpt.pt")
    found = read_archive(tmp_path / "ckpt.pt")
    assert same(found["model"], dict(layer.state_dict()))
    assert same(found["optimizer"], torch.load(tmp_path / "ckpt.pt")["optimizer"])
    for key in ("model_args", "iter_num", "best_val_loss", "config", "dtype"):
        assert same(found[key], value[key]), key


def test_a_tensor_is_a_view_of_the_file_and_writing_to_it_is_not(archive: Path) -> None:
    before = archive.read_bytes()
    read_archive(archive)["matrix"].zero_()
    assert archive.read_bytes() == before


def test_a_large_file_is_not_taken_into_memory(tmp_path: Path) -> None:
    with TorchWriter(tmp_path / "a.pth") as writer:
        part = torch.zeros(1 << 22)
        writer.finish({str(i): writer.add(part) for i in range(12)})
    assert (tmp_path / "a.pth").stat().st_size > 190 << 20
    del part
    with bounded():
        assert len(read_tensors(tmp_path / "a.pth").tensors) == 12


# What is written


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"weights_only": False}], ids=str)
def test_torch_opens_what_is_written(options: dict[str, bool], tmp_path: Path) -> None:
    plain = {"dim": 3, "f": 1e-5, "none": None, "yes": True, "nested": {"list": [1, "é"], "t": (1, 2)}}
    with TorchWriter(tmp_path / "w.pth") as writer:
        stored = {name: writer.add(tensor) for name, tensor in tensors().items() if name != "tied"}
        writer.finish({"model": {**stored, "tied": stored["matrix"]}, "args": plain})
    found = torch.load(tmp_path / "w.pth", **{"weights_only": True, **options})
    expected = {name: tensor.detach() for name, tensor in tensors().items()}
    assert same(found, {"model": {**expected, "tied": expected["matrix"]}, "args": plain})
    assert same(read_archive(tmp_path / "w.pth"), found)
    model = found["model"]
    assert model["matrix"].data_ptr() == model["tied"].data_ptr() != model["turned"].data_ptr()


def test_records_are_aligned_checked_and_stored_once(tmp_path: Path) -> None:
    for name in ("one.pth", "two.pth"):
        with TorchWriter(tmp_path / name) as writer:
            writer.finish({str(i): writer.add(torch.ones(2**i + 1).bfloat16()) for i in range(12)})
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.pth") as archive:
        assert archive.testzip() is None
    reader = torch._C.PyTorchFileReader(str(tmp_path / "one.pth"))
    assert all(reader.get_record_offset(f"data/{i}") % 64 == 0 for i in range(12))
    found = read_archive(tmp_path / "one.pth")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_sizes_beyond_four_bytes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.formats.archives.torch_writer._WIDE", 8)
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", 100)
    monkeypatch.setattr("zipfile.ZIP_FILECOUNT_LIMIT", 2)
    with TorchWriter(tmp_path / "w.pth") as writer:
        writer.finish({str(i): writer.add(torch.full((i + 2,), i + 0.5)) for i in range(5)})
    data = (tmp_path / "w.pth").read_bytes()
    assert b"PK\6\6" in data and b"PK\6\7" in data
    data = data[:-12] + b"\xff\xff" + data[-10:]  # the number of entries is to be read there
    (tmp_path / "w.pth").write_bytes(data)
    expected = {str(i): torch.full((i + 2,), i + 0.5) for i in range(5)}
    assert same(read_archive(tmp_path / "w.pth"), expected)
    assert same(torch.load(tmp_path / "w.pth", weights_only=True, mmap=True), expected)
    broken = data.replace(b"PK\6\6", b"PK\6\5")
    (tmp_path / "w.pth").write_bytes(broken)
    assert "its directory makes no sense" in refused(tmp_path / "w.pth")


@pytest.mark.slow
def test_an_archive_beyond_four_gibibytes(tmp_path: Path) -> None:
    part = torch.zeros(1 << 29)  # 2 GiB
    with TorchWriter(tmp_path / "w.pth") as writer:
        stored = {str(i): writer.add(part) for i in range(3)}
        writer.finish({**stored, "last": writer.add(torch.arange(5.0))})
    del part
    for found in (read_archive(tmp_path / "w.pth"), torch.load(tmp_path / "w.pth", mmap=True)):
        assert torch.equal(found["last"], torch.arange(5.0))
        assert found["2"].shape == (1 << 29,)


# What is refused


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with bounded(), pytest.raises(ModelError) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused(name: str, archive: Path) -> None:
    data = archive.read_bytes()
    for pickle_ in (HOSTILE[name], b"}X\x01\x00\x00\x00a" + HOSTILE[name] + b"s"):
        archive.write_bytes(repacked(data, b"\x80\x02" + pickle_ + b"."))
        refused(archive)


def test_a_command_is_named_and_not_run(archive: Path, tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    archive.write_bytes(repacked(archive.read_bytes(), pickle.dumps({"a": Command()}, protocol=2)))
    message = refused(archive)
    assert f"holds more than tensors and plain values: '{os.system.__module__}.system'" in message
    assert "torch.save(model.state_dict(), path)" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: 61}, "damaged: a storage of 61 values of 4 bytes in 240 bytes"),
        ({2: 2**40}, "damaged: a storage of"),
        ({0: torch.DoubleStorage}, "damaged: a storage of 60 values of 8 bytes"),
        ({1: "9"}, "it has no 'data/9'"),
        ({3: 1}, r"it holds a tensor [6, 10] that reaches beyond its 60 values"),
        ({4: (6, 11)}, r"it holds a tensor [6, 11] that reaches beyond its 60 values"),
        ({4: (2**40,), 5: (0,)}, "it holds a tensor [1099511627776] that reaches beyond its 60 values"),
        ({4: (2**31, 2**31), 5: (0, 0)}, "that reaches beyond its 60 values"),
        ({5: (10, 2)}, "that reaches beyond its 60 values"),
        ({5: (-10, 1)}, "its pickle is damaged"),
        ({5: (10,)}, "its pickle is damaged"),
        ({4: (True, 10)}, "its pickle is damaged"),
        ({4: (1,) * 9, 5: (1,) * 9}, "its pickle is damaged"),
    ],
)
def test_a_tensor_that_lies(archive: Path, change: dict[int, Any], message: str) -> None:
    data = archive.read_bytes()
    table = {"matrix": described(data)["matrix"]}
    for place, value in change.items():
        table["matrix"][place] = value
    archive.write_bytes(repacked(data, from_description(table)))
    assert message in refused(archive)


def test_many_names_for_one_tensor_make_no_large_model(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 18)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    row = described(data)["a"]
    (tmp_path / "a.pth").write_bytes(repacked(data, from_description({"a": row, "b": row})))
    assert len(read_tensors(tmp_path / "a.pth").tensors) == 2
    many = {str(number): row for number in range(1000)}
    (tmp_path / "a.pth").write_bytes(repacked(data, from_description(many)))
    assert "its tensors claim 1048576000 bytes of the 1048576 that it holds" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize("length", [0, 1, 21, 22, 100, 500, -1, -21, -22, -100])
def test_cut_short(archive: Path, length: int) -> None:
    archive.write_bytes(archive.read_bytes()[:length])
    refused(archive)


def test_files_of_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "written by torch before 1.6; load it with torch and save it again" in refused(
        tmp_path / "old.pth"
    )
    assert recognises(tmp_path / "old.pth")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a/data.pkl": b"", "b/data/0": b""}, "expected one directory in it"),
        ({"a/other": b""}, "it has no 'data.pkl'"),
        ({"a/data.pkl": b"\x80\x02N.", "a/byteorder": b"big"}, "written on a big-endian machine"),
        ({"a/data.pkl": b"\x80\x02N."}, "expected a dictionary of tensors and nothing else"),
        ({"a/data.pkl": b"\x80\x02}X\1\0\0\0aNs."}, "expected a dictionary of tensors and nothing else"),
        ({"a/data.pkl": b" " * (16 << 20) + b" "}, "no model needs more than"),
        ({"a/data.pkl": b"\x80\x02"}, "its pickle is cut short"),
    ],
)
def test_zip_files_of_others(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert message in refused(tmp_path / "a.pth")


def test_compressed_repeated_and_damaged_members(archive: Path) -> None:
    data, description = archive.read_bytes(), description_of(archive.read_bytes())
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as other:
        other.writestr("a/data.pkl", description)
    assert "its members are compressed" in refused(archive)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(archive, "w") as other:
        other.writestr("a/data.pkl", description)
        other.writestr("a/data.pkl", b"\x80\x02N.")
    assert "it holds 'a/data.pkl' twice" in refused(archive)
    archive.write_bytes(data.replace(b"matrix", b"matrex"))
    assert "data.pkl is not what was written" in refused(archive)


def test_a_directory_that_claims_everything(archive: Path) -> None:
    data = archive.read_bytes()
    for place, form in ((10, "<H"), (12, "<I"), (16, "<I")):
        for value in (0, 1, 0xFFFE, 0xFFFFFFFE):
            changed = bytearray(data)
            struct.pack_into(form, changed, len(data) - 22 + place, value % (1 << 8 * struct.calcsize(form)))
            archive.write_bytes(bytes(changed))
            assert "damaged: " in refused(archive)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / "none.pth")
    assert "cannot be read" in refused(tmp_path)


def damaged(draw: random.Random, path: Path) -> bytes:
    return bent_archive(draw, path.read_bytes())


def read_all(path: Path) -> None:
    """Every value of every tensor."""
    for tensor in read_tensors(path).tensors.values():
        assert tensor.numel() <= 1 << 20
        tensor.double().sum()


@pytest.mark.parametrize("rounds", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_mutated_archives_are_refused_or_valid(rounds: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(OrderedDict((name, t) for name, t in tensors().items() if name != "none"), path)
    assert 0 < fuzz(path, [path], damaged, rounds, read_all) < rounds * 0.6
