from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from puna.errors import CheckpointError
from puna.train.metrics import MetricsLog, discard


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, say=pytest.fail) as log:
        log.write("train", step=1, loss=0.1 + 0.2, timing={"seconds": 0.5})
        log.write("skipped", step=2, loss=math.nan, grad_norm=math.inf, documents=["ä.py"])
    assert read(path) == [
        {"kind": "train", "step": 1, "loss": 0.30000000000000004, "timing": {"seconds": 0.5}},
        {"kind": "skipped", "step": 2, "loss": "nan", "grad_norm": "inf", "documents": ["ä.py"]},
    ]


def test_a_resumed_log_has_no_gap_and_no_repeat(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, say=pytest.fail) as log:
        log.write("train", step=1)
        offset = log.sync()
        log.write("train", step=2)
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "st')  # a killed process leaves half a line
    with MetricsLog(path, offset=offset, say=pytest.fail) as log:
        log.write("train", step=2)
        assert log.sync() == path.stat().st_size
    assert [record["step"] for record in read(path)] == [1, 2]


def test_a_new_run_begins_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("left over\n")
    with MetricsLog(path, say=pytest.fail) as log:
        assert log.sync() == 0


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(CheckpointError, match="at least the 1,000 bytes that the checkpoint recorded, got 3"):
        MetricsLog(path, offset=1000, say=pytest.fail)
    assert path.read_text() == "{}\n"


def test_tensorboard_gets_the_numbers_and_the_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tmp_path / "tensorboard"
    # Steps 1 to 3, stopped, and resumed from the checkpoint of step 2; what was there before began at step 0.
    for offset, at, steps in ((None, 0, (0, 1, 2, 3)), (None, 0, (1, 2, 3)), (0, 2, (3, 4))):
        with MetricsLog(tmp_path / "m", offset=offset, tensorboard=board, step=at, say=pytest.fail) as log:
            for step in steps:
                log.write("train", step=step, loss=5.0 - step, timing={"tokens_per_s": 7.0})
            log.write("sample", step=steps[-1], prompt="a", text="b")
    events = EventAccumulator(str(board))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(n, 5.0 - n) for n in (1, 2, 3, 4)]
    assert events.Scalars("train/tokens_per_s")[0].value == 7.0
    assert "sample/text/text_summary" in events.Tags()["tensors"]


def test_without_tensorboard_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    with MetricsLog(tmp_path / "m", tensorboard=tmp_path / "board", say=said.append) as log:
        log.write("train", step=1, loss=1.0)
    assert said == ["TensorBoard is not installed, going on without; to add it: pip install 'puna[train]'"]
    assert len(read(tmp_path / "m")) == 1


def test_a_tensorboard_that_cannot_be_opened_stops_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with MetricsLog(tmp_path / "m", tensorboard=tmp_path / "file", say=said.append) as log:
        log.write("train", step=1, loss=1.0)
    assert said == ["TensorBoard's files cannot be written (File exists); going on without them"]
    assert len(read(tmp_path / "m")) == 1


def test_other_ranks_keep_no_record() -> None:
    discard("train", step=1)
