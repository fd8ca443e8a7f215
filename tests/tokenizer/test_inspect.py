"""Counts that can be checked by hand."""

from __future__ import annotations

import subprocess
import sys

from puna.tokenizer.inspect import contents, fit, pieces
from puna.tokenizer.tokenizer import Tokenizer


def test_contents(small: Tokenizer, ranked: Tokenizer) -> None:
    found = contents(small, longest=3)
    assert (found.vocab_size, found.special_tokens, found.byte_tokens) == (600, 3, 256)
    lengths = [len(small.token_bytes(index)) for index in found.longest]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(len(small.token_bytes(i)) for i in range(3, 600))
    assert contents(ranked).special_tokens == 256


def test_fit(small: Tokenizer) -> None:
    found = fit(small, ["é\n", ""])
    ids = small.encode("é\n", bos=False)  # the space before, two bytes, one byte
    assert pieces(small, ids) == list(zip(ids, ["▁", "<0xC3>", "<0xA9>", "<0x0A>"], strict=True))
    assert (found.texts, found.bytes, found.characters, found.tokens) == (2, 3, 2, 4)
    assert (found.fallback_tokens, found.unknown_tokens, found.distinct_tokens) == (3, 0, 4)
    assert (found.bytes_per_token, found.fallback_share) == (0.75, 0.75)
    assert fit(small, []).bytes_per_token == 0.0


def test_the_room_loads_nothing_heavy() -> None:
    heavy = {"torch", "tokenizers", "sentencepiece", "tiktoken", "jinja2"}
    program = f"import sys, puna.tokenizer; print({heavy} & {{*sys.modules}})"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
