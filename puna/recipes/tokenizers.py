"""Train a tokenizer on text, and look at one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from puna.data.readers import ReadReport, read
from puna.errors import TokenizerError
from puna.progress import Track, silent
from puna.tokenizer import load
from puna.tokenizer.inspect import contents, fit, pieces
from puna.tokenizer.train import TokenizerSettings
from puna.tokenizer.train import train as train_tokenizer

Say = Callable[[str], None]


def train(
    inputs: Sequence[str], out: Path, settings: TokenizerSettings, field: str, say: Say, track: Track = silent
) -> dict[str, Any]:
    """Train on files, directories or globs, and write what `transformers` and Puna open.

    Raises:
        DataError: the inputs are missing or empty.
        TokenizerError: the text does not support the vocabulary, or `out` exists.
    """
    if out.exists():
        raise TokenizerError(f"{out} already exists; choose another directory with --out")
    report = ReadReport()
    texts = (document.text for document in read(inputs, field=field, report=report))
    tokenizer = train_tokenizer(texts, settings, out, track)
    for line in report.lines():
        say(line)
    known = contents(tokenizer)
    say(f"Tokenizer of {known.vocab_size:,} tokens in {out}")
    return {"tokenizer": str(out), "vocab_size": known.vocab_size, "fingerprint": known.fingerprint}


def inspect(path: Path, text: Path | None, say: Say) -> dict[str, Any]:
    """What a tokenizer holds; with a text, how it cuts it.

    Raises:
        TokenizerError: there is no tokenizer at `path`.
        DataError: the text cannot be read.
    """
    tokenizer = load(path)
    known = contents(tokenizer)
    say(
        f"{known.kind}: {known.vocab_size:,} tokens, of them {known.special_tokens:,} special and "
        f"{known.byte_tokens:,} single bytes\nfingerprint {known.fingerprint}\nlongest tokens:"
    )
    for index in known.longest:
        say(f"  {index:>7}  {tokenizer.piece(index)!r}")
    result: dict[str, Any] = {
        "kind": known.kind,
        "vocab_size": known.vocab_size,
        "special_tokens": known.special_tokens,
        "byte_tokens": known.byte_tokens,
        "longest": [tokenizer.piece(index) for index in known.longest],
        "fingerprint": known.fingerprint,
    }
    if text is not None:
        texts = [document.text for document in read([text])]
        found = fit(tokenizer, texts)
        say(
            f"{text}: {found.bytes:,} bytes in {found.tokens:,} tokens, "
            f"{found.bytes_per_token:.3f} bytes per token, "
            f"{100 * found.fallback_share:.2f}% of them single bytes"
        )
        shown = tokenizer.encode(texts[0][:200], bos=False)
        say("it begins: " + " ".join(repr(piece) for _, piece in pieces(tokenizer, shown)))
        result |= {"bytes": found.bytes, "tokens": found.tokens, "bytes_per_token": found.bytes_per_token}
    return result
