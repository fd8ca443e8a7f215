"""torch.compile for the blocks of a built model, from outside and reversibly.

Each block is compiled by itself. All layers then share one graph, which takes seconds instead of minutes; and
the embedding stays outside: its compiled gradient on a CPU, left to itself, is summed by threads in whatever
order they come, and differs from run to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from puna.kernels.compiler import find_toolchain
from puna.kernels.library import cache_directory
from puna.model.llama import Llama
from puna.settings import Settings, layout
from puna.train.policies import Policy, written_out

Mode = Literal["auto", "on", "off"]
Say = Callable[[str], None]
Forward = Callable[..., Any]
Compiler = Callable[[Forward], Forward]


class CompileSettings(Settings):
    """`auto`: on CUDA, and on a CPU where a C++ compiler and Python's headers are found and layers do not run
    compiled passes of their own (memory.policy).
    """

    mode: Mode = layout("auto")


class Replaced:
    """Blocks that run another forward, and the way back. Parameters and their names are untouched."""

    def __init__(self, forwards: Sequence[tuple[nn.Module, Forward]] = ()) -> None:
        self._forwards = forwards
        self.active = False

    def apply(self) -> None:
        """Run the other forwards from now on."""
        for block, forward in self._forwards:
            block.forward = forward  # on the instance: hides the class's
        self.active = bool(self._forwards)

    def revert(self) -> None:
        """Run the blocks as they are written."""
        if self.active:
            for block, _ in self._forwards:
                del block.forward
        self.active = False

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run the blocks as they are written inside the context: generation, where every length would
        compile anew.
        """
        was_active = self.active
        self.revert()
        try:
            yield
        finally:
            if was_active:
                self.apply()


@dataclass(frozen=True)
class Layers:
    """How the layers of a model run while it trains."""

    replaced: Replaced
    policy: Policy
    compiled: bool

    def __str__(self) -> str:
        if self.policy == "none":
            return "compiled" if self.compiled else "not compiled"
        return f"memory policy {self.policy}" + (", compiled" if self.compiled else "")


def prepare_layers(
    model: Llama,
    policy: Policy,
    mode: Mode,
    device: torch.device,
    trial: Callable[[], object],
    say: Say,
    *,
    float8: bool = False,
) -> Layers:
    """Let the layers keep what the policy says, and compile them, unless the mode or the machine speaks
    against it.

    Args:
        trial: one forward and backward pass. It runs before the layers are compiled and after: memory that
            does not suffice runs out before. If it fails once compiled, they stay as they were, after one
            line of advice.
        say: takes that line.
        float8: whether products within the layers are of 8 bits.
    """
    plain = _tried(_replaced(model, policy, None, float8), trial)
    if not _compiles(policy, mode, device, say):
        return Layers(plain, policy, False)
    plain.revert()
    try:
        return Layers(_tried(_replaced(model, policy, _compile, float8), trial), policy, True)
    except Exception as error:
        fault = _first_line(error)
    # Not before the error is gone, and with it what its frames held of the device's memory. A fault of the
    # model or of memory shows here again, and is told as what it is.
    _tried(plain, trial)
    say(f"Running without torch.compile, somewhat slower: it failed with {fault}")
    return Layers(plain, policy, False)


def _replaced(model: Llama, policy: Policy, compiler: Compiler | None, float8: bool) -> Replaced:
    if policy != "none":
        return Replaced(written_out(model, policy, compiler or _as_it_is, float8=float8))
    return Replaced([(block, compiler(block.forward)) for block in model.model.layers] if compiler else [])


def _tried(replaced: Replaced, trial: Callable[[], object]) -> Replaced:
    """Applied, if the trial then passes; else the layers are as they were before."""
    replaced.apply()
    try:
        trial()
    except BaseException:
        replaced.revert()
        raise
    return replaced


def _compiles(policy: Policy, mode: Mode, device: torch.device, say: Say) -> bool:
    if mode == "off" or (mode == "auto" and device.type not in ("cpu", "cuda")):
        return False
    if device.type != "cpu":
        return True
    if policy != "none":  # what the passes call is compiled already
        return False
    if not find_toolchain().works:
        say(f"Running without torch.compile, somewhat slower: {find_toolchain().fault}.")
        return False
    return True


def _as_it_is(function: Forward) -> Forward:
    return function


def _compile(forward: Forward) -> Forward:
    if directory := cache_directory():  # torch's own choice is a place for temporary files
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory.with_name("inductor")))
    # Static shapes: after a second shape torch would otherwise compile a graph for any, and go on training
    # with it; a resumed run that never saw the second shape would then compute other bits.
    # Deterministic: kernels are not chosen by timing them.
    return torch.compile(forward, dynamic=False, options={"deterministic": True})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
