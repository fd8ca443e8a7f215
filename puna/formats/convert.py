"""One format into another: written aside, compared with its source, and only then given its name."""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.devices import DTYPES
from puna.errors import CheckFailed, ModelError, SettingsError, TokenizerError, nearest
from puna.files import replace_directory, sync_directory, sync_tree
from puna.formats import provenance
from puna.formats.content import Content
from puna.formats.opening import FORMATS, Format, is_part
from puna.formats.proof.verify import Comparison, VerifySettings, compare
from puna.formats.saving import check_destination, written_aside
from puna.formats.source import Source
from puna.model.counts import parameters
from puna.model.weights import Packed, Weights
from puna.progress import Track, Tracker, silent
from puna.settings import Settings, parse
from puna.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conversion:
    """What was written.

    `left_out` names what the format could not hold, `notes` what the user should know, `record` is what the
    provenance beside the model says; `comparison` is None where none was asked for.
    """

    path: Path
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    comparison: Comparison | None
    record: dict[str, Any]


def convert(
    source: Source,
    destination: str | Path,
    to: str,
    settings: Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    weights_only: bool = False,
    verify: VerifySettings | None = VerifySettings(),
    force: bool = False,
    origin: str | None = None,
    track: Track = silent,
) -> Conversion:
    """Write a model in another format, tensor by tensor, and prove the result equal to its source.

    Args:
        source: the model, opened.
        destination: a directory, or a file for single-file formats.
        to: a name in FORMATS.
        settings: how to write, for that format's settings class.
        tokenizer: takes the place of the model's own.
        weights_only: leave out what the format cannot hold, where a model remains without it.
        verify: how to compare, or None not to; the record says which.
        force: replace a model that is there.
        origin: the source as the user named it, for the record.
        track: shows progress.

    Raises:
        SettingsError: no such format, or settings it does not have.
        ModelError: the destination exists, the format cannot hold the model, or the source is damaged.
        CheckFailed: what was written is not equal to the source; nothing is left of it.
        ResourceError: the disk is full.
    """
    format = _format(to)
    wanted, expanding = _wanted(source, to, settings or {})
    target = Path(os.path.realpath(destination))  # a link or ".." may lead to where the source lies
    _check_target(source, target, format, force)
    said = provenance.read(source.path) or {}
    content, left_out = _content(source, tokenizer, weights_only)
    content, more = _without_obstacles(content, to, format, wanted, weights_only)
    with written_aside(target) as place:
        place.mkdir(parents=True)
        new = place / target.name
        hashes = _Hashes(provenance.PayloadHash(), None if verify else provenance.PayloadHash())
        written = _written(format, new, content, wanted, hashes, track, to)
        notes = (*source.notes, *expanding, *_told(content, format), *written)
        record = {
            **provenance.record(hashes.written, content.config, content.tokenizer, **_kept(said)),
            "conversion": {
                "format": to,
                "settings": wanted.model_dump(mode="json", exclude_none=True),
                "left_out": [*left_out, *more],
                "notes": list(notes),
            },
        }
        provenance.write(new, record)  # a reader finds there what its format leaves unsaid
        comparison = None
        if verify is not None:
            comparison = _compared(source, content, format.read(new), hashes.written, verify, track)
        record |= {
            "source": _about(source, origin, comparison, hashes),
            "verified": comparison is not None,
            "verify": None if comparison is None else comparison.as_dict(),
        }
        provenance.write(new, record)
        sync_tree(place)
        _put(place, new, target, format, force)
    return Conversion(target, (*left_out, *more), notes, comparison, record)


@dataclass(frozen=True)
class _Hashes:
    """Over what is written, and over what is read where no comparison hashes that."""

    written: provenance.PayloadHash
    read: provenance.PayloadHash | None


def _format(to: str) -> Format:
    if to not in FORMATS:
        known = ", ".join(FORMATS)
        raise SettingsError(f"no format is called {to!r}; expected one of {known}.{nearest(to, FORMATS)}")
    return FORMATS[to]


def _wanted(source: Source, to: str, given: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The settings to write with; low-bit tensors need a type where the format has none for them."""
    format, packed = FORMATS[to], [kind for kind in source.stored if kind not in DTYPES]
    if not packed or format.takes_packed or "dtype" in given:
        return parse(format.settings, given, f"settings for {to}"), []
    kinds = ", ".join(packed)
    note = f"tensors stored as {kinds} are expanded to float16; with dtype float32 they keep every bit"
    return parse(format.settings, {**given, "dtype": "float16"}, f"settings for {to}"), [note]


def _check_target(source: Source, target: Path, format: Format, force: bool) -> None:
    if not format.is_directory and is_part(target):
        raise ModelError(f"{target.name} is the name of a part of a directory; choose one such as model.gguf")
    check_destination(target, force, lambda path: any(row.recognises(path) for row in FORMATS.values()))
    if any(Path(os.path.realpath(file)).is_relative_to(target) for file in _files(source.path)):
        raise ModelError(f"{target} is where the source lies, and would be replaced; choose another name")
    if Path.cwd().is_relative_to(target):  # whoever stands in it would be left in one that is gone
        raise ModelError(f"{target} is the working directory, and would be replaced; choose another name")
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty and target.is_dir() != format.is_directory:
        kinds = ("a file", "a directory")
        there, ours = kinds[target.is_dir()], kinds[format.is_directory]
        raise ModelError(f"{target} is {there}, and this format is {ours}; choose another name")


def _files(model: Path) -> Iterator[Path]:
    """What a model is read from: its file, or its directory and the files in it, which may be links."""
    yield model
    if model.is_dir():
        yield from model.iterdir()


def _content(
    source: Source, tokenizer: Tokenizer | None, weights_only: bool
) -> tuple[Content, tuple[str, ...]]:
    """What there is to write; a tokenizer that cannot be opened may be left out."""
    left_out: tuple[str, ...] = ()
    try:
        own = source.tokenizer()
    except TokenizerError as error:
        own = None
        if tokenizer is None and not weights_only:
            advice = "name another with --tokenizer, or pass --weights-only"
            raise TokenizerError(f"{error}; {advice}") from None
        left_out = (f"a tokenizer that cannot be opened ({error})",)
    if tokenizer is None:
        tokenizer = own
    elif own is not None and tokenizer.chat_template is None:  # the model was taught to talk by it
        tokenizer = Tokenizer(tokenizer.codec, tokenizer.end_ids, own.chat_template)
    ends, bos = source.end_ids, source.bos_id
    if tokenizer is not None:
        ends = tuple(dict.fromkeys((*ends, *tokenizer.end_ids)))
        bos = tokenizer.bos_id if bos is None else bos
    return Content(source.weights, tokenizer, ends, bos, source.generation), left_out


def _without_obstacles(
    content: Content, to: str, format: Format, wanted: Settings, weights_only: bool
) -> tuple[Content, tuple[str, ...]]:
    """The content that the format can hold, and what was left out for that."""
    found = list(format.obstacles(content, wanted))
    left_out = []
    if found and not (weights_only and all(obstacle.without is not None for obstacle in found)):
        what = "; ".join(obstacle.what for obstacle in found)
        can = all(obstacle.without is not None for obstacle in found)
        advice = "pass --weights-only to leave it out" if can else "choose another format"
        raise ModelError(f"{to} cannot hold {what}; {advice}")
    while found:
        first = found[0]
        assert first.without is not None
        content = first.without
        left_out.append(first.what)
        found = list(format.obstacles(content, wanted))
    return content, tuple(left_out)


def _written(
    format: Format, new: Path, content: Content, wanted: Settings, hashes: _Hashes, track: Track, to: str
) -> list[str]:
    """Write, showing how far it is; returns the format's notes."""
    with track(f"Writing {to}", parameters(content.config).total, "weights") as bar:
        passing = Weights(content.config, _Passing(content.weights, bar, hashes.read))
        return format.write(new, replace(content, weights=passing), wanted, hashes.written.add)


def _compared(
    source: Source,
    content: Content,
    written: Source,
    hashes: provenance.PayloadHash,
    settings: VerifySettings,
    track: Track,
) -> Comparison:
    """What was written against what was meant to be.

    Raises:
        CheckFailed: they differ, or the file does not give back what was written to it.
    """
    meant = replace(source, weights=content.weights, end_ids=content.end_ids)
    comparison = compare(meant, written, settings, track, tokenizer_a=content.tokenizer)
    if comparison.sha256_b != hashes.hexdigest():
        raise CheckFailed("the result was not kept: the file does not give back the tensors written to it")
    if not comparison.equal:
        raise CheckFailed(f"the result differs from its source and was not kept: {comparison.verdict}")
    return comparison


def _told(content: Content, format: Format) -> list[str]:
    """What a user should know of any format's result."""
    notes, size = [], content.config.vocab_size
    if content.tokenizer is not None and content.tokenizer.vocab_size > size:
        words = content.tokenizer.vocab_size
        notes.append(f"the tokenizer has {words} tokens and the model {size}: it cannot read the others")
    if content.generation and not format.is_directory:
        notes.append(f"left to the reader: generation settings {', '.join(content.generation)}")
    return notes


def _kept(said: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """What the commands that made the source said of it, which its copy is as well."""
    return {part: said.get(part) for part in ("training", "quantization")}


def _about(
    source: Source, origin: str | None, comparison: Comparison | None, hashes: _Hashes
) -> dict[str, Any]:
    if comparison is None:
        assert hashes.read is not None
        digest = hashes.read.hexdigest()
    else:
        digest = comparison.sha256_a
    return {
        "model": origin or str(source.path),
        "format": source.format,
        "sha256": digest,
        "stored": dict(source.stored),
    }


def _put(place: Path, new: Path, target: Path, format: Format, force: bool) -> None:
    """Give what lies in `place` its names, the model last."""
    if not force:  # somebody may have come first
        check_destination(target, False, lambda path: False)
    if format.is_directory:
        replace_directory(new, target)
        return
    beside = sorted(path for path in place.iterdir() if path != new)
    for path in beside:
        there = target.with_name(path.name)
        ours = path == provenance.place(new)
        if there.exists() and not (force or ours or _same(there, path)):
            raise ModelError(f"{there} exists already and would be replaced; pass --force, or move it")
    if target.is_dir():  # an empty one
        target.rmdir()
    for path in (*beside, new):
        path.replace(target.with_name(path.name))
    sync_directory(target.parent)


def _same(first: Path, second: Path) -> bool:
    return first.is_file() and filecmp.cmp(first, second, shallow=False)


class _Passing:
    """A model's tensors, counted as they pass, and hashed where that is not done elsewhere."""

    def __init__(self, weights: Weights, bar: Tracker, hashes: provenance.PayloadHash | None) -> None:
        self._weights, self._bar, self._hashes = weights, bar, hashes

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        for name, value in self._weights:
            if self._hashes is not None:
                self._hashes.add(name, value)
            yield name, value
            self._bar.advance(math.prod(value.shape))
