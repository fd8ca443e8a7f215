"""`puna quantize`: its figures against models run by hand, resumed as if never stopped, bounded."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna import cli, formats
from puna.errors import DataError, InputError, Interrupted, ModelError, ResourceError, SettingsError
from puna.formats import provenance
from puna.formats.packed import plain
from puna.model.config import ModelConfig
from puna.model.initial import initial_weights
from puna.model.weights import Packed, Weights, weights_of
from puna.recipes.describe import describe
from puna.recipes.quantization import model as model_quantizer
from puna.recipes.quantization import unfinished
from puna.recipes.quantization.damage import worst
from puna.recipes.quantization.run import quantize
from puna.recipes.quantization.settings import read_quantize_settings, settings_of
from puna.recipes.quantization.unfinished import partial_of
from puna.tokenizer.tokenizer import Tokenizer
from tests.model.shapes import model_of
from tests.reference import numpy_llama
from tests.small import small_tokenizer

SCHEMES = ("int8", "int4", "gptq", "nf4")
FEW = {"calibration": {"sequences": 5, "measured": 2}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough of it for a few hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def number_{i}(x): return {i} * x - {i * i % 7}\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped heads, untied; wide enough for every scheme."""
    return save(tmp_path_factory.mktemp("model") / "model", tokenizer)


def save(path: Path, tokenizer: Tokenizer | None, **changes: Any) -> Path:
    config = ModelConfig(
        **{
            "vocab_size": 400,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
    )
    formats.save(path, weights_of(model_of(config)), tokenizer)
    return path


def quantized(source: Path, destination: Path, scheme: str, text: Path | None, **more: Any) -> dict[str, Any]:
    values = {"scheme": scheme, **FEW, **more.pop("settings", {})}
    return quantize(
        formats.open_model(source),
        destination,
        settings_of(values),
        calibration=() if text is None else (text,),
        **more,
    )


def numbers(model: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model in float64."""
    source = formats.open_model(model)
    return {name: plain(value).double().numpy() for name, value in source.weights}


def logits(model: Path, ids: np.ndarray) -> np.ndarray:
    """(B, T, V), by the straight-line program."""
    source = formats.open_model(model)
    weights = numbers(model)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    found, _ = numpy_llama.forward(source.config.model_dump(mode="json"), weights, ids)
    return found


def by_hand(first: np.ndarray, second: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """KL divergence, agreement and perplexities of logits (B, T, V)."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x - x.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(first), log_softmax(second)
    scored = [-np.take_along_axis(x[:, :-1], ids[:, 1:, None], -1).mean() for x in (p, q)]
    return {
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1_agreement": float((first.argmax(-1) == second.argmax(-1)).mean()),
        "perplexity_of_source": math.exp(scored[0]),
        "perplexity": math.exp(scored[1]),
    }


def measured_ids(tokenizer: Tokenizer, text: Path, sequences: int, length: int) -> np.ndarray:
    """The first sequences of a text: BOS, and the tokens that follow."""
    ids = tokenizer.encode(text.read_text(), bos=False)[: sequences * (length - 1)]
    rows = np.array(ids).reshape(sequences, length - 1)
    return np.concatenate([np.full((sequences, 1), tokenizer.bos_id), rows], axis=1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_figures_are_those_of_the_files(
    scheme: str, saved: Path, text: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    done = quantized(saved, tmp_path / "small", scheme, text)
    record = done["quantization"]
    ids = measured_ids(tokenizer, text, 2, 64)
    meant = by_hand(logits(saved, ids), logits(tmp_path / "small", ids), ids)
    for name, value in meant.items():
        assert record["numbers"][name] == pytest.approx(value, rel=2e-3), name
    change = 100 * (meant["perplexity"] / meant["perplexity_of_source"] - 1)
    assert record["numbers"]["perplexity_change_percent"] == pytest.approx(change, abs=1e-3)
    assert provenance.read(tmp_path / "small") == {key: done[key] for key in done if key != "path"}
    assert not partial_of(tmp_path / "small").exists()


def in_whole_numbers(x: np.ndarray, groups: int) -> np.ndarray:
    """Each group of a row to multiples of its largest magnitude / 127."""
    parts = x.reshape(*x.shape[:-1], groups, -1)
    step = np.abs(parts).max(-1, keepdims=True) / 127
    return (np.round(parts / step) * step).reshape(x.shape)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_engine_rounds_what_it_multiplies(
    scheme: str,
    saved: Path,
    text: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = quantized(saved, tmp_path / "small", scheme, text, settings={"output": "keep"})
    stored = dict(formats.open_model(tmp_path / "small").weights)
    ids = measured_ids(tokenizer, text, 2, 64)
    source = logits(saved, ids)
    plain_linear = numpy_llama.linear

    def linear(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
        value = stored[f"{name}.weight"]
        rounded = in_whole_numbers(x, value.scales.shape[1]) if isinstance(value, Packed) else x
        return plain_linear(weights, name, rounded)

    monkeypatch.setattr(numpy_llama, "linear", linear)
    meant = by_hand(source, logits(tmp_path / "small", ids), ids)
    record = done["quantization"]
    # A sum that is rounded otherwise turns a number near a half: a few per cent of what is lost.
    assert record["engine"]["kl"] == pytest.approx(meant["kl"], rel=0.05)
    assert record["engine"]["perplexity"] == pytest.approx(meant["perplexity"], rel=2e-3)
    assert record["engine"]["kl"] != record["numbers"]["kl"]
    assert record["primary"] == "engine"


def test_the_figures_of_a_layer(saved: Path, text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    layers = quantized(saved, tmp_path / "small", "int4", text)["quantization"]["layers"]
    before, after = numbers(saved), numbers(tmp_path / "small")
    name = "model.layers.0.self_attn.q_proj.weight"
    found = layers[0]["matrices"]["q_proj"]
    apart = after[name] - before[name]
    assert found["weights"] == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(before[name]), rel=1e-4)
    ids = measured_ids(tokenizer, text, 2, 64)
    gain = before["model.layers.0.input_layernorm.weight"]
    x, _ = numpy_llama.rms_norm(gain, before["model.embed_tokens.weight"][ids], 1e-5)
    meant, rounded = x @ before[name].T, in_whole_numbers(x, 4)
    assert found["numbers"] == pytest.approx(relative(x @ after[name].T, meant), rel=1e-4)
    assert found["engine"] == pytest.approx(relative(rounded @ after[name].T, meant), rel=1e-3)
    # The embedding is kept, so before the first layer there is no difference yet.
    assert layers[0]["own"] == pytest.approx(layers[0]["hidden"]["engine"], rel=1e-5)
    assert layers[1]["own"] < layers[1]["hidden"]["engine"]


def relative(found: np.ndarray, meant: np.ndarray) -> float:
    return float(np.linalg.norm(found - meant) / np.linalg.norm(meant))


def test_gptq_loses_less_than_rounding(saved: Path, text: Path, tmp_path: Path) -> None:
    settings = {"calibration": {"sequences": 40, "measured": 4}, "group": 32}
    lost = {}
    for scheme in ("int4", "gptq"):
        done = quantized(saved, tmp_path / scheme, scheme, text, settings=settings)
        lost[scheme] = done["quantization"]["layers"][-1]["hidden"]["numbers"]
    assert lost["gptq"] < 0.8 * lost["int4"]


def test_what_is_added_to_the_stream_makes_good_what_the_stream_lacks(
    saved: Path, text: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Beside gptq, int8 is rounded to nearest from where the stream comes nearest to the source's."""
    target, settings = tmp_path / "small", {"exceptions": {"*.o_proj": "int8", "*.down_proj": "int8"}}
    quantized(saved, target, "gptq", text, settings=settings)
    ids = measured_ids(tokenizer, text, 7, 64)[2:]  # those behind what is measured on
    config = formats.open_model(saved).config.model_dump(mode="json")
    before, after = numbers(saved), numbers(target)
    meant, found = (numpy_llama.forward(config, weights, ids)[1]["layers"] for weights in (before, after))
    for layer in range(2):
        for name, stream, inputs in (("self_attn.o_proj", 0, 7), ("mlp.down_proj", 8, 13)):
            key = f"model.layers.{layer}.{name}.weight"
            s, x = (states[layer][inputs].reshape(320, -1) for states in (meant, found))
            lacks = (meant[layer][stream] - found[layer][stream]).reshape(320, -1)
            root = math.sqrt(0.01 * np.square(x).sum(0).mean())
            goal = np.concatenate([lacks + s @ before[key].T, root * before[key].T])
            aim = np.linalg.lstsq(np.concatenate([x, root * np.eye(x.shape[1])]), goal, rcond=None)[0].T
            steps = np.abs(aim).max(1, keepdims=True) / 127
            assert (np.abs(after[key] - aim) < 0.52 * steps).all(), key
            assert (np.abs(after[key] - before[key]) > 2 * steps).mean() > 0.1, key


def test_layers_that_suffer_are_told_with_what_helps(saved: Path, text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = quantized(saved, tmp_path / "first", "int4", text, say=said.append)
    [first, second] = done["quantization"]["worst"]
    assert first["own"] >= second["own"]
    assert first["advice"] == f"--except '*.layers.{first['layer']}.*.{first['matrix']}=int8'"
    assert any(line.startswith("suffers most") and first["advice"] in line for line in said)
    pattern = first["advice"].removeprefix("--except '").removesuffix("=int8'")
    again = quantized(saved, tmp_path / "second", "int4", text, settings={"exceptions": {pattern: "int8"}})
    about = again["quantization"]["layers"][first["layer"]]
    assert about["matrices"][first["matrix"]]["scheme"] == "int8"
    assert about["own"] < first["own"]


def test_sizes(saved: Path, text: Path, tmp_path: Path) -> None:
    size = quantized(saved, tmp_path / "small", "int4", text, settings={"output": "int4"})["quantization"][
        "size"
    ]
    linear = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 192) + 128 * 400
    plain_ = 128 * 400 + 5 * 128  # the embedding and the norms
    assert size["before"] == 4 * (linear + plain_)
    assert size["after"] == linear * 4.5 / 8 + 4 * plain_
    assert size["bits_per_quantized_weight"] == 4.5
    assert size["quantized_matrices"] == 15


@pytest.mark.parametrize(
    ("scheme", "advice"), [("gptq", "*.layers.0.*.v_proj=int8"), ("int4", "*.layers.0.*.down_proj=keep")]
)
def test_what_makes_good_the_loss_of_gptq_is_not_blamed(scheme: str, advice: str) -> None:
    v, down = {"scheme": scheme, "engine": 0.1}, {"scheme": "int8", "engine": 0.2}
    layers = [
        {"layer": 0, "own": 0.1, "matrices": {"v_proj": v, "down_proj": down}},
        {"layer": 1, "own": 0.0, "matrices": {"v_proj": v}},
    ]
    [found] = worst(layers, fitted=scheme == "gptq")
    assert found["advice"] == f"--except '{advice}'"
    int8 = [{"layer": 0, "own": 0.1, "matrices": {"down_proj": down}}]
    assert worst(int8, fitted=False) and not worst(int8, fitted=True)  # gptq on the output alone fits all


class Killed(BaseException):
    """The end of the process, as far as a test in it can tell."""


def stop_at(monkeypatch: pytest.MonkeyPatch, place: str, step: int, stop: type[BaseException]) -> None:
    """End while a step is computed, or once it was finished."""
    whole: Callable[..., Any] = model_quantizer.ModelQuantizer._step
    finish = model_quantizer.Unfinished.finish

    def within(self: Any, number: int, *rest: Any) -> Any:
        found = whole(self, number, *rest)
        if place == "within" and number == step:
            raise stop
        return found

    def after(self: Any, *arguments: Any) -> None:
        finish(self, *arguments)
        if place == "after" and len(self.records) == step + 1:
            raise stop

    monkeypatch.setattr(model_quantizer.ModelQuantizer, "_step", within)
    monkeypatch.setattr(model_quantizer.Unfinished, "finish", after)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("scheme", ["gptq", "int8"])
def test_resumed_is_never_stopped(
    scheme: str, saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(saved, tmp_path / "whole", scheme, text)
    target = tmp_path / "resumed"
    for place, step in (("within", 1), ("after", 1), ("within", 2), ("after", 3)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"--resume|nothing is left"):
            stop_at(patch, place, step, KeyboardInterrupt)
            quantized(saved, target, scheme, text, resume=True)
        assert not target.exists()
    quantized(saved, target, scheme, text, resume=True)
    assert content(target) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]


def test_what_is_resumed_is_the_same(
    saved: Path, text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, partial = tmp_path / "small", tmp_path / "small.partial"
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"small\.partial.*--resume"):
        stop_at(patch, "after", 1, KeyboardInterrupt)
        quantized(saved, target, "gptq", text)
    kept = content(partial)
    with pytest.raises(ModelError, match=r"2 finished steps.*--resume.*--force"):
        quantized(saved, target, "gptq", text)
    with pytest.raises(ModelError, match=r"begun with another gptq\.damping \(0\.01, now 0\.02\); leave"):
        quantized(saved, target, "gptq", text, resume=True, settings={"gptq": {"damping": 0.02}})
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[100:])
    with pytest.raises(ModelError, match="begun with another text"):
        quantized(saved, target, "gptq", other, resume=True)
    assert content(partial) == kept
    changed = save(tmp_path / "changed", tokenizer)
    tensors = {name: plain(value) * 1.01 for name, value in formats.open_model(saved).weights}
    config = formats.open_model(saved).config
    formats.save(changed, Weights(config, tensors.items()), tokenizer, overwrite=True)
    with pytest.raises(ModelError, match="changed since this was begun"):
        quantized(changed, target, "gptq", text, resume=True)
    small = formats.open_model(saved).config.model_copy(update={"rope_theta": 500.0})
    formats.save(tmp_path / "other", Weights(small, tensors.items()), tokenizer)
    with pytest.raises(ModelError, match="begun from another model; name that one"):
        quantized(tmp_path / "other", target, "gptq", text, resume=True)
    assert content(partial) == kept
    quantized(saved, target, "gptq", text, force=True)
    assert target.is_dir() and not partial.exists()


def test_a_run_goes_on_by_the_options_it_was_begun_with(
    saved: Path, text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    values = {"scheme": "gptq:32", **FEW, "exceptions": {"*.v_proj": "int8"}, "gptq": {"damping": 0.02}}
    monkeypatch.chdir(tmp_path)  # files are named as a user names them

    def run(target: str, values: dict[str, Any], **more: Any) -> None:
        quantize(formats.open_model(saved), tmp_path / target, settings_of(values), **more)

    files = {"calibration": [os.path.relpath(text)], "measure_on": [text], "tokenizer": "tokenizer"}
    run("whole", values, **files)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, "after", 1, KeyboardInterrupt)
        run("small", values, **files)
    monkeypatch.chdir(saved)
    other = {"scheme": "int4", "exceptions": {"*.v_proj": "int4"}, "gptq": {"damping": 0.03}}
    with pytest.raises(ModelError) as raised:
        run("small", other, resume=True)
    for part in (
        "another scheme ('gptq', now 'int4')",
        "exceptions.*.v_proj ('int8', now 'int4')",
        "gptq.damping (0.02, now 0.03)",
    ):
        assert part in str(raised.value)
    assert "group" not in str(raised.value) and "calibration" not in str(raised.value)
    run("small", {"gptq": {"damping": 0.02}}, measure_on=[text], resume=True)
    assert content(tmp_path / "small") == content(tmp_path / "whole")


def test_a_disk_that_fills_is_one_line_and_what_is_finished_is_kept(
    saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = unfinished.chunks
    written = itertools.count()

    def filling(*arguments: Any) -> Any:
        if next(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "chunks", filling)
        with pytest.raises(
            ResourceError, match=r"No space left .* free\); free some space and go on with --resume"
        ):
            quantized(saved, tmp_path / "small", "int8", text)
    quantize(formats.open_model(saved), tmp_path / "small", settings_of({}), resume=True)
    quantized(saved, tmp_path / "whole", "int8", text)
    assert content(tmp_path / "small") == content(tmp_path / "whole")


def test_what_another_version_began_is_not_gone_on_with(
    saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, manifest = tmp_path / "small", tmp_path / "small.partial" / "manifest.json"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, "after", 1, KeyboardInterrupt)
        quantized(saved, target, "int8", text)
    stored = json.loads(manifest.read_text())
    older = {key: value for key, value in stored["identity"].items() if key != "results"}
    for identity in (older, {**older, "results": 1, "puna": "0.0.1"}):
        manifest.write_text(json.dumps({**stored, "identity": identity}))
        with pytest.raises(
            ModelError, match=r"was begun by Puna 0\S+ \(results of version [01]\), and this is"
        ):
            quantized(saved, target, "int8", text, resume=True)
        with pytest.raises(ModelError, match=r"2 finished steps of Puna \S+ .*; begin again with --force$"):
            quantized(saved, target, "int8", text)
    quantized(saved, target, "int8", text, force=True)
    assert target.is_dir() and not manifest.parent.exists()


def test_nothing_is_taken_from_a_run_that_finished_no_step(
    saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, manifest = tmp_path / "small", tmp_path / "small.partial" / "manifest.json"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, "after", 1, KeyboardInterrupt)
        quantized(saved, target, "int8", text, settings={"exceptions": {"*.v_proj": "keep"}})
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "steps": []}))
    for step in manifest.parent.glob("step-*"):
        step.unlink()
    quantized(saved, target, "int4", text, resume=True)
    quantized(saved, tmp_path / "whole", "int4", text)
    assert content(target) == content(tmp_path / "whole")


def test_measuring_is_part_of_what_is_gone_on_with(
    saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "small"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, "after", 1, KeyboardInterrupt)
        quantized(saved, target, "int8", text, settings={"measure": False})
    with pytest.raises(ModelError, match=r"begun with another measure \(False, now True\)"):
        quantized(saved, target, "int8", text, settings={"measure": True}, resume=True)
    quantize(formats.open_model(saved), target, settings_of({}), resume=True)
    record = provenance.read(target)
    assert record is not None and record["quantization"]["settings"]["measure"] is False


def test_a_damaged_manifest(saved: Path, text: Path, tmp_path: Path) -> None:
    partial = tmp_path / "small.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{")
    for how in ({"resume": True}, {"force": True}):
        with pytest.raises(ModelError, match=r"damaged, or of another version; remove"):
            quantized(saved, tmp_path / "small", "int8", text, **how)


@pytest.mark.parametrize("manifest", [None, "{}", '{"version": 1, "identity": {}, "steps": []}'])
@pytest.mark.parametrize("name", ["notes.txt", "my.states", "folder"])
def test_what_is_somebody_elses_stays(
    saved: Path, text: Path, tmp_path: Path, name: str, manifest: str | None
) -> None:
    partial = tmp_path / "small.partial"
    partial.mkdir()
    if manifest is not None:
        (partial / "manifest.json").write_text(manifest)
    if name == "folder":
        (partial / name).mkdir()
    else:
        (partial / name).write_text("mine")
    for how in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(ModelError, match=r"holds|damaged|begun by"):
            quantized(saved, tmp_path / "small", "int8", text, **how)
        assert (partial / name).exists() and (partial / "manifest.json").exists() == (manifest is not None)


IDS = np.arange(600) % 400
BAD: list[tuple[dict[str, Any], type[InputError], str]] = [
    ({"scheme": "int5"}, SettingsError, "'scheme': expected int8, int4, gptq, nf4, or .*'int5'"),
    ({"scheme": "int4", "group": 128}, ModelError, "down_proj.*192 inputs.*multiple of 128"),
    (
        {"scheme": "int4", "exceptions": {"*.dwn_proj": "int8"}},
        SettingsError,
        "'\\*.dwn_proj' matches no matrix",
    ),
    ({"scheme": "int4", "exceptions": {"down_proj": "int8"}}, SettingsError, "mean '\\*.down_proj'"),
    ({"scheme": "int8", "exceptions": {"*": "keep"}}, SettingsError, "nothing is left to quantize"),
    ({"scheme": "int4", "exceptions": {"*.down_proj": "int5"}}, SettingsError, "int5"),
    ({"scheme": "nf4", "exceptions": {"*.down_proj": "int8"}}, InputError, "nf4 .*beside int8"),
    ({"scheme": "nf4", "embeddings": "nf4"}, InputError, "embeddings cannot be nf4"),
    (
        {"scheme": "gptq", "calibration": {"sequences": 500}},
        DataError,
        "500|50[0-9] are asked for.*--calibration",
    ),
    ({"scheme": "gptq", "calibration": {"sequences": 1}}, DataError, "192 tokens are needed to fit to"),
    (
        {"scheme": "gptq", "calibration": {"sequences": 2}, "exceptions": {"*.down_proj": "int8"}},
        DataError,
        "192 tokens are needed to fit to",
    ),
    ({"calibration": {"length": 128}}, DataError, "calibration.length is 128, and the model's context 64"),
    ({"colibration": {"length": 128}}, SettingsError, "unknown setting 'colibration'"),
    ({"gptq": {"damping": 0}}, SettingsError, "damping"),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD)
def test_refused_before_anything_is_written(
    values: dict[str, Any], error: type[InputError], message: str, saved: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        quantize(formats.open_model(saved), tmp_path / "small", settings_of(values), calibration=[text])
    assert len(str(raised.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_refused_for_its_text(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gptq fits to text: name some with --calibration"):
        quantized(saved, tmp_path / "small", "gptq", None)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(DataError, match=r"short\.txt gives .*64 tokens are needed to measure on"):
        quantized(saved, tmp_path / "small", "int8", short, settings={"calibration": {}})
    with pytest.raises(DataError, match=r"nowhere.*no such file"):
        quantized(saved, tmp_path / "small", "int8", tmp_path / "nowhere.txt")
    np.save(tmp_path / "ids.npy", np.full(600, 400))
    with pytest.raises(DataError, match="expected ids from 0 to 399, got 400 to 400"):
        quantized(saved, tmp_path / "small", "int8", tmp_path / "ids.npy")
    np.save(tmp_path / "halves.npy", IDS / 2)
    with pytest.raises(DataError, match="expected whole numbers, got an array of float64"):
        quantized(saved, tmp_path / "small", "int8", tmp_path / "halves.npy")
    assert not (tmp_path / "small").exists() and not partial_of(tmp_path / "small").exists()


def test_refused_for_its_places(saved: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    quantized(saved, small, "int8", text)
    kept = content(small)
    with pytest.raises(ModelError, match=r"small exists already; .* pass --force to replace it$"):
        quantized(saved, small, "int8", text)
    with pytest.raises(ModelError, match=r"quantized already \(.*int8 ×15.*\), and rounding it once more"):
        quantized(small, tmp_path / "smaller", "int4", text)
    with pytest.raises(ModelError, match="holds the source"):
        quantized(saved, saved, "int8", text, force=True)
    assert content(small) == kept
    quantized(saved, small, "int4", text, force=True)
    assert "int4" in formats.open_model(small).stored


def test_a_disk_that_is_too_small(
    saved: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.recipes.quantization import job

    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(ResourceError, match=r"are needed beside .*1kB are free"):
        quantized(saved, tmp_path / "small", "int8", text)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer(text: Path, tmp_path: Path) -> None:
    bare = save(tmp_path / "bare", None)
    with pytest.raises(DataError, match=r"is text, and the model has no tokenizer: .*--tokenizer"):
        quantized(bare, tmp_path / "small", "int8", text)
    said: list[str] = []
    done = quantized(bare, tmp_path / "unmeasured", "int8", None, say=said.append)
    assert any("nothing is measured" in line for line in said)
    assert done["quantization"]["text"] is None and "engine" not in done["quantization"]
    assert done["quantization"]["layers"][0]["matrices"]["q_proj"]["weights"] > 0
    np.save(tmp_path / "ids.npy", IDS)
    measured = quantized(bare, tmp_path / "measured", "gptq", tmp_path / "ids.npy")
    assert measured["quantization"]["text"]["measured_sequences"] == 2
    assert measured["quantization"]["engine"]["kl"] > 0


def test_without_text_the_library_is_measured_on(saved: Path, tmp_path: Path) -> None:
    said: list[str] = []
    quantized(saved, tmp_path / "small", "int8", None, say=said.append)
    assert any("tokens of the source of Python's standard library" in line for line in said)


def test_texts_of_several_kinds(saved: Path, text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines()))
    done = quantize(
        formats.open_model(saved),
        tmp_path / "small",
        settings_of({"scheme": "gptq", **FEW}),
        calibration=[text, lines],
        measure_on=[lines],
    )
    about = done["quantization"]["text"]
    assert (about["origin"], about["fitted_origin"]) == ("lines.jsonl", "text.txt, lines.jsonl")
    assert (about["measured_sequences"], about["fitted_sequences"]) == (2, 5)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_kinds_of_models(changes: dict[str, Any], text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, **changes)
    settings, said = {"output": "int8"}, list[str]()
    done = quantized(source, tmp_path / "small", "int4", text, settings=settings, say=said.append)
    both = "note: int8 is asked of the output projection, and so the embedding is: in this model they are one"
    assert any(line.startswith(both) for line in said) == ("tie_word_embeddings" in changes)
    ids = measured_ids(tokenizer, text, 2, 64)
    meant = by_hand(logits(source, ids), logits(tmp_path / "small", ids), ids)
    assert done["quantization"]["numbers"]["kl"] == pytest.approx(meant["kl"], rel=2e-3)


def test_gptq_of_the_output(saved: Path, text: Path, tmp_path: Path) -> None:
    done = quantized(saved, tmp_path / "small", "gptq", text, settings={"output": "gptq"})
    assert formats.open_model(tmp_path / "small").stored["int4"] == 15
    assert done["quantization"]["size"]["quantized_matrices"] == 15


def test_to_gguf(saved: Path, text: Path, tmp_path: Path) -> None:
    """In groups of 32 with float16 scales int4 is Q4_0 and int8 Q8_0, bit for bit."""
    from puna.formats.convert import convert

    quantized(saved, tmp_path / "small", "gptq", text, settings={"group": 32, "output": "int8:32"})
    small = formats.open_model(tmp_path / "small")
    done = convert(small, tmp_path / "small.gguf", "gguf")
    assert done.comparison is not None and done.comparison.equal
    assert formats.open_model(tmp_path / "small.gguf").stored["q4_0"] == 14
    before, after = numbers(tmp_path / "small"), numbers(tmp_path / "small.gguf")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_settings_from_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        "scheme = 'int4'\ngroup = 128\n[exceptions]\n'*.down_proj' = 'int8'\n[gptq]\ndamping = 0.1\n"
    )
    found = read_quantize_settings(
        file, {"group": 32}, ["lm_head=keep"], ["calibration.sequences=7", "exceptions.'*.v_proj'=int8:32"]
    )
    assert (found.recipe.scheme, found.recipe.group) == ("int4", 32)
    assert found.recipe.exceptions == {"*.down_proj": "int8", "lm_head": "keep", "*.v_proj": "int8:32"}
    assert (found.calibration.sequences, found.gptq.damping) == (7, 0.1)
    with pytest.raises(SettingsError, match="--except: expected PATTERN=SCHEME"):
        read_quantize_settings(None, {}, ["down_proj"], [])


def puna(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "puna", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_command(
    saved: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["puna", "quantize", str(saved), str(tmp_path / "small"), "--scheme", "int4", "--json"]
    options = ["--except", "lm_head=keep", "--calibration", str(text), "--set", "calibration.measured=2"]
    monkeypatch.setattr(sys, "argv", [*command, *options])

    def run() -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    code, told, noted = run()
    assert code == 0, noted
    *lines, last = told.splitlines()
    record, kept = json.loads(last), provenance.read(tmp_path / "small")
    assert kept is not None and record["quantization"] == kept["quantization"]
    assert record["quantization"]["size"]["quantized_matrices"] == 14
    assert lines[1].split() == ["layer", "q", "k", "v", "o", "gate", "up", "down", "alone", "so", "far"]
    assert any(line.startswith("as the engine computes") for line in lines)
    assert "Quantizing" in noted
    code, told, noted = run()
    assert (code, told) == (2, "")
    assert noted.startswith("puna: ") and len(noted.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_at_many_moments(number: int, saved: Path, text: Path, tmp_path: Path) -> None:
    """The process ends wherever it happens to be; what is resumed is the same, bit for bit."""
    arguments = [
        str(saved),
        str(tmp_path / "small"),
        "--scheme",
        "gptq",
        "--calibration",
        str(text),
        "--resume",
    ]
    quick = ["--set", "calibration.sequences=60", "--set", "calibration.measured=4"]
    began = time.monotonic()
    puna("quantize", str(saved), str(tmp_path / "whole"), *arguments[2:], *quick).communicate()
    whole = time.monotonic() - began
    for share in (0.5, 0.6, 0.7, 0.8, 0.9):
        running = puna("quantize", *arguments, *quick)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(share * whole)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, number)
        running.communicate()
        assert running.returncode in (0, -number, 128 + number)
        if (tmp_path / "small").exists():  # whole, or the last line says so
            break
    else:
        (last := puna("quantize", *arguments, *quick)).communicate()
        assert last.returncode == 0
    assert content(tmp_path / "small") == content(tmp_path / "whole")


PEAK = r"""
import re, sys
from pathlib import Path
from puna import formats
from puna.recipes.quantization.run import quantize
from puna.recipes.quantization.settings import settings_of
source, text, target, scheme = sys.argv[1:]
few = {"sequences": 46, "measured": 2}
settings = settings_of({"scheme": scheme, "calibration": few, "gptq": {"sweeps": 0}})
quantize(formats.open_model(source), target, settings, calibration=[text])
# Not ru_maxrss: a process begins with that of the one that started it.
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "gptq"])
def test_memory_is_that_of_one_layer(scheme: str, text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Six layers more take no more of it, though each has 20 MB in float32 and 10 MB in its file."""
    peaks = []
    for count in (2, 8):
        config = ModelConfig(
            vocab_size=400,
            hidden_size=640,
            intermediate_size=1792,
            num_hidden_layers=count,
            num_attention_heads=10,
            max_position_embeddings=64,
        )
        tensors = ((name, tensor.bfloat16()) for name, tensor in initial_weights(config, seed=0))  # type: ignore[union-attr]
        formats.save(tmp_path / f"{count}", Weights(config, tensors), tokenizer)
        command = [
            sys.executable,
            "-c",
            PEAK,
            str(tmp_path / f"{count}"),
            str(text),
            str(tmp_path / f"small-{count}"),
        ]
        done = subprocess.run([*command, scheme], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 40e6


def test_a_trained_model(assets: Path, tmp_path: Path) -> None:
    """int8 changes next to nothing; stories are told in the model's own words."""
    done = quantize(
        formats.open_model(assets / "weights" / "stories260K" / "stories260K.bin"),
        tmp_path / "small",
        settings_of({"scheme": "int8", "calibration": {"measured": 8}}),
        calibration=[assets / "corpora" / "tinystories"],
    )
    record = done["quantization"]
    assert 3 < record["engine"]["perplexity_of_source"] < 12
    assert abs(record["engine"]["perplexity_change_percent"]) < 1
    assert record["engine"]["kl"] < 0.005
    assert record["engine"]["top1_agreement"] > 0.95


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int8", "int8 per channel with float32 scales ×15"),
        ("gptq", "int4 in groups of 32 with float16 scales ×14"),
        ("nf4", "nf4 in blocks of 64 with float32 scales ×14"),
    ],
)
def test_info_tells_how_matrices_are_stored(
    scheme: str, words: str, saved: Path, text: Path, tmp_path: Path
) -> None:
    quantized(saved, tmp_path / "small", scheme, text)
    told: list[str] = []
    describe(formats.open_model(tmp_path / "small"), told.append)
    assert f"quantized   {words}" in told


def test_info_shows_what_was_recorded(saved: Path, text: Path, tmp_path: Path) -> None:
    target, told = tmp_path / "small", list[str]()
    quantized(saved, target, "int8", text)
    describe(formats.open_model(target), told.append)
    record = json.loads((target / "puna.json").read_text())
    assert f"KL {record['quantization']['engine']['kl']:.2e} nats" in "\n".join(told)
    (target / "puna.json").write_text(json.dumps({**record, "quantization": {"scheme": "theirs"}}))
    told.clear()
    describe(formats.open_model(target), told.append)
    assert "a record that this version does not know" in "\n".join(told)
