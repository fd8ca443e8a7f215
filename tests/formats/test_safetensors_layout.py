"""Files made piece by piece are what the library reads, every tensor in its place."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from puna.formats.huggingface.safetensors_layout import CHUNK, chunks, header


def test_the_library_reads_what_is_written_piece_by_piece(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "bytes": torch.randint(0, 256, (7,), dtype=torch.uint8),
        "turned": torch.randn(5, 3).T,
        "larger than a piece": torch.randn(CHUNK // 4 + 3),
        "halves": torch.randn(3).half(),
        "none": torch.empty(0, 4),
        "truths": torch.tensor([True, False, True]),
    }
    pieces = [bytes(piece) for piece in chunks(tensors, {"made": "by hand"})]
    assert max(map(len, pieces)) <= CHUNK
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"".join(pieces))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made": "by hand"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == each.dtype for name, each in tensors.items())
    assert all(torch.equal(found[name], each) for name, each in tensors.items())
    length = int.from_bytes(pieces[0][:8], "little")
    entries = json.loads(pieces[0][8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert entries[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_a_header_fills_the_room_that_was_left_for_it() -> None:
    made = header({"a": 1}, room=40)
    assert (len(made), made[:8], made[8:]) == (48, b"\x28" + bytes(7), b'{"a":1}' + b" " * 33)
