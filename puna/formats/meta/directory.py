"""Meta's own layout: params.json, consolidated.NN.pth for every model-parallel rank, tokenizer.model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

import puna.tokenizer
from puna.errors import ModelError, TokenizerError
from puna.formats import provenance
from puna.formats.archives.torch_writer import Stored, TorchWriter
from puna.formats.casting import stored
from puna.formats.content import Content, Obstacle, Record
from puna.formats.huggingface.config_json import read_bos_id, read_end_ids, read_generation, token_ids
from puna.formats.json_files import read_object, write_object
from puna.formats.meta.names import to_meta
from puna.formats.meta.params import PARAMS, read_params, unsaid, write_params
from puna.formats.meta.shards import EMBEDDING, HEAD, Ranks, WholeTensors, cut
from puna.formats.rotary import interleaved
from puna.formats.source import Source
from puna.formats.tensor_files import TensorFiles, listed
from puna.model.rope import Llama3Scaling, NoScaling
from puna.model.weights import Packed, Weights
from puna.settings import Settings
from puna.tokenizer import saving
from puna.tokenizer.model_file import model_file
from puna.tokenizer.tokenizer import Tokenizer

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.model"
_LLAMA3_WORDS = 128_000  # where no tokenizer tells Llama 3 from its predecessors, the vocabulary does
_FILE = re.compile(r"consolidated\.(\d{2,4})\.pth", re.ASCII)


class MetaSettings(Settings):
    """`dtype` None keeps every tensor's own type; `shards` is the number of model-parallel ranks."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    shards: int = Field(default=1, gt=0, le=1024)


def recognises(path: Path) -> bool:
    """Whether a path is such a directory."""
    try:
        return (path / PARAMS).is_file() and any(_FILE.fullmatch(name.name) for name in path.iterdir())
    except OSError:
        return False


def read(directory: Path) -> Source:
    """Open a directory; every name, type and shape in it is checked.

    No tensor is read, but for output projection and embedding: whether they are equal is told by no file.

    Raises:
        ModelError: a file is missing, damaged, or does not fit the others.
    """
    origin = directory / PARAMS
    values = read_object(origin)
    generation = read_object(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    ranks = Ranks(_files(directory), values.get("dim", 0))
    known = (provenance.read(directory) or {}).get("model")
    config, notes = read_params(values, ranks.told(), known, str(origin))
    whole = WholeTensors(ranks, config)
    tensors = TensorFiles([directory], config, directory, lambda _: nullcontext(whole), PARAMS)
    open_tokenizer, above = _tokenizer(directory)
    return Source(
        path=directory,
        format="meta",
        weights=Weights(tensors.config, tensors),
        dtype=tensors.dtype,
        stored=tensors.stored,
        end_ids=read_end_ids(generation),
        bos_id=read_bos_id(generation),
        generation=read_generation(generation),
        open_tokenizer=open_tokenizer,
        notes=(*notes, *above),
    )


def obstacles(content: Content, settings: MetaSettings) -> Iterator[Obstacle]:
    """What of a model these files cannot hold."""
    config = content.config
    if config.attention_bias or config.mlp_bias:
        yield Obstacle("biases", None)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        yield Obstacle(
            f"heads of width {config.head_dim}; its own is hidden_size / num_attention_heads, "
            f"{config.hidden_size} / {config.num_attention_heads}",
            None,
        )
    uneven = ", ".join(f"{name} {getattr(config, name)}" for name in _indivisible(content, settings.shards))
    if uneven:
        yield Obstacle(f"{settings.shards} equal shards of {uneven} (--shards)", None)
    if config.sliding_window is not None:
        yield Obstacle(
            f"a sliding window of {config.sliding_window} (longer texts get other answers without it)",
            _reshaped(content, sliding_window=None),
        )
    scaling = config.rope_scaling
    if not isinstance(scaling, NoScaling) and unsaid(config, scaled=True)[1] != scaling:
        yield Obstacle(
            f"the rotary scaling {scaling.rope_type!r} of this model",
            _reshaped(content, rope_scaling=NoScaling()),
        )
    if content.tokenizer is not None:
        try:
            model_file(content.tokenizer.codec)
        except TokenizerError as error:
            yield Obstacle(f"its tokenizer: {error}", replace(content, tokenizer=None))


def write(target: Path, content: Content, settings: MetaSettings, record: Record) -> list[str]:
    """Write a directory that Meta's code opens; it must not exist.

    Returns what the user should know of it, a sentence each.

    Raises:
        ModelError: the weights cannot be stored.
        OSError: as it comes; the directory is then incomplete.
    """
    target.mkdir(parents=True)
    config, tokenizer = content.config, _original(content.tokenizer)
    by_rows = _is_tiktoken(tokenizer) if tokenizer is not None else config.vocab_size >= _LLAMA3_WORDS
    _write_tensors(target, content.weights, settings, 0 if by_rows else 1, record)
    write_object(target / PARAMS, write_params(config, explicit_theta=by_rows))
    if content.end_ids or content.bos_id is not None or content.generation:
        ids = token_ids(content.bos_id, content.end_ids)
        write_object(target / GENERATION, {**content.generation, **ids})
    if tokenizer is not None:
        saving.save_original(tokenizer, tokenizer.codec, target)
    context = unsaid(config, isinstance(config.rope_scaling, Llama3Scaling))[0]
    if context == config.max_position_embeddings:
        return []
    return [
        f"{PARAMS} has no place for the context length {config.max_position_embeddings}; puna.json keeps it"
    ]


def _write_tensors(
    target: Path, weights: Weights, settings: MetaSettings, embedding: int, record: Record
) -> None:
    """Every tensor cut for the ranks, whose files are all open at once."""
    with ExitStack() as stack:
        archives = [
            stack.enter_context(TorchWriter(target / f"consolidated.{rank:02d}.pth"))
            for rank in range(settings.shards)
        ]
        entries: list[dict[str, Stored]] = [{} for _ in archives]
        tied: list[Stored] = []
        for name, tensor in stored(weights, lambda name, shape: settings.dtype):
            if isinstance(tensor, Packed):
                raise ModelError(f"{name} is packed as {tensor.scheme}; choose a dtype to expand it to")
            record(name, tensor)
            meta, moved = to_meta(name), interleaved(name, tensor, weights.config)
            assert isinstance(moved, Tensor)
            parts = _add(archives, moved, cut(meta, embedding))
            for entry, part in zip(entries, parts, strict=True):
                entry[meta] = part
            if meta == EMBEDDING and weights.config.tie_word_embeddings:
                # Meta's code asks for an output projection too; where both are cut alike it is stored once.
                tied = parts if embedding == 0 or len(archives) == 1 else _add(archives, moved, 0)
        for entry, part in zip(entries, tied, strict=bool(tied)):
            entry[HEAD] = part
        for archive, entry in zip(archives, entries, strict=True):
            archive.finish(entry)


def _add(archives: list[TorchWriter], tensor: Tensor, dimension: int | None) -> list[Stored]:
    if dimension is None:
        return [archive.add(tensor) for archive in archives]
    parts = tensor.chunk(len(archives), dim=dimension)
    return [archive.add(part) for archive, part in zip(archives, parts, strict=True)]


def _files(directory: Path) -> list[Path]:
    """The files of all ranks, in order.

    Raises:
        ModelError: some are missing.
    """
    numbers = {int(match[1]): path for path in directory.iterdir() if (match := _FILE.fullmatch(path.name))}
    missing = [f"consolidated.{rank:02d}.pth" for rank in range(max(numbers)) if rank not in numbers]
    if missing:
        raise ModelError(f"{directory}: {listed(missing)} missing; copy the rest too")
    return [numbers[rank] for rank in sorted(numbers)]


def _tokenizer(directory: Path) -> tuple[Any, list[str]]:
    """What opens the tokenizer, and a note where it lies one directory up, as with Llama 1 and 2."""
    if (directory / TOKENIZER).is_file():
        return partial(puna.tokenizer.load, directory), []
    above = directory.absolute().parent / TOKENIZER
    if above.is_file():
        return partial(puna.tokenizer.load, above), [f"tokenizer: from {above}"]
    return None, []


def _original(tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The same tokenizer as a tokenizer.model has it."""
    if tokenizer is None:
        return None
    codec = model_file(tokenizer.codec)
    return Tokenizer(codec, tokenizer.end_ids, tokenizer.chat_template, tokenizer.extras)


def _is_tiktoken(tokenizer: Tokenizer | None) -> bool:
    return tokenizer is not None and tokenizer.kind == "tiktoken"


def _cuts_rows(content: Content) -> bool:
    """Whether the embedding is cut along the vocabulary, as Llama 3's is."""
    if content.tokenizer is None:
        return content.config.vocab_size >= _LLAMA3_WORDS
    try:
        return _is_tiktoken(_original(content.tokenizer))
    except TokenizerError:
        return False


def _indivisible(content: Content, shards: int) -> Iterator[str]:
    """What a matrix is cut along, by the config's names, that does not come out even."""
    embedding = () if _cuts_rows(content) else ("hidden_size",)
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", *embedding)
    return (name for name in names if getattr(content.config, name) % shards)


def _reshaped(content: Content, **changes: Any) -> Content:
    config = content.config.model_copy(update=changes)
    return replace(content, weights=Weights(config, content.weights.tensors))
