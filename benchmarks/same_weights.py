"""One model of random weights as a Hugging Face directory and as GGUF files, and how each program opens it.

A format is what the weights are stored in, the same numbers of the same bits for everyone:

- bfloat16, float32: the directory, and a GGUF file of that type (bfloat16 numbers in either case);
- q8_0, q4_0: one GGUF file for all, in blocks of 32 weights with a scale in float16 (8.5 and 4.5 bits), the
  embedding and the output too;
- int8: llama.cpp has q8_0, and Puna int8 with a scale in float32 for each row (8 bits and a little), rounded
  from the directory while it is opened; the output too, and the embedding where it is the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from puna import formats
from puna import tokenizer as tokenizers
from puna.engine.llm import LLM
from puna.engine.loading import load
from puna.formats.convert import convert
from puna.formats.huggingface.directory import HuggingFaceSettings
from puna.model.initial import initial_weights
from puna.model.presets import preset


@dataclass(frozen=True)
class Format:
    """The type of the GGUF file; what Puna opens, the type it computes in, what it rounds to."""

    gguf: str
    opens: str
    dtype: str = "bfloat16"
    quantize: dict[str, str] | None = None


FORMATS = {
    "bfloat16": Format("bfloat16", "hf"),
    "float32": Format("float32", "hf", "float32"),
    "q8_0": Format("q8_0", "q8_0.gguf"),
    "q4_0": Format("q4_0", "q4_0.gguf"),
    "int8": Format("q8_0", "hf", quantize={"scheme": "int8", "output": "int8"}),
}


@dataclass(frozen=True)
class Weights:
    """Where the files of one format are."""

    directory: Path
    format: str

    @property
    def gguf(self) -> Path:
        return self.directory / f"{FORMATS[self.format].gguf}.gguf"

    @property
    def puna(self) -> Path:
        """What Puna opens."""
        return self.directory / FORMATS[self.format].opens

    @property
    def dtype(self) -> str:
        """What Puna computes in; its cache has that type too."""
        return FORMATS[self.format].dtype

    @property
    def quantize(self) -> dict[str, str] | None:
        return FORMATS[self.format].quantize

    def load(self, **options: Any) -> LLM:
        llm = load(self.puna, dtype=self.dtype, device="cpu", quantize=self.quantize, **options)
        llm.pack()
        return llm

    def make(self, name: str, context: int | None = None, tokenizer: Path | None = None) -> None:
        """Write what is not there already."""
        hf = self.directory / "hf"
        if not hf.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            own = preset(name)
            length = max(own.max_position_embeddings, context or 0)
            weights = initial_weights(own.model_copy(update={"max_position_embeddings": length}), seed=0)
            settings = HuggingFaceSettings(dtype="bfloat16")  # what float32 holds too: the same numbers
            known = None if tokenizer is None else tokenizers.load(tokenizer)
            formats.save(hf, weights, known, settings=settings)
        if not self.gguf.exists():
            to = {"dtype": FORMATS[self.format].gguf}
            convert(formats.open_model(hf), self.gguf, "gguf", to, verify=None)


@dataclass(frozen=True)
class Step:
    """What a step must read: bytes of weights, how many they are, bytes of keys and values per position."""

    weight_bytes: int
    weights: int
    position_bytes: int

    @property
    def bits(self) -> float:
        return 8 * self.weight_bytes / self.weights

    def seconds(self, positions: float, rate: float) -> float:
        """At so many bytes per second, with so many positions to attend to."""
        return (self.weight_bytes + positions * self.position_bytes) / rate


def step_of_file(path: Path, position_bytes: int) -> Step:
    """Of llama.cpp: all tensors but the embedding, where the output projection is another."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    found = tensors.values()
    return Step(sum(int(t.n_bytes) for t in found), sum(int(t.n_elements) for t in found), position_bytes)


def step_of_model(llm: LLM, weights: int, position_bytes: int) -> Step:
    """Of Puna: what its parameters take, packed as they are."""
    embedding = 0 if llm.config.tie_word_embeddings else _bytes(llm.model.model.embed_tokens)
    return Step(_bytes(llm.model) - embedding, weights, position_bytes)


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
