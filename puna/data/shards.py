"""A directory of shards, read as one long sequence of tokens.

`manifest.json` is written last, so a directory that has one is complete. It names the tokenizer by its
fingerprint, and every shard with its checksum.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.data.shardfile import (
    Header,
    Shard,
    TokenDocument,
    join,
    map_shard,
    verify_shard,
    write_shard,
    writing,
)
from puna.errors import DataError
from puna.files import write_atomically

MANIFEST = "manifest.json"
VERSION = 1
SHARD_TOKENS = 1 << 25  # 64 MiB of two-byte tokens: few files, and little to redo after a kill


class TokenSet:
    """Documents as one sequence of tokens on disk, memory-mapped; offsets count tokens from its beginning.

    Args:
        directory: what `prepare` or `write_token_set` made.
        fingerprint: of the tokenizer about to be used; None skips the comparison.

    Raises:
        DataError: not such a directory, incomplete, damaged, or made with another tokenizer.
    """

    def __init__(self, directory: Path, fingerprint: str | None = None) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.fingerprint: str = self.manifest["tokenizer"]
        self.vocab_size: int = self.manifest["vocab_size"]
        _require_tokenizer(directory, self.fingerprint, fingerprint)
        self._hold([_open_shard(directory, entry) for entry in self.manifest["shards"]])

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop), as far as there are any."""
        parts = [shard.tokens[begin:end] for shard, _, begin, end in self._pieces(start, stop)]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """The offsets in [start, stop) at which documents start."""
        found = [np.empty(0, np.int64)]
        for shard, base, begin, end in self._pieces(start, stop):
            first, last = np.searchsorted(shard.starts[:-1], (begin, end))
            found.append(shard.starts[first:last] + base)
        return np.concatenate(found)

    def document_at(self, offset: int) -> int:
        """The index of the document that holds the token at `offset`."""
        shard, within = self._locate(offset, self._token_starts, "token")
        found = int(np.searchsorted(self._shards[shard].starts, within, side="right")) - 1
        return int(self._document_starts[shard]) + found

    def document(self, index: int) -> TokenDocument:
        """A document by its index."""
        shard, within = self._locate(index, self._document_starts, "document")
        return self._shards[shard].document(within)

    def source(self, index: int) -> str:
        """Where a document, by its index, came from."""
        shard, within = self._locate(index, self._document_starts, "document")
        return self._shards[shard].source(within)

    def source_at(self, offset: int) -> str:
        """Where the document that holds the token at `offset` came from."""
        return self.source(self.document_at(offset))

    def sample(self, tokens: int) -> TokenSet:
        """About `tokens` tokens: whole documents spread evenly over all, at least one, held in memory.

        Its totals are its own, so that bits per byte come out right on it. The same call gives the same
        documents; all of them where there are no more tokens than asked for.
        """
        if tokens >= self.tokens_total:
            return self
        count = max(1, self.documents_total * tokens // self.tokens_total)
        chosen = [self.document(number * self.documents_total // count) for number in range(count)]
        sampled = copy.copy(self)
        sampled._hold([join(chosen, self.vocab_size)])
        return sampled

    def verify(self) -> None:
        """Read everything on disk and compare checksums.

        Raises:
            DataError: a shard differs from what was written.
        """
        for entry in self.manifest["shards"]:
            verify_shard(self.directory / entry["file"])

    def _hold(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._token_starts = _starts(len(shard.tokens) for shard in shards)
        self._document_starts = _starts(shard.documents_total for shard in shards)
        self.tokens_total = int(self._token_starts[-1])
        self.documents_total = int(self._document_starts[-1])
        self.bytes_total = sum(int(shard.sizes.sum()) for shard in shards)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """Shards that hold tokens [start, stop): each, its first offset, where to begin and end in it."""
        assert start >= 0
        first = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        for shard, base in zip(self._shards[first:], self._token_starts[first:].tolist(), strict=False):
            if base >= stop:
                return
            yield shard, base, max(start - base, 0), min(stop - base, len(shard.tokens))

    def _locate(self, index: int, starts: NDArray[np.int64], what: str) -> tuple[int, int]:
        """The shard that holds the token or document `index`, and its index there."""
        total = int(starts[-1])
        if not 0 <= index < total:
            raise DataError(f"{self.directory}: expected a {what} from 0 to {total - 1}, got {index}")
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        return shard, index - int(starts[shard])


class ShardWriter:
    """Fills a directory with shards as documents come; a shard closes with the document that fills it.

    `finished` are the headers of shards that an earlier attempt left whole.
    """

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
        finished: Sequence[Header] = (),
    ) -> None:
        self.directory = directory
        self.vocab_size = vocab_size
        self.shard_tokens = shard_tokens
        self.headers = list(finished)
        self._documents: list[TokenDocument] = []
        self._tokens = 0
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def documents_total(self) -> int:
        """Documents taken so far, those of finished shards included."""
        return sum(header.documents for header in self.headers) + len(self._documents)

    def add(self, document: TokenDocument) -> None:
        """Take one document more.

        Raises:
            ResourceError: the disk is full.
        """
        self._documents.append(document)
        self._tokens += len(document.ids)
        if self._tokens >= self.shard_tokens:
            self._write()

    def close(self, fingerprint: str, notes: Mapping[str, Any] | None = None) -> None:
        """Write what is left, and the manifest that completes the directory; `notes` say how it was made."""
        if self._documents:
            self._write()
        manifest = {
            "version": VERSION,
            "tokenizer": fingerprint,
            "vocab_size": self.vocab_size,
            "tokens": sum(header.tokens for header in self.headers),
            "documents": sum(header.documents for header in self.headers),
            "notes": dict(notes or {}),
            "shards": [_entry(number, header) for number, header in enumerate(self.headers)],
        }
        path = self.directory / MANIFEST
        with writing(path):
            write_atomically(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

    def _write(self) -> None:
        path = self.directory / shard_name(len(self.headers))
        self.headers.append(write_shard(path, join(self._documents, self.vocab_size)))
        self._documents, self._tokens = [], 0


def write_token_set(
    directory: Path,
    documents: Iterable[TokenDocument],
    *,
    vocab_size: int,
    fingerprint: str,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenSet:
    """Write documents that are tokens already, a shard at a time."""
    writer = ShardWriter(directory, vocab_size, shard_tokens)
    for document in documents:
        writer.add(document)
    writer.close(fingerprint)
    return TokenSet(directory)


def shard_name(number: int) -> str:
    """The file of one shard."""
    return f"shard-{number:05d}.bin"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a token directory.

    Raises:
        DataError: there is none, or it is not one that this version reads.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{directory}: not a directory of prepared tokens, or not finished; prepare it"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; prepare the data again") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise DataError(f"{path}: version {version}, this Puna reads {VERSION}; prepare the data again")
    missing = {"tokenizer", "vocab_size", "shards"} - manifest.keys()
    if missing:
        raise DataError(f"{path}: lacks {', '.join(sorted(missing))}; prepare the data again")
    return manifest


def _entry(number: int, header: Header) -> dict[str, Any]:
    return {
        "file": shard_name(number),
        "tokens": header.tokens,
        "documents": header.documents,
        "sha256": header.sha256.hex(),
    }


def _open_shard(directory: Path, entry: Mapping[str, Any]) -> Shard:
    path = directory / str(entry["file"])
    header, shard = map_shard(path)
    if header.sha256.hex() != entry["sha256"]:
        raise DataError(f"{path}: not the shard that {MANIFEST} names; prepare the data again")
    return shard


def _require_tokenizer(directory: Path, made_with: str, wanted: str | None) -> None:
    if wanted not in (None, made_with):
        raise DataError(
            f"{directory}: made with tokenizer {made_with[:12]}, not with {str(wanted)[:12]}; "
            "use that tokenizer, or prepare the data again in another directory"
        )


def _starts(counts: Iterable[int]) -> NDArray[np.int64]:
    """0 and the running sums: where each part starts, and the total."""
    return np.concatenate(([0], np.cumsum(list(counts), dtype=np.int64))).astype(np.int64)
