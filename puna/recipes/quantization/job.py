"""What a quantization is to do, once everything was checked that can be before a tensor is read."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import __version__
from puna.devices import DTYPES
from puna.errors import DataError, ModelError, ResourceError, SettingsError
from puna.formats import FORMATS, Source
from puna.formats.huggingface.quantized import Layout
from puna.formats.saving import check_destination
from puna.model.config import ModelConfig
from puna.model.weights import Packed, shapes
from puna.progress import quantity
from puna.quantize.recipe import EMBEDDING, Choice, choices, settled
from puna.recipes.quantization.calibration import Text, read_text
from puna.recipes.quantization.damage import worst
from puna.recipes.quantization.hidden_states import HiddenStates
from puna.recipes.quantization.layer import Texts
from puna.recipes.quantization.settings import Inputs, QuantizeSettings, completed
from puna.recipes.quantization.unfinished import Begun, Unfinished, begun
from puna.tokenizer.tokenizer import Tokenizer

RESULTS = 1
"""Raised whenever the same source, settings and text give other tensors or figures than before: what an older
version left unfinished is then not gone on with."""

NORM = "model.norm.weight"
LAYER = "model.layers."
_IDENTITY = {"puna": __version__, "results": RESULTS}
_VERSION = Begun(_IDENTITY, {}).version


@dataclass(frozen=True)
class Job:
    """What is to be done, after everything that can be checked was."""

    source: Source
    target: Path
    settings: QuantizeSettings
    chosen: Mapping[str, Choice]
    text: Text | None
    tokenizer: Tokenizer | None
    inputs: Inputs

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.source.config

    @property
    def begun(self) -> Begun:
        """What decides the result; the source's tensors are compared as they are read."""
        identity = {
            **_IDENTITY,
            "model": self.config.model_dump(mode="json"),
            "stored": dict(self.source.stored),
            "settings": self.settings.model_dump(mode="json"),
            "text": None if self.text is None else self.text.sha256,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.fingerprint,
        }
        return Begun(identity, self.inputs.model_dump(mode="json"))

    @property
    def steps(self) -> list[list[str]]:
        """Names of the tensors of each step: the embedding, each layer, the final norm with the output."""
        names = list(shapes(self.config))
        per_layer = sum(name.startswith(f"{LAYER}0.") for name in names)
        inner = names[1 : names.index(NORM)]
        layers = [inner[at : at + per_layer] for at in range(0, len(inner), per_layer)]
        return [names[:1], *layers, names[names.index(NORM) :]]

    @property
    def packed_bytes(self) -> int:
        """About what the result takes."""
        bits = 0.0
        for name, shape in shapes(self.config).items():
            choice = self.chosen.get(name)
            width = (
                self.source.dtype.itemsize * 8 if choice is None else choice.format.bits_per_weight(shape[1])
            )
            bits += math.prod(shape) * width
        return int(bits / 8)

    def texts(self, directory: Path) -> Texts:
        """The texts that pass through the layers, kept in a directory."""
        width, text = self.config.hidden_size, self.text
        if text is None:
            return Texts(None, None, None, None, None)

        def states(name: str, ids: Tensor) -> HiddenStates | None:
            return HiddenStates(directory, name, ids, width) if len(ids) else None

        rounds = any(choice.format.scheme != "nf4" for choice in self.chosen.values())
        return Texts(
            source=states("source", text.measured),
            numbers=states("numbers", text.measured),
            engine=states("engine", text.measured) if rounds else None,
            fitted=states("fitted", text.fitted),
            aimed=states("aimed", text.fitted),
        )

    def record(self, work: Unfinished) -> dict[str, Any]:
        """The figures of all steps, as puna.json has them."""
        layers = [step["layer"] for step in work.records if "layer" in step]
        matrices = sum(math.prod(shapes(self.config)[name]) for name in self.chosen)
        total = sum(math.prod(shape) for shape in shapes(self.config).values())
        before, after, packed = (
            sum(step["bytes"][key] for step in work.records) for key in ("before", "after", "packed")
        )
        text = self.text
        return {
            "scheme": self.settings.recipe.scheme,
            "settings": self.settings.model_dump(mode="json"),
            "primary": "engine",
            "size": {
                "before": before,
                "after": after,
                "bits_per_weight": 8 * after / total,
                "bits_per_quantized_weight": 8 * packed / matrices if matrices else 0.0,
                "quantized_matrices": len(self.chosen),
            },
            "text": None
            if text is None
            else {
                "origin": text.origin,
                "sha256": text.sha256,
                "length": text.measured.shape[1],
                "measured_sequences": len(text.measured),
                "fitted_sequences": len(text.fitted),
                "fitted_length": text.fitted.shape[1],
                "fitted_origin": text.fitted_origin if len(text.fitted) else None,
            },
            **work.records[-1].get("logits", {}),
            "layers": layers,
            "worst": worst(layers, fitted=text is not None and len(text.fitted) > 0),
        }


def prepared(
    source: Source,
    destination: str | Path,
    settings: QuantizeSettings,
    inputs: Inputs,
    tokenizer: Tokenizer | None,
    resume: bool,
    force: bool,
) -> Job:
    """The job, after checking all that can be checked before any tensor is read.

    What is left out takes, with `resume`, the place of what the unfinished run was begun with.

    Raises:
        InputError: as `puna.recipes.quantization.run.quantize`.
    """
    _refuse_quantized(source)
    target = Path(os.path.realpath(destination))
    if resume and (before := begun(target, _VERSION)) is not None:
        settings, inputs = completed(settings, before.settings), inputs.completed(before.inputs)
    settings = settings.model_copy(update={"recipe": settled(settings.recipe, source.dtype)})
    chosen = choices(settings.recipe, source.config)
    if not chosen:
        raise SettingsError("nothing is left to quantize: the exceptions keep every matrix as it is")
    calibrated = [name for name, choice in chosen.items() if choice.scheme == "gptq"]
    if EMBEDDING in calibrated:
        raise SettingsError("gptq cannot fit an output projection that is the embedding too: set output=int8")
    _check_target(source, target, force)
    if calibrated and not inputs.calibration:
        raise DataError(
            "gptq fits to text: name some with --calibration FILE, of the kind that the model is to work on"
        )
    tokenizer = tokenizer or inputs.open_tokenizer() or source.tokenizer()
    _check_layout(chosen, source.config)
    _check_tokenizer(tokenizer)
    fitted = [name for name in chosen if calibrated and (name.startswith(LAYER) or name in calibrated)]
    widest = max((shapes(source.config)[name][1] for name in fitted), default=0)
    text = None
    if settings.measure or calibrated:
        files, others = (list(map(Path, names)) for names in (inputs.calibration, inputs.measure_on))
        text = read_text(files, others, tokenizer, source.config, settings.calibration, widest)
    if text is not None and not settings.measure:
        text = replace(text, measured=text.measured[:0])
    job = Job(source, target, settings, chosen, text, tokenizer, inputs)
    _check_room(job)
    return job


def _refuse_quantized(source: Source) -> None:
    low = {kind: count for kind, count in source.stored.items() if kind not in DTYPES}
    if low:
        kinds = ", ".join(f"{kind} ×{count}" for kind, count in low.items())
        raise ModelError(
            f"{source.path} is quantized already ({kinds}), and rounding it once more would lose twice; "
            "quantize the model that it was made from"
        )


def _check_target(source: Source, target: Path, force: bool) -> None:
    check_destination(target, force, lambda path: any(format.recognises(path) for format in FORMATS.values()))
    if target.is_file():
        raise ModelError(f"{target} is a file, and a quantized model is a directory; choose another name")
    if Path(os.path.realpath(source.path)).is_relative_to(target) or Path.cwd().is_relative_to(target):
        raise ModelError(f"{target} holds the source, or is the working directory; choose another name")


def _check_layout(chosen: Mapping[str, Choice], config: ModelConfig) -> None:
    """Ask the files' layout about matrices without numbers, of the shapes and types that will come."""
    layout, known = Layout(config.tie_word_embeddings), shapes(config)
    for name, choice in chosen.items():
        rows, inputs = known[name]
        width = inputs if choice.format.scheme == "int8" else inputs // 2
        codes = torch.empty(rows, width, dtype=torch.uint8, device="meta")
        scales = torch.empty(rows, choice.format.groups(inputs), dtype=choice.format.scales, device="meta")
        layout.add(name, Packed(choice.format.scheme, codes, scales, (rows, inputs)))


def _check_tokenizer(tokenizer: Tokenizer | None) -> None:
    """A directory must be able to hold it; better told now than after hours."""
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save(directory)


def _check_room(job: Job) -> None:
    """Twice the result, once unfinished, and the states before and after a layer."""
    existing = next(place for place in job.target.parents if place.exists())
    states = sum(3 * text.file_bytes for text in job.texts(existing))
    needed, free = 2 * job.packed_bytes + states, shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            f"about {quantity(needed)}B are needed beside {job.target}, and {quantity(free)}B are free; free "
            "some space, choose another disk, or lower calibration.sequences"
        )
