"""Compiled blocks: the same model, the same bits every time, and a quiet way back."""

from __future__ import annotations

import gc
import shutil
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.kernels.compiler import Toolchain, find_toolchain, try_toolchain
from puna.model.llama import Llama
from puna.train import compile as compiling
from puna.train.compile import prepare_layers
from puna.train.determinism import DeterminismSettings, make_deterministic
from puna.train.gradients import accumulate
from puna.train.loop import LoopSettings, TrainState, rehearse, train
from puna.train.objectives import language_modelling
from puna.train.optimizer import OptimizerSettings, build
from puna.train.policies import Policy
from tests.train.tiny import CPU, ROWS, TinySource, bits, precision, same_bits, tiny_model

# torch's own, while its compiler is imported
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
needs_toolchain = pytest.mark.skipif(not find_toolchain().works, reason=find_toolchain().fault)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Deterministic kernels and two threads, and afterwards what was before."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert make_deterministic(DeterminismSettings(threads=2), CPU) == 2
    assert torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def trial_of(model: Llama, dtype: torch.dtype) -> Any:
    batch = next(TinySource(ROWS // 2).steps(0)).batches[0]
    return lambda: rehearse(language_modelling, model, batch, precision(dtype))


def trained(
    mode: compiling.Mode, dtype: torch.dtype, dropout: float, policy: Policy = "none"
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and losses of four updates."""
    model = tiny_model(dropout)
    layers = prepare_layers(model, policy, mode, CPU, trial_of(model, dtype), say=pytest.fail)
    assert layers.compiled == (mode == "on")
    assert layers.replaced.active == (mode == "on" or policy != "none")
    losses: list[float] = []
    train(
        language_modelling, model, build(model, OptimizerSettings()), TinySource(ROWS // 2), TrainState(),
        settings=LoopSettings(steps=4), rate=lambda step: 1e-3, precision=precision(dtype),
        record=lambda kind, **values: losses.append(values["loss"]),
    )  # fmt: skip
    return bits(model), losses


@needs_toolchain
@pytest.mark.usefixtures("two_threads")
def test_compiled_runs_repeat_bit_for_bit() -> None:
    """With two threads, bfloat16 and dropout."""
    first, second = (trained("on", torch.bfloat16, dropout=0.1) for _ in range(2))
    assert same_bits(first[0], second[0])
    assert first[1] == second[1]


@needs_toolchain
def test_all_layers_share_one_graph_and_eager_is_one_step_away() -> None:
    model = tiny_model()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = prepare_layers(model, "none", "on", CPU, trial_of(model, torch.float32), pytest.fail).replaced
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert model.state_dict().keys() == tiny_model().state_dict().keys()

    def is_compiled() -> bool:
        return any("forward" in vars(layer) for layer in model.model.layers)

    gradients = gradients_of(model)
    assert is_compiled()
    with compiled.eager():
        assert not is_compiled()
        for name, gradient in gradients_of(model).items():
            assert (gradient - gradients[name]).norm() <= 1e-5 * gradient.norm(), name
    assert is_compiled()
    compiled.revert()
    with compiled.eager():
        pass
    assert not is_compiled()
    assert not compiled.active


def gradients_of(model: Llama) -> dict[str, torch.Tensor]:
    batch = next(TinySource(ROWS // 2).steps(0)).batches[0]
    accumulate(language_modelling, model, [batch], precision())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradients


def failing_compile(forward: Any) -> Any:
    def compiled(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("CppCompileError: C++ compile error\nwith a long log\nbelow it")

    return compiled


def test_a_failing_compiler_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_compile", failing_compile)
    model = tiny_model()
    said: list[str] = []
    trial = trial_of(model, torch.float32)
    layers = prepare_layers(model, "none", "on", torch.device("meta"), trial, said.append)
    assert not layers.compiled and not layers.replaced.active
    assert said == [
        "Running without torch.compile, somewhat slower: it failed with "
        "RuntimeError: CppCompileError: C++ compile error"
    ]
    trial_of(model, torch.float32)()


def test_an_error_of_the_model_itself_is_not_blamed_on_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_compile", failing_compile)

    def trial() -> None:
        raise ValueError("the model's own")

    with pytest.raises(ValueError, match="the model's own"):
        prepare_layers(tiny_model(), "none", "on", torch.device("meta"), trial, pytest.fail)


def test_a_compiler_that_refuses_its_options_costs_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(forward: Any) -> Any:
        raise RuntimeError("Unexpected optimization option deterministic")

    monkeypatch.setattr(compiling, "_compile", refusing)
    said: list[str] = []
    layers = prepare_layers(tiny_model(), "paper", "on", torch.device("meta"), lambda: None, said.append)
    assert not layers.compiled and layers.replaced.active
    assert len(said) == 1 and "Unexpected optimization option" in said[0]


def test_a_trial_that_fails_leaves_the_model_as_it_was() -> None:
    def trial() -> None:
        raise KeyboardInterrupt

    model = tiny_model(tied=True)
    with pytest.raises(KeyboardInterrupt):
        prepare_layers(model, "paper", "off", CPU, trial, pytest.fail)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_failed_is_let_go_before_the_layers_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error holds its frames, and these the device's memory, which the next trial needs."""
    monkeypatch.setattr(compiling, "_compile", failing_compile)
    model, held = tiny_model(), []

    def trial() -> None:
        gc.collect()
        assert all(each() is None for each in held)
        large = torch.empty(3)
        held.append(weakref.ref(large))
        trial_of(model, torch.float32)()

    assert not prepare_layers(model, "none", "on", torch.device("meta"), trial, lambda line: None).compiled
    assert len(held) == 3


def test_without_a_toolchain_a_cpu_runs_eagerly_after_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compiling, "find_toolchain", lambda: Toolchain("g++", "there is no C++ compiler (g++)")
    )
    said: list[str] = []
    assert not prepare_layers(tiny_model(), "none", "auto", CPU, lambda: None, said.append).compiled
    assert said == ["Running without torch.compile, somewhat slower: there is no C++ compiler (g++)."]


@pytest.mark.parametrize(("mode", "device"), [("off", "cpu"), ("auto", "mps")])
def test_where_compiling_is_not_wanted_nothing_is_tried(mode: compiling.Mode, device: str) -> None:
    model, where = tiny_model(), torch.device(device)
    assert not prepare_layers(model, "none", mode, where, lambda: None, pytest.fail).compiled


# The toolchain


def test_a_missing_compiler_is_named() -> None:
    assert try_toolchain("no-such-compiler").fault == (
        "there is no C++ compiler (no-such-compiler); install g++ or clang"
    )


@pytest.mark.skipif(shutil.which("true") is None, reason="no `true` on this system")
def test_missing_headers_are_named(tmp_path: Path) -> None:
    assert "holds no Python.h; install python3-dev" in try_toolchain("true", headers=tmp_path).fault


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: no linker' >&2\necho more >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    found = try_toolchain(str(compiler), headers=tmp_path)
    assert found.fault == f"{compiler} cannot build a library: fatal error: no linker"
    assert not found.works
