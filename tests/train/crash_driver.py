"""Run a puna command that kills itself at a named point inside a checkpoint's save.

    python crash_driver.py --point model-synced --occurrence 2 --fell FILE -- pretrain RUN.toml --resume

Points lie between the product's own steps, which are wrapped from outside; the product knows nothing of this.
The K-th time the point is reached its name goes to FILE, and the process dies by SIGKILL, as in `kill -9`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from puna import files
from puna.train import checkpoint, run

POINTS = (  # in the order a save reaches them
    "begun",  # nothing there yet
    "directory-made",
    "model-half-written",
    "model-written",
    "model-synced",
    "optimizer-half-written",
    "optimizer-written",
    "optimizer-synced",
    "state-written",
    "state-synced",
    "manifest-written",
    "manifest-synced",
    "directory-synced",
    "renamed",
    "root-synced",
    "saved",
)
ASIDE = "stepped-aside"  # between the two renames, where the system cannot exchange two names
EXPORT_POINTS = ("export-written", "export-synced", "export-renamed", "exported")
PRUNE_POINTS = ("prune-renamed",)
NAMED = "renamed"  # from here on the new checkpoint counts


def after_rename(point: str) -> bool:
    """Whether a save killed at this point leaves its checkpoint behind."""
    return point in POINTS and POINTS.index(point) >= POINTS.index(NAMED)


class Points:
    """Calls `action` at the K-th time one point is reached; installed by wrapping the product's functions."""

    def __init__(self, point: str, occurrence: int, action: Callable[[str], None]) -> None:
        self.point, self.left, self.action = point, occurrence, action
        self.doing = ""  # "", "save", "export" or "prune": which of them the shared functions now serve
        self.file = ""  # the file of a checkpoint that is being written

    def reach(self, name: str) -> None:
        if name == self.point:
            self.left -= 1
            if self.left == 0:
                self.action(name)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module, name, wrapper in (
                (checkpoint, "save", self.save),
                (checkpoint, "prune", self.prune),
                (checkpoint, "_write", self.write),
                (checkpoint, "sync_directory", self.sync_temporary),
                (checkpoint, "replace_directory", self.replace),
                (run.RunDirectory, "export", self.export),
                (run, "sync_tree", self.sync_export),
                (run, "replace_directory", self.replace),
                (files, "sync_directory", self.sync_parent),
                (checkpoint.shutil, "rmtree", self.remove),
                (os, "fsync", self.fsync),
                (Path, "rename", self.rename),
            ):
                original = getattr(module, name)
                stack.enter_context(mock.patch.object(module, name, _calling(wrapper, original)))
            yield

    def save(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._during("save", original, *args, **kwargs)

    def export(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._during("export", original, *args, **kwargs)

    def prune(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._during("prune", original, *args, **kwargs)

    def _during(self, doing: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        if doing == "save":
            self.reach("begun")
        self.doing = doing
        try:
            return original(*args, **kwargs)
        finally:
            self.doing = ""

    def write(self, original: Any, path: Path, chunks: Any) -> Any:
        """One file of a checkpoint."""
        self.file = path.stem
        if self.file == "model":
            self.reach("directory-made")
        result = original(path, self._half(chunks))
        self.file = ""
        return result

    def _half(self, chunks: Any) -> Iterator[Any]:
        for number, chunk in enumerate(chunks):
            if number == 2:  # the header and the first tensor are written
                self.reach(f"{self.file}-half-written")
            yield chunk

    def fsync(self, original: Any, descriptor: int) -> None:
        if self.file:
            self.reach(f"{self.file}-written")
        original(descriptor)
        if self.file:
            self.reach(f"{self.file}-synced")

    def sync_temporary(self, original: Any, path: Path) -> None:
        original(path)
        if self.doing == "save" and ".tmp-" in path.name:
            self.reach("directory-synced")

    def sync_export(self, original: Any, path: Path) -> None:
        self.reach("export-written")
        original(path)
        self.reach("export-synced")

    def replace(self, original: Any, new: Path, target: Path) -> None:
        original(new, target)
        self.reach("saved" if self.doing == "save" else "exported")

    def sync_parent(self, original: Any, path: Path) -> None:
        """`files.replace_directory` syncs the parent right after the new name is there."""
        if self.doing in ("save", "export") and ".tmp-" not in str(path):
            self.reach("renamed" if self.doing == "save" else "export-renamed")
        original(path)
        if self.doing == "save":
            self.reach("root-synced")

    def rename(self, original: Any, path: Path, target: Path) -> Path:
        result = original(path, target)
        if Path(target).name.endswith(".replaced"):
            self.reach(ASIDE)
        return result

    def remove(self, original: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        if self.doing == "prune":
            self.reach("prune-renamed")
        original(path, *args, **kwargs)


def _calling(wrapper: Any, original: Any) -> Any:
    """A plain function, so that it becomes a method where it replaces one."""
    return lambda *args, **kwargs: wrapper(original, *args, **kwargs)


def killer(fell: Path | None) -> Callable[[str], None]:
    """Die as by `kill -9`, after noting where."""

    def kill(point: str) -> None:
        if fell is not None:
            fell.write_text(point, encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)

    return kill


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--point", required=True, choices=(*POINTS, ASIDE, *EXPORT_POINTS, *PRUNE_POINTS))
    parser.add_argument("--occurrence", type=int, default=1)
    parser.add_argument("--fell", type=Path, help="file that gets the point's name")
    parser.add_argument("command", nargs="+", help="after --: what follows `puna`")
    options = parser.parse_args()
    with Points(options.point, options.occurrence, killer(options.fell)).installed():
        from puna.cli import main as puna  # now: what is imported by name must find the wrapped functions

        sys.argv = ["puna", *options.command]
        puna()


if __name__ == "__main__":
    main()
