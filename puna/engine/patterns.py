r"""Regular expressions: what `re.fullmatch` says, in the syntax that constraints are compiled from.

The dialects differ in silence: in what `\w` holds, or what `[a&&b]` means. So a pattern is read by Python's
own parser and written anew, in code points; what decoding cannot follow is refused by name.
"""

from __future__ import annotations

import re
import sys
import unicodedata
import warnings
from collections.abc import Callable
from functools import cache
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from puna.errors import InputError

# As unicodedata and str.isspace have them: letters, numbers and "_"; decimal digits; white space.
# Characters younger than Python's own Unicode are none of its letters and digits.
_AGE = ".".join(unicodedata.unidata_version.split(".")[:2])
_UNICODE = {
    codes.CATEGORY_WORD: rf"[[\p{{L}}\p{{N}}_]&&\p{{age={_AGE}}}]",
    codes.CATEGORY_DIGIT: rf"[\p{{Nd}}&&\p{{age={_AGE}}}]",
    codes.CATEGORY_SPACE: r"\t-\r\x1c-\x1f \x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}"
    r"\x{205f}\x{3000}",
}
_ASCII = {
    codes.CATEGORY_WORD: "0-9A-Za-z_",
    codes.CATEGORY_DIGIT: "0-9",
    codes.CATEGORY_SPACE: r"\t-\r ",
}
_NEGATED = {
    codes.CATEGORY_NOT_WORD: codes.CATEGORY_WORD,
    codes.CATEGORY_NOT_DIGIT: codes.CATEGORY_DIGIT,
    codes.CATEGORY_NOT_SPACE: codes.CATEGORY_SPACE,
}
_BEGINNINGS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING)
_ENDS = (codes.AT_END, codes.AT_END_STRING)
_REFUSED = {
    codes.ASSERT: "a look-around",
    codes.ASSERT_NOT: "a look-around",
    codes.FAILURE: "a look-around",
    codes.ATOMIC_GROUP: "an atomic group",
    codes.POSSESSIVE_REPEAT: "a possessive repeat",
    codes.GROUPREF: "a back-reference",
    codes.GROUPREF_EXISTS: "a back-reference",
}


def translate(pattern: str) -> str:
    r"""The same language in the syntax of Rust's `regex`, fit to stand between slashes.

    >>> translate(r"a+[^b]|c$")
    '(?:(?:\\x{61}){1,}[^\\x{62}]|\\x{63})'

    Raises:
        InputError: it is none, or it needs more than reading once from left to right.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what looks like the set operations of other dialects is none
            tree = parser.parse(pattern)
        return _sequence(tree, tree.state.flags, True, True)
    except re.error as error:
        raise InputError(f"not a regular expression of Python's re: {error}; got {pattern!r:.80}") from None
    except (RecursionError, OverflowError):
        raise InputError(f"the regular expression is too deep or too large: {pattern!r:.80}") from None


def literal(text: str) -> str:
    """A pattern for this text and no other."""
    return "".join(map(_character, map(ord, text)))


def _sequence(items: Any, flags: int, first: bool, last: bool) -> str:
    """`first`, `last`: whether it begins or ends the whole, where anchors say nothing new."""
    nodes = list(items)
    while first and nodes and nodes[0][0] is codes.AT and nodes[0][1] in _BEGINNINGS:
        del nodes[0]
    while last and nodes and nodes[-1][0] is codes.AT and nodes[-1][1] in _ENDS:
        del nodes[-1]
    end = len(nodes) - 1
    return "".join(
        _node(kind, value, flags, first and place == 0, last and place == end)
        for place, (kind, value) in enumerate(nodes)
    )


def _node(kind: Any, value: Any, flags: int, first: bool, last: bool) -> str:
    if kind in _REFUSED:
        raise InputError(f"the regular expression has {_REFUSED[kind]}, which decoding cannot follow")
    if kind is codes.AT:
        raise InputError(
            "the regular expression has an anchor (^, $, \\b) inside; the whole answer is matched"
        )
    if kind is codes.BRANCH:
        return f"(?:{'|'.join(_sequence(arm, flags, first, last) for arm in value[1])})"
    if kind is codes.SUBPATTERN:
        _, added, removed, items = value
        return f"(?:{_sequence(items, (flags | added) & ~removed, first, last)})"
    if kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        least, most, items = value
        bound = "" if most is codes.MAXREPEAT else most
        return f"(?:{_sequence(items, flags, False, False)}){{{least},{bound}}}"
    return SIMPLE[kind](value, flags)


def _one(code: int, flags: int) -> str:
    return _set([(codes.LITERAL, code)], flags) if flags & re.IGNORECASE else _character(code)


def _any(_: Any, flags: int) -> str:
    return r"[\x{0}-\x{10ffff}]" if flags & re.DOTALL else r"[^\n]"


def _set(items: Any, flags: int) -> str:
    negated = items[0][0] is codes.NEGATE
    members = "".join(_member(kind, value, flags) for kind, value in items[negated:])
    return f"[{'^' * negated}{members}]"


def _member(kind: Any, value: Any, flags: int) -> str:
    if kind is codes.CATEGORY:
        table = _ASCII if flags & re.ASCII else _UNICODE
        return f"[^{table[_NEGATED[value]]}]" if value in _NEGATED else table[value]
    low, high = value if kind is codes.RANGE else (value, value)
    cases = _cases(low, high, flags & re.ASCII) if flags & re.IGNORECASE else ""
    return (
        f"{_character(low)}-{_character(high)}{literal(cases)}" if high > low else literal(chr(low) + cases)
    )


SIMPLE: dict[Any, Callable[[Any, int], str]] = {
    codes.LITERAL: _one,
    codes.NOT_LITERAL: lambda code, flags: _set([(codes.NEGATE, None), (codes.LITERAL, code)], flags),
    codes.ANY: _any,
    codes.IN: _set,
}
"""What matches one character, by Python's name for it."""


def _character(code: int) -> str:
    if 0xD800 <= code <= 0xDFFF:
        raise InputError("half of a surrogate pair is no text, and no answer can hold it")
    return f"\\x{{{code:x}}}"


@cache
def _cases(low: int, high: int, ascii_only: int) -> str:
    """What beyond this range matches it when case is ignored."""
    span = f"[{re.escape(chr(low))}-{re.escape(chr(high))}]"
    matching = re.findall(span, _cased(), re.IGNORECASE | ascii_only)
    return "".join(character for character in matching if not low <= ord(character) <= high)


@cache
def _cased() -> str:
    """Every character that has another case."""
    known = (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF)
    return "".join(c for c in known if not c == c.lower() == c.upper() == c.casefold())
