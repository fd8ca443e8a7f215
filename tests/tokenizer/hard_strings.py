"""Strings that tokenizers fail on, by the ten thousand: drawn by seed, and the lines of every real corpus."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Draw = random.Random

WHITE = [chr(code) for code in range(0x3001) if chr(code).isspace()]
FORMATS = ["\u200b", "\u200c", "\u200d", "\u200e", "\u200f", "\u202a", "\u202e", "\u2060", "\ufeff", "\u00ad"]
MARKS = [chr(code) for code in range(0x10000) if unicodedata.combining(chr(code))]
EMOJI = [*"😀👍👩👧👦🏳❤☝🧑🎄🇫🇷🇩🇪", "\ufe0f", "\u200d", "\u20e3", "\U0001f3fb", "\U0001f3ff", "\U000e0067"]
NEAR_SURROGATES = [chr(code) for code in (0xD7A3, 0xD7FB, 0xD7FF, 0xE000, 0xE001, 0xF8FF, 0xF900)]
NONCHARACTERS = [chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)]
NONCHARACTERS += [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Where a vocabulary has no letters of a script, every character is written as bytes.
BLOCKS = [
    (0x20, 0x7F), (0x80, 0x100), (0x100, 0x250), (0x370, 0x400), (0x400, 0x530), (0x590, 0x700),
    (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2100, 0x2300),
    (0x2500, 0x2600), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xFB00, 0xFE00),
    (0xFF00, 0xFFF0), (0x10000, 0x10100), (0x12000, 0x12400), (0x1D400, 0x1D800), (0x1F300, 0x1F700),
    (0x20000, 0x2A6E0), (0xE0000, 0xE0080), (0xF0000, 0xF0100), (0x10FF00, 0x110000),
]  # fmt: skip
DIGITS = [*"0123456789", *"٠١٢३४५０１２", *"²³½Ⅷ〇一二", "𝟘", "𝟙"]
WORDS = [
    "a", "ab", "ﬁ", "the", " the", "The", "don't", "'LL", "it'ſ", "naïve", "日本", "мир", "שלום", "سلام",
]  # fmt: skip
SIGNS = [*"=-_.,;:!?#*/\\|()[]{}<>@&%$^~`'\"", "...", "//", "->", "▅", "\ufffd", "\u2581"]


def planes(draw: Draw, names: Sequence[str]) -> str:
    """Characters of every plane alike, assigned or not."""
    return _joined(draw, lambda: chr(draw.randrange(draw.randrange(17) << 16, sys.maxunicode + 1)), 12)


def blocks(draw: Draw, names: Sequence[str]) -> str:
    """Characters of one or two scripts, with spaces between."""
    chosen = draw.sample(BLOCKS, draw.randint(1, 2))

    def one() -> str:
        return " " if draw.random() < 0.15 else chr(draw.randrange(*draw.choice(chosen)))

    return _joined(draw, one, 24)


def edges(draw: Draw, names: Sequence[str]) -> str:
    """What stands beside the surrogates, private use, noncharacters, marks without letters."""
    pool = [*NEAR_SURROGATES, *NONCHARACTERS, *FORMATS, "a", " "]
    return _joined(draw, lambda: draw.choice(pool), 12)


def white(draw: Draw, names: Sequence[str]) -> str:
    """Runs of one kind of white space or of all, alone or around words."""
    kinds = draw.sample(WHITE, draw.randint(1, 4))

    def run() -> str:
        return _joined(draw, lambda: draw.choice(kinds), draw.choice([1, 3, 20, 70]))

    between = ["", "a", *WORDS, "1", "."]
    return "".join(run() + draw.choice(between) for _ in range(draw.randint(1, 4))) + run()


def digits(draw: Draw, names: Sequence[str]) -> str:
    """Numbers of every length, with points, signs and letters in them."""
    pool = [*DIGITS[:10]] * 3 + [*DIGITS, ".", ",", "-", "e", " ", "x", "%"]
    return _joined(draw, lambda: draw.choice(pool), 30)


def controls(draw: Draw, names: Sequence[str]) -> str:
    """C0 and C1 control characters, NUL among them."""
    pool = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "a", " ", "é"]
    return _joined(draw, lambda: draw.choice(pool), 16)


def marks(draw: Draw, names: Sequence[str]) -> str:
    """Letters under heaps of marks, composed and decomposed."""
    text = "".join(draw.choice("aeionuAEO ") + _joined(draw, lambda: draw.choice(MARKS), 8) for _ in range(3))
    return unicodedata.normalize(draw.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)


def emoji(draw: Draw, names: Sequence[str]) -> str:
    """Families, flags and skins, whole and broken."""
    return _joined(draw, lambda: draw.choice(EMOJI), 14)


def right_to_left(draw: Draw, names: Sequence[str]) -> str:
    """Hebrew and Arabic with the marks that turn direction."""
    ranges = [(0x5D0, 0x5EB), (0x621, 0x64B), (0x64B, 0x653), (0x20, 0x40)]

    def one() -> str:
        return draw.choice(FORMATS) if draw.random() < 0.2 else chr(draw.randrange(*draw.choice(ranges)))

    return _joined(draw, one, 24)


def special(draw: Draw, names: Sequence[str]) -> str:
    """Special tokens' names embedded, doubled, nested and cut."""
    name = draw.choice(names)
    cut = draw.randrange(len(name) + 1)
    head, tail = name[:cut], name[cut:]
    forms = [name, name * 2, head, tail, head + name + tail, head + " " + tail]
    return "".join(draw.choice([*forms, *WORDS, " ", "\n", "<", ">"]) for _ in range(draw.randint(1, 5)))


def words(draw: Draw, names: Sequence[str]) -> str:
    """Words, signs and spaces in any order, as source code and damaged text have them."""
    pool = [*WORDS, *SIGNS, " ", " ", "\n", "\t", "\r\n", *DIGITS[:3]]
    chosen = draw.sample(pool, draw.randint(1, 6))
    return _joined(draw, lambda: draw.choice(chosen), 30)


def repeats(draw: Draw, names: Sequence[str]) -> str:
    """Periods: where one pair may merge in several ways."""
    period = _joined(draw, lambda: draw.choice([*"aabn =-#_.\n", "é", "日", "😀"]), 4)
    return draw.choice(["", " ", "a"]) + period * draw.randint(2, 60) + draw.choice(["", " ", "b"])


KINDS: list[Callable[[Draw, Sequence[str]], str]] = [
    planes, blocks, edges, white, digits, controls, marks, emoji, right_to_left, special, words, repeats,
]  # fmt: skip


def _joined(draw: Draw, one: Callable[[], str], most: int) -> str:
    return "".join(one() for _ in range(draw.randint(1, most)))


def drawn(count: int, names: Sequence[str], seed: int = 0) -> list[str]:
    """`count` distinct valid texts, each kind in turn; `names` are special tokens' names."""
    draw, texts = random.Random(seed), dict.fromkeys(["", " "])
    while len(texts) < count:
        kind = KINDS[len(texts) % len(KINDS)]
        text = kind(draw, names)
        # What is no text has a rule of its own, and nothing to be compared with.
        texts[text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")] = None
    return list(texts)


def corpus_lines(corpora: Path) -> list[str]:
    """Every distinct line and every distinct text of the records, in order."""
    lines: dict[str, None] = {}
    for path in sorted(corpora.rglob("*")):
        if path.suffix in (".txt", ".wet"):
            lines.update(dict.fromkeys(path.read_text(encoding="utf-8", errors="replace").split("\n")))
        elif path.suffix in (".json", ".jsonl"):
            lines.update(dict.fromkeys(_texts(_records(path))))
    return list(lines)


def _records(path: Path) -> object:
    text = path.read_text(encoding="utf-8")
    return (
        json.loads(text) if path.suffix == ".json" else [json.loads(row) for row in text.splitlines() if row]
    )


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
