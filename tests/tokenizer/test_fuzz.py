"""Damaged and hostile tokenizer files and chat templates: refused in one line, or usable; never a crash.

The libraries underneath may end the process, so the rounds run in a process of their own, which says which
round it is in.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.errors import TokenizerError
from puna.tokenizer import protobuf
from puna.tokenizer.chat import TEMPLATES, render
from puna.tokenizer.reading import load
from puna.tokenizer.tokenizer import Tokenizer
from tests.formats.damage import bent, bounded, cut_or_flipped

Draw = random.Random
ROOT = Path(__file__).parents[2]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a<s> é\n" * 3},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": ["c", {"d": 1}]},
]


# --- tokenizer.json ---

STEPS: list[Any] = [
    None, {}, {"type": "Sequence"}, {"type": "NFC"}, {"type": "NFKC"}, {"type": "Lowercase"},
    {"type": "Nothing"},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": "("}},
    {"type": "Replace", "pattern": {"Regex": "(?=a)*|\\1"}, "content": "x" * 1000},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xy"}, {"type": "Prepend", "prepend": ""},
    {"pattern": {"String": "a"}, "content": "a" * 200},
    {"type": "Sequence", "normalizers": [{"pattern": {"String": "a"}, "content": "a" * 99}] * 6},
    {"type": "Prepend", "prepend": "x" * 100_000},
    {"type": "Strip", "content": "a", "start": 2**63, "stop": 2**63},
    {"type": "Strip", "content": "ab", "start": -1, "stop": 0},
    {"type": "Strip", "content": " ", "start": "1"},
    {"type": "Metaspace", "replacement": "ab"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": 3},
    {"type": "Metaspace", "add_prefix_space": 0},
    {"type": "ByteLevel"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": 1, "use_regex": True},
    {"type": "Split", "pattern": {"Regex": "\\p{L}"}, "behavior": "Removed", "invert": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhAA=="},
    {"type": "Precompiled", "precompiled_charsmap": "CAAAAP////////8A"},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "CTC"}, {"type": "WordPiece"},
    {"type": "BPEDecoder"},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": "<s> $A", "pair": "$A",
     "special_tokens": {"<s>": {"ids": [2**31]}}},
]  # fmt: skip
MODELS: dict[str, list[Any]] = {
    "type": ["Unigram", "BPE", "WordPiece", None, 1],
    "unk_token": ["", "<nothing>", None, 3, "a"],
    "dropout": [0.5, 2.0, -1, "x"],
    "byte_fallback": [True, False, None],
    "fuse_unk": [True, False],
    "ignore_merges": [True, False],
    "continuing_subword_prefix": ["##", "", 1, "▁" * 1000],
    "end_of_word_suffix": ["</w>", "", []],
    "merges": [[], None, ["a"], [["a"]], [["a", "b", "c"]], [["zz", "zzz"]], [[1, 2]], "a b",
               ["a b c"], [["", ""]]],
    "vocab": [{}, [], {"": 0}, {"a": 0, "b": 0}, {"a": 4_000_000}, [["a", 0.0]], [["a", "b"]],
              {"a": 1.5}, {"a": True}],
}  # fmt: skip
ADDED: list[Any] = [
    {}, {"id": 0}, {"id": 5, "content": "", "special": True},
    {"id": 2**22, "content": "far", "special": True},
    {"id": 4_000_000, "content": "far", "special": False}, {"id": 1, "content": "a", "special": False},
    {"id": 700, "content": "x" * 100_000, "special": True, "lstrip": True}, {"id": "1", "content": "a"},
    {"id": 3, "content": "<a>", "special": True, "normalized": True, "single_word": True, "rstrip": True},
    {"id": 0, "content": "<s>", "special": True}, {"id": 600, "content": "\ud800", "special": True},
    {"id": 601, "content": ["a"], "special": True}, {"id": 602, "content": None},
    {"id": True, "content": "b"},
]  # fmt: skip


def _json(draw: Draw, data: bytes) -> bytes:
    if draw.random() < 0.25:
        return cut_or_flipped(draw, data, len(data))
    document = json.loads(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        document = draw.choice([bent, _other_step, _other_model, _other_added, _other_vocabulary])(
            draw, document
        )
        if not isinstance(document, dict):
            break
    return json.dumps(document).encode()


def _other_step(draw: Draw, document: dict[str, Any]) -> dict[str, Any]:
    role = draw.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding"])
    step = draw.choice(STEPS)
    plural = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}.get(
        role, "x"
    )
    if draw.random() < 0.4:
        old = document.get(role)
        parts = [step, old] if draw.random() < 0.5 else [old, step, step]
        step = {"type": "Sequence", plural: [part for part in parts if part] if draw.random() < 0.9 else "no"}
    for _ in range(draw.choice([0, 0, 0, 0, 3, 300])):
        step = {"type": "Sequence", plural: [step]}
    return {**document, role: step}


def _other_model(draw: Draw, document: dict[str, Any]) -> dict[str, Any]:
    key = draw.choice(list(MODELS))
    model = document.get("model")
    return (
        {**document, "model": {**model, key: draw.choice(MODELS[key])}}
        if isinstance(model, dict)
        else document
    )


def _other_added(draw: Draw, document: dict[str, Any]) -> dict[str, Any]:
    added = document.get("added_tokens")
    more = draw.choices(ADDED, k=draw.choice([1, 2, 5]))
    return {**document, "added_tokens": (added if isinstance(added, list) else []) + more}


def _other_vocabulary(draw: Draw, document: dict[str, Any]) -> dict[str, Any]:
    """Ids moved, doubled and taken away; merges of what is not there."""
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        return document
    vocab, merges = dict(model["vocab"]), list(model.get("merges") or [])
    for name in draw.sample(list(vocab), min(len(vocab), draw.choice([1, 5, 100]))):
        if draw.random() < 0.4:
            vocab[name] = draw.choice([-1, 0, 1, 10**4, 2**22 - 1, 2**22, 2**32, 2**64, None, "7", 1.0])
        else:
            index = vocab.pop(name)
            if draw.random() < 0.5:
                vocab[name * draw.choice([0, 2, 10_000])] = index
    if draw.random() < 0.3:
        merges.insert(
            draw.randrange(len(merges) + 1), draw.choice([["▁q", "zx"], ["a", ""], "ab", ["a"], None])
        )
    return {**document, "model": {**model, "vocab": vocab, "merges": merges}}


# --- SentencePiece ---


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _field(number: int, wire: int, content: bytes | int) -> bytes:
    tag = _varint(number << 3 | wire)
    if isinstance(content, int):
        return tag + _varint(content)
    return tag + (_varint(len(content)) if wire == 2 else b"") + content


def _parts(data: bytes) -> list[tuple[int, int, bytes | int]]:
    return [
        (part.number, part.wire, part.value if part.wire == 0 else data[part.value : part.end])
        for part in protobuf._fields(data, 0, len(data))
    ]


def _proto(draw: Draw, data: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.15:
        return cut_or_flipped(draw, data, len(data))
    if kind < 0.3:
        return data[: draw.randrange(len(data))]
    parts = _parts(data)
    if kind < 0.4:
        draw.shuffle(parts)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = _place(draw, parts)
        number, wire, content = parts[place]
        action = draw.random()
        if action < 0.1:
            del parts[place]
        elif action < 0.2:
            parts.insert(draw.randrange(len(parts)), parts[place])
        elif action < 0.25:
            parts[place] = (draw.choice([0, 1, 2, 3, 4, 5, 99]), draw.choice([0, 1, 2, 5]), content)
        elif wire == 2 and isinstance(content, bytes):
            parts[place] = (number, wire, _bent_message(draw, number, content))
        if not parts:
            break
    return b"".join(_field(*part) for part in parts)


def _place(draw: Draw, parts: list[tuple[int, int, bytes | int]]) -> int:
    """Settings as often as one of the many pieces."""
    places = [index for index, part in enumerate(parts) if part[0] != 1]
    return draw.choice(places) if places and draw.random() < 0.5 else draw.randrange(len(parts))


def _bent_message(draw: Draw, number: int, content: bytes) -> bytes:
    try:
        parts = _parts(content)
    except IndexError:
        return draw.randbytes(draw.choice([0, 3, 300]))
    if number == 1:
        choices: list[tuple[int, int, bytes | int]] = [
            (1, 2, text)
            for text in (
                b"",
                b"a",
                b"\xff",
                b"<s>",
                b"<0x41>",
                b"<unk>",
                b"\xe2\x96\x81",
                b"a" * 70_000,
                b"\0",
            )
        ]
        choices += [
            (2, 5, value)
            for value in (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f")
        ]
        choices += [(3, 0, kind) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 2**31, 2**63)]
    elif number == 2:
        choices = [(3, 0, kind) for kind in (0, 1, 2, 3, 4, 5, 2**40)]
        choices += [
            (key, 0, value)
            for key in (4, 24, 35, 40, 41, 42, 43)
            for value in (0, 1, 2, 9999, 2**31, 2**64 - 1)
        ]
        choices += [(key, 2, value) for key in (44, 45, 46, 47, 48) for value in (b"", b"a", b"\xff", b"<s>")]
    else:
        choices = [(2, 2, draw.randbytes(draw.choice([0, 1, 4, 5, 64, 3000])))]
        choices += [
            (2, 2, length + draw.randbytes(64))
            for length in (b"\0\0\0\0", b"\x20\0\0\0", b"\xff\xff\xff\x7f")
        ]
        choices += [(key, 0, value) for key in (3, 4, 5) for value in (0, 1, 7)]
        choices += [(1, 2, b"nfkc"), (1, 2, b"\xff"), (6, 2, b"a\tb"), (6, 2, draw.randbytes(40))]
    new = draw.choice(choices)
    kept = [part for part in parts if part[0] != new[0] or draw.random() < 0.1]
    kept.insert(draw.randrange(len(kept) + 1), new)
    return b"".join(_field(*part) for part in kept)


# --- tiktoken ---


def _ranks(draw: Draw, data: bytes) -> bytes:
    if draw.random() < 0.3:
        return cut_or_flipped(draw, data, len(data))
    rows = data.splitlines()
    for _ in range(draw.choice([1, 1, 3, 50])):
        place = draw.randrange(len(rows))
        token, _, rank = rows[place].partition(b" ")
        changes: list[bytes] = [
            token, b" " + rank, token + b" -1", token + b" 9" * 3, token + b" 99999999999999999999",
            token[:-1] + b" " + rank,
            b"====" + b" " + rank, base64.b64encode(b"x" * 50_000) + b" " + rank, b"", b" ",
            token + b"\t" + rank,
            base64.b64encode(draw.randbytes(3)) + b" " + rank, base64.b64encode(b"") + b" " + rank,
            b"\xff\xfe " + rank,
            token + b" " + rank + b" 1", token + b" \xd9\xa1", rows[draw.randrange(len(rows))],
        ]  # fmt: skip
        if draw.random() < 0.2:
            del rows[place]
        else:
            rows[place] = draw.choice(changes)
        if not rows:
            break
    end = draw.choice([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"])
    return end.join(rows) + draw.choice([b"", end])


# --- the files beside ---

CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "bos_token": {"content": "<s>", "special": True},
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
    },
    "chat_template": [
        {"name": "default", "template": TEMPLATES["llama3"]},
        {"name": "tools", "template": "x"},
    ],
    "eos_token_id": [2, 600],
    "model_max_length": 10**30,
    "pad_token": {"content": "<pad>"},
    "padding_side": "left",
    "additional_special_tokens": ["<pad>", {"content": "</s>"}],
    "extra_special_tokens": {"image_token": "<image>"},
    "add_eos_token": True,
    "tokenizer_class": "LlamaTokenizer",
}
# added_tokens.json, of tokens beyond the 600 of the vocabulary.
LISTED: dict[str, Any] = {"[PAD]": 600, "<|im_start|>": 601, "<|im_end|>": 602}
BESIDE = ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"]
BESIDE += ["chat_template.json", "chat_template.jinja", "added_tokens.json"]
ODD: list[Any] = [
    {"content": 5}, {"content": ["a"]}, {"1": "<s>"}, {"-1": "<x>"}, {"٣": "x"}, {str(2**70): "x"},
    {"600": {"content": "x"}},
    {"9" * 5000: "x"}, "x" * 10**6, [{"name": 1, "template": 2}], [[]], {"name": {"name": {}}}, "\ud800",
    "\0", [10**400],
]  # fmt: skip


def _beside(draw: Draw, data: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.1:
        return draw.choice(
            [b"[" * 10**6, b'{"a":' * 10**5, b"\xff\xfe{", b"", b"\xef\xbb\xbf{}", b"NaN", b'{"a": 1e999}']
        )
    if kind < 0.25:
        return cut_or_flipped(draw, data)
    config = dict(CONFIG)
    for _ in range(draw.choice([1, 1, 2, 4])):
        key = draw.choice(list(config))
        config = {**config, key: draw.choice([bent(draw, config[key]), draw.choice(ODD)])}
    return json.dumps(config).encode()


def _listed(draw: Draw, data: bytes) -> bytes:
    """added_tokens.json with ids and names that do not fit, or too many of them."""
    if draw.random() < 0.1:
        return cut_or_flipped(draw, json.dumps(LISTED).encode())
    table: Any = dict(LISTED)
    for _ in range(draw.choice([1, 1, 2, 4])):
        name = draw.choice([*LISTED, "", "<s>", "a", "▁the", "\ud800", "\0", "x" * 10**5, "<0x0A>", " ", "▁"])
        ids = [
            *range(595, 606),
            -1,
            2**22 - 1,
            2**22,
            2**64,
            10**400,
            True,
            None,
            "600",
            600.0,
            [600],
            {"id": 1},
        ]
        table[name] = draw.choice(ids)
    if draw.random() < 0.1:
        table = {
            f"<{index}>": index for index in range(draw.choice([0, 600]), 600 + draw.choice([1, 9, 5000]))
        }
    return json.dumps(bent(draw, table) if draw.random() < 0.2 else table).encode()


# --- templates ---

ATOMS = [
    "1", "0", "-1", "2**70", "10**9", "0.5", "1e308", "'a'", "''", "'a'*9999", "'<s>'", "none", "true",
    "[]", "[1,2]", "{}",
    "{'a':[1]}", "(1,2)", "messages", "messages[0]", "messages[-1].content", "m", "m.content", "m['role']",
    "bos_token", "x",
    "ns", "ns.x", "loop", "loop.last", "loop.index0", "range(10**5)", "range(9)", "self", "caller", "f",
    "namespace", "dict",
    "cycler", "joiner", "raise_exception", "strftime_now", "lipsum", "ns.x.__class__",
    "''.__class__.__mro__", "f.__globals__",
    "messages.append", "m.items()", "m.keys", "cycler.__init__", "''.format", "x.y", "loop.cycle", "''.join",
]  # fmt: skip
FILTERS = [
    "abs", "attr('__class__')", "batch(10**9,'x')", "capitalize", "center(10**9)", "default('a')",
    "dictsort", "e", "escape",
    "first", "float", "format('a')", "groupby('role')", "indent(10**9)", "indent(4,true)", "int",
    "int(base=36)", "items", "join",
    "join('x'*10**5)", "last", "length", "list", "lower", "map('upper')", "map(attribute='role')", "max",
    "min", "pprint",
    "random", "reject('none')", "replace('a','b'*10**6)", "replace('','x')", "reverse",
    "round(10**9,'ceil')", "round(1)", "safe",
    "select", "selectattr('role','equalto','user')", "slice(10**9)", "sort", "sort(attribute='role')",
    "string", "sum",
    "sum(start=[])", "title", "tojson", "tojson(indent=10**9)", "tojson(separators=('x'*10**6,':'))",
    "trim", "trim('a'*10**5)",
    "truncate(9)", "unique", "upper", "urlize", "wordcount", "xmlattr", "map('map','map')",
    "map(attribute='a.'*10**5)",
]  # fmt: skip
TESTS = [
    "defined", "none", "string", "mapping", "iterable", "number", "eq(1)", "in([1])", "sameas(1)", "callable",
    "lower", "divisibleby(2)", "gt('a')",
]  # fmt: skip
METHODS = [
    "strip()", "strip('a'*10**6)", "split('a')", "split()", "splitlines()", "replace('a','b'*10**7)",
    "join(['a']*10**5)", "upper()",
    "format(x)", "format(*[1]*10**6)", "format_map({})", "encode()", "ljust(10**10)", "zfill(10**10)",
    "translate({97:'b'*10**6})",
    "get('a')", "items()", "update({})", "append(1)", "copy()", "index('a')", "count('')",
    "rfind('b'*10**6)", "to_bytes(10**10)",
    "bit_length()", "expandtabs(10**9)", "next()", "a.b.c", "__class__", "__init__.__globals__", "mro()",
    "startswith('a')",
]  # fmt: skip
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "in", "not in", "and", "or"]


def _expression(draw: Draw, depth: int) -> str:
    if depth == 0:
        return draw.choice(ATOMS)
    a, b = (_expression(draw, depth - 1 if draw.random() < 0.6 else 0) for _ in range(2))
    return draw.choice([
        f"({a} {draw.choice(OPERATORS)} {b})", f"({a} | {draw.choice(FILTERS)})",
        f"({a}).{draw.choice(METHODS)}",
        f"({a} is {draw.choice(TESTS)})", f"({a} if {b} else {a})", f"[{a}, {b}]", f"{{{a}: {b}}}",
        f"({a})[{b}]",
        f"({a})[{b}:]", f"({a})[::-1]", f"({a})({b})", f"f({a})", f"namespace(x={a})", f"not {a}", f"-({a})",
    ])  # fmt: skip


def _statement(draw: Draw, depth: int) -> str:
    a = _expression(draw, draw.randint(0, 3))
    body = "".join(_statement(draw, depth - 1) for _ in range(draw.randint(1, 2))) if depth else "{{ x }}"
    return draw.choice([
        f"{{{{ {a} }}}}", f"{{% for m in {a} %}}{body}{{% endfor %}}",
        "{% for i in range(10**5) %}" + body + "{% endfor %}",
        f"{{% for m in messages if {a} recursive %}}{body}{{{{ loop({a}) }}}}{{% endfor %}}",
        f"{{% set ns.x = {a} %}}",
        f"{{% set x = {a} %}}", "{% set x %}" + body + "{{ x }}{{ x }}{% endset %}",
        "{% set ns.x = [ns.x, ns.x] %}",
        f"{{% macro f(n={a}) %}}{body}{{{{ f(n) }}}}{{{{ f(n) }}}}{{% endmacro %}}",
        "{% set ns.x = ns.x ~ ns.x %}",
        f"{{% if {a} %}}{body}{{% else %}}{body}{{% endif %}}",
        f"{{% filter {draw.choice(FILTERS)} %}}{body}{{% endfilter %}}",
        f"{{% call f({a}) %}}{body}{{% endcall %}}", f"{{% with x = {a} %}}{body}{{% endwith %}}",
        "{% break %}", "{% set ns.x = (ns.x,) * 99 %}",
        f"{{% include {a} %}}", f"{{% import {a} as o %}}",
        "{% block b %}" + body + "{{ self.b() }}{% endblock %}", "text " * 999,
        "{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "{% set ns.x = ns.x * 99 %}",
        "{% autoescape true %}<{% endautoescape %}", "{%- raw -%}{{{% endraw %}",
    ])  # fmt: skip


NESTED = [
    "(",
    "[",
    "{",
    "not ",
    "-",
    "{{",
    "{%",
    "{#",
    "{% if 1 %}",
    "{% for i in [1] %}",
    "{% set x %}",
    "a.",
    "a|",
    "a~",
    "1+",
    "'",
    "\\",
]


def _template(draw: Draw, data: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.15:
        source = draw.choice(list(TEMPLATES.values())).encode()
        return cut_or_flipped(draw, source, len(source))
    if kind < 0.25:
        text = draw.choice(["{{ ", ""]) + draw.choice(NESTED) * draw.choice([10, 100, 1000, 5000, 10**5])
        return (text + draw.choice(["", " }}", "1 }}"])).encode()
    begin = "{% set ns = namespace(x='ab') %}{% macro f(n) %}{{ n }}{{ caller }}{% endmacro %}"
    return (begin + "".join(_statement(draw, draw.randint(0, 4)) for _ in range(draw.randint(1, 4)))).encode()


# --- the rounds ---

Damage = Callable[[Draw, bytes], bytes]
# What is damaged, by kind: the file's name, where an undamaged one comes from, and how it is damaged.
KINDS: dict[str, tuple[str, str, Damage]] = {
    "json": ("tokenizer.json", "small", _json),
    "byte-level json": ("tokenizer.json", "ranked", _json),
    "sentencepiece": ("tokenizer.model", "small", _proto),
    "tiktoken": ("tokenizer.model", "ranked", _ranks),
    "beside": ("", "small", _beside),
    "beside json": ("", "modern", _beside),
    "added tokens": ("added_tokens.json", "small", _listed),
    "template": ("chat_template.jinja", "small", _template),
}
STRINGS = ["", " ", "hello the\n é12", "a<s>b</s> ", "日本😀\0", "▁▁ x  ", "aaaa" * 50, "self._x = 0x1F"]


def _use(tokenizer: Tokenizer) -> None:
    """Encodes, decodes, streams, describes."""
    for text in STRINGS:
        ids = tokenizer.encode(text, eos=tokenizer.eos_id is not None)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        tokenizer.decode(ids)
        tokenizer.decode(tokenizer.encode(text, specials=True), specials=True)
    tokenizer.encode_batch(STRINGS, threads=2)
    some = range(0, tokenizer.vocab_size, tokenizer.vocab_size // 50 + 1)
    tokenizer.decode(some)
    assert all(isinstance(tokenizer.piece(index), str) for index in some)
    assert len(tokenizer.fingerprint) == 64
    render(tokenizer, TALK[:3], None if tokenizer.chat_template is not None else "vicuna")


def _save(tokenizer: Tokenizer, directory: Path) -> None:
    """Whatever can be used can be saved, or says why not; what was saved gives the same ids."""
    try:
        tokenizer.save(directory)
    except TokenizerError as error:
        assert "\n" not in str(error)
        return
    again = load(directory)
    assert again.encode_batch(STRINGS) == tokenizer.encode_batch(STRINGS)


def _round(kind: str, seed: int, sound: Path, work: Path) -> bool:
    name, origin, damage = KINDS[kind]
    draw = random.Random(seed)
    name = name or draw.choice(BESIDE)
    usual = (
        (sound / origin / name).read_bytes()
        if (sound / origin / name).is_file()
        else json.dumps(CONFIG).encode()
    )
    main = "tokenizer.json" if origin == "modern" else "tokenizer.model"
    files = {} if name in MAIN else {main: (sound / origin / main).read_bytes()}
    files[name] = damage(draw, usual)
    for directory in (work, work.with_name(work.name + "-saved")):
        shutil.rmtree(directory, ignore_errors=True)
    work.mkdir()
    for file, content in files.items():
        (work / file).write_bytes(content)
    try:
        with bounded():
            tokenizer = load(work)
            _use(tokenizer)
            _save(tokenizer, work.with_name(work.name + "-saved"))
    except TokenizerError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return False
    return True


MAIN = ("tokenizer.model", "tokenizer.json")


def _rounds(kind: str, first: int, count: int, sound: Path, work: Path) -> None:
    """Says each round before it begins, and how many files could be used."""
    used = 0
    for seed in range(first, first + count):
        print(f"{kind}, round {seed}", flush=True)
        used += _round(kind, seed, sound, work)
    print(f"{kind}: {used} of {count} could be used", flush=True)


@pytest.fixture(scope="module")
def sound(small: Tokenizer, ranked: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory with each undamaged tokenizer."""
    directory = tmp_path_factory.mktemp("sound")
    small.save(directory / "small")
    ranked.save(directory / "ranked")
    (directory / "modern").mkdir()
    (directory / "modern" / "tokenizer.json").write_bytes(
        (directory / "small" / "tokenizer.json").read_bytes()
    )
    return directory


def _survives(kinds: list[str], count: int, sound: Path, work: Path) -> str:
    arguments = [str(count), str(sound), str(work), *kinds]
    done = subprocess.run(
        [sys.executable, "-m", "tests.tokenizer.test_fuzz", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if "could be used" in line]
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"{last} ended with {done.returncode}: {done.stderr[-3000:]}"
    assert len(said) == len(kinds)
    return "\n".join(said)


@pytest.mark.slow
def test_damaged_files(sound: Path, tmp_path: Path) -> None:
    _survives(list(KINDS), 60, sound, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(kind: str, sound: Path, tmp_path: Path) -> None:
    print(_survives([kind], 2500, sound, tmp_path))


if __name__ == "__main__":
    _count, _sound, _work = sys.argv[1:4]
    for _kind in sys.argv[4:]:
        _rounds(_kind, 0, int(_count), Path(_sound), Path(_work))
