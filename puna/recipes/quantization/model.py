"""A model from its embedding to its logits, quantized step by step, with the texts that pass through it.

B sequences   T positions   R rows (B · T)   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from puna.errors import ModelError
from puna.formats import provenance
from puna.formats.proof.divergence import NO_TARGET, diverge
from puna.formats.proof.layerwise import embedded
from puna.model.attention import KERNELS, first_keys
from puna.model.config import ModelConfig
from puna.model.llama import Block, RMSNorm
from puna.model.rope import Rope
from puna.model.weights import Packed
from puna.quantize.gptq import Gptq
from puna.quantize.recipe import EMBEDDING, OUTPUT, not_quantized
from puna.quantize.release import release
from puna.quantize.schemes import quantized
from puna.recipes.quantization.damage import figures_of
from puna.recipes.quantization.job import LAYER, NORM, Job
from puna.recipes.quantization.layer import (
    Angles,
    Layer,
    groups_of,
    in_whole_numbers,
    quantize_layer,
    takes_whole_numbers,
)
from puna.recipes.quantization.unfinished import Unfinished

Told = Callable[[float, str], None]
"""Takes a share of the layers, and what is worked on now."""


class ModelQuantizer:
    """From the embedding to the logits, step by step; steps that are finished are read over."""

    def __init__(self, job: Job, work: Unfinished) -> None:
        self._job, self._work, config = job, work, job.config
        self._texts = job.texts(work.directory)
        self._hashes = provenance.PayloadHash()
        self._stream = iter(job.source.weights)
        self._head: Tensor | Packed | None = None
        self._source_head: Tensor | None = None
        self._angles = _angles_of(config)
        with torch.random.fork_rng(devices=[]):
            self._block = Block(config, KERNELS["fused"]).float().eval()

    @torch.no_grad()
    def run(self, told: Told) -> None:
        """Finish every step that is not.

        Raises:
            ModelError: the source is damaged, or changed since the first steps were finished.
        """
        for number, names in enumerate(self._job.steps):
            tensors = {name: not_quantized(name, value) for name, value in islice(self._stream, len(names))}
            assert list(tensors) == names
            lines = self._hashed(tensors)
            if number == 0:
                self._source_head = tensors[EMBEDDING]
            if number < len(self._work.records):
                self._check_unchanged(number, lines)
            else:
                self._finish(number, tensors, lines, told)
            for tensor in tensors.values():
                release(tensor)
        assert next(self._stream, None) is None

    def _check_unchanged(self, number: int, lines: dict[str, str]) -> None:
        if self._work.records[number]["lines"] != lines:
            path = self._job.source.path
            raise ModelError(f"{path} changed since this was begun; begin again with --force")

    def _finish(self, number: int, tensors: dict[str, Tensor], lines: dict[str, str], told: Told) -> None:
        self._keep_needed(number)
        found, record = self._step(number, tensors, told)
        about = {"lines": lines, "machine": machine(), "bytes": _sizes(tensors, found)}
        self._work.finish(found, record | about)

    def _hashed(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        for name, tensor in tensors.items():
            self._hashes.add(name, tensor)
        return {name: self._hashes.lines[name] for name in tensors}

    def _keep_needed(self, number: int) -> None:
        before = str(number - 1)
        self._work.keep_only([text.file(before) for text in self._texts] if number else [])

    def _step(
        self, number: int, tensors: dict[str, Tensor], told: Told
    ) -> tuple[dict[str, Tensor | Packed], dict[str, Any]]:
        last = self._job.config.num_hidden_layers
        if number == 0:
            return self._embedding(tensors)
        if number <= last:
            return self._layer(
                number, tensors, lambda share, what: told(share, f"layer {number - 1}: {what}")
            )
        found = self._output(tensors)
        told(1, "logits")
        return found

    def _embedding(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor | Packed], dict[str, Any]]:
        source = tensors[EMBEDDING]
        value = self._rounded(EMBEDDING, source)
        texts = self._texts
        for text in texts:
            rows = source if text is texts.source or text is texts.aimed else value
            text.put("0", (embedded(rows, text.ids[part], torch.float32) for part in text.parts))
        return {EMBEDDING: value}, {}

    def _layer(
        self, number: int, tensors: dict[str, Tensor], told: Told
    ) -> tuple[dict[str, Tensor | Packed], dict[str, Any]]:
        prefix = f"{LAYER}{number - 1}."
        for name, tensor in tensors.items():
            self._block.get_parameter(name.removeprefix(prefix)).copy_(tensor)
        chosen = {
            name.removeprefix(prefix).removesuffix(".weight"): self._job.chosen[name]
            for name in tensors
            if name in self._job.chosen
        }
        layer = Layer(self._block, prefix.removesuffix("."), chosen, self._job.settings.gptq, self._angles)
        is_last = number == self._job.config.num_hidden_layers and not self._fits_output
        packed, figures = quantize_layer(layer, self._texts, str(number - 1), str(number), is_last, told)
        stored: dict[str, Tensor | Packed] = {
            name: packed.get(name.removeprefix(prefix).removesuffix(".weight"), tensor)
            for name, tensor in tensors.items()
        }
        return stored, {"layer": {"layer": number - 1, **figures}}

    @property
    def _fits_output(self) -> bool:
        choice = self._job.chosen.get(OUTPUT)
        return choice is not None and choice.scheme == "gptq"

    def _output(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor | Packed], dict[str, Any]]:
        config = self._job.config
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight.copy_(tensors[NORM])
        place = str(config.num_hidden_layers)
        stored: dict[str, Tensor | Packed] = dict(tensors)
        if config.tie_word_embeddings:
            source, head = self._source_head, next(value for _, value in self._work.tensors())
        else:
            source = tensors[OUTPUT]
            stored[OUTPUT] = head = (
                self._fitted_output(source, norm, place)
                if self._fits_output
                else self._rounded(OUTPUT, source)
            )
        assert source is not None
        if self._texts.source is None:
            return stored, {}
        return stored, {"logits": self._logits(norm, place, source, head)}

    def _fitted_output(self, weight: Tensor, norm: RMSNorm, place: str) -> Packed:
        fitting, text = Gptq(weight.shape[1], self._job.settings.gptq), self._texts.fitted
        aimed = self._texts.aimed
        assert text is not None and aimed is not None
        for part in text.parts:
            fitting.add(norm(text.read(place, part)), norm(aimed.read(place, part)))
        return fitting.quantized(weight, self._job.chosen[OUTPUT].format, OUTPUT)

    def _logits(self, norm: RMSNorm, place: str, source: Tensor, head: Tensor | Packed) -> dict[str, Any]:
        """KL divergence and perplexities, of the numbers and of the engine."""
        texts = self._texts
        assert texts.source is not None and texts.numbers is not None
        ids, vocabulary = texts.source.ids, self._job.config.vocab_size
        targets = torch.full_like(ids, NO_TARGET)
        targets[:, :-1] = ids[:, 1:]
        rows = torch.repeat_interleave(torch.arange(len(ids)), ids.shape[1])
        first = norm(texts.source.read_all(place)), source
        found = {}
        for kind, text in (("numbers", texts.numbers), ("engine", texts.engine or texts.numbers)):
            hidden = norm(text.read_all(place))  # (R, D)
            if kind == "engine" and isinstance(head, Packed) and takes_whole_numbers(head):
                hidden = in_whole_numbers(hidden, groups_of(head))
            found[kind] = figures_of(diverge(first, (hidden, head), vocabulary, targets.flatten(), rows))
        return found

    def _rounded(self, name: str, tensor: Tensor) -> Tensor | Packed:
        choice = self._job.chosen.get(name)
        return tensor if choice is None else quantized(tensor, choice.format, name)


def _angles_of(config: ModelConfig) -> Callable[[int], Angles]:
    rope = Rope(config.rope_theta, config.head_dim, config.max_position_embeddings, config.rope_scaling)

    @cache
    def angles(T: int) -> Angles:
        cos, sin = rope(torch.arange(T)[None], torch.float32)
        return cos, sin, first_keys(T, config.sliding_window, None, cos.device)

    return angles


def machine() -> str:
    """What rounds sums beside the settings."""
    return f"torch {torch.__version__} on {torch.get_num_threads()} threads"


def _sizes(before: Mapping[str, Tensor], after: Mapping[str, Tensor | Packed]) -> dict[str, int]:
    packed = sum(_bytes(value) for value in after.values() if isinstance(value, Packed))
    return {
        "before": sum(tensor.nbytes for tensor in before.values()),
        "after": sum(map(_bytes, after.values())),
        "packed": packed,
    }


def _bytes(value: Tensor | Packed) -> int:
    if not isinstance(value, Packed):
        return value.nbytes
    return value.data.nbytes + (0 if value.scales is None else value.scales.nbytes)
