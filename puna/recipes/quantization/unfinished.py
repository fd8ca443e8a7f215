"""A quantization in progress: `DST.partial`, which holds every finished step and what the next one needs.

    manifest.json           what decides the result, where the text lies, and each finished step's figures
    step-00000.safetensors  the tensors of a step as they are to be stored
    NAME-PLACE.states       hidden states
    .lock                   held by the process that works here

A step counts once the manifest names it, which is written last: a kill at any moment leaves whole steps.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from puna.errors import ModelError, RunBusyError
from puna.files import disk_errors, sync_directory, sync_file, write_atomically
from puna.formats.huggingface.safetensors_layout import chunks
from puna.model.weights import Packed
from puna.progress import counted

VERSION = 1
MANIFEST = "manifest.json"
_LOCK = ".lock"
_WORTH_KEEPING = 2  # steps: the embedding alone is made in a moment
_OURS = re.compile(
    r"manifest\.json.*|\.lock|step-\d{5}\.safetensors|(source|numbers|engine|fitted|aimed)-.*\.states"
)
_MODEL = ("model", "stored")  # what says of an identity which model it is
_SCALES = "|scales"  # after the name of a matrix whose codes lie under that name


@dataclass(frozen=True)
class Begun:
    """How a quantization was begun, as JSON.

    `identity` is what decides the result; `inputs` are the files that were named, so that a run that goes on
    need not name them again.
    """

    identity: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings."""
        found: dict[str, Any] = self.identity["settings"]
        return found

    @property
    def version(self) -> str:
        """What made it: another version's steps are no part of what this one makes."""
        return f"Puna {self.identity.get('puna')} (results of version {self.identity.get('results', 0)})"


class Unfinished:
    """The steps that are done, and the directory to work in; `records` has what is known of each step."""

    def __init__(self, directory: Path, begun: Begun, records: list[dict[str, Any]]) -> None:
        self.directory, self.begun, self.records = directory, begun, records

    def finish(self, tensors: dict[str, Tensor | Packed], record: dict[str, Any]) -> None:
        """Add a step; its states are on the disk already.

        Raises:
            OSError: as it comes; the step then does not count.
        """
        file = self._step(len(self.records))
        plain, schemes = _apart(tensors)
        with file.open("wb") as opened:
            opened.writelines(chunks(plain, {"tensors": json.dumps(schemes)}))
        sync_file(file)
        self.records.append(record)
        try:
            self.write()
        except BaseException:
            self.records.pop()
            raise

    def write(self) -> None:
        """The manifest, onto the disk."""
        content = {"version": VERSION, **asdict(self.begun), "steps": self.records}
        write_atomically(self.directory / MANIFEST, json.dumps(content, indent=1) + "\n")

    def tensors(self) -> Iterator[tuple[str, Tensor | Packed]]:
        """Every tensor of every finished step, in order."""
        for number in range(len(self.records)):
            with safe_open(self._step(number), framework="pt") as file:
                for name, (scheme, shape) in json.loads(file.metadata()["tensors"]).items():
                    data = file.get_tensor(name)
                    if scheme is None:
                        yield name, data
                    else:
                        yield name, Packed(scheme, data, file.get_tensor(name + _SCALES), tuple(shape))

    def keep_only(self, states: Sequence[Path]) -> None:
        """Remove hidden states that no step needs any more, and what a killed step left."""
        kept = {path.name for path in states} | {MANIFEST, _LOCK}
        kept |= {self._step(number).name for number in range(len(self.records))}
        for path in self.directory.iterdir():
            if path.name not in kept and _OURS.fullmatch(path.name):
                path.unlink()

    def _step(self, number: int) -> Path:
        return self.directory / f"step-{number:05}.safetensors"


def partial_of(target: Path) -> Path:
    """Where a quantization to `target` lies while it is not finished."""
    return target.with_name(f"{target.name}.partial")


def begun(target: Path, version: str) -> Begun | None:
    """How the quantization that lies unfinished beside `target` was begun; None where no step of one does.

    Raises:
        ModelError: its manifest is damaged, or it was begun by another version.
    """
    directory = partial_of(target)
    if not (directory / MANIFEST).is_file():
        return None
    stored = _read(directory / MANIFEST)
    found = _begun(stored)
    if not stored["steps"]:  # a kill left it before there was anything to go on with
        return None
    if found.version != version:
        raise ModelError(
            f"{directory} was begun by {found.version}, and this is {version}, which would go on otherwise; "
            "finish it with that one, or begin again with --force"
        )
    return found


@contextlib.contextmanager
def unfinished(target: Path, now: Begun, resume: bool, force: bool) -> Iterator[Unfinished]:
    """Hold `target`'s unfinished quantization against other processes, making it if need be.

    It stays where something in it can be gone on with, and is removed after a success.

    Args:
        target: what is to be written.
        now: how it would be begun now.
        resume: go on with what is there.
        force: begin again where something is there.

    Raises:
        ModelError: something is there that cannot be gone on with, or is not to be.
        RunBusyError: another process works on it.
        ResourceError: the disk is full.
    """
    directory = partial_of(target)
    with (
        disk_errors(f"working in {directory}", directory, ModelError, _ADVICE),
        contextlib.ExitStack() as stack,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_locked(directory))
        stack.callback(_remove_if_empty, directory)
        found = _found(directory, now, resume, force)
        found.write()
        try:
            yield found
        except BaseException:
            if len(found.records) < _WORTH_KEEPING:
                _remove(directory)
            raise
        _remove(directory)


_ADVICE = "free some space and go on with --resume"


def _found(directory: Path, now: Begun, resume: bool, force: bool) -> Unfinished:
    foreign = sorted(path.name for path in directory.iterdir() if not _OURS.fullmatch(path.name))
    manifest = directory / MANIFEST
    stored = _read(manifest) if manifest.is_file() else None
    if foreign or (stored is None and any(directory.glob("step-*"))):
        shown = foreign[0] if foreign else "steps without their manifest"
        raise ModelError(f"{directory} holds {shown}, which is no part of a quantization; move it away")
    if stored is None or (force and not resume):
        return Unfinished(directory, now, [])
    steps = stored["steps"]
    if not resume and steps:
        same = _begun(stored).version == now.version
        raise ModelError(
            f"{directory} holds {counted(len(steps), 'finished step')} of "
            f"{'an earlier run; go on with it by --resume, or' if same else _begun(stored).version + ';'} "
            "begin again with --force"
        )
    changed = list(_changed(stored["identity"], now.identity))
    if resume and steps and any(stored["identity"].get(part) != now.identity[part] for part in _MODEL):
        raise ModelError(
            f"{directory} was begun from another model; name that one, or begin again with --force"
        )
    if resume and changed and steps:
        raise ModelError(
            f"{directory} was begun with another {', '.join(changed)}; leave out what differs, or begin "
            "again with --force"
        )
    return Unfinished(directory, now, steps if resume and not changed else [])


def _read(manifest: Path) -> dict[str, Any]:
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        whole = stored["version"] == VERSION and isinstance(stored["steps"], list)
        whole = whole and isinstance(stored["identity"]["settings"], dict)
        whole = whole and isinstance(stored.get("inputs", {}), dict)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ModelError(
            f"{manifest}: damaged, or of another version; remove {manifest.parent} if it is not needed"
        )
    return stored


def _begun(stored: Mapping[str, Any]) -> Begun:
    return Begun(stored["identity"], stored.get("inputs", {}))


def _changed(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every part in which two identities differ, dotted; settings as their user names them."""
    for key in {**before, **now}:
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _changed(a, b, "" if key in ("settings", "recipe") else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} ({a!r}, now {b!r})" if len(f"{a!r}{b!r}") < 120 else f"{prefix}{key}"


def _apart(
    tensors: dict[str, Tensor | Packed],
) -> tuple[dict[str, Tensor], dict[str, tuple[str | None, list[int]]]]:
    """Plain tensors by name, and of each value its scheme and shape."""
    plain: dict[str, Tensor] = {}
    schemes: dict[str, tuple[str | None, list[int]]] = {}
    for name, value in tensors.items():
        schemes[name] = (value.scheme if isinstance(value, Packed) else None, list(value.shape))
        if not isinstance(value, Packed):
            plain[name] = value.contiguous()
            continue
        assert value.scales is not None
        plain[name], plain[name + _SCALES] = value.data.contiguous(), value.scales.contiguous()
    return plain, schemes


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / _LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusyError(f"another process works in {directory}; wait for it, or stop it") from None
        yield


def _remove(directory: Path) -> None:
    """The lock last: until then nobody else begins here."""
    ours = [path for path in directory.iterdir() if _OURS.fullmatch(path.name)]
    for path in sorted(ours, key=lambda path: path.name == _LOCK):
        path.unlink()
    with contextlib.suppress(OSError):  # somebody put something of theirs here meanwhile
        directory.rmdir()
    sync_directory(directory.parent)


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not (directory / MANIFEST).is_file():
        (directory / _LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()
