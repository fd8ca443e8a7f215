"""A model directory, written aside first: the whole of it is there, or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from puna.errors import ModelError
from puna.files import disk_errors, replace_directory, sync_tree, temporary_beside
from puna.formats import provenance
from puna.formats.content import Content
from puna.formats.huggingface import directory as huggingface
from puna.formats.huggingface.directory import HuggingFaceSettings
from puna.model.weights import Weights
from puna.tokenizer.tokenizer import Tokenizer

_OURS = (  # what formats and their tokenizers write, and what a repository of a model holds beside
    *("*.json", "*.jinja", "*.model", "*.safetensors", "pytorch_model*.bin", "consolidated.*.pth"),
    *("merges.txt", "README.md", "LICENSE*", "USE_POLICY.md", ".gitattributes", ".cache"),
)


def save(
    directory: str | Path,
    weights: Weights,
    tokenizer: Tokenizer | None = None,
    *,
    end_ids: Sequence[int] | None = None,
    bos_id: int | None = None,
    source: str | None = None,
    training: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    settings: HuggingFaceSettings | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model directory that transformers opens, with its provenance.

    Args:
        directory: may exist where it is empty, or where `overwrite` is given.
        weights: read once, one tensor in memory at a time.
        tokenizer: its files are written too; it gives begin and end tokens where they are not given here.
        end_ids: the tokens that end an answer.
        bos_id: the token that begins a text.
        source: what the model was made from, for puna.json.
        training: what the training run says of itself, for puna.json; JSON.
        quantization: what was measured when it was quantized, for puna.json; JSON.
        settings: type and size of the files.
        overwrite: replace the model that is there.

    Raises:
        ModelError: the destination exists, or the weights cannot be stored.
        TokenizerError: tokenizer.json cannot express the tokenizer.
        ResourceError: the disk is full.
    """
    target = Path(directory).resolve()
    check_destination(target, overwrite, huggingface.recognises, "pass overwrite=True to replace it")
    if tokenizer is not None:
        end_ids = tokenizer.end_ids if end_ids is None else end_ids
        bos_id = tokenizer.bos_id if bos_id is None else bos_id
    content = Content(weights, tokenizer, tuple(end_ids or ()), bos_id)
    with written_aside(target) as temporary:
        hashes = provenance.PayloadHash()
        huggingface.write(temporary, content, settings or HuggingFaceSettings(), hashes.add)
        record = provenance.record(
            hashes, weights.config, tokenizer, source=source, training=training, quantization=quantization
        )
        provenance.write(temporary, record)
        sync_tree(temporary)
        replace_directory(temporary, target)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A name beside `target`, not existing, for what will take its place; removed whatever happens.

    So are directories above it that were not there before, where nothing came to lie in them.

    Raises:
        ResourceError, ModelError: for an OSError inside, in one line.
    """
    temporary = temporary_beside(target)
    new = [directory for directory in target.parents if not directory.exists()]
    with disk_errors(f"writing the model {target}", target, ModelError, "free some space and save it again"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # not empty: something was written, and is to stay
                for directory in new:
                    directory.rmdir()


def check_destination(
    target: Path,
    overwrite: bool,
    recognises: Callable[[Path], bool],
    advice: str = "pass --force to replace it",
) -> None:
    """Nothing is written over but an empty directory or, where that is asked for, a model.

    `advice` says how the caller's own user asks for that.

    Raises:
        ModelError: something else is there.
    """
    with disk_errors(f"looking at {target}", target, ModelError, "choose another place"):
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
    if not overwrite:
        raise ModelError(f"{target} exists already; choose another name, or {advice}")
    if not recognises(target):
        raise ModelError(f"{target} exists and is not a model, so it is not replaced; choose another name")
    foreign = _foreign(target) if target.is_dir() else []
    if foreign:
        shown = ", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if len(foreign) > 4 else "")
        raise ModelError(f"{target} holds more than a model ({shown}), which would be lost; move that first")


def _foreign(directory: Path) -> list[str]:
    """What lies in a model's directory and is no part of a model."""
    names = sorted(path.name for path in directory.iterdir())
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in _OURS)]
