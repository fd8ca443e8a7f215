"""Where special tokens stand in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from puna.tokenizer.codec import ParseOptions


def split(text: str, specials: Mapping[str, int], pattern: re.Pattern[str] | None) -> Iterator[str | int]:
    """The text as stretches of ordinary text (never empty) and ids of the special tokens between them.

    >>> names = {"<s>": 1, "</s>": 2}
    >>> list(split("<s>a</s>b", names, compile_pattern(names, {})))
    [1, 'a', 2, 'b']
    """
    at = 0
    for match in pattern.finditer(text) if pattern is not None else ():
        if match.start() > at:
            yield text[at : match.start()]
        yield specials[match[match.lastindex or 0]]
        at = match.end()
    if at < len(text):
        yield text[at:]


def compile_pattern(specials: Mapping[str, int], parse: Mapping[str, ParseOptions]) -> re.Pattern[str] | None:
    """A pattern whose last group is a special token, the longest where several begin; None without any."""
    names = sorted((name for name in specials if name), key=lambda name: (-len(name), name))
    if not names:
        return None
    if not parse:
        return re.compile(f"({'|'.join(map(re.escape, names))})")
    plain = ParseOptions()
    return re.compile("|".join(_alternative(name, parse.get(name, plain)) for name in names))


def _alternative(name: str, options: ParseOptions) -> str:
    before = ("\\s*" if options.lstrip else "") + ("(?<!\\w)" if options.single_word else "")
    after = ("(?!\\w)" if options.single_word else "") + ("\\s*" if options.rstrip else "")
    return f"{before}({re.escape(name)}){after}"
