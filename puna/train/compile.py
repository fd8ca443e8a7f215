"""torch.compile for the blocks of a built model, from outside and reversibly.

Each block is compiled by itself. All layers then share one graph, which takes seconds instead of minutes; and
the embedding stays outside: its compiled gradient on a CPU, left to itself, is summed by threads in whatever
order they come, and differs from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from puna.kernels.compiler import find_toolchain
from puna.model.llama import Llama
from puna.settings import Settings, layout

Mode = Literal["auto", "on", "off"]
Say = Callable[[str], None]


class CompileSettings(Settings):
    """`auto`: on CUDA, and on a CPU where a C++ compiler and Python's headers are found."""

    mode: Mode = layout("auto")


class Compiled:
    """Blocks whose forward is compiled, and the way back. Parameters and their names are untouched."""

    def __init__(self, blocks: Sequence[nn.Module] = ()) -> None:
        self._compiled: list[tuple[nn.Module, Callable[..., Any]]] = [
            (block, _compile(block.forward)) for block in blocks
        ]
        self.active = False

    def apply(self) -> None:
        """Run the blocks compiled from now on."""
        for block, forward in self._compiled:
            block.forward = forward  # type: ignore[method-assign]  # on the instance: hides the class's
        self.active = bool(self._compiled)

    def revert(self) -> None:
        """Run the blocks as they are written."""
        if self.active:
            for block, _ in self._compiled:
                del block.forward
        self.active = False

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run uncompiled inside the context: generation, where every length would compile anew."""
        was_active = self.active
        self.revert()
        try:
            yield
        finally:
            if was_active:
                self.apply()


def compile_blocks(
    model: Llama, mode: Mode, device: torch.device, trial: Callable[[], object], say: Say
) -> Compiled:
    """Compile `model.model.layers`, unless the mode or the machine speaks against it.

    Args:
        trial: one forward and backward pass. It runs once compiled; if it fails, and does not when run
            eagerly, the model stays eager after one line of advice.
        say: takes that line.
    """
    if mode == "off" or (mode == "auto" and device.type not in ("cpu", "cuda")):
        return Compiled()
    if device.type == "cpu" and not find_toolchain().works:
        say(f"Running without torch.compile, somewhat slower: {find_toolchain().fault}.")
        return Compiled()
    compiled = Compiled()
    try:
        compiled = Compiled(list(model.model.layers))
        compiled.apply()
        trial()
    except Exception as error:
        compiled.revert()
        trial()  # a fault of the model or of memory shows here again, and is told as what it is
        say(f"Running without torch.compile, somewhat slower: it failed with {_first_line(error)}")
    return compiled


def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Static shapes: after a second shape torch would otherwise compile a graph for any, and go on training
    # with it; a resumed run that never saw the second shape would then compute other bits.
    # Deterministic: kernels are not chosen by timing them.
    return torch.compile(forward, dynamic=False, options={"deterministic": True})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
