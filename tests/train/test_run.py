"""A run directory: one holder, settings that do not change unnoticed, a model whole at every moment."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from puna.errors import CheckpointError, InputError, ModelError, ResourceError, RunBusyError
from puna.formats.opening import model_path
from puna.formats.saving import written_aside
from puna.settings import Difference, Settings, fixed, layout, neutral
from puna.train.run import RunDirectory, compare, environment

ROOT = Path(__file__).parents[2]


class Optimizer(Settings):
    name: str = fixed("adamw")
    learning_rate: float = 1e-3


class RunSettings(Settings):
    name: str = neutral("first")
    micro_rows: int = layout(4)
    note: str | None = None
    optimizer: Optimizer = Optimizer()


MACHINE = {"torch": "2.13.0", "threads": 2}


def begun(path: Path, settings: Settings = RunSettings()) -> RunDirectory:
    with RunDirectory(path).hold(resume=False) as run:
        assert run.begin(settings, MACHINE) == []
    return run


def test_a_run_begins_with_its_settings_and_its_machine(tmp_path: Path) -> None:
    run = begun(tmp_path / "runs" / "one")
    assert run.exists
    assert run.settings(RunSettings) == RunSettings()
    assert sorted(entry.name for entry in run.path.iterdir()) == [".lock", "environment.json", "run.toml"]


@pytest.mark.parametrize("there", [(), ("runs",), ("runs", "one")])
def test_a_run_that_fails_before_it_begins_leaves_nothing(tmp_path: Path, there: tuple[str, ...]) -> None:
    tmp_path.joinpath(*there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError), RunDirectory(tmp_path / "runs" / "one").hold(resume=True):
        raise InputError("too few tokens")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_led_nowhere_can_be_forgotten(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").hold(resume=False) as run:
        run.begin(RunSettings(), MACHINE)
        (run.path / "tokens").mkdir()
        (run.path / "tokens" / "00000.bin").write_bytes(b"1")
        run.metrics.write_text("{}")
        run.forget()
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_started_over_by_mistake(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"run already holds a run; continue it with --resume, or choose"
    ):
        run.hold(resume=False).__enter__()
    with run.hold(resume=True):
        pass
    assert run.exists


@pytest.mark.parametrize("resume", [False, True])
def test_a_path_that_is_no_run_is_refused_and_untouched(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"holds other files \(thesis\.txt\) and no run; choose an empty"
    ):
        RunDirectory(tmp_path).hold(resume=resume).__enter__()
    with pytest.raises(CheckpointError, match=r"thesis\.txt is a file, not a run directory"):
        RunDirectory(tmp_path / "thesis.txt").hold(resume=resume).__enter__()
    with pytest.raises(CheckpointError, match="Not a directory while opening the run"):
        RunDirectory(tmp_path / "thesis.txt" / "run").hold(resume=resume).__enter__()
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_process_killed_before_the_run_began_left_is_no_obstacle(tmp_path: Path) -> None:
    for name in (".lock", "environment.json", ".run.toml.tmp-77"):
        (tmp_path / name).write_text("")
    begun(tmp_path)
    assert not (tmp_path / ".run.toml.tmp-77").exists()


# The lock

HOLD = """
import os, sys, time
from pathlib import Path
from puna.train.run import RunDirectory
with RunDirectory(Path(sys.argv[1])).hold(resume=True) as run:
    child = os.fork() if sys.argv[2] == "fork" else 1
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def holder(run: Path, fork: str = "") -> tuple[subprocess.Popen[str], int]:
    """A process that holds the run, and the child it forked if it was asked to."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), fork], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        return process, int(process.stdout.readline())


def test_a_second_process_is_told_which_one_holds_the_run_and_a_killed_one_holds_nothing(
    tmp_path: Path,
) -> None:
    run = begun(tmp_path / "run")
    process, child = holder(run.path, "fork")
    try:
        with pytest.raises(
            RunBusyError, match=rf"is in use by process {process.pid} on \S+; wait until it ends"
        ):
            run.hold(resume=True).__enter__()
        process.kill()
        process.wait()
        os.kill(child, 0)  # a worker outlives its parent, and must not keep the lock
        with run.hold(resume=True):
            pass
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)


def test_one_process_cannot_hold_a_run_twice(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with run.hold(resume=True):
        with pytest.raises(RunBusyError, match=rf"process {os.getpid()} on"):
            run.hold(resume=True).__enter__()
        with pytest.raises(RunBusyError):  # busy rather than "use --resume": that would not help
            run.hold(resume=False).__enter__()
    with run.hold(resume=True):
        pass


def test_of_many_that_start_at_once_one_wins(tmp_path: Path) -> None:
    """Losers of the race must neither hold the run too nor take its lock away on their way out."""
    outcomes: list[str] = []
    gate = threading.Barrier(8)
    won = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        try:
            with RunDirectory(tmp_path / "run").hold(resume=False) as run:
                run.begin(RunSettings(), MACHINE)
                outcomes.append("held")
                won.wait()
        except RunBusyError:
            outcomes.append("busy")
            won.wait()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["busy"] * 7 + ["held"]


# Settings


def test_settings_are_compared_by_what_they_change() -> None:
    old = RunSettings()
    neutral_only = RunSettings(name="second")
    assert compare(old, neutral_only) == []
    assert compare(old, RunSettings(name="second", micro_rows=2)) == [
        Difference("micro_rows", 4, 2, "layout")
    ]
    meaning = RunSettings(micro_rows=2, note="x", optimizer=Optimizer(learning_rate=2e-3))
    with pytest.raises(CheckpointError) as caught:
        compare(old, meaning)
    assert str(caught.value) == (
        "settings that change the result differ from those of the run: note: None → 'x'; "
        "optimizer.learning_rate: 0.001 → 0.002; set them back, choose another directory, "
        "or continue all the same with --allow-changes"
    )
    assert {change.key for change in compare(old, meaning, allow_changes=True)} == {
        "micro_rows",
        "note",
        "optimizer.learning_rate",
    }


@pytest.mark.parametrize("allowed", [False, True])
def test_what_the_saved_state_fits_alone_is_refused_even_where_changes_are_allowed(allowed: bool) -> None:
    changed = RunSettings(note="x", optimizer=Optimizer(name="muon"))
    with pytest.raises(CheckpointError) as caught:
        compare(RunSettings(), changed, allow_changes=allowed)
    assert str(caught.value) == (
        "settings that change the result differ from those of the run: "
        + ("" if allowed else "note: None → 'x'; ")
        + "optimizer.name: 'adamw' → 'muon'; set them back, choose another directory, or begin a new run "
        "from this one's model, with init_from: what this run saved fits no other optimizer.name"
    )


def test_a_resumed_run_tells_what_changed_and_stores_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    changed = RunSettings(name="second", micro_rows=2, optimizer=Optimizer(learning_rate=2e-3))
    with run.hold(resume=True):
        with pytest.raises(CheckpointError):
            run.begin(changed, MACHINE)
        assert run.settings(RunSettings) == RunSettings()
        assert run.begin(changed, MACHINE | {"threads": 1}, allow_changes=True) == [
            "setting changed (rounding may differ): micro_rows: 4 → 2",
            "setting changed (the result differs): optimizer.learning_rate: 0.001 → 0.002",
            "machine changed (rounding may differ): threads: 2 → 1",
        ]
        assert run.begin(changed, MACHINE | {"threads": 1}) == []
    assert run.settings(RunSettings) == changed


def test_a_damaged_record_of_the_machine_is_no_obstacle(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.environment_file.write_text("[")
    with run.hold(resume=True):
        assert run.begin(RunSettings(), MACHINE) == []


def test_what_earlier_versions_did_not_record_is_told_once(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    now = MACHINE | {"memory_policy": "paper"}
    with run.hold(resume=True):
        assert run.begin(RunSettings(), now) == [
            "machine perhaps changed: memory_policy is 'paper', and was not recorded before"
        ]
        assert run.begin(RunSettings(), now) == []


def test_the_machine_is_described() -> None:
    here = environment(torch.device("cpu"))
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["device"] == "cpu"
    assert here["processor"]


# The exported model


def write_model(number: int) -> object:
    def write(directory: Path) -> None:
        (directory / "config.json").write_text(str(number))
        (directory / "parts").mkdir()
        (directory / "parts" / "a").write_text(str(number))

    return write


@pytest.mark.parametrize("exchange", [True, False])
def test_an_export_replaces_the_model(tmp_path: Path, exchange: bool) -> None:
    run = begun(tmp_path / "run")
    with mock.patch("puna.files._exchange", return_value=False) if not exchange else mock.MagicMock():
        for number in (1, 2):
            run.export(write_model(number))  # type: ignore[arg-type]
    assert (run.model / "config.json").read_text() == "2"
    assert {entry.name for entry in run.path.iterdir()} == {".lock", "environment.json", "run.toml", "model"}


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux")
def test_a_reader_never_finds_the_model_missing(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.export(write_model(0))  # type: ignore[arg-type]
    missing, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            if not (run.model / "config.json").exists():
                missing.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        run.export(write_model(number))  # type: ignore[arg-type]
    done.set()
    reader.join()
    assert missing == []


def test_a_failed_export_keeps_the_old_model(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.export(write_model(1))  # type: ignore[arg-type]

    def fail(directory: Path) -> None:
        (directory / "config.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        ResourceError, match=re.escape(f"No space left on device while exporting {run.model}")
    ):
        run.export(fail)
    assert (run.model / "config.json").read_text() == "1"
    assert not [entry for entry in run.path.iterdir() if ".tmp-" in entry.name]


def test_a_disk_full_while_a_model_is_written_is_told_as_in_any_part_of_the_run(tmp_path: Path) -> None:
    """Who writes models for everybody advises to save them again; here the run is to be gone on with."""
    run = begun(tmp_path / "run")
    run.export(write_model(1))  # type: ignore[arg-type]

    def save(directory: Path) -> None:
        with written_aside(directory) as temporary:
            temporary.mkdir()
            (temporary / "config.json").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError) as caught:
        run.export(save)
    told = str(caught.value)
    assert told.startswith(f"No space left on device while exporting {run.model} (")
    assert told.endswith("; what was saved before is whole; free some space, then continue with --resume")
    assert (run.model / "config.json").read_text() == "1"
    assert not [entry for entry in run.path.iterdir() if ".tmp-" in entry.name]


def test_settings_that_cannot_be_stored_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "run")
    before = run.settings_file.read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device while writing the settings"):
        run.store(RunSettings())
    assert run.settings_file.read_text() == before


@pytest.mark.parametrize(("leftover", "survives"), [(".model.tmp-77", False), (".model.replaced", True)])
def test_leftovers_of_a_killed_export_are_swept(tmp_path: Path, leftover: str, survives: bool) -> None:
    """Killed between the two renames, the old model is found, and put back by the next holder."""
    run = begun(tmp_path / "run")
    write_model(1)((run.path / leftover).mkdir() or run.path / leftover)  # type: ignore[operator]
    if survives:
        assert model_path(run.path) == run.path / leftover
    with run.hold(resume=True):
        assert not (run.path / leftover).exists()
        assert run.model.is_dir() is survives


def test_a_run_stands_for_its_model(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(ModelError, match="is a run without a model so far"):
        model_path(run.path)
    run.export(write_model(1))  # type: ignore[arg-type]
    assert model_path(run.path) == run.model
    assert model_path(tmp_path) == tmp_path
    assert model_path(tmp_path / "model.gguf") == tmp_path / "model.gguf"
