"""`puna quantize`: a smaller model, one layer in memory at a time, measured against its source as it is made.

The source is read once. Each layer is quantized, and the texts (layer.py) go on to the next
one; what is finished lies in `DST.partial` (unfinished.py) until all of it is written to DST at once.

    B sequences   T positions   R rows (B · T)   D width   V vocabulary
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.errors import CheckFailed, Interrupted
from puna.files import replace_directory, sync_tree
from puna.formats import Source, open_model, provenance
from puna.formats.content import Content
from puna.formats.huggingface import directory as huggingface
from puna.formats.saving import check_destination, written_aside
from puna.model.weights import Packed, Weights
from puna.progress import Track, silent
from puna.quantize.recipe import told
from puna.recipes.quantization.damage import lines
from puna.recipes.quantization.job import Job, prepared
from puna.recipes.quantization.model import ModelQuantizer, machine
from puna.recipes.quantization.settings import QuantizeSettings, inputs_of
from puna.recipes.quantization.unfinished import Unfinished, partial_of, unfinished
from puna.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]


def quantize(
    source: Source,
    destination: str | Path,
    settings: QuantizeSettings,
    *,
    calibration: Sequence[str | Path] = (),
    measure_on: Sequence[str | Path] = (),
    tokenizer: Tokenizer | str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    origin: str | None = None,
    say: Say = lambda line: None,
    track: Track = silent,
) -> dict[str, Any]:
    """Quantize a model into a directory, print what was lost, and return the record.

    Args:
        source: the model, opened.
        destination: where the directory is to be.
        settings: what decides the result.
        calibration: text, or ids, to measure on and, with gptq, to fit to.
        measure_on: other text to measure on.
        tokenizer: takes the place of the model's own.
        resume: go on with what a killed run left; settings and files that are not given are that run's.
        force: replace a model that is there, and begin again where a run was killed.
        origin: the source as the user named it, for the record.
        say: takes lines for people.
        track: shows progress.

    Raises:
        SettingsError: the recipe does not fit the model.
        ModelError: a shape does not allow the scheme, the source is quantized already or damaged, or the
            destination exists.
        DataError: the text is too short, or cannot be read.
        ResourceError: there is too little room on the disk.
        Interrupted: Ctrl-C or SIGTERM; finished layers are kept.
        CheckFailed: what was written does not read back.
    """
    opened, named = (tokenizer, None) if isinstance(tokenizer, Tokenizer) else (None, tokenizer)
    inputs = inputs_of(calibration, measure_on, named)
    job = prepared(source, destination, settings, inputs, opened, resume, force)
    for note in (*source.notes, *told(job.settings.recipe, job.config)):
        say(f"note: {note}")
    if job.text is None and job.settings.measure:
        say("note: nothing is measured: without a tokenizer, ids are needed (--calibration FILE.npy)")
    try:
        with unfinished(job.target, job.begun, resume, force) as work:
            _tell_machine(work, say)
            with track("Quantizing", job.config.num_hidden_layers + 1, "steps") as bar:
                bar.start_at(max(0, len(work.records) - 1))
                ModelQuantizer(job, work).run(bar.advance)
            record = job.record(work)
            written = _written(job, work, record, origin, force)
    except (KeyboardInterrupt, SystemExit) as stop:
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
        raise Interrupted(number, _stopped(partial_of(job.target))) from None
    for line in (*lines(record), *(f"note: {note}" for note in written["quantization"]["notes"])):
        say(line)
    say(f"Written: {destination}")
    return {"path": str(job.target), **written}


def _stopped(partial: Path) -> str:
    if not partial.is_dir():
        return "stopped; no layer was finished, and nothing is left"
    return f"stopped; what is finished is kept in {partial}: run it again with --resume"


def _tell_machine(work: Unfinished, say: Say) -> None:
    """Sums round by the number of threads, and by the version of torch."""
    before = work.records[-1]["machine"] if work.records else machine()
    if before != machine():
        say(f"note: begun with {before}, and now it is {machine()}: results may differ in their last bits")


def _written(
    job: Job, work: Unfinished, about: dict[str, Any], origin: str | None, force: bool
) -> dict[str, Any]:
    """Put the finished steps together at the destination; returns its record.

    Raises:
        CheckFailed: the files do not give back what was written to them.
        ModelError, ResourceError: it cannot be written.
    """
    hashes = provenance.PayloadHash()
    content = _content(job, Weights(job.config, _Again(work)))
    with written_aside(job.target) as new:
        notes = huggingface.write(new, content, huggingface.HuggingFaceSettings(), hashes.add)
        record = provenance.record(
            hashes,
            job.config,
            content.tokenizer,
            source=_about(job, work, origin),
            training=(provenance.read(job.source.path) or {}).get("training"),
            quantization={**about, "notes": notes},
        )
        provenance.write(new, record)
        if provenance.payload_hash(open_model(new).weights) != hashes.hexdigest():
            raise CheckFailed(
                "the result was not kept: its files do not give back the tensors written to them"
            )
        sync_tree(new)
        if not force:  # somebody may have come first
            check_destination(job.target, False, lambda path: False)
        replace_directory(new, job.target)
    return record


def _about(job: Job, work: Unfinished, origin: str | None) -> dict[str, Any]:
    """The source, for the record; its hash is of all its tensors, as they were read."""
    hashes = provenance.PayloadHash()
    for step in work.records:
        hashes.lines |= step["lines"]
    return {
        "model": origin or str(job.source.path),
        "format": job.source.format,
        "sha256": hashes.hexdigest(),
        "stored": dict(job.source.stored),
    }


def _content(job: Job, weights: Weights) -> Content:
    """What there is to write: all that the source says of itself, and the tensors that are finished."""
    source, tokenizer = job.source, job.tokenizer
    ends, bos = source.end_ids, source.bos_id
    if tokenizer is not None:
        ends = tuple(dict.fromkeys((*ends, *tokenizer.end_ids)))
        bos = tokenizer.bos_id if bos is None else bos
    return Content(weights, tokenizer, ends, bos, source.generation)


@dataclass(frozen=True)
class _Again:
    """The finished tensors, as often as they are asked for."""

    work: Unfinished

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        return self.work.tensors()
