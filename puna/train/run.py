"""The directory of a run: who holds it, with which settings, on which machine, and where things lie in it.

run.toml             resolved settings; its presence makes the directory a run
environment.json     versions, processor, threads, device of the last start
metrics.jsonl        what happened, one record per line
tensorboard/         the same, for TensorBoard
checkpoints/step-N/
model/               the best model so far, whole at every moment
report.html
.lock                held by the process that trains
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import platform
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

import puna
from puna.errors import CheckpointError, InputError, Interrupted, RunBusyError
from puna.files import (
    disk_errors,
    replace_directory,
    sweep,
    sync_tree,
    temporary_beside,
    write_atomically,
)
from puna.kernels.library import load
from puna.settings import Difference, Settings, differences, read_settings, to_toml

S = TypeVar("S", bound=Settings)
GO_ON = "continue with --resume"  # how a stopped run is gone on with, in the words of every message
ADVICE = f"what was saved before is whole; free some space, then {GO_ON}"

EFFECTS = {"layout": "rounding may differ", "meaning": "the result differs"}
"""What a change of each kind of setting does to the rest of a run."""


class RunDirectory:
    """Paths of a run; `hold` takes it for this process, `begin` makes it one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path / "run.toml"
        self.environment_file = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.report = path / "report.html"
        self.lock = path / ".lock"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.settings_file.is_file()

    @contextlib.contextmanager
    def hold(self, *, resume: bool) -> Iterator[RunDirectory]:
        """Hold the directory against other processes, making it if need be; a killed process holds nothing.

        Where no run is begun inside the block, what this made is removed again. What killed processes left
        is swept.

        Raises:
            CheckpointError: it holds a run and `resume` is False, or it holds something that is no run.
            RunBusyError: another process holds it; the message names the process.
        """
        with contextlib.ExitStack() as stack:
            with disk_errors(f"opening the run {self.path}", self.path, CheckpointError, ADVICE):
                self._refuse_foreign()
                made = [place for place in (self.path, *self.path.parents) if not place.exists()]
                self.path.mkdir(parents=True, exist_ok=True)
                stack.callback(_remove_empty, made)
                stack.enter_context(_locked(self.lock, self.path))
                stack.callback(self._remove_unless_begun)
                self._refuse_foreign()
                if self.exists and not resume:
                    raise CheckpointError(
                        f"{self.path} already holds a run; continue it with --resume, "
                        "or choose another directory"
                    )
                sweep(self.path)
            yield self

    def settings(self, cls: type[S]) -> S:
        """The settings stored at the last start.

        Raises:
            SettingsError: they are not of this class, or damaged.
        """
        return read_settings(cls, self.settings_file)

    def machine(self) -> dict[str, Any]:
        """What `environment` gave at the last start; empty where that is not known."""
        try:
            stored = json.loads(self.environment_file.read_bytes())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}

    def begin(self, settings: Settings, machine: dict[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Store settings and machine; return what changed since a run was begun here, in lines to be logged.

        `machine` is what `environment` gives. Neutral settings may change silently.

        Raises:
            CheckpointError: a setting that changes the result differs, and `allow_changes` is False; or one
                that the saved state depends on.
        """
        lines: list[str] = []
        if self.exists:
            changed = compare(self.settings(type(settings)), settings, allow_changes)
            lines += [f"setting changed ({EFFECTS[change.kind]}): {change}" for change in changed]
            lines += _machine_changes(self.machine(), machine)
        with disk_errors(f"writing the settings of {self.path}", self.path, CheckpointError, ADVICE):
            write_atomically(self.environment_file, json.dumps(machine, indent=2) + "\n")
        self.store(settings)
        return lines

    def store(self, settings: Settings) -> None:
        """Write `run.toml`.

        Raises:
            ResourceError: the disk is full; the old settings stay.
            CheckpointError: the disk cannot be written to; likewise.
        """
        with disk_errors(f"writing the settings of {self.path}", self.path, CheckpointError, ADVICE):
            write_atomically(self.settings_file, to_toml(settings))

    def known(self) -> dict[Path, bytes | None]:
        """Settings and machine as they are written, for `put_back`; None where there is no file."""
        files = self.settings_file, self.environment_file
        return {file: file.read_bytes() if file.is_file() else None for file in files}

    def put_back(self, known: Mapping[Path, bytes | None]) -> None:
        """Undo a `begin` in a run that goes on from here: what was refused must not stand as its settings."""
        for file, content in known.items():
            if content is not None:
                write_atomically(file, content.decode())

    def forget(self) -> None:
        """Undo a `begin` that led nowhere: remove all it and what followed put here. Only for who holds it.

        The directory was empty when the run began, so nothing of anyone else is lost.
        """
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry not in (self.lock, self.settings_file):
                entry.unlink(missing_ok=True)
        self.settings_file.unlink(missing_ok=True)  # last: killed before this, it is still a run

    def export(self, write: Callable[[Path], object]) -> None:
        """Replace `model/` by what `write` puts into the directory it gets; readers see the old or the new.

        Raises:
            ResourceError: the disk is full; the old model stays.
            CheckpointError: the disk cannot be written to; likewise.
        """
        temporary = temporary_beside(self.model)
        with disk_errors(f"exporting {self.model}", self.path, CheckpointError, ADVICE):
            try:
                temporary.mkdir()
                write(temporary)
                sync_tree(temporary)
                replace_directory(temporary, self.model)
            except InputError as error:
                # Whoever writes a model advises to save it again; a run is gone on with instead.
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file, not a run directory; choose another path")
        if self.path.is_dir() and not self.exists:
            foreign = sorted(entry.name for entry in self.path.iterdir() if not self._is_own(entry))
            if foreign:
                raise CheckpointError(
                    f"{self.path} holds other files ({foreign[0]}) and no run; "
                    "choose an empty or a new directory"
                )

    def _is_own(self, entry: Path) -> bool:
        """Whether a process killed before its run began may have left this."""
        return entry in (self.lock, self.environment_file) or ".tmp-" in entry.name

    def _remove_unless_begun(self) -> None:
        if not self.exists:
            self.environment_file.unlink(missing_ok=True)
            self.lock.unlink(missing_ok=True)


def compare(old: S, new: S, allow_changes: bool = False) -> list[Difference]:
    """The differences worth logging: those of layout, and those of meaning where they are allowed.

    Raises:
        CheckpointError: meaning changed and is not allowed, or what the saved state depends on did; all such
            differences are shown.
    """
    changed = [change for change in differences(old, new) if change.kind != "neutral"]
    fixed = [change.key for change in changed if change.kind == "fixed"]
    refused = [
        change
        for change in changed
        if change.kind == "fixed" or (change.kind == "meaning" and not allow_changes)
    ]
    if refused:
        raise CheckpointError(
            f"settings that change the result differ from those of the run: {'; '.join(map(str, refused))}; "
            f"set them back, choose another directory, or {_other_way(fixed)}"
        )
    return changed


def stopped(number: int) -> Interrupted:
    """A signal came where nothing had to be saved first."""
    return Interrupted(
        number, f"stopped by {signal.Signals(number).name}; what was saved before is whole: {GO_ON}"
    )


def _other_way(fixed: list[str]) -> str:
    """What else can be done about settings that differ, among them those of these keys that must not."""
    if not fixed:
        return "continue all the same with --allow-changes"
    return (
        "begin a new run from this one's model, with init_from: what this run saved fits no other "
        f"{' or '.join(fixed)}"
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a result may depend on besides its settings; call it after the number of threads is set."""
    return {
        "puna": puna.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": load("norms").fault or "compiled",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def _machine_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs from a machine on record, in lines; earlier versions of Puna recorded less."""
    lines = []
    for key in new if old else ():
        if key not in old:
            lines.append(f"machine perhaps changed: {key} is {new[key]!r}, and was not recorded before")
        elif old[key] != new[key]:
            change = Difference(key, old[key], new[key], "layout")
            lines.append(f"machine changed ({EFFECTS[change.kind]}): {change}")
    return lines


def _remove_empty(places: list[Path]) -> None:
    for place in places:
        with contextlib.suppress(OSError):  # not empty, or gone
            place.rmdir()


def _processor() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _locked(lock: Path, run: Path) -> Iterator[None]:
    """Hold `flock` on a file until the block ends or the process dies, whichever comes first.

    The kernel releases it, so nothing has to be cleaned up after a kill. File systems shared between machines
    must support it (NFS does, through its own locks).

    Raises:
        RunBusyError: another process, or another block of this one, holds it.
    """
    file = _acquire(lock, run)
    # A child made by fork would keep the lock after we are killed; one made by exec never gets the file.
    os.register_at_fork(after_in_child=file.close)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _acquire(lock: Path, run: Path) -> io.FileIO:
    while True:
        file = io.FileIO(lock, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file after we opened it: then this is a lock on nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    return file
        except BlockingIOError:
            holder = os.pread(file.fileno(), 200, 0).decode("utf-8", "replace").strip() or "another process"
            file.close()
            raise RunBusyError(
                f"{run} is in use by {holder}; wait until it ends, stop it, or choose another directory"
            ) from None
        except BaseException:
            file.close()
            raise
        file.close()
