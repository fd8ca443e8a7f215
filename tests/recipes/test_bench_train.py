"""`puna bench train`: operations by hand, parts that add up, a row for every case, mistakes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from puna import formats
from puna.errors import InputError, ModelError, PunaError, ResourceError, SettingsError
from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token, parameters
from puna.model.presets import preset
from puna.model.weights import weights_of
from puna.plan import measure as plan_measure
from puna.progress import silent
from puna.recipes.bench import training, training_case
from puna.recipes.bench.command import bench
from puna.recipes.bench.training import flops_of_token
from puna.recipes.bench.training_case import _memory as case_memory
from puna.recipes.bench.training_case import measure, opened, parts_of
from puna.recipes.bench.training_settings import TrainBenchSettings, document_ends, shape_of
from puna.settings import parse
from puna.train.footprint import Run, footprint
from puna.train.policies import Policy
from tests.model.shapes import CONFIGS, model_of

SMALL = CONFIGS["explicit head width"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bench") / "model"
    formats.save(path, weights_of(model_of(SMALL)))
    return str(path)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are measured in no time; and a test's threads and memory are not the case's to change."""
    monkeypatch.setattr(training_case, "SECONDS", 0.002)
    monkeypatch.setattr(plan_measure, "BUFFER", {"cpu": 1 << 22})
    monkeypatch.setattr(training_case, "keep_freed_memory", lambda device: False)
    monkeypatch.setattr(training_case, "make_deterministic", lambda settings, device: 1)


def case_of(directory: str, **changes: Any) -> TrainBenchSettings:
    usual = {"model": directory, "rows": 4, "row_length": 12, "dtype": "float32", "compile": "off"}
    return parse(TrainBenchSettings, {**usual, "device": "cpu", "steps": 2, "repeats": 2, **changes})


def run(*arguments: str, said: list[str] | None = None) -> list[dict[str, Any]]:
    lines = [] if said is None else said
    results: list[dict[str, Any]] = bench("train", arguments, None, lines.append, silent)["results"]
    return results


# What is counted


def test_operations_of_a_token_by_hand(directory: str) -> None:
    """6 for each weight of a matrix; attention's two products with what it sees, forward and twice back."""
    D, N, K, H, F, V, layers = 32, 4, 2, 16, 48, SMALL.vocab_size, SMALL.num_hidden_layers
    matrices = layers * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + D * V
    whole = flops_of_token(case_of(directory), SMALL)
    assert whole == pytest.approx(6 * matrices + 3 * layers * 4 * N * H * (12 + 1) / 2)
    parts = flops_of_token(case_of(directory, documents=3), SMALL)
    assert parts == pytest.approx(6 * matrices + 3 * layers * 4 * N * H * (4 + 1) / 2)


def test_documents_of_uneven_length_count_each_by_its_own(directory: str) -> None:
    settings = case_of(directory, row_length=11, documents=3)
    assert document_ends(settings) == [3, 7, 11]
    each = [flops_per_token(SMALL, length, training=True) for length in (3, 4, 4)]
    assert flops_of_token(settings, SMALL) == pytest.approx((3 * each[0] + 8 * each[1]) / 11)


def test_rows_hold_so_many_documents_and_every_token_but_their_first_is_learned(directory: str) -> None:
    with opened(case_of(directory, row_length=11, documents=3)) as case:
        batch = next(case.source.steps(0)).batches[0]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0] * 3 + [1] * 4 + [2] * 4] * 4
    assert batch.loss_mask.sum() == 4 * (11 - 3)
    with opened(case_of(directory)) as case:
        assert next(case.source.steps(0)).batches[0].documents is None


def test_parts_add_up_to_the_step() -> None:
    parts = parts_of({"seconds": 2.0, "waiting": 0.05, "updating": 0.1}, forward=0.4, loss=0.5)
    assert parts == pytest.approx(
        {"forward": 0.4, "loss": 0.5, "backward": 0.8, "updating": 0.2, "waiting": 0.1}
    )


def test_a_preset_changes_its_vocabulary_and_its_context() -> None:
    settings = parse(
        TrainBenchSettings, {"model": "puna-1m", "vocab": 100, "tied": False, "row_length": [8, 9000]}
    )
    config = shape_of(settings)
    assert (config.vocab_size, config.tie_word_embeddings, config.max_position_embeddings) == (
        100,
        False,
        9000,
    )
    assert config.hidden_size == preset("puna-1m").hidden_size


# What is measured


def test_the_figures_of_a_case(directory: str) -> None:
    found = json.loads(json.dumps(measure(case_of(directory, micro_rows=2))))
    assert [one["steps"] for one in found["repeats"]] == [2, 2]
    assert all(one["seconds"] > 0 and one["flops"] > 0 for one in found["repeats"])
    total = parameters(SMALL).total
    memory = found["memory"]
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4 * total, 4 * total, 8 * total)
    assert set(found["parts"]) == {"forward", "loss", "backward", "updating", "waiting"}
    assert all(seconds >= 0 for seconds in found["parts"].values())
    assert (found["precision"], found["policy"] in ("none", "paper")) == ("float32", True)


def test_updates_are_those_of_the_loop(directory: str) -> None:
    with opened(case_of(directory)) as case:
        before = [parameter.detach().clone() for parameter in case.model.parameters()]
        case.run(3)
        assert (case.state.step, case.state.position) == (
            training_case.WARM + 3,
            4 * (training_case.WARM + 3),
        )
        assert len(case.timings) == case.state.step
        moved = [not torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("policy", ["none", "paper", "block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_that_is_estimated_is_that_which_tensors_take(
    policy: Policy, dtype: str, tmp_path: Path
) -> None:
    """Never less, and at most a fifth more of all that is held."""
    path = tmp_path / "model"
    shape = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    formats.save(path, weights_of(model_of(parse(ModelConfig, {**shape, "num_attention_heads": 4}))))
    settings = case_of(str(path), policy=policy, rows=8, row_length=256, dtype=dtype)
    with opened(settings) as case:
        memory = case_memory(case)
        run = Run(case.config, 8, 256, policy, case.precision.compute)
        above = most_tensors(lambda: case.run(2), tmp_path / "trace.json") - memory["gradients"]
    found = footprint(run)
    held = found.weights + found.gradients + found.optimizer
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        found.weights, found.gradients, found.optimizer,
    )  # fmt: skip
    assert 1 <= found.total / (held + above) <= 1.2


def most_tensors(run: Callable[[], object], trace: Path) -> int:
    """The most bytes that tensors made by `run` took at one time.

    Counted by torch as it allocates: what a process holds depends on what the C library keeps.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    watched.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(accumulate(changes))


def found_of(case: TrainBenchSettings, seconds: float = 2.0) -> dict[str, Any]:
    """What a process would tell of a case."""
    return {
        "repeats": [{"seconds": seconds, "steps": 5, "flops": 1e6}] * 3,
        "peak": "1MFLOP/s (measured)",
        "reading": 1e12,
        "parts": {"forward": 0.1, "loss": 0.1, "backward": 0.1, "updating": 0.05, "waiting": 0.05},
        "memory": {"weights": 4, "gradients": 4, "optimizer": 8, "above": 1_500_000},
        "precision": "float32",
        "policy": case.policy[0],
        "layers": "not compiled",
        "notes": ["a word of advice"],
        "environment": {"threads": 1},
        "device": "cpu",
    }


def test_a_row_and_json_for_every_policy_and_length(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "run_apart", found_of)
    said: list[str] = []
    results = run(directory, "policy=[none, paper]", "row_length=[8, 16]", "rows=2", said=said)
    cases = [(result["settings"]["policy"], result["settings"]["row_length"]) for result in results]
    assert cases == [(["none"], [8]), (["none"], [16]), (["paper"], [8]), (["paper"], [16])]
    assert [line.split()[:2] for line in said[-4:]] == [
        ["none", "8"], ["none", "16"], ["paper", "8"], ["paper", "16"]
    ]  # fmt: skip
    assert "a word of advice" in said
    assert "limit: 1MFLOP/s (measured); anew around every repeat" in said
    for result in results:
        tokens = 2 * result["settings"]["row_length"][0]
        settings = parse(TrainBenchSettings, result["settings"])
        assert (result["what"], result["unit"], result["value"]) == ("train", "tokens/s", tokens * 5 / 2.0)
        assert result["limit"] == pytest.approx(1e6 / flops_of_token(settings, SMALL))
        assert result["ratio"] == pytest.approx(result["value"] / result["limit"])
        assert result["details"]["waiting"] == pytest.approx(0.125)
    assert "12.50%" in said[-1] and "1.5MB" in said[-1]


def test_what_does_not_fit_is_told_and_the_rest_goes_on(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(case: TrainBenchSettings) -> dict[str, Any]:
        if case.row_length == [16]:
            raise ResourceError("needs 3GB")
        return found_of(case)

    monkeypatch.setattr(training, "run_apart", found)
    said: list[str] = []
    assert len(run(directory, "row_length=[8, 16]", "rows=2", said=said)) == 1
    assert said[-1] == "  auto, 16: needs 3GB"
    with pytest.raises(ResourceError, match="needs 3GB"):
        run(directory, "row_length=16")


def test_a_process_of_its_own_tells_figures_and_faults(directory: str) -> None:
    """Once for real: what it prints is understood, and its errors are ours."""
    with pytest.raises(SettingsError, match=r"precision\.weights"):
        training.run_apart(case_of(directory, weights="bfloat16"))


@pytest.mark.parametrize(
    ("status", "out", "kind", "message"),
    [
        (-9, "", ResourceError, "the process was killed"),
        (1, "", PunaError, "measuring ended with status 1: KeyError: 'x'"),
        (0, '{"error": "ResourceError", "message": "out of memory"}', ResourceError, "out of memory"),
    ],
)
def test_how_a_process_ended_is_told(
    status: int,
    out: str,
    kind: type[PunaError],
    message: str,
    directory: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = subprocess.CompletedProcess([], status, out, "Traceback\nKeyError: 'x'\n")
    monkeypatch.setattr(training.subprocess, "run", lambda *given, **named: ended)
    with pytest.raises(kind, match=message):
        training.run_apart(case_of(directory))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["row_length=1"], SettingsError, "row_length must name lengths of at least 2, got [1]"),
        (
            ["documents=9", "row_length=[64, 16]"],
            SettingsError,
            "documents must be at most 8, two tokens each",
        ),
        (["policy=[paper, blok]"], SettingsError, "'blok'"),
        (["no/such/model"], ModelError, "no/such/model"),
        (["vocabulary=100"], SettingsError, "unknown setting 'vocabulary'. Did you mean 'vocab'"),
    ],
)
def test_mistakes_are_told(arguments: list[str], error: type[InputError], message: str) -> None:
    with pytest.raises(error) as caught:
        run(*arguments)
    assert message in str(caught.value)
