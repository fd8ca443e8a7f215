"""The text of a run as tokens: where documents come from, which tokenizer cuts them, where the shards lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import puna.tokenizer
from puna import formats
from puna.data.holdout import split
from puna.data.inputs import list_files
from puna.data.prepare import Prepared, prepare, prepare_documents
from puna.data.readers import read
from puna.data.shards import TokenSet
from puna.data.stdlib import StandardLibrary, standard_library
from puna.errors import DataError, ModelError, SettingsError, nearest
from puna.files import disk_errors
from puna.parallel import World
from puna.progress import Track
from puna.recipes.training.compression import Compression, compress
from puna.recipes.training.settings import DataSettings, PretrainSettings
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import train as train_tokenizer
from puna.train.run import ADVICE

Say = Callable[[str], None]
STDLIB = "python-stdlib"
CORPORA = (STDLIB,)
COMPRESSED_AT_MOST = 64_000_000  # bytes of held-out text; beyond, xz takes minutes and says nothing new


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, and what it made of the text to train on and of the text held out."""

    tokenizer: Tokenizer
    train: TokenSet
    validation: TokenSet

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint belongs to, as hashes."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "train": _identity(self.train),
            "validation": _identity(self.validation),
        }

    def compression(self) -> Compression | None:
        """What gzip and xz need for the held-out documents concatenated; None if they are very long."""
        if self.validation.bytes_total > COMPRESSED_AT_MOST:
            return None
        return compress(self._held_out())

    def _held_out(self) -> Iterator[str]:
        for index in range(self.validation.documents_total):
            yield self.tokenizer.decode(self.validation.document(index).ids)


def open_corpus(settings: PretrainSettings, directory: Path, world: World, say: Say, track: Track) -> Corpus:
    """Tokenizer and shards of a run, made in its directory by the first process, opened by all.

    Raises:
        DataError: inputs are missing, empty, or too few to train on or to hold out.
        TokenizerError: there is no such tokenizer, or the text does not support one of that size.
    """
    library = _library(settings.data)
    if world.leads:
        tokenizer = _tokenizer(settings, library, directory / "tokenizer", track)
        prepared = _prepare(settings.data, library, tokenizer, directory / "data", track)
        if library is not None:
            manifest = directory / "corpus.json"
            with disk_errors(f"writing {manifest}", directory, DataError, ADVICE):
                library.write_manifest(manifest)
        for line in prepared.report:
            say(line)
    world.barrier()
    tokenizer = _tokenizer(settings, library, directory / "tokenizer", track)
    train, validation = (
        TokenSet(directory / "data" / side, tokenizer.fingerprint) for side in ("train", "validation")
    )
    say(
        f"Text: {train.bytes_total:,} bytes ({train.tokens_total:,} tokens) to train on, "
        f"{validation.bytes_total:,} bytes ({validation.tokens_total:,} tokens) held out, "
        f"{train.bytes_total / train.tokens_total:.2f} bytes per token"
    )
    return Corpus(tokenizer, train, validation)


def _identity(tokens: TokenSet) -> str:
    """A hash of the shards' checksums: of every token and its document."""
    return hashlib.sha256(json.dumps(tokens.manifest["shards"], sort_keys=True).encode()).hexdigest()


def _library(data: DataSettings) -> StandardLibrary | None:
    if data.corpus is None:
        return None
    if data.corpus not in CORPORA:
        raise SettingsError(
            f"data.corpus must be one of {', '.join(CORPORA)}, got {data.corpus!r}."
            f"{nearest(data.corpus, CORPORA)}"
        )
    return standard_library()


def _tokenizer(
    settings: PretrainSettings, library: StandardLibrary | None, directory: Path, track: Track
) -> Tokenizer:
    """The one of `init_from`, the one at `tokenizer.path`, or one trained in an earlier or in this start."""
    if settings.init_from is not None:
        tokenizer = formats.open_model(Path(settings.init_from)).tokenizer()
        if tokenizer is None:
            raise ModelError(f"{settings.init_from}: has no tokenizer; put its files beside the weights")
        return tokenizer
    if settings.tokenizer.path is not None:
        return puna.tokenizer.load(settings.tokenizer.path)
    assert settings.tokenizer.train is not None
    if directory.is_dir():
        return puna.tokenizer.load(directory)
    return train_tokenizer(
        _training_texts(settings.data, library), settings.tokenizer.train, directory, track
    )


def _training_texts(data: DataSettings, library: StandardLibrary | None) -> Iterator[str]:
    """What is not held out: a tokenizer fitted to held-out text would flatter the score."""
    if library is not None:
        return (document.text for document in library.train)
    documents = read(data.train, data.field, data.separator)
    if data.validation:
        return (document.text for document in documents)
    total = sum(file.size for file in list_files(data.train))
    return (document.text for side, document in split(documents, data.holdout, total) if side == "train")


def _prepare(
    data: DataSettings, library: StandardLibrary | None, tokenizer: Tokenizer, directory: Path, track: Track
) -> Prepared:
    if library is not None:
        return prepare_documents(
            library.train, library.held_out, tokenizer, directory, workers=data.workers, track=track
        )
    prepared = prepare(
        data.train, tokenizer, directory, validation=data.validation, holdout=data.holdout, field=data.field,
        separator=data.separator, workers=data.workers, track=track,
    )  # fmt: skip
    if prepared.validation is None:
        raise DataError("nothing was held out; raise data.holdout, or name text in data.validation")
    return prepared
