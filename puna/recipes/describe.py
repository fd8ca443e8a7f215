"""What a model is: config, parameters by part, tokenizer, provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from puna import formats
from puna.errors import LONGEST, printable
from puna.formats import provenance
from puna.model.counts import flops_per_token, parameters
from puna.recipes.quantization.damage import summary

Say = Callable[[str], None]


def describe(source: formats.Source, say: Say) -> dict[str, Any]:
    """Print and return it; no weights are read."""
    config, counts = source.config, parameters(source.config)
    record = provenance.read(source.path)
    result = {
        "path": str(source.path),
        "format": source.format,
        "dtype": str(source.dtype).removeprefix("torch."),
        "stored": dict(source.stored),
        "packing": dict(source.packing),
        "config": config.model_dump(mode="json"),
        "parameters": {**asdict(counts), "total": counts.total},
        "flops_per_token": flops_per_token(config, config.max_position_embeddings, training=False),
        "tokenizer": _tokenizer(source),
        "end_ids": list(source.end_ids),
        "notes": list(source.notes),
        "provenance": record,
    }
    for line in _lines(result):
        say(printable(line, LONGEST))  # puna.json may come from anywhere, and terminals obey
    return result


def _tokenizer(source: formats.Source) -> dict[str, Any] | None:
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return None
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "chat_template": tokenizer.chat_template is not None,
        "fingerprint": tokenizer.fingerprint,
    }


def _lines(result: dict[str, Any]) -> list[str]:
    counts = result["parameters"]
    parts = "  ".join(f"{part} {counts[part]:,}" for part in counts if part != "total")
    return [
        f"{result['path']} ({result['format']}, stored in {_stored(result['stored'])})",
        f"parameters  {counts['total']:,}  ({parts})",
        *(f"  {key:<24} {_short(value)}" for key, value in result["config"].items()),
        *(f"quantized   {words} ×{count}" for words, count in result["packing"].items()),
        *_tokenizer_lines(result["tokenizer"], result["end_ids"]),
        *(f"note        {note}" for note in result["notes"]),
        *_provenance_lines(result["provenance"]),
    ]


def _stored(stored: dict[str, int]) -> str:
    """The types of the tensors; how many have each, where there are several."""
    if len(stored) == 1:
        return next(iter(stored))
    return ", ".join(f"{kind} ×{count}" for kind, count in stored.items())


def _tokenizer_lines(tokenizer: dict[str, Any] | None, end_ids: list[int]) -> list[str]:
    if tokenizer is None:
        return ["tokenizer   none: prompts must be ids"]
    template = "a chat template" if tokenizer["chat_template"] else "no chat template"
    return [
        f"tokenizer   {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, BOS {tokenizer['bos_id']}, "
        f"ends at {', '.join(map(str, end_ids)) or 'nothing'}, {template}"
    ]


def _provenance_lines(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["provenance  none recorded (no puna.json)"]
    lines = [f"provenance  puna {record['puna']}, weights sha256 {record['weights']['sha256'][:16]}…"]
    if isinstance(record.get("source"), dict):
        about, verified = record["source"], record.get("verify")
        lines.append(f"  converted from           {about.get('model')} ({about.get('format')})")
        if isinstance(verified, dict):
            lines.append(f"  compared with it         {verified.get('verdict')}")
        elif not record.get("quantization"):  # whose own figures say how far it is from its source
            lines.append("  compared with it         not verified")
    lines += _quantization_lines(record.get("quantization"))
    training = {key: value for key, value in (record.get("training") or {}).items() if value is not None}
    return lines + [f"  {key:<24} {_short(value)}" for key, value in training.items()]


def _quantization_lines(said: Any) -> list[str]:
    """What was recorded when it was quantized; puna.json may have been written by anybody."""
    if not isinstance(said, dict):
        return []
    try:
        return [
            f"  quantized by             puna quantize, {said['scheme']}",
            *map("  {}".format, summary(said)),
        ]
    except (KeyError, TypeError, ValueError):
        return ["  quantized by             a record that this version does not know"]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
