"""Kill a process inside its saves, at every point and in every situation: `python crash_saves.py DIRECTORY`.

Each case runs in a child of its own with its own checkpoint directory `DIRECTORY/SITUATION/POINT`. Prints one
JSON object: case → signal that ended the child.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from crash_driver import ASIDE, EXPORT_POINTS, POINTS, PRUNE_POINTS, Points, killer

from puna import files
from puna.train import checkpoint
from puna.train.run import RunDirectory

SITUATIONS = {  # steps saved in order; the last save is the one that is killed
    "first": [1],
    "later": [1, 2, 3],
    "again": [1, 2, 2],
    "again-by-two-renames": [1, 2, 2],  # as where two names cannot be exchanged
}


CASES = [(situation, point) for situation in SITUATIONS for point in POINTS]
CASES.append(("again-by-two-renames", ASIDE))
EXPORTS = [(situation, point) for situation in ("export", "export-by-two-renames") for point in EXPORT_POINTS]
EXPORTS.append(("export-by-two-renames", ASIDE))
PRUNES = [("prune", point) for point in PRUNE_POINTS]


def content(step: int, attempt: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, object]]:
    """What is saved at a step; the attempt tells apart two saves of one step."""
    generator = torch.Generator().manual_seed(1000 * step + attempt)
    tensors = {
        group: {f"{name}.{step}": torch.randn(5, 7, generator=generator) for name in "abc"}
        for group in ("model", "optimizer")
    }
    return tensors, {"step": step, "attempt": attempt, "loss": 1 / (step + 3)}


def act(root: Path, situation: str) -> None:
    """What the killed process does: it ends by itself only if the point is never reached."""
    with mock.patch.object(files, "_exchange", _never if "renames" in situation else files._exchange):
        if situation.startswith("export"):
            export_twice(root)
            return
        for attempt, step in enumerate(SITUATIONS.get(situation, [1, 2, 3])):
            checkpoint.save(root, step, *content(step, attempt))
        checkpoint.prune(root, keep_last=1)


def export_twice(root: Path) -> None:
    run = RunDirectory(root)
    run.settings_file.write_text("")
    for number in (1, 2):
        run.export(lambda directory, number=number: write_model(directory, number))


def write_model(directory: Path, number: int) -> None:
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_text(f"{name} {number}")


def _never(first: Path, second: Path) -> bool:
    return False


def killed(root: Path, situation: str, point: str) -> int:
    """The signal that ended a child which saved until it reached the point in its last save."""
    child = os.fork()
    if child == 0:
        root.mkdir(parents=True)
        once = point == ASIDE or situation == "prune"
        occurrence = 1 if once else len(SITUATIONS.get(situation, (1, 2)))
        with Points(point, occurrence, killer(root.with_suffix(".fell"))).installed():
            act(root, situation)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def main() -> None:
    base = Path(sys.argv[1])
    torch.set_num_threads(1)
    signals = {
        f"{situation}/{point}": killed(base / situation / point, situation, point)
        for situation, point in CASES + EXPORTS + PRUNES
    }
    print(json.dumps(signals))


if __name__ == "__main__":
    main()
