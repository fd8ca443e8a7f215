"""What a run leaves on record: one JSON object per line, mirrored to TensorBoard where that is installed.

    {"kind": "train", "step": 20, "tokens": 81920, "loss": 5.31, "lr": 0.0003, "grad_norm": 1.2,
     "timing": {"seconds": 0.41, "tokens_per_s": 9990.2, "waiting": 0.0001, "updating": 0.04,
                "utilisation": 0.55}}

`waiting` (for rows) and `updating` (clipping, the optimizer) are shares of the step's seconds. Everything
outside "timing" is the same, bit for bit, in a run that was interrupted and resumed as in one that was not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from puna.errors import CheckpointError
from puna.files import disk_errors
from puna.train.run import GO_ON

Say = Callable[[str], None]
FULL_DISK = f"free some space, then {GO_ON}"


class Record(Protocol):
    """Where the loop and the functions beside it put what they found."""

    def __call__(self, kind: str, **values: Any) -> None:
        """`kind`: train, validation, sample, skipped, event or summary; values are JSON."""


def discard(kind: str, **values: Any) -> None:
    """The Record of ranks that keep none."""


class MetricsLog:
    """A metrics file open for appending.

    Args:
        path: `metrics.jsonl`.
        offset: the length in bytes that a checkpoint recorded. What was written after it is cut off and will
            be written again by the resumed run: no gap, no repeat. None begins an empty file.
        tensorboard: a directory for event files, or None.
        step: where the run stands; TensorBoard forgets what came after it.
        say: takes a line of advice.

    Raises:
        CheckpointError: the file is shorter than `offset`, or cannot be written.
        ResourceError: the disk is full.
    """

    def __init__(
        self,
        path: Path,
        *,
        offset: int | None = None,
        tensorboard: Path | None = None,
        step: int = 0,
        say: Say,
    ) -> None:
        self._path = path
        self._say = say
        with self._disk_errors():
            self._file = path.open("ab")
            self._cut(offset or 0)
        # What has the step's own number was recorded before the checkpoint: a resumed run does not repeat it.
        self._board = _open_board(tensorboard, 0 if offset is None else step + 1, say)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; numbers that JSON has no name for (NaN, infinities) become their name."""
        line = json.dumps(_finite({"kind": kind, **values}), ensure_ascii=False, allow_nan=False)
        with self._disk_errors():
            self._file.write(line.encode() + b"\n")
            self._file.flush()  # another process may be reading along
        self._mirror(kind, values)

    def sync(self) -> int:
        """Bring everything written to the disk; its length in bytes, for the checkpoint."""
        with self._disk_errors():
            self._file.flush()
            if self._path.is_file():  # a device such as /dev/null has nothing to bring
                os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        """End the log; closing twice is allowed."""
        self._file.close()
        if self._board is None:
            return
        try:
            self._board.close()
        except OSError as error:
            # Its thread tells here what it could not write; that must not hide the error being raised.
            self._say(f"TensorBoard's files are incomplete: {error.strerror or error}")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self, offset: int) -> None:
        length = self._file.seek(0, os.SEEK_END)
        if length < offset:
            self._file.close()
            raise CheckpointError(
                f"{self._path}: expected at least the {offset:,} bytes that the checkpoint recorded, got "
                f"{length:,}; it was changed by hand: put it back, or start in another directory"
            )
        if length > offset:
            self._file.truncate(offset)
            self._file.seek(0, os.SEEK_END)

    def _disk_errors(self) -> Any:
        return disk_errors(f"writing {self._path}", self._path.parent, CheckpointError, FULL_DISK)

    def _mirror(self, kind: str, values: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        step = values.get("step", 0)
        try:
            for name, value in _flat(values):
                if isinstance(value, str):
                    self._board.add_text(f"{kind}/{name}", value, step)
                elif name != "step":
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            # The mirror may be missing; the record itself may not.
            self._say(_without_board(error))
            self._board = None


def _open_board(directory: Path | None, purge_step: int, say: Say) -> Any:
    if directory is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("TensorBoard is not installed, going on without; to add it: pip install 'puna[train]'")
        return None
    try:
        return SummaryWriter(str(directory), purge_step=purge_step)
    except OSError as error:
        say(_without_board(error))
        return None


def _without_board(error: OSError) -> str:
    return f"TensorBoard's files cannot be written ({error.strerror}); going on without them"


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float | str]]:
    """Numbers and texts; the members of "timing" stand beside the others, lists are left to the file."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            yield name, value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
