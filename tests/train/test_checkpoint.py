"""Checkpoints give back the same bits, and what is not whole is never taken for whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from puna.errors import CheckpointError, ResourceError
from puna.formats.huggingface.safetensors_layout import CODES
from puna.train import checkpoint
from puna.train.checkpoint import newest, prune, read, save, steps

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)},
        "optimizer": {
            "a.exp_avg": torch.randn(3, 4, generator=generator),
            "a.step": torch.tensor(float(step)),
        },
    }


def save_step(root: Path, step: int) -> Path:
    return save(root, step, tensors_of(step), {"train": {"step": step, "loss": 1 / (step + 2)}})


def assert_is_step(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert found.step == step
    assert found.values == {"train": {"step": step, "loss": 1 / (step + 2)}}
    expected = tensors_of(step)
    assert found.tensors.keys() == expected.keys()
    for group, named in expected.items():
        assert found.tensors[group].keys() == named.keys()
        assert all(same_bits(found.tensors[group][name], named[name]) for name in named)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, NaNs and signs of zero included."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    views = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*views)


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * width), dtype=torch.uint8)
    return raw.view(dtype)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_number_type_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    named = {
        "matrix": random_bits(dtype, 3, 5),
        "transposed": random_bits(dtype, 3, 5).T,
        "every other": random_bits(dtype, 3, 6)[:, ::2],
        "expanded": random_bits(dtype, 1, 4).expand(3, 4),
        "scalar": random_bits(dtype, 1)[0],
        "empty": random_bits(dtype, 0, 4),
        "empty too": random_bits(dtype, 0, 4),
        "odd width before others": torch.ones(3, dtype=torch.uint8),
        "wide": torch.ones(3, dtype=torch.float64),
    }
    path = save(tmp_path, 1, {"model": named}, {})
    for loaded in (read(path).tensors["model"], load_file(path / "model.safetensors")):
        assert loaded.keys() == named.keys()
        assert all(same_bits(loaded[name], named[name]) for name in named)


def test_every_tensor_lies_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    """What reads the file in place (a memory map, another language) may ask for it."""
    named = {
        "narrow": torch.ones(3, dtype=torch.int8),
        "half": torch.ones(3, dtype=torch.float16),
        "wide": torch.ones(3, dtype=torch.float64),
    }
    data = (save(tmp_path, 1, {"model": named}, {}) / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in named.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_tensor_under_two_names_is_stored_once_and_comes_back_as_one(tmp_path: Path) -> None:
    weight, other = torch.randn(64, 64), torch.randn(64, 64)
    model = {"embed": weight, "head": weight, "rows": weight[:10], "alike": weight.clone(), "other": other}
    path = save(tmp_path, 1, {"model": model, "optimizer": {"embed": other}}, {})
    found = read(path).tensors["model"]
    assert all(same_bits(found[name], model[name]) for name in model)
    assert found["head"] is found["embed"]
    assert found["alike"] is not found["embed"]
    assert (path / "model.safetensors").stat().st_size < (3 * 64 + 10) * 64 * 4 + 1000


def test_parameters_are_stored_without_their_gradients(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    path = save(tmp_path, 1, {"model": dict(layer.named_parameters())}, {})
    assert same_bits(read(path).tensors["model"]["weight"], layer.weight.detach())
    assert not read(path).tensors["model"]["weight"].requires_grad


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(values=st.dictionaries(st.text(), json_values, max_size=4))
def test_values_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    root = tmp_path_factory.mktemp("values")
    assert repr(read(save(root, 1, {}, values)).values) == repr(
        values
    )  # repr tells 1 from 1.0 and 0.0 from -0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), {1: 2}, {"a": {3}}, torch.ones(1)])
def test_values_that_json_would_change_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        save(tmp_path, 1, {}, {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_a_number_type_that_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"phase: a checkpoint cannot hold torch\.complex64"):
        save(tmp_path, 1, {"model": {"phase": torch.ones(2, dtype=torch.complex64)}}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_records_what_lies_beside_it(tmp_path: Path) -> None:
    path = save_step(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("puna-checkpoint", 1, 7)
    assert manifest["files"] == {
        name: {
            "bytes": (path / name).stat().st_size,
            "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(),
        }
        for name in FILES[:-1]
    }
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)


def test_the_same_state_is_the_same_bytes_in_whatever_order_it_comes(tmp_path: Path) -> None:
    backwards = {group: dict(reversed(named.items())) for group, named in tensors_of(3).items()}
    first, second = (
        save(tmp_path / name, 3, tensors, {}) for name, tensors in (("a", tensors_of(3)), ("b", backwards))
    )
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


# What is not whole


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_garbage(path: Path) -> None:
    path.write_bytes(b"\xff[[[" * 50_000)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (truncate, empty, flip_last_bit, grow, replace_by_garbage, replace_by_directory, Path.unlink)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_noticed_and_the_previous_checkpoint_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (10, 20):
        save_step(tmp_path, step)
    damage(tmp_path / "step-20" / name)
    said: list[str] = []
    assert_is_step(newest(tmp_path, said.append), 10)
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint step-20 is not whole ({name}: ")
    assert said[0].endswith("passed over, going back to step-10")
    assert "\n" not in said[0]
    assert steps(tmp_path) == [10]
    assert (tmp_path / "unusable-step-20").is_dir()
    assert_is_step(newest(tmp_path, said.append), 10)
    assert len(said) == 1


@pytest.mark.parametrize("name", FILES)
def test_no_single_flipped_bit_changes_what_is_read(tmp_path: Path, name: str) -> None:
    """Every byte of every file; in the manifest a flip may fall on what carries no meaning."""
    path = save_step(tmp_path, 1)
    original = (path / name).read_bytes()
    for place in range(0, len(original), 1 if name == "manifest.json" else 7):
        data = bytearray(original)
        data[place] ^= 1 << (place % 8)
        (path / name).write_bytes(data)
        try:
            assert_is_step(read(path), 1)
            assert name == "manifest.json"
        except CheckpointError as error:
            assert str(error)


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"version": 2},
            r"manifest.json: format ('puna-checkpoint', 2), this Puna reads ('puna-checkpoint', 1)",
        ),
        ({"format": "other"}, "manifest.json: format ('other', 1), this Puna reads ('puna-checkpoint', 1)"),
        ({"step": 9}, "manifest.json: of step 9"),
        ({"files": {}}, "manifest.json: names other files than a checkpoint has"),
        (
            {
                "files": {
                    "state.json": {"bytes": 1, "sha256": ""},
                    "../x.safetensors": {"bytes": 1, "sha256": ""},
                }
            },
            "manifest.json: names other files than a checkpoint has",
        ),
        ({"files": {"state.json": {"bytes": -1, "sha256": ""}}}, "manifest.json: damaged"),
        ({"files": [1]}, "manifest.json: damaged"),
        ({"step": "1"}, "manifest.json: damaged"),
        ({"more": 1}, "manifest.json: damaged"),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object], fault: str
) -> None:
    path = save_step(tmp_path, 1)
    edit_manifest(path, **changes)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value) == fault


def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_memory_is_taken(
    tmp_path: Path,
) -> None:
    path = save(tmp_path, 1, {"model": {"a": torch.ones(2)}}, {})
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 44], "data_offsets": [0, 1 << 46]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (path / "model.safetensors").write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(path, files=files)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file"):
        read(path)


def test_where_no_checkpoint_was_saved_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", pytest.fail) is None
    (tmp_path / ".step-1.tmp-77").mkdir()
    assert newest(tmp_path, pytest.fail) is None
    assert list(tmp_path.iterdir()) == []


def test_where_none_is_whole_nothing_is_started_over_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        empty(save_step(tmp_path, step) / "state.json")
    with pytest.raises(CheckpointError, match=r"is whole \(step-2: state\.json: 0 bytes, .*; step-1: .*\); "):
        newest(tmp_path, pytest.fail)
    assert steps(tmp_path) == [1, 2]


# Keeping


def test_prune_keeps_the_last_ones_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100):
        save_step(tmp_path, step)
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, keep_last=2, best_step=2)
    assert steps(tmp_path) == [2, 10, 100]
    prune(tmp_path, keep_last=1)
    assert steps(tmp_path) == [100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-100"]
    assert_is_step(newest(tmp_path, pytest.fail), 100)


def test_an_unusable_checkpoint_never_counts_among_the_last(tmp_path: Path) -> None:
    for step in (10, 20):
        save_step(tmp_path, step)
    empty(tmp_path / "step-20" / "state.json")
    newest(tmp_path, lambda line: None)
    save_step(tmp_path, 15)
    prune(tmp_path, keep_last=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-15", "unusable-step-20"]
    save_step(tmp_path, 25)
    prune(tmp_path, keep_last=1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-25"]


def test_tensors_read_stay_valid_when_their_checkpoint_is_removed(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    found = newest(tmp_path, pytest.fail)
    save(tmp_path, 1, tensors_of(5), {})
    shutil.rmtree(tmp_path)
    assert_is_step(found, 1)


# A disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where this process may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=False).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save_step(root, 1)
    with pytest.raises(ResourceError) as caught:
        save(root, 2, {"model": {"a": torch.ones(500_000)}}, {})
    line = str(caught.value)
    assert line.startswith(f"No space left on device while saving {root / 'step-2'} (")
    assert line.endswith("earlier checkpoints are whole; free some space, then continue with --resume")
    assert "\n" not in line
    assert [path.name for path in root.iterdir()] == ["step-1"]
    assert_is_step(newest(root, pytest.fail), 1)
    save_step(root, 2)
    assert_is_step(newest(root, pytest.fail), 2)


def test_the_limit_on_a_files_size_is_told_like_a_full_disk(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match="File too large while saving"):
            save(tmp_path, 2, {"model": {"a": torch.ones(500_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_is_step(newest(tmp_path, pytest.fail), 1)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"(Not a directory|File exists) while saving"):
        save_step(tmp_path / "file", 1)


def test_a_failed_second_rename_moves_the_old_checkpoint_back(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    rename = Path.rename

    def fail_on_the_new(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    with (
        mock.patch("puna.files._exchange", return_value=False),
        mock.patch.object(Path, "rename", fail_on_the_new),
        pytest.raises(CheckpointError),
    ):
        save(tmp_path, 1, tensors_of(5), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert_is_step(newest(tmp_path, pytest.fail), 1)
