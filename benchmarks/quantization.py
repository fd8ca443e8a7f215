"""What quantization does to a model's perplexity, and how much of int4's loss gptq takes back.

    python benchmarks/quantization.py MODEL TEXT --calibration TEXT [--schemes int8 int4 gptq nf4]
        [--set group=128 …] [--separator '<|endoftext|>'] [--every 1] [--documents N] [--length T]
        [--dtype float32] [--directory DIR] [--tokenizer FILE] [--llama]

Makes each scheme's directory (`puna quantize`, with the same settings for all; it stays in DIR, where one is
given), opens it as users do and scores the text with the kernels that answer: so the rounding of activations
counts too. The text must not be what the model or gptq learned from. It is divided at the separator into
documents, every so many of which are taken, each cut to so many tokens after BOS.

Bits are those of all weights, scales, norms and embeddings included. With --llama the source is converted to
GGUF's Q8_0 and Q4_0 and scored by llama.cpp on the same ids, all of its keys and values in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import puna
from puna import formats
from puna import tokenizer as tokenizers
from puna.errors import PunaError
from puna.formats.convert import convert
from puna.model.counts import parameters
from puna.recipes.quantization.run import quantize
from puna.recipes.quantization.settings import settings_of
from puna.settings import overridden
from puna.tokenizer.tokenizer import Tokenizer

SCHEMES = ("int8", "int4", "gptq", "nf4")
BLOCKS = ("q8_0", "q4_0")
Score = Callable[[list[int]], Tensor]
"""Ids → logits (T, V) of each."""


def main() -> None:
    options = _options()
    source = formats.open_model(formats.resolve(options.model))
    known = source.tokenizer() if options.tokenizer is None else tokenizers.load(options.tokenizer)
    assert known is not None, "this model has no tokenizer: name one with --tokenizer"
    rows = list(_rows(options, known, source.config.max_position_embeddings))
    scored = sum(len(ids) - 1 for ids in rows)
    print(json.dumps({"model": str(options.model), "text": str(options.text), "documents": len(rows),
                      "tokens": scored, "dtype": options.dtype, "set": options.set}), flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        directory = options.directory or Path(place)
        directory.mkdir(parents=True, exist_ok=True)
        found = {"source": _line("source", _puna(options, source.path, known), rows, _bits(source, source))}
        for scheme in options.schemes:
            try:
                path = _made(options, source, scheme, directory, known)
            except PunaError as error:
                print(json.dumps({"scheme": scheme, "refused": str(error)}), flush=True)
                continue
            bits = _bits(formats.open_model(path), source)
            found[scheme] = _line(scheme, _puna(options, path, known), rows, bits, found["source"])
        if options.llama:
            _llama_lines(source, rows, directory, found["source"])
    _conclude(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--llama", action="store_true")
    return parser.parse_args()


def _rows(options: argparse.Namespace, known: Tokenizer, context: int) -> Iterator[list[int]]:
    documents = [part.strip() for part in options.text.read_text("utf-8").split(options.separator)]
    chosen = [part for part in documents if part][:: options.every][: options.documents]
    for document in chosen:
        ids = known.encode(document, bos=True)[: min(options.length, context)]
        if len(ids) > 1:
            yield ids


def _made(
    options: argparse.Namespace, source: formats.Source, scheme: str, directory: Path, known: Tokenizer
) -> Path:
    path = directory / scheme
    values = overridden({"scheme": scheme, "measure": False}, options.set)
    calibration = options.calibration if scheme == "gptq" else ()
    quantize(source, path, settings_of(values), calibration=calibration, tokenizer=known, force=True)
    return path


def _puna(options: argparse.Namespace, path: Path, known: Tokenizer) -> Score:
    llm = puna.load(path, dtype=options.dtype, device="cpu", tokenizer=known)
    llm.pack()

    @torch.no_grad()
    def score(ids: list[int]) -> Tensor:
        logits: Tensor = llm.model(torch.tensor([ids]))[0]  # (T, V)
        return logits

    return score


def _llama_lines(
    source: formats.Source, rows: Sequence[list[int]], directory: Path, reference: dict[str, Any]
) -> None:
    for name in ("float32", *BLOCKS):
        path = directory / f"{name}.gguf"
        try:
            convert(source, path, "gguf", {"dtype": name}, weights_only=True, verify=None, force=True)
        except PunaError as error:
            print(json.dumps({"scheme": f"llama.cpp {name}", "refused": str(error)}), flush=True)
            continue
        bits = _bits(formats.open_model(path), source)
        with _quiet():
            score = _llama(path, max(map(len, rows)), source.config.vocab_size)
        _line(f"llama.cpp {name}", score, rows, bits, reference)


def _llama(path: Path, length: int, vocabulary: int) -> Score:
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(bytes(path), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = length, length, length
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(length, 0, 1)

    def score(ids: list[int]) -> Tensor:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        assert lib.llama_decode(context, batch) == 0
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), vocabulary))
        return torch.from_numpy(logits.copy())  # (T, V)

    return score


class _quiet:  # noqa: N801 — stands for a statement
    """What a library says while it opens a model is not part of the figures."""

    def __enter__(self) -> None:
        self._kept = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def __exit__(self, *error: object) -> None:
        os.dup2(self._kept, 2)


def _line(
    name: str,
    score: Score,
    rows: Sequence[list[int]],
    bits: float,
    reference: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score all rows, print a line, and return it."""
    losses = [
        F.cross_entropy(score(ids)[:-1].double(), torch.tensor(ids[1:]), reduction="sum") for ids in rows
    ]
    loss = float(sum(losses)) / sum(len(ids) - 1 for ids in rows)
    row: dict[str, Any] = {"scheme": name, "bits": round(bits, 2), "loss": loss, "perplexity": math.exp(loss)}
    if reference is not None:
        row["perplexity more"] = f"{row['perplexity'] / reference['perplexity'] - 1:+.3%}"
    print(json.dumps(row), flush=True)
    return row


def _bits(opened: formats.Source, source: formats.Source) -> float:
    """Of all weights together: what their numbers and scales take."""
    size = 0
    for _, value in opened.weights:
        parts = (value,) if isinstance(value, Tensor) else (value.data, value.scales)
        size += sum(part.nbytes for part in parts if part is not None)
    return 8 * size / parameters(source.config).total


def _conclude(found: dict[str, dict[str, Any]]) -> None:
    if not {"int4", "gptq"} <= set(found):
        return
    source, plain, fitted = (found[name]["perplexity"] for name in ("source", "int4", "gptq"))
    closed = (plain - fitted) / (plain - source)
    print(json.dumps({"of the gap that int4 opens, gptq closes": f"{closed:.0%}",
                      "perplexity": [source, plain, fitted]}))  # fmt: skip


if __name__ == "__main__":
    main()
