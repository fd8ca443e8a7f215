from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from puna import parallel
from puna.errors import SettingsError
from puna.parallel import World
from tests.torchrun import run_in_ranks


def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in parallel.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    world = parallel.start()
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    world.sum_gradients([parameter])
    world.broadcast([parameter])
    world.barrier()
    assert (world, world.leads) == (World(), True)
    assert parameter.grad.tolist() == [1.0, 1.0]
    assert world.sum_scalars([1, 2.5]) == [1.0, 2.5]
    assert (world.any(True), world.any(False)) == (True, False)
    parallel.stop()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "0"},
            r"expected torchrun to set RANK, WORLD_SIZE, LOCAL_RANK to numbers, got \{'RANK': '0'\}",
        ),
        ({"RANK": "a", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "to numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK must be below WORLD_SIZE"),
    ],
)
def test_half_a_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in parallel.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        parallel.start()


def test_ranks_wait_for_hours_of_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    given: dict[str, timedelta] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: given.update(timeout=timeout))
    assert parallel.start() == World(0, 2, 0)
    assert given["timeout"] >= timedelta(hours=12)


def test_two_ranks_agree(tmp_path: Path) -> None:
    run_in_ranks(2, "-m", "tests.ranks", str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [first.pop("world"), second.pop("world")] == [[0, 2, 0, True], [1, 2, 1, False]]
    assert first == second
    assert first["gradients"] == [[0, 3, 6], [3.0 * n for n in range(7)], [0], [5, 6]]
    assert first["sums"] == [3.0, 0.2]
    assert first["any"] == [True, False]
    assert first["copied"] == [1.0, 1.0]
