"""The tokenizer beside a model file that carries none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import puna.tokenizer
from puna.errors import TokenizerError
from puna.tokenizer import llama2c_vocabulary
from puna.tokenizer.tokenizer import Tokenizer

_USUAL = ("tokenizer.model", "tokenizer.json")  # together they are one tokenizer, with files beside them
_HEAD = 1 << 17  # bytes that tell a vocabulary from a model


def tokenizer_beside(model: Path, vocab_size: int) -> Callable[[], Tokenizer] | None:
    """What opens the tokenizer in a model file's directory; None where none fits `vocab_size` ids.

    A file of the model's own name comes first, then a vocabulary of exactly as many tokens, then any other
    file before llama2.c's .bin. Where several are left and differ, or the only ones are damaged, opening
    raises TokenizerError.
    """
    fitting: dict[Path, Tokenizer] = {}
    damage: list[str] = []
    for path in _candidates(model):
        try:
            found = puna.tokenizer.load(path)
        except TokenizerError as error:
            damage.append(str(error))
            continue
        if found.vocab_size <= vocab_size:
            fitting[path] = found
    if fitting:
        chosen = _chosen(model, fitting, vocab_size)
        return partial(puna.tokenizer.load, chosen[0]) if len(chosen) == 1 else partial(_ambiguous, chosen)
    return partial(_damaged, damage[0]) if damage else None


def own_vocabulary(model: Path) -> Path:
    """Where a model's tokenizer is written in llama2.c's form: named after it, for there may be others."""
    return model.with_name(f"tok-{model.stem}.bin")


def _candidates(model: Path) -> Iterator[Path]:
    """The directory where the usual names stand in it, and every other file that may be a tokenizer."""
    directory = model.parent
    if any((directory / name).is_file() for name in _USUAL):
        yield directory
    for path in sorted(directory.glob("tok*.model")) + sorted(directory.glob("tok*.bin")):
        if path != model and path.name not in _USUAL and _may_be_tokenizer(path):
            yield path
    own = model.with_suffix(".model")
    if own.is_file() and not own.name.startswith("tok"):
        yield own


def _may_be_tokenizer(path: Path) -> bool:
    """A .bin may be a model as well: its content decides."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return path.suffix != ".bin" or llama2c_vocabulary.looks_like_vocabulary(file.read(_HEAD))
    except OSError:
        return False


def _chosen(model: Path, fitting: dict[Path, Tokenizer], vocab_size: int) -> list[Path]:
    """The tokenizers that are left when the better ones have been preferred, equal ones counted once."""
    left, own = list(fitting), (model.stem, own_vocabulary(model).stem)
    left = [path for path in left if path.is_file() and path.stem in own] or left
    left = [path for path in left if fitting[path].vocab_size == vocab_size] or left
    left = [path for path in left if path.is_dir() or path.suffix != ".bin"] or left
    return list({fitting[path].fingerprint: path for path in left}.values())


def _ambiguous(paths: list[Path]) -> Tokenizer:
    names = ", ".join(path.name for path in paths)
    raise TokenizerError(
        f"several tokenizers fit the model in {paths[0].parent}: {names}; "
        "choose one with tokenizer= or --tokenizer"
    )


def _damaged(message: str) -> Tokenizer:
    raise TokenizerError(message)
