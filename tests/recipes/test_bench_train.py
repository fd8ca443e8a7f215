"""`puna bench train`: operations by hand, parts that add up, a row for every case, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from puna import formats
from puna.errors import InputError, ModelError, PunaError, ResourceError, SettingsError
from puna.kernels import float8
from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token, parameters
from puna.model.presets import preset
from puna.model.weights import weights_of
from puna.plan import measure as plan_measure
from puna.progress import Tracker, quantity, silent
from puna.recipes.bench import training, training_case
from puna.recipes.bench.command import bench
from puna.recipes.bench.training import flops_in_float8, flops_of_token
from puna.recipes.bench.training_case import _memory as case_memory
from puna.recipes.bench.training_case import measure, opened, parts_of
from puna.recipes.bench.training_settings import NAMES, TrainBenchSettings, document_ends, shape_of
from puna.recipes.training.settings import PretrainSettings
from puna.settings import Settings, parse
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


def test_operations_in_float8_are_those_of_the_layers_matrices() -> None:
    counts = parameters(SMALL)
    assert flops_in_float8(SMALL) == 6 * (counts.attention + counts.mlp)  # it has no biases


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
    assert all(one["seconds"] > 0 and one["flops"][0] > 0 for one in found["repeats"])
    total = parameters(SMALL).total
    memory = found["memory"]
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (4 * total, 4 * total, 8 * total)
    assert set(found["parts"]) == {"forward", "loss", "backward", "updating", "waiting"}
    assert all(seconds >= 0 for seconds in found["parts"].values())
    assert (found["precision"], found["policy"] in ("none", "paper")) == ("float32", True)


def test_the_loss_has_the_penalty_that_is_asked_for(directory: str) -> None:
    """After equal updates of equal numbers weights differ where the loss does."""

    def weights_after(z: float) -> torch.Tensor:
        with opened(case_of(directory, z=z)) as case:
            case.run(1)
            return case.model.lm_head.weight.detach().clone()

    plain = weights_after(0.0)
    assert torch.equal(weights_after(0.0), plain)
    assert not torch.equal(weights_after(0.1), plain)


def test_layers_in_float8_are_measured_beside_two_limits(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where torch computes such products one by one."""
    monkeypatch.setattr(float8, "multiplies_float8", lambda device: True)
    found = measure(case_of(directory, float8=True, dtype="bfloat16", row_length=16, repeats=1))
    assert found["precision"] == "bfloat16 with float32 weights, layers in float8"
    assert ["bfloat16 matrix" in found["peaks"][0], "float8_e4m3fn matrix" in found["peaks"][1]] == [True] * 2
    assert found["policy"] == "paper"
    ((wide, narrow),) = (one["flops"] for one in found["repeats"])
    assert wide > 0 and narrow > 0


def test_it_tells_what_it_does_and_how_much_is_left(directory: str) -> None:
    told: list[tuple[str, int]] = []
    measure(case_of(directory), lambda doing, done: told.append((doing, done)))
    assert told == [
        ("making the model, first updates", 0),
        ("memory", 0),
        ("repeat 1 of 2, 2 updates", 1),
        ("repeat 2 of 2, 2 updates", 1),
        ("the parts of an update", 1),
    ]


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
    shape = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    formats.save(path, weights_of(model_of(parse(ModelConfig, {**shape, "num_attention_heads": 4}))))
    settings = case_of(str(path), policy=policy, rows=8, row_length=128, dtype=dtype)
    with opened(settings) as case:
        memory = case_memory(case)
        run = Run(case.config, 8, 128, policy, case.precision.compute)
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


def found_of(case: TrainBenchSettings, tell: training_case.Tell) -> dict[str, Any]:
    """What a process would tell of a case."""
    tell("repeat 1 of 3", 1)
    rates = [1e6, 4e6] if case.float8 else [1e6]
    return {
        "repeats": [{"seconds": 2.0, "steps": 5, "flops": rates}] * 3,
        "peaks": [f"{rate / 1e6:g}MFLOP/s (measured)" for rate in rates],
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
    needed = quantity(flops_of_token(case_of(directory, row_length=8), SMALL))
    assert f"limit: 1MFLOP/s (measured), anew around every repeat; a token needs {needed}FLOP" in said
    for result in results:
        tokens = 2 * result["settings"]["row_length"][0]
        settings = parse(TrainBenchSettings, result["settings"])
        assert (result["what"], result["unit"], result["value"]) == ("train", "tokens/s", tokens * 5 / 2.0)
        assert result["limit"] == pytest.approx(1e6 / flops_of_token(settings, SMALL))
        assert result["ratio"] == pytest.approx(result["value"] / result["limit"])
        assert result["details"]["waiting"] == pytest.approx(0.125)
    assert "12.50%" in said[-1] and "1.5MB" in said[-1]


def test_what_is_in_float8_counts_at_its_own_rate(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "run_apart", found_of)
    monkeypatch.setattr(float8, "multiplies_float8", lambda device: True)
    said: list[str] = []
    changes = ["float8=true", "dtype=bfloat16", "z=0.0001", "device=cpu", "row_length=16"]
    (result,) = run(directory, *changes, said=said)
    assert (result["settings"]["float8"], result["settings"]["z"]) == (True, 0.0001)
    needed = flops_of_token(parse(TrainBenchSettings, result["settings"]), SMALL)
    narrow = flops_in_float8(SMALL)
    assert result["limit"] == pytest.approx(1 / ((needed - narrow) / 1e6 + narrow / 4e6))
    assert result["details"]["matrix_eight_bit_ops"] == 4e6
    assert any("1MFLOP/s (measured) and 4MFLOP/s (measured)" in line for line in said)


def test_progress_names_the_case_and_what_is_measured(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[float, str]] = []

    class Notes:
        def start_at(self, amount: float) -> None: ...
        def say(self, text: str) -> None: ...
        def advance(self, amount: float, note: str = "") -> None:
            noted.append((amount, note))

    @contextmanager
    def track(label: str, total: float, unit: str) -> Iterator[Tracker]:
        assert (label, total, unit) == ("Training", 2 * (3 + 2), "runs")
        yield Notes()

    def one_of_two(case: TrainBenchSettings, tell: training_case.Tell) -> dict[str, Any]:
        found = found_of(case, tell)
        if case.row_length == [16]:
            raise ResourceError("needs 3GB")
        return found

    monkeypatch.setattr(training, "run_apart", one_of_two)
    bench("train", [directory, "row_length=[16, 8]", "device=cpu"], None, lambda line: None, track)
    assert noted == [
        (1, "1 of 2: auto, row 16: repeat 1 of 3"),
        (4, "1 of 2: auto, row 16"),
        (1, "2 of 2: auto, row 8: repeat 1 of 3"),
        (4, "2 of 2: auto, row 8"),
    ]


def test_a_misspelt_preset_is_offered_the_nearest() -> None:
    with pytest.raises(
        SettingsError, match=r"puna-16m is no preset, and no model is there\. Did you mean 'puna-1"
    ):
        run("puna-16m")


def test_a_case_that_is_stopped_is_not_counted_as_done(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[float] = []

    class Counts:
        def start_at(self, amount: float) -> None: ...
        def say(self, text: str) -> None: ...
        def advance(self, amount: float, note: str = "") -> None:
            done.append(amount)

    @contextmanager
    def track(label: str, total: float, unit: str) -> Iterator[Tracker]:
        yield Counts()

    def stopped(case: TrainBenchSettings, tell: training_case.Tell) -> dict[str, Any]:
        tell("repeat 1 of 3", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_apart", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench("train", [directory, "device=cpu"], None, lambda line: None, track)
    assert done == [1]


def test_what_does_not_fit_is_told_and_the_rest_goes_on(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(case: TrainBenchSettings, tell: training_case.Tell) -> dict[str, Any]:
        if case.row_length == [16]:
            raise ResourceError("needs 3GB")
        return found_of(case, tell)

    monkeypatch.setattr(training, "run_apart", found)
    said: list[str] = []
    assert len(run(directory, "row_length=[8, 16]", "rows=2", said=said)) == 1
    assert said[-1] == "  auto, 16: needs 3GB"
    with pytest.raises(ResourceError, match="needs 3GB"):
        run(directory, "row_length=16")


def test_a_process_of_its_own_tells_figures_and_faults(directory: str) -> None:
    """Once for real: what it prints is understood, and its errors are ours, in this benchmark's names."""
    told: list[str] = []
    with pytest.raises(SettingsError, match=r'^weights = "bfloat16" needs .* set dtype = "bfloat16"'):
        training.run_apart(case_of(directory, weights="bfloat16"), lambda doing, done: told.append(doing))
    assert told == ["making the model, first updates"]


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "the process was killed"),
        (
            "print('a library'); raise KeyError('x')",
            PunaError,
            "measuring ended with status 1: KeyError: 'x'",
        ),
        (
            """print('{"error": "ResourceError", "message": "out of memory"}')""",
            ResourceError,
            "out of memory",
        ),
        ("""print('{"error": "Interrupted", "message": "stopped"}')""", PunaError, "stopped"),
        ("print(3)", PunaError, "measuring ended with status 0: it said nothing"),
    ],
)
def test_how_a_process_ended_is_told(
    program: str, kind: type[PunaError], message: str, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Instead(subprocess.Popen[str]):
        def __init__(self, command: list[str], **named: Any) -> None:
            super().__init__([sys.executable, "-c", program], **named)

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(Popen=Instead))
    with pytest.raises(kind, match=message) as caught:
        training.run_apart(case_of(directory))
    assert type(caught.value) is kind


def test_a_process_is_ended_with_whoever_waits_for_it(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = []

    class Instead(subprocess.Popen[str]):
        def __init__(self, command: list[str], **named: Any) -> None:
            program = """print('{"doing": "it", "done": 0}', flush=True); import time; time.sleep(60)"""
            super().__init__([sys.executable, "-c", program], **named)
            processes.append(self)

    def stop(doing: str, done: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(Popen=Instead))
    with pytest.raises(KeyboardInterrupt):
        training.run_apart(case_of(directory), stop)
    assert processes[0].wait(10) == -9


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
        (["optimizer=adm"], SettingsError, "'optimizer': expected one of adamw, muon, got 'adm'"),
        (["weights=int8"], SettingsError, "'weights': input should be 'float32', 'bfloat16+float32' or"),
        (["z=-1"], SettingsError, "'z'"),
    ],
)
def test_mistakes_are_told(arguments: list[str], error: type[InputError], message: str) -> None:
    with pytest.raises(error) as caught:
        run(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["float8=true", "dtype=bfloat16"], "float8 = true: cpu does not multiply in float8"),
        (
            ["float8=true", "dtype=float32"],
            "float8 = true needs bfloat16 around it, got float32; set dtype =",
        ),
        (["policy=[paper,offload]"], 'policy = "offload" moves what is kept to main memory'),
        (["policy=paper", "compile=on"], 'where compile = "on" has nothing to do; leave compile at "auto"'),
        (["weights=bfloat16", "dtype=float32"], 'set dtype = "bfloat16", or weights = "float32"'),
        (["micro_rows=3"], "8 rows per step cannot be divided into micro-batches of 3 on 1 rank; take"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work_in_names_of_this_command(
    changes: list[str], message: str, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "run_apart", None)
    said: list[str] = []
    with pytest.raises(SettingsError) as caught:
        run(directory, "device=cpu", *changes, said=said)
    assert message in str(caught.value)
    assert not any(name in str(caught.value) for name in NAMES)
    assert said == []


def test_advice_about_memory_names_settings_of_this_command(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_case, "check_fits", _would_fit)
    with pytest.raises(ResourceError, match=r"^micro_rows = 2 would fit; policy = \"block\"; row_length$"):
        answered(case_of(directory), monkeypatch)


def _would_fit(run: Run, device: torch.device) -> None:
    raise ResourceError('batch.micro_rows = 2 would fit; memory.policy = "block"; data.row_length')


def answered(case: TrainBenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process of a case does, in this one."""
    printed: list[str] = []
    monkeypatch.setattr(sys, "stdin", StringIO(case.model_dump_json()))
    monkeypatch.setattr(training_case, "_print", lambda **values: printed.append(json.dumps(values)))
    assert training_case.main() == 0
    message = json.loads(printed[-1])
    raise training.FAULTS[message["error"]](message["message"])


def test_every_name_that_is_translated_is_one_of_a_run_and_one_of_this_command() -> None:
    for name, here in NAMES.items():
        group, _, field = name.partition(".")
        settings = PretrainSettings.model_fields[group].annotation
        assert isinstance(settings, type) and issubclass(settings, Settings)
        assert field in settings.model_fields
        assert here in TrainBenchSettings.model_fields
