"""A run from text to model: what it leaves, that it goes on exactly, and that bad input leaves nothing."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import shutil
import signal
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import puna
from puna.errors import (
    CheckpointError,
    DataError,
    InputError,
    Interrupted,
    PunaError,
    ResourceError,
    SettingsError,
    TokenizerError,
)
from puna.formats import saving
from puna.progress import silent
from puna.recipes.training import opening, session
from puna.recipes.training.length import seconds_per_update
from puna.recipes.training.pretrain import pretrain
from puna.recipes.training.settings import PretrainSettings
from puna.settings import read_settings, to_toml
from puna.train.loop import train
from tests.recipes.conftest import tiny, write_text
from tests.torchrun import run_in_ranks


def quiet(settings: PretrainSettings, **options: Any) -> dict[str, Any]:
    return pretrain(settings, say=lambda line: None, **options)


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if kind is None or record["kind"] == kind]


def bare(run: Path) -> list[dict[str, Any]]:
    """The log without what may differ between two runs: times, paths, and notes of interruptions."""
    kept = [record for record in records(run) if record["kind"] != "event"]
    return [
        {key: value for key, value in record.items() if key not in ("timing", "run", "model", "report")}
        for record in kept
    ]


def weights(run: Path, step: int = 30) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def test_a_run_leaves_everything_and_learns(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    for name in (
        "run.toml",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "tokenizer",
        "data",
        "model",
    ):
        assert (run / name).exists(), name
    assert [record["step"] for record in records(run, "train")] == list(range(1, 31))
    assert [record["step"] for record in records(run, "validation")] == [0, 10, 20, 30]
    assert [record["step"] for record in records(run, "sample")] == [0, 15, 30]
    first, *_, last = [record["loss"] for record in records(run, "validation")]
    assert abs(first - math.log(384)) < 0.3  # an untrained model knows nothing
    assert last < 0.75 * first
    assert records(run, "summary")[0]["bits_per_byte"] == result["bits_per_byte"]
    assert read_settings(PretrainSettings, run / "run.toml").length.steps == 30


def test_bits_per_byte_is_the_loss_per_byte(finished: tuple[Path, dict[str, Any]]) -> None:
    """By hand: the exported model scores the held-out documents, in windows of 64 that overlap by half."""
    run, result = finished
    llm = puna.load(run, dtype="float32", device="cpu")
    nats, size, targets = 0.0, 0, 0
    stream: list[int] = []
    starts: set[int] = set()
    for path in _held_out(run, llm):
        ids = llm.tokenizer.encode(path, eos=True)  # type: ignore[union-attr]
        starts.add(len(stream))
        stream += ids
        size += len(path.encode())
    window, stride = 64, 32
    for begin in range(0, len(stream) - 1, stride):
        piece = stream[begin : begin + window + 1]
        scored = range(0 if begin == 0 else stride, len(piece) - 1)
        nats_here, count = _score(llm, piece, begin, starts, scored)
        nats, targets = nats + nats_here, targets + count
        if begin + window + 1 >= len(stream):
            break
    assert result["loss"] == pytest.approx(nats / targets, abs=2e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=2e-5)


def _held_out(run: Path, llm: puna.LLM) -> list[str]:
    from puna.data.shards import TokenSet

    tokens = TokenSet(run / "data" / "validation")
    return [llm.tokenizer.decode(tokens.document(i).ids) for i in range(tokens.documents_total)]  # type: ignore[union-attr]


def _score(llm: puna.LLM, piece: list[int], begin: int, starts: set[int], scored: range) -> tuple[float, int]:
    """Each document of a window alone, so that nothing depends on masks."""
    nats, count = 0.0, 0
    cuts = [0, *(i for i in range(1, len(piece)) if begin + i in starts), len(piece)]
    for low, high in pairwise(cuts):
        if high - low < 2:
            continue
        with torch.no_grad():
            logits = llm.model(torch.tensor([piece[low : high - 1]]))[0].log_softmax(-1)
        for at in range(low, high - 1):
            if at in scored:
                nats -= float(logits[at - low, piece[at + 1]])
                count += 1
    return nats, count


@pytest.mark.parametrize("stops", [[10], [3, 17, 18]])
def test_resumed_equals_never_stopped(
    tmp_path: Path,
    text: Path,
    finished: tuple[Path, dict[str, Any]],
    stops: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = finished
    out = tmp_path / "run"
    for stop in stops:
        _signal_at(monkeypatch, stop)
        with pytest.raises(Interrupted) as interruption:
            quiet(tiny(out, text), resume=True)
        assert interruption.value.exit_code == 143
        monkeypatch.undo()
    quiet(tiny(out, text), resume=True)
    assert bare(out) == bare(whole)
    expected, got = weights(whole), weights(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def _signal_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM to this process when the rate of a step is asked for, in the middle of the loop."""
    original = session.learning_rate

    def rate(settings: Any, peak: float, current: int, steps: int) -> float:
        if current == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(settings, peak, current, steps)

    monkeypatch.setattr(session, "learning_rate", rate)


def test_second_epoch_after_resume(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs are crossed, once in peace and once with a stop in the second."""
    few = write_text(tmp_path / "few", documents=12)
    quiet(tiny(tmp_path / "whole", few))
    _signal_at(monkeypatch, 25)
    with pytest.raises(Interrupted):
        quiet(tiny(tmp_path / "cut", few))
    monkeypatch.undo()
    quiet(tiny(tmp_path / "cut", few), resume=True)
    assert bare(tmp_path / "cut") == bare(tmp_path / "whole")


def test_micro_batches_change_rounding_only(
    tmp_path: Path, text: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    whole = tmp_path / "whole"
    dry = {
        "fields": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    }
    quiet(tiny(whole, text, model=dry, length={"steps": 6}, batch={"rows": 8, "micro_rows": 8}))
    split = tmp_path / "split"
    quiet(tiny(split, text, model=dry, length={"steps": 6}, batch={"rows": 8, "micro_rows": 1}))
    for one, other in zip(records(whole, "train"), records(split, "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_going_on_from_a_model_directory(
    tmp_path: Path, text: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    run, _ = finished
    out = tmp_path / "more"
    changes: dict[str, Any] = {"init_from": str(run / "model"), "model": None, "tokenizer": None}
    result = quiet(tiny(out, text, **changes, length={"steps": 10}, schedule={"warmup_steps": 2}))
    first = records(out, "validation")[0]["loss"]
    assert first == pytest.approx(
        records(run, "validation")[-1]["loss"], rel=1e-3
    )  # it begins where that ended
    assert result["loss"] < first


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path, text: Path) -> None:
    """No step is validated at an interval here: the end alone makes a model."""
    settings = tiny(tmp_path / "run", text, length={"steps": 6}, validation={"every": 100})
    first = quiet(settings)
    before, log = weights(tmp_path / "run", 6), bare(tmp_path / "run")
    assert quiet(settings, resume=True) == first
    assert bare(tmp_path / "run") == log
    after = weights(tmp_path / "run", 6)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(records(tmp_path / "run", "summary")) == 1


def test_training_that_only_made_a_model_worse_still_exports_it(
    tmp_path: Path, text: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    out = tmp_path / "worse"
    changes: dict[str, Any] = {"init_from": str(finished[0] / "model"), "model": None, "tokenizer": None}
    result = quiet(
        tiny(
            out,
            text,
            **changes,
            length={"steps": 4},
            schedule={"warmup_steps": 0},
            optimizer={"learning_rate": 0.5},
        )
    )
    first, last = (record["loss"] for record in records(out, "validation"))
    assert first < last
    assert puna.load(out, device="cpu").config.hidden_size == 32
    assert result["loss"] == pytest.approx(last, rel=0.05)  # it is the exported model that is scored


def test_a_run_that_skipped_to_its_end_is_validated_when_resumed(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(tmp_path / "run", text, length={"steps": 6}, max_skipped=2)

    def broken(model: Any, batch: Any) -> Any:
        loss, count, others = session.language_modelling(model, batch)
        return loss * (math.nan if torch.is_grad_enabled() and batch.position > 4 * 8 else 1.0), count, others

    with monkeypatch.context() as patch:
        patch.setattr(session, "train", lambda objective, *given, **named: train(broken, *given, **named))
        with pytest.raises(PunaError, match="after skipping 2 steps"):
            quiet(settings)
    quiet(settings, resume=True)
    assert [record["step"] for record in records(tmp_path / "run", "validation")] == [0, 6]
    assert (tmp_path / "run" / "model").is_dir()


def test_a_checkpoint_is_let_go_of_once_taken_up(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors keep the files on the disk, pruned or not."""
    out = tmp_path / "run"
    _signal_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        quiet(tiny(out, text, length={"steps": 6}))
    monkeypatch.undo()
    found: list[weakref.ref[Any]] = []

    def newest(*given: Any) -> Any:
        checkpoint = original(*given)
        found.append(weakref.ref(checkpoint))
        return checkpoint

    def checked(*given: Any, **named: Any) -> None:
        gc.collect()
        assert [reference() for reference in found] == [None]
        train(*given, **named)

    original = session.checkpoints.newest
    monkeypatch.setattr(session.checkpoints, "newest", newest)
    monkeypatch.setattr(session, "train", checked)
    quiet(tiny(out, text, length={"steps": 6}), resume=True)
    assert found


def test_two_ranks_train_and_resume(tmp_path: Path, text: Path) -> None:
    """The newest checkpoint is damaged: one rank sets it aside, and both go on from the one before."""
    settings = tiny(tmp_path / "run", text, length={"steps": 6}, checkpoint={"every": 2})
    (tmp_path / "run.toml").write_text(to_toml(settings))
    run_in_ranks(2, "-m", "puna", "pretrain", str(tmp_path / "run.toml"))
    (tmp_path / "run" / "checkpoints" / "step-6" / "state.json").write_text("{}")
    run_in_ranks(2, "-m", "puna", "pretrain", str(tmp_path / "run.toml"), "--resume")
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 7))
    assert len(records(tmp_path / "run", "summary")) == 1
    assert (tmp_path / "run" / "checkpoints" / "unusable-step-6").is_dir()


def test_ranks_measure_the_same_number_of_updates() -> None:
    """Whatever their clocks say: an update waits for every rank."""
    made: list[int] = []
    seconds_per_update(made.append, lambda seconds: 0.5, silent)
    assert made == [3, 18]  # nine of the twelve seconds, by the mean alone


def test_a_directory_with_a_run_is_refused_without_resume(
    text: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    with pytest.raises(CheckpointError, match="--resume"):
        quiet(tiny(finished[0], text))


def resumed(finished: Path, copy: Path, recorded: dict[str, Any]) -> list[str]:
    """What a run says first when it goes on, and was begun where the machine was on record like this."""
    run = shutil.copytree(finished, copy)
    (run / "environment.json").write_text(json.dumps(recorded))
    lines: list[str] = []
    settings = read_settings(PretrainSettings, run / "run.toml", [f"out={run}"])
    pretrain(settings, resume=True, say=lines.append)
    assert [record["text"] for record in records(run, "event")] == [
        line for line in lines if "machine" in line
    ]
    return [line for line in lines if "machine" in line]


def test_another_memory_policy_than_the_run_began_with_is_told(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    """It is chosen by the machine and by other settings, and decides about the last bits."""
    recorded = json.loads((finished[0] / "environment.json").read_text())
    assert recorded["memory_policy"] == "none"  # of a model with dropout
    other = resumed(finished[0], tmp_path / "other", {**recorded, "memory_policy": "paper"})
    assert other == ["machine changed (rounding may differ): memory_policy: 'paper' → 'none'"]
    del recorded["memory_policy"]  # as versions before did
    older = resumed(finished[0], tmp_path / "older", recorded)
    assert older == ["machine perhaps changed: memory_policy is 'none', and was not recorded before"]


def test_a_disk_that_fills_while_the_model_is_exported_is_no_harm_to_the_run(
    tmp_path: Path, text: Path, finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[Path] = []

    def full(path: Path) -> None:
        exports.append(path)
        if len(exports) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "sync_tree", full)
        with pytest.raises(
            ResourceError, match=r"while exporting \S+model \(.* free\); .*continue with --resume$"
        ):
            quiet(tiny(out, text))
    assert not list(out.rglob("*.tmp-*"))
    assert puna.load(out, device="cpu").config.hidden_size == 32  # the model of before
    quiet(tiny(out, text), resume=True)
    assert bare(out) == bare(finished[0])


def test_stopped_while_text_is_read_says_how_to_go_on(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*given: Any) -> Any:
        raise KeyboardInterrupt

    settings = tiny(tmp_path / "run", text, length={"steps": 6})
    with monkeypatch.context() as patch:
        patch.setattr(opening, "open_corpus", pressed)
        with pytest.raises(Interrupted, match=r"continue with --resume$") as stopped:
            quiet(settings)
    assert stopped.value.exit_code == 130
    assert quiet(settings, resume=True)["steps"] == 6


def test_stopped_while_speed_is_measured_claims_no_step(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*given: Any, **named: Any) -> None:
        raise Interrupted(signal.SIGTERM, "stopped by SIGTERM at step 7; state is saved")

    monkeypatch.setattr(opening, "train", asked)
    told = "stopped by SIGTERM; what was saved before is whole: continue with --resume"
    with pytest.raises(Interrupted, match=told) as stopped:
        quiet(tiny(tmp_path / "run", text, length={"steps": None, "minutes": 1}))
    assert stopped.value.exit_code == 143


def test_changed_meaning_is_refused(text: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate: 0\.003 → 0\.001"):
        quiet(tiny(finished[0], text, optimizer={"learning_rate": 1e-3}), resume=True)


BAD: list[tuple[str, dict[str, Any], type[InputError], str]] = [
    ("missing input", {"data": {"train": ["nowhere"]}}, DataError, "nowhere: no such file"),
    ("too large a vocabulary", {"tokenizer": {"train": {"vocab_size": 30000}}}, TokenizerError, "30,?000"),
    ("no tokenizer there", {"tokenizer": {"path": "nowhere", "train": None}}, TokenizerError, "nowhere"),
    ("not a model", {"init_from": "nowhere", "model": None, "tokenizer": None}, InputError, "nowhere"),
    ("warm-up too long", {"schedule": {"warmup_steps": 30}}, SettingsError, "warm"),
    ("rows do not divide", {"batch": {"rows": 8, "micro_rows": 3}}, SettingsError, "micro"),
    ("too little text", {"data": {"row_length": 60000}}, DataError, "too few tokens"),
    (
        "heads",
        {"model": {"fields": {"hidden_size": 30, "num_attention_heads": 4}}},
        SettingsError,
        "hidden_size",
    ),
    ("unknown preset", {"model": {"preset": "llama-7", "fields": {}}}, InputError, "llama-7b"),
    ("unknown device", {"device": "gpu"}, SettingsError, "device must be one of"),
    ("unknown corpus", {"data": {"corpus": "stdlib", "train": None}}, SettingsError, "python-stdlib"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, text: Path, changes: dict[str, Any], error: type[InputError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        quiet(tiny(tmp_path / "run", text, **changes))
    assert len(str(raised.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_paper_preset_brings_the_papers_recipe() -> None:
    settings = read_settings(
        PretrainSettings, None, ["out=x", "model.preset=llama-65b", "data.train=['t']", "tokenizer.path=t"]
    )
    assert settings.optimizer.learning_rate == 1.5e-4
    assert settings.schedule.warmup_steps == 2000
    assert settings.batch.rows * settings.data.row_length == 4 * 1024**2
    assert settings.length.tokens == 1_400_000_000_000
    shorter = read_settings(
        PretrainSettings,
        None,
        [
            "out=x",
            "model.preset=llama-7b",
            "data.train=['t']",
            "tokenizer.path=t",
            "length.steps=5",
            "batch.rows=4",
        ],
    )
    assert (shorter.length.steps, shorter.length.tokens, shorter.batch.rows) == (5, None, 4)


@pytest.mark.parametrize("name", ["laptop", "gpu", "node", "llama-7b", "continue"])
def test_example_settings_are_valid(name: str) -> None:
    read_settings(PretrainSettings, Path(__file__).parents[2] / "configs" / f"{name}.toml")
