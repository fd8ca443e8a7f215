"""A small trained tokenizer, a small Llama-3-like one, and strings that tokenizers fail on."""

from __future__ import annotations

import argparse
import base64
import inspect
import json
import random
from pathlib import Path

import pytest

from puna.tokenizer.chat import MARKS
from puna.tokenizer.reading import load
from puna.tokenizer.tiktoken_reader import TiktokenCodec
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.train import TokenizerSettings, train

HARD = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "  a",
    "a ",
    "a  b",
    " " * 33 + "x" + " " * 17,
    "\n",
    "\n\n a",
    "\nfoo\n    bar\n\tbaz\r\n",
    "\0",
    "a\0b",
    "0123456789 3.14159 1e10",
    "don't DON'T you'll they'Re it'ſ",
    "<s>",
    "</s> <unk>",
    "text <s>and</s> <0x0A> more",
    "<|eot_id|><|begin_of_text|>",
    "é e\u0301 ﬁ Å ß İ",
    "日本語のテキスト。中文 한국어 ไทย हिन्दी العربية",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff",
    "\u00a0\u2003\u3000\u200b\ufeff\u0085x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababaababab",
    "========----------########",
    "def f(self, *args, **kwargs):\n    return self._x[0]  # done\n",
    "▅▇ \ufffd \ufffe",
]


@pytest.fixture(scope="session")
def source() -> str:
    """Some Python source that every Python carries."""
    return inspect.getsource(argparse)


@pytest.fixture(scope="session")
def small(source: str) -> Tokenizer:
    """Trained by LLaMA's rules."""
    return train([source], TokenizerSettings(vocab_size=600))


@pytest.fixture(scope="session")
def small_directory(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tokenizer, saved."""
    directory = tmp_path_factory.mktemp("small")
    small.save(directory)
    return directory


def _ranks() -> bytes:
    """All bytes, then pairs that join to common words, each from two earlier tokens, as BPE makes them."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in (
        b" the",
        b"hello",
        b"    ",
        b"\n\n",
        b"self",
        "é".encode(),
        "日本".encode(),
        b"aaa",
        b"user",
    ):
        tokens += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in tokens]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="session")
def ranked_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of tiktoken's kind."""
    directory = tmp_path_factory.mktemp("ranked")
    (directory / "tokenizer.model").write_bytes(_ranks())
    return directory


@pytest.fixture(scope="session")
def ranked(ranked_directory: Path) -> Tokenizer:
    """The tiktoken tokenizer."""
    return load(ranked_directory)


@pytest.fixture(scope="session")
def framed(small_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The trained tokenizer with the tokens of every built-in template added, as fine-tunes add them."""
    directory = tmp_path_factory.mktemp("framed")
    (directory / "tokenizer.model").write_bytes((small_directory / "tokenizer.model").read_bytes())
    names = [name for marks in MARKS.values() for name in marks]
    added = {name: 600 + place for place, name in enumerate(names)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    return load(directory)


@pytest.fixture(scope="session")
def modern(small_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The trained tokenizer again, from its tokenizer.json alone."""
    directory = tmp_path_factory.mktemp("modern")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((small_directory / name).read_bytes())
    return load(directory)


@pytest.fixture(scope="session")
def framed_ranked(ranked_directory: Path) -> Tokenizer:
    """The tiktoken tokenizer with the tokens of every built-in template."""
    data = (ranked_directory / "tokenizer.model").read_bytes()
    reserved = len(data.splitlines()) + 2
    return Tokenizer(TiktokenCodec(data, {reserved: "<|im_start|>", reserved + 1: "<|im_end|>"}))


@pytest.fixture(scope="session")
def framed_modern(framed: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """`framed` again, from its tokenizer.json alone."""
    directory = tmp_path_factory.mktemp("framed_modern")
    framed.save(directory)
    (directory / "tokenizer.model").unlink()
    return load(directory)


@pytest.fixture(params=["framed", "framed_ranked", "framed_modern"])
def each_framed(request: pytest.FixtureRequest) -> Tokenizer:
    """Every kind of tokenizer in turn, with the tokens of every built-in template."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["small", "ranked", "modern"])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    """Every kind of tokenizer in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def hard() -> list[str]:
    """The hard strings, and two thousand random mixtures of their parts; none holds U+2581."""
    draw = random.Random(0)
    parts = [
        "a",
        "b",
        "ab",
        " ",
        "  ",
        "\n",
        "aa",
        "=",
        " the",
        "The",
        "é",
        "日",
        "😀",
        "\t",
        "0",
        "12",
        "<s>",
        "//",
    ]
    parts += ["ba", "...", "__", "</s>", "<|eot_id|>", "'s", "\u00a0", "ana", "self", "\r\n"]
    mixtures = []
    for _ in range(2000):
        alphabet = draw.sample(parts, draw.randint(1, 5))
        mixtures.append("".join(draw.choices(alphabet, k=draw.randint(0, 24))))
    return [*HARD, *mixtures]


@pytest.fixture(scope="session")
def real_lines(assets: Path) -> list[str]:
    """Lines of real text in two languages, and of conversations."""
    texts = [
        "corpora/books/books__French__Candide.txt",
        "corpora/tinyshakespeare/input.txt",
        "corpora/wikitext-2/test.txt",
    ]
    lines = [line for name in texts for line in (assets / name).read_text(encoding="utf-8").split("\n")[:700]]
    records = json.loads((assets / "corpora/instructions/alpaca_en_demo.json").read_text(encoding="utf-8"))
    return lines + [record["output"] for record in records[:300]]
