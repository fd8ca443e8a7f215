"""Progress where standard error is a file: shares, rates and what is left, with a clock that stands still."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from puna import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    # Not `time.monotonic` itself: threads of other tests wait by it, and would wait for a day.
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_lines_say_share_rate_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.on_stderr("Working", 1000, "tok") as bar:
        clock[0] += 20
        bar.advance(400, "loss 2.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Working …", "Working:  40%  20 tok/s  30s left  loss 2.5", "Working: 400 tok in 20s"]


def test_what_was_done_earlier_does_not_count_as_speed(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.on_stderr("Working", 1000, "tok") as bar:
        bar.start_at(500)
        clock[0] += 20
        bar.advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["Working:  60%  5 tok/s  1m20s left", "Working: 100 tok in 20s"]


def test_before_anything_is_done_nobody_knows_how_long_it_takes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.on_stderr("Working", 1000, "tok") as bar:
        clock[0] += 20
        bar.advance(0, "starting")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "Working:   0%  starting"
