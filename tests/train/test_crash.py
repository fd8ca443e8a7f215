"""Killed by SIGKILL at every point inside a save, in every situation: what is found afterwards is whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puna.errors import CheckpointError, ResourceError
from puna.formats.opening import model_path
from puna.train import checkpoint
from puna.train.run import RunDirectory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the two programs beside this file import each other as scripts do
from crash_driver import ASIDE, POINTS, Points, after_rename  # noqa: E402
from crash_saves import CASES, EXPORTS, PRUNES, SITUATIONS, content  # noqa: E402

sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One child per case, each killed in its last save; the directory they leave."""
    base = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(HERE / "crash_saves.py"), str(base)],
        cwd=HERE.parent.parent,
        env={"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    signals = json.loads(done.stdout)
    assert signals == {f"{situation}/{point}": 9 for situation, point in CASES + EXPORTS + PRUNES}
    return base


@pytest.mark.parametrize(("situation", "point"), CASES)
def test_what_a_killed_save_leaves_is_whole(killed: Path, situation: str, point: str) -> None:
    root = killed / situation / point
    assert root.with_suffix(".fell").read_text() == point
    saves = list(enumerate(SITUATIONS[situation]))
    finished = saves if after_rename(point) else saves[:-1]
    said: list[str] = []

    found = checkpoint.newest(root, said.append)

    assert said == []
    assert [path.name for path in sorted(root.iterdir())] == sorted({f"step-{step}" for _, step in finished})
    if not finished:
        assert found is None
        return
    attempt, step = finished[-1]
    tensors, values = content(step, attempt)
    assert found is not None
    assert (found.step, found.values) == (step, values)
    for group, named in tensors.items():
        assert found.tensors[group].keys() == named.keys()
        assert all(torch.equal(found.tensors[group][name], named[name]) for name in named)
    assert checkpoint.save(root, 4, *content(4, 0)) == root / "step-4"


@pytest.mark.parametrize(("situation", "point"), EXPORTS)
def test_what_a_killed_export_leaves_is_a_whole_model(killed: Path, situation: str, point: str) -> None:
    run = RunDirectory(killed / situation / point)
    assert run.path.with_suffix(".fell").read_text() == point
    number = 2 if point in ("export-renamed", "exported") else 1
    assert {path.read_text() for path in model_path(run.path).iterdir()} == {
        f"config.json {number}",
        f"model.safetensors {number}",
    }
    with run.hold(resume=True):
        assert {path.name for path in run.path.iterdir()} == {".lock", "run.toml", "model"}
    assert (run.model / "config.json").read_text() == f"config.json {number}"


def test_what_a_killed_prune_leaves_is_not_taken_for_a_checkpoint(killed: Path) -> None:
    root = killed / "prune" / "prune-renamed"
    assert checkpoint.steps(root) == [2, 3]
    found = checkpoint.newest(root, pytest.fail)
    assert found is not None
    assert found.step == 3
    assert sorted(path.name for path in root.iterdir()) == ["step-2", "step-3"]


def test_the_harness_reaches_as_many_points_as_promised() -> None:
    assert len(POINTS) >= 10
    assert [point for point in POINTS if after_rename(point)] == ["renamed", "root-synced", "saved"]


def test_a_save_syncs_each_file_then_the_manifest_then_the_directory_then_renames(tmp_path: Path) -> None:
    """The order that a power cut, which loses whatever was not synced, asks for."""
    reached: list[str] = []
    points = Points("", 1, reached.append)
    points.reach = reached.append  # type: ignore[method-assign]
    with points.installed():
        checkpoint.save(tmp_path, 1, *content(1, 0))
    assert reached[0] == "begun"
    assert tuple(reached) == POINTS
    assert ASIDE not in reached


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO], ids=errno.errorcode.get
)
@pytest.mark.parametrize("point", POINTS[1:-1])  # the first and the last lie outside the writing
def test_an_error_at_any_point_of_a_save_leaves_whole_checkpoints(
    tmp_path: Path, point: str, number: int
) -> None:
    def fail(name: str) -> None:
        raise OSError(number, os.strerror(number))

    checkpoint.save(tmp_path, 1, *content(1, 0))
    expected = CheckpointError if number == errno.EIO else ResourceError
    with Points(point, 1, fail).installed(), pytest.raises(expected) as caught:
        checkpoint.save(tmp_path, 2, *content(2, 0))
    assert str(caught.value).startswith(f"{os.strerror(number)} while saving {tmp_path / 'step-2'}")
    steps = [1, 2] if after_rename(point) else [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step}" for step in steps]
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.values == content(steps[-1], 0)[1]
