"""Checkpoints: all a run needs to go on, on disk, whole or not at all.

    step-200/
      model.safetensors       one file per group of tensors
      optimizer.safetensors
      state.json              everything that is not a tensor
      manifest.json           format version, and size and SHA-256 of the other files; written last

A checkpoint is made under a temporary name: each file written and synced, then the manifest, then the
directory; one rename gives it its name, and the parent is synced. A process killed at any instant therefore
leaves either a whole `step-N` or none. What rots later is noticed by the checksums. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import safetensors
from torch import Tensor

import puna
from puna.errors import CheckpointError
from puna.files import disk_errors, replace_directory, sweep, sync_directory, temporary_beside
from puna.formats.huggingface.safetensors_layout import CODES, chunks
from puna.settings import Settings, neutral
from puna.train.run import GO_ON

FORMAT = "puna-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MANIFEST_LIMIT = 1 << 20  # bytes; a manifest names a handful of files
_STEP = re.compile(r"(?:unusable-)?step-(0|[1-9]\d*)")

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Group ("model", "optimizer", …) → name → tensor."""


class CheckpointSettings(Settings):
    """How often to save, and what to keep."""

    every: int = neutral(500, gt=0)  # steps
    keep_last: int = neutral(2, gt=0)
    keep_best: bool = neutral(True)


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at a step. Tensors are backed by the files: copy them into place, do not hold them."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]
    path: Path


class _File(Settings):
    bytes: int = pydantic.Field(ge=0)
    sha256: str


class _Manifest(Settings):
    format: str
    version: int
    step: int
    puna: str
    files: dict[str, _File]


def save(root: Path, step: int, tensors: Tensors, values: Mapping[str, Any]) -> Path:
    """Write `root/step-N`, in place of one that may be there, and return its path.

    Tensors may have any strides and be on any device; one under two names of a group is stored once.
    `values` must be exactly what JSON gives back: names are strings, lists are no tuples, numbers are finite.

    Raises:
        ResourceError: the disk is full; nothing is left of this checkpoint, and all others are untouched.
        CheckpointError: the disk cannot be written to; likewise.
        TypeError, ValueError: `values` or a number type cannot be stored exactly.
    """
    state = _exact_json(values)
    target = root / f"step-{step}"
    temporary = temporary_beside(target)
    advice = f"earlier checkpoints are whole; free some space, then {GO_ON}"
    with disk_errors(f"saving {target}", root, CheckpointError, advice):
        try:
            _make_root(root)
            temporary.mkdir()
            files = {name: _write(temporary / name, chunks) for name, chunks in _contents(tensors, state)}
            manifest = _Manifest(
                format=FORMAT, version=VERSION, step=step, puna=puna.__version__, files=files
            )
            _write(temporary / MANIFEST, [manifest.model_dump_json(indent=2).encode()])
            sync_directory(temporary)
            replace_directory(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def read(path: Path) -> Checkpoint:
    """The checkpoint in a `step-N` directory, every file compared with its checksum first.

    Raises:
        CheckpointError: it is not whole; the message names the file and the fault, not the checkpoint.
    """
    try:
        manifest = _read_manifest(path)
        for name, recorded in manifest.files.items():
            _verify(path / name, recorded)
        groups = [name.removesuffix(".safetensors") for name in manifest.files if name != STATE]
        tensors = {group: _read_tensors(path / f"{group}.safetensors") for group in groups}
        return Checkpoint(manifest.step, tensors, json.loads((path / STATE).read_bytes()), path)
    except OSError as error:
        name = Path(error.filename).name if error.filename else "a file"
        raise CheckpointError(f"{name}: {error.strerror or error}") from error


def newest(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever saved.

    Those that are not whole are passed over, told by `say` in one line each, and renamed to
    `unusable-step-N`, so that they never count as one of the last K. Only for who holds the run: leftovers of
    killed saves are swept.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    sweep(root)
    faults: dict[int, str] = {}
    for step in reversed(steps(root)):
        try:
            checkpoint = read(root / f"step-{step}")
        except CheckpointError as error:
            faults[step] = str(error)
            continue
        for broken, fault in faults.items():
            _set_aside(root, broken)
            say(f"checkpoint step-{broken} is not whole ({fault}): passed over, going back to step-{step}")
        return checkpoint
    if faults:
        listed = "; ".join(f"step-{step}: {fault}" for step, fault in faults.items())
        raise CheckpointError(
            f"no checkpoint in {root} is whole ({listed}); restore one, or remove it to start over"
        )
    return None


def steps(root: Path) -> list[int]:
    """The steps saved, in order; whether they are whole is not asked."""
    return sorted(step for step, path in _directories(root) if path.name.startswith("step-"))


def prune(root: Path, keep_last: int, best_step: int | None = None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the one of `best_step`."""
    kept = steps(root)[-keep_last:]
    for step, path in _directories(root):
        # An unusable one stays until as many whole ones are newer: someone may want to look at it.
        if kept and step < kept[0] and step != best_step:
            # First the name, at once: a directory half removed must not be taken for a checkpoint.
            doomed = temporary_beside(path)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _directories(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    found = [(_STEP.fullmatch(path.name), path) for path in sorted(root.iterdir())]
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def _set_aside(root: Path, step: int) -> None:
    place = root / f"unusable-step-{step}"
    shutil.rmtree(place, ignore_errors=True)
    with disk_errors(f"renaming {root / f'step-{step}'}", root, CheckpointError, "free some space"):
        (root / f"step-{step}").rename(place)


# Writing


def _make_root(root: Path) -> None:
    if not root.is_dir():
        root.mkdir(parents=True)
        sync_directory(root.parent)


def _contents(tensors: Tensors, state: bytes) -> Iterator[tuple[str, Iterable[memoryview | bytes]]]:
    for group, named in tensors.items():
        yield f"{group}.safetensors", chunks(*_without_repeats(named))
    yield STATE, [state]


def _write(path: Path, chunks: Iterable[memoryview | bytes]) -> _File:
    """Write and sync a file, hashing on the way so that it is never read back."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return _File(bytes=size, sha256=digest.hexdigest())


def _without_repeats(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in the order they are stored, and names that are another name's tensor: {alias: name}.

    Tensors that only overlap in memory are stored whole, each for itself.
    """
    owners: dict[tuple[Any, ...], str] = {}
    stored, shared = {}, {}
    for name, tensor in named.items():
        if tensor.dtype not in CODES:
            raise TypeError(f"{name}: a checkpoint cannot hold {tensor.dtype}")
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = owners.setdefault(identity, name) if tensor.numel() else name  # an empty one has no address
        if owner == name:
            stored[name] = tensor.detach()
        else:
            shared[name] = owner
    # By name, so that the same state gives the same bytes in whatever order it is handed over.
    return dict(sorted(stored.items())), shared


def _exact_json(values: Mapping[str, Any]) -> bytes:
    """JSON that gives back the same values: Python writes floats so that they return bit for bit."""
    text = json.dumps(values, allow_nan=False, indent=2)
    if json.loads(text) != values:
        raise TypeError(
            "checkpoint values must be what JSON gives back: string keys, lists instead of tuples"
        )
    return text.encode()


# Reading


def _read_manifest(path: Path) -> _Manifest:
    with (path / MANIFEST).open("rb") as file:
        text = file.read(MANIFEST_LIMIT)
    try:
        values = json.loads(text)
        found = (values["format"], values["version"])
        if found != (FORMAT, VERSION):
            raise CheckpointError(f"{MANIFEST}: format {found}, this Puna reads {(FORMAT, VERSION)}")
        manifest = _Manifest.model_validate(values)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{MANIFEST}: damaged") from None
    if path.name != f"step-{manifest.step}":
        raise CheckpointError(f"{MANIFEST}: of step {manifest.step}")
    if STATE not in manifest.files or any(not _is_ours(name) for name in manifest.files):
        raise CheckpointError(f"{MANIFEST}: names other files than a checkpoint has")
    return manifest


def _is_ours(name: str) -> bool:
    return name == STATE or (name.endswith(".safetensors") and Path(name).name == name)


def _verify(path: Path, recorded: _File) -> None:
    """Compare a file with its record: first the size, which costs nothing, then the content."""
    size = path.stat().st_size
    if size != recorded.bytes:
        raise CheckpointError(f"{path.name}: {size:,} bytes, expected {recorded.bytes:,}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != recorded.sha256:
            raise CheckpointError(f"{path.name}: content differs from its checksum")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shared = file.metadata() or {}
        return tensors | {alias: tensors[name] for alias, name in shared.items()}
    except (safetensors.SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path.name}: not a safetensors file of a checkpoint: {error}") from None
