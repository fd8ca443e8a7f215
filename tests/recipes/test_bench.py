"""`puna bench`: figures by hand, work that is counted exactly, settings that make no sense."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna import formats
from puna.errors import InputError, ModelError, ResourceError, SettingsError
from puna.kernels.library import load as load_library
from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token, parameters
from puna.model.initial import initialize
from puna.model.llama import Llama
from puna.model.presets import preset
from puna.model.weights import weights_of
from puna.plan import measure
from puna.plan.measure import Peak, Reading
from puna.progress import silent
from puna.quantize.packing import pack
from puna.quantize.recipe import Recipe
from puna.recipes.bench import figures, serving, training
from puna.recipes.bench.command import WHATS, bench, explain
from puna.recipes.bench.figures import Figure, Limits, PeakMemory, Repeat
from puna.recipes.bench.generation import (
    HEADINGS,
    DecodeSettings,
    PrefillSettings,
    _Bench,
    _decode_run,
    _prefill_run,
)
from puna.recipes.bench.model import Subject, flops_of, open_subject, random_model
from puna.recipes.bench.work import bits_per_weight, has_whole_numbers, whole_operations
from puna.settings import parse
from tests.model.shapes import CONFIGS, model_of

CPU = torch.device("cpu")
SHAPE = CONFIGS["explicit head width"].model_copy(update={"max_position_embeddings": 64})
POSITION = 2 * SHAPE.num_hidden_layers * SHAPE.num_key_value_heads * SHAPE.head_dim * 4  # bytes in float32


def limits(flops: float, rate: float) -> Limits:
    return Limits(Peak(flops, torch.float32, CPU, 1), Reading(rate, 1, CPU, 1))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are measured in no time, and are accordingly wrong."""
    monkeypatch.setattr(figures, "SECONDS", 0.002)
    monkeypatch.setattr(measure, "BUFFER", {"cpu": 1 << 22})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model"
    formats.save(path, weights_of(model_of(SHAPE)))
    return path


def run(what: str, *arguments: str, said: list[str] | None = None) -> list[dict[str, Any]]:
    lines = [] if said is None else said
    results: list[dict[str, Any]] = bench(what, arguments, None, lines.append, silent)["results"]
    return results


def test_the_floor_is_the_slower_of_reading_and_computing() -> None:
    reads = Repeat(seconds=4.0, units=8, read=300.0, flops=50.0, limits=limits(100.0, 100.0))
    assert reads.floor == {"memory": 3.0, "matrix": 0.5}
    assert reads.ratio == 0.75
    computes = Repeat(seconds=4.0, units=8, read=50.0, flops=100.0, limits=limits(100.0, 100.0))
    assert computes.ratio == 0.25
    figure = Figure("x", {"a": 1}, "tokens/s", [computes], {"cores": 2}, {"more": 3})
    assert figure.limit == (8.0, "matrix")
    found = figure.as_dict()
    assert list(found) == ["what", "settings", "value", "unit", "limit", "ratio", "environment", "details"]
    assert (found["value"], found["limit"], found["ratio"]) == (2.0, 8.0, 0.25)
    assert found["details"]["limited_by"] == "matrix"
    assert found["details"]["more"] == 3
    json.dumps(found)


def test_eight_bits_are_multiplied_at_a_rate_of_their_own() -> None:
    both = Limits(Peak(10.0, torch.float32, CPU, 1), Reading(1.0, 1, CPU, 1), Peak(40.0, torch.int8, CPU, 1))
    work = Repeat(seconds=8.0, units=1, read=1.0, flops=20.0, limits=both, narrow=80.0)
    assert work.floor == {"memory": 1.0, "matrix": 2.0 + 2.0}
    assert Figure("x", {}, "tokens/s", [work], {}).as_dict()["details"]["matrix_eight_bit_ops"] == 40.0
    faster = Limits(both.peak, both.reading, Peak(50.0, torch.int8, CPU, 1))
    for one, other in ((both, faster), (faster, both), (limits(1.0, 1.0), faster)):
        better = one.better(other).narrow
        assert better is not None and better.flops == 50.0
    assert limits(1.0, 1.0).better(limits(2.0, 2.0)).narrow is None


def test_every_way_to_the_peak_of_whole_numbers_multiplies_them() -> None:
    left, right = (torch.randint(-127, 128, (64, 64), dtype=torch.int8) for _ in range(2))
    expected = left.double() @ right.double().T
    ways = measure._whole_products(left, right)
    assert len(ways) >= 1
    for product in ways:
        assert torch.equal(product().double(), expected)
    peak = measure.measure_peak(CPU, torch.int8, 0.01)
    assert peak.flops > 0
    assert "OP/s (int8 matrix products" in str(peak) and "FLOP/s" not in str(peak)


def test_a_figure_is_its_median_repeat_by_the_limits_of_its_own_moment() -> None:
    """The second repeat is slow because memory was: it reached more of what there was than the third."""
    figure = Figure(
        "x",
        {},
        "tokens/s",
        [
            Repeat(1.0, 10, 40.0, 0.0, limits(1.0, 100.0)),
            Repeat(2.0, 10, 40.0, 0.0, limits(1.0, 40.0)),
            Repeat(2.5, 10, 40.0, 0.0, limits(1.0, 100.0)),
        ],
        {},
    )
    assert (figure.rate, figure.typical.ratio) == (10.0, 0.4)
    assert figure.limit == (25.0, "memory")
    assert figure.spread == pytest.approx((10 - 4) / 5)


def test_the_better_limits_of_two() -> None:
    both = limits(1.0, 5.0).better(limits(2.0, 3.0))
    assert (both.peak.flops, both.reading.rate) == (2.0, 5.0)


def test_flops_are_those_of_the_counts_and_add_up() -> None:
    config = CONFIGS["sliding window"]
    whole = flops_of(config, 0, 20, heads=20)
    assert whole == pytest.approx(20 * flops_per_token(config, 20, training=False))
    assert flops_of(config, 0, 7, 7) + flops_of(config, 7, 13, 13) == pytest.approx(whole)
    assert whole - flops_of(config, 0, 20, heads=1) == 19 * 2 * config.vocab_size * config.hidden_size


def test_the_flops_of_a_token_by_hand() -> None:
    """It sees ten keys: two products with each of ten vectors, for every head and layer."""
    D, N, K, H, F, V = 32, 4, 2, 16, 48, SHAPE.vocab_size
    assert (SHAPE.hidden_size, SHAPE.num_attention_heads, SHAPE.head_dim, SHAPE.intermediate_size) == (
        D,
        N,
        H,
        F,
    )
    layer = 2 * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + 2 * 2 * N * H * 10
    assert flops_of(SHAPE, 9, 1, heads=1) == pytest.approx(SHAPE.num_hidden_layers * layer + 2 * V * D)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_but_an_embedding_of_its_own(tied: bool) -> None:
    config = SHAPE.model_copy(update={"tie_word_embeddings": tied})
    counts = parameters(config)
    subject = Subject(random_model(config, torch.bfloat16, CPU), None, 64)
    assert subject.weight_bytes == 2 * counts.total
    assert subject.step_bytes == 2 * (counts.total if tied else counts.total - counts.embedding)


def test_random_weights_are_those_that_training_begins_with() -> None:
    ours = random_model(SHAPE, torch.bfloat16, CPU)
    theirs = Llama(SHAPE)
    initialize(theirs, seed=0)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16)), name


INTEGERS = pytest.mark.skipif(
    load_library("integers").functions is None, reason="no compiler: whole numbers are expanded"
)


def quantized(tied: bool, **recipe: Any) -> Subject:
    config = SHAPE.model_copy(update={"tie_word_embeddings": tied})
    model = random_model(config, torch.bfloat16, CPU, parse(Recipe, recipe))
    pack(model)
    return Subject(model, None, 64)


@INTEGERS
def test_operations_on_whole_numbers_are_those_of_quantized_matrices() -> None:
    """Of both kinds, since eight bits are what is multiplied; the output only where there are logits."""
    D, N, K, H, F, V = 32, 4, 2, 16, 48, SHAPE.vocab_size
    down, layer = D * F, 2 * D * N * H + 2 * D * K * H + 2 * D * F
    layers = SHAPE.num_hidden_layers
    mixed = {"scheme": "int4", "exceptions": {"*.down_proj": "int8"}, "output": "int8"}
    model = quantized(False, **mixed).model
    assert whole_operations(model, 10, heads=3) == 2 * (10 * layers * (down + layer) + 3 * D * V)
    kept = quantized(False, scheme="int8", exceptions={"*.down_proj": "keep"}, output="keep").model
    assert whole_operations(kept, 10, heads=3) == 2 * 10 * layers * layer
    tied = quantized(True, scheme="int8", output="int8").model
    assert whole_operations(tied, 10, heads=3) == 2 * (10 * layers * (down + layer) + 3 * D * V)
    assert not has_whole_numbers(random_model(SHAPE, torch.bfloat16, CPU))


@INTEGERS
def test_bits_per_weight_are_of_what_a_step_reads_with_its_scales() -> None:
    plain = Subject(random_model(SHAPE, torch.bfloat16, CPU), None, 64)
    assert bits_per_weight(plain) == 16
    counts = parameters(SHAPE)
    D, N, K, H, F = 32, 4, 2, 16, 48
    outputs = SHAPE.num_hidden_layers * (N * H + 2 * K * H + D + 2 * F + D)
    weights, read = counts.attention + counts.mlp, counts.total - counts.embedding
    subject = quantized(False, scheme="int8", output="keep")
    bytes_read = weights + 4 * outputs + 2 * (counts.head + counts.norm)
    assert bits_per_weight(subject) == pytest.approx(8 * bytes_read / read, rel=0.02)  # panels are filled up


def begin(settings: DecodeSettings | PrefillSettings, config: ModelConfig = SHAPE) -> _Bench:
    subject = Subject(model_of(config).eval(), None, config.max_position_embeddings)
    return _Bench(settings, subject, CPU, torch.float32, PeakMemory(CPU))


def test_what_decoding_reads_and_computes_is_counted_exactly() -> None:
    settings = parse(DecodeSettings, {"prompt": 5, "new": 3, "streams": [2]})
    bench_ = begin(settings)
    engine = bench_.new_engine(2, 16)
    work = _decode_run(bench_, engine, settings, 2, seed=1)
    # The prompts' step gave each sequence a sixth token; the three steps that count see 6, 7 and 8 positions.
    assert (work.steps, work.tokens) == (3, 6)
    assert work.read == 3 * bench_.subject.step_bytes + 2 * (6 + 7 + 8) * POSITION
    assert work.flops == pytest.approx(2 * flops_of(SHAPE, 5, 3, heads=3))
    assert work.seconds > sum(work.parts.values()) > 0
    assert engine.times.steps == 4
    assert engine.load.running == engine.load.waiting == 0


def test_a_window_bounds_what_is_read() -> None:
    config = CONFIGS["sliding window"].model_copy(update={"max_position_embeddings": 64})
    settings = parse(DecodeSettings, {"prompt": 5, "new": 3, "streams": [1]})
    bench_ = begin(settings, config)
    work = _decode_run(bench_, bench_.new_engine(1, 16), settings, 1, seed=1)
    assert work.read == 3 * bench_.subject.step_bytes + (6 + 6 + 6) * bench_.position_bytes


def test_decoding_starts_when_all_prompts_are_computed() -> None:
    """In steps of sixteen rows the first streams run ahead of the last ones."""
    values = {"prompt": 9, "new": 2, "streams": [4], "engine": {"step_tokens": 16, "max_running": 8}}
    settings = parse(DecodeSettings, values)
    bench_ = begin(settings)
    engine = bench_.new_engine(4, 60)
    work = _decode_run(bench_, engine, settings, 4, seed=1)
    assert work.tokens == 8
    assert engine.times.rows > 4 * 9 + 8  # those ahead decoded meanwhile


def test_a_prompt_is_timed_to_the_first_token() -> None:
    settings = parse(PrefillSettings, {"prompt": [11], "engine": {"step_tokens": 8, "max_running": 1}})
    bench_ = begin(settings)
    work = _prefill_run(bench_, bench_.new_engine(1, 12), 11, seed=1)
    assert (work.steps, work.tokens) == (2, 11)
    assert work.read == bench_.subject.step_bytes
    assert work.flops == pytest.approx(flops_of(SHAPE, 0, 11, heads=1))


def test_a_table_and_a_row_of_json_for_every_number_of_streams(directory: Path) -> None:
    said: list[str] = []
    results = run(
        "decode",
        str(directory),
        "streams=[1, 3]",
        "prompt=4",
        "new=3",
        "repeats=2",
        "dtype=float32",
        said=said,
    )
    assert [result["settings"]["streams"] for result in results] == [[1], [3]]
    assert [line.split()[0] for line in said[-3:]] == ["streams", "1", "3"]
    for result in results:
        assert (result["what"], result["unit"]) == ("decode", "tokens/s")
        assert result["value"] > 0
        assert result["ratio"] == pytest.approx(result["value"] / result["limit"])
        assert len(result["details"]["repeats"]) == 2
        outside = result["details"]["outside_the_model"]
        assert outside["all"] == pytest.approx(sum(outside[part] for part in ("schedule", "sample", "text")))
        assert 0 < outside["all"] < 1
        memory = result["details"]["memory"]
        assert memory["weights"] == 4 * parameters(SHAPE).total
        assert memory["cache"] == result["settings"]["streams"][0] * 64 * POSITION
        again = parse(DecodeSettings, json.loads(json.dumps(result["settings"])))
        assert again.model == str(directory)
        assert result["environment"]["threads"] == torch.get_num_threads()


@INTEGERS
@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_a_model_quantized_meanwhile_is_measured_as_one_that_was_before(
    what: str, directory: Path, tmp_path: Path
) -> None:
    few = ["repeats=1", "dtype=bfloat16", *(["streams=[1]", "prompt=4", "new=3"] if what == "decode" else [])]
    few += ["prompt=[9]"] if what == "prefill" else []
    said: list[str] = []
    (now,) = run(what, str(directory), "quantize=int8", *few, said=said)
    assert any("bits per weight read" in line for line in said)
    assert any("int8 matrix products" in line for line in said)
    assert now["settings"]["quantize"]["scheme"] == "int8"
    assert now["details"]["matrix_eight_bit_ops"] > 0
    puna.load(directory, dtype="bfloat16", device="cpu", quantize="int8").save(tmp_path / "int8")
    (before,) = run(what, str(tmp_path / "int8"), *few)
    assert before["details"]["bits_per_weight"] == now["details"]["bits_per_weight"] < 16
    assert before["details"]["memory"]["weights"] == now["details"]["memory"]["weights"]
    (plain,) = run(what, str(directory), "quantize=none", *few)
    assert plain["settings"]["quantize"] is None
    assert plain["details"]["bits_per_weight"] == 16
    assert plain["details"]["matrix_eight_bit_ops"] is None
    again = parse(WHATS[what].settings, json.loads(json.dumps(now["settings"])))
    assert again.model_dump(mode="json") == now["settings"]


def test_prefill_has_a_row_for_every_length(directory: Path) -> None:
    results = run("prefill", "repeats=1", "prompt=[3, 20]", f"model={directory}", "dtype=float32")
    assert [result["settings"]["prompt"] for result in results] == [[3], [20]]
    assert all(result["what"] == "prefill" and result["value"] > 0 for result in results)


def test_settings_come_from_a_file_and_the_command_line_wins(tmp_path: Path, directory: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(f'model = "{directory}"\nprompt = [3]\nrepeats = 1\n[engine]\ndeterministic = false\n')
    (result,) = bench("prefill", ["prompt=[5]"], path, lambda line: None, silent)["results"]
    assert result["settings"]["prompt"] == [5]
    assert result["settings"]["engine"]["deterministic"] is False


@pytest.mark.parametrize("what", WHATS)
def test_the_help_names_every_setting_with_its_default_and_every_column(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    lines = explain(what).splitlines()
    assert max(map(len, lines)) <= 90
    rows = {
        line.split()[0]: " ".join(line.split()[1:]) for line in lines if line[:2] == "  " and line[2] != " "
    }
    for name in WHATS[what].settings.model_fields:
        assert any(row.partition(".")[0] == name for row in rows), name
    assert rows["model"].startswith("puna-110m A preset")
    if what == "train":
        assert rows["rows"].startswith("8 Rows of tokens that one update")
    else:
        assert rows["engine.step_tokens"].startswith("512")
        prompts = {"decode": "64 Tokens", "prefill": "[128,512] Tokens", "serve": "[16,256] Tokens"}
        assert rows["prompt"].startswith(prompts[what])
    assert all(len(text.split()) > 1 for name, text in rows.items() if "engine" not in name)
    headings = {"serve": serving.HEADINGS, "train": training.HEADINGS}.get(what, HEADINGS)
    assert set(headings) <= set(rows)


def test_a_presets_context_grows_with_what_is_measured() -> None:
    subject = open_subject("puna-1m", torch.float32, CPU, None, 700)
    assert (subject.context, subject.model.config.max_position_embeddings) == (700, 700)
    assert (
        open_subject("puna-1m", torch.float32, CPU, None, 9).context
        == preset("puna-1m").max_position_embeddings
    )
    with pytest.raises(
        SettingsError, match="positions are needed, and the context has 99; lower prompt or new, or raise"
    ):
        open_subject("puna-1m", torch.float32, CPU, 99, 700)


@pytest.mark.parametrize(
    ("what", "arguments", "error", "message"),
    [
        (
            "decoed",
            [],
            SettingsError,
            "what must be one of train, decode, prefill, serve, got 'decoed'. Did you mean 'decode'",
        ),
        ("decode", ["stream=[1]"], SettingsError, "unknown setting 'stream'. Did you mean 'streams'"),
        ("decode", ["streams=[0]"], SettingsError, "streams must be from 1 to engine.max_running, 64, got"),
        (
            "decode",
            ["streams=[1, 65]"],
            SettingsError,
            "streams must be from 1 to engine.max_running, 64, got",
        ),
        ("decode", ["streams=[]"], SettingsError, "'streams'"),
        ("decode", ["sampling.n=2"], SettingsError, "sampling.n and best_of must be 1 here"),
        ("decode", ["repeats=0"], SettingsError, "'repeats'"),
        ("decode", ["dtype=float12"], SettingsError, "dtype must be auto or one of"),
        ("decode", ["no/such/model"], ModelError, "no/such/model"),
        ("decode", ["quantize=int7"], SettingsError, "int7"),
        ("decode", ["MODEL", "quantize=gptq"], SettingsError, "calibrated with text"),
        (
            "prefill",
            ["MODEL", "prompt=[9]", "quantize.scheme=int8", "quantize.exceptions.x=keep"],
            SettingsError,
            "'x' matches no matrix",
        ),
        ("prefill", ["prompt=[0]"], SettingsError, "prompt must name lengths of at least 1"),
        (
            "prefill",
            ["MODEL", "prompt=[99]"],
            SettingsError,
            "100 positions are needed, and the context has 64",
        ),
        ("prefill", ["MODEL", "context=99"], SettingsError, "context is for presets"),
        ("decode", ["MODEL", "prompt=4", "new=4", "engine.cache_memory=1"], ResourceError, "cache_memory"),
        (
            "decode",
            [
                "MODEL",
                "prompt=4",
                "new=4",
                "streams=[1]",
                f"sampling.stop_ids={list(range(SHAPE.vocab_size))}",
            ],
            SettingsError,
            "an answer ended before all steps were timed",
        ),
    ],
)
def test_mistakes_are_told(
    what: str, arguments: list[str], error: type[InputError], message: str, directory: Path
) -> None:
    named = [str(directory) if argument == "MODEL" else argument for argument in arguments]
    with pytest.raises(error) as caught:
        run(what, *named)
    assert message in str(caught.value)


def test_streams_that_had_to_wait_are_no_figure(directory: Path) -> None:
    each = 64 * POSITION
    with pytest.raises(ResourceError, match="too little memory for all streams at once"):
        run("decode", str(directory), "streams=[3]", "prompt=4", "new=4", f"engine.cache_memory={2 * each}",
            "dtype=float32")  # fmt: skip


@pytest.fixture
def _torch_memory() -> Iterator[PeakMemory]:
    yield PeakMemory(CPU)


def test_the_peak_of_memory_is_what_was_held_at_most(_torch_memory: PeakMemory) -> None:
    memory = _torch_memory
    if memory.most() is None:
        pytest.skip("this system does not tell")
    size = 64 << 20
    held = torch.ones(size, dtype=torch.uint8)
    del held
    assert size * 0.95 < (memory.most() or 0) < size * 1.5
    memory.restart()
    assert (memory.most() or 0) < size * 0.5
    assert math.isfinite(memory.most() or 0)
