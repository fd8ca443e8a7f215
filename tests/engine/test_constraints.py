"""What ends is valid, whatever the model prefers; what is valid can be written; the rest is refused."""

from __future__ import annotations

import json
import random
import re
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import puna.tokenizer
from puna.engine import patterns
from puna.engine.params import SamplingParams
from puna.engine.text import answer_text
from puna.errors import InputError, MissingExtraError
from puna.tokenizer.json_reader import JsonCodec
from puna.tokenizer.tokenizer import Tokenizer
from tests.engine.schemas import SCHEMAS, VALUES, fits

pytest.importorskip("llguidance")

from puna.engine.constraints import KEPT, Constraint, Grammars
from puna.engine.notation import MOST, json_rule

LIMIT = 150  # tokens of an answer
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
BALANCED = 'start: item*\nitem: "(" start ")" | "[" start "]"'


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, its model's size, its end ids, and what constraints are compiled for it."""

    tokenizer: Tokenizer
    grammars: Grammars
    end_ids: tuple[int, ...]
    size: int

    def begin(self, prompt: str | None = "Answer:", **constraint: Any) -> Answer:
        """None: an answer that reads by itself, as in a chat."""
        ids = self.tokenizer.encode("Hello" if prompt is None else prompt)
        found = self.grammars.constraint(SamplingParams(**constraint), ids, continues=prompt is not None)
        assert found is not None
        return Answer(self, ids, prompt is not None, found, [])


@dataclass(frozen=True)
class Answer:
    vocabulary: Vocabulary
    prompt: list[int]
    continues: bool
    constraint: Constraint
    tokens: list[int]

    @property
    def text(self) -> str:
        """What the user sees."""
        text = answer_text(self.vocabulary.tokenizer, self.prompt, (), self.continues)
        return "".join([*map(text.push, self.tokens), text.close()])

    def accept(self, token: int) -> None:
        self.constraint.accept(token)
        self.tokens.append(token)

    def takes(self, ids: list[int]) -> bool:
        """Whether these may be the answer, as a whole."""
        for token in ids:
            if not self.constraint.allowed()[token]:
                return False
            self.accept(token)
        return self.may_end()

    def may_end(self) -> bool:
        """Whether any end token is allowed; all are, or none."""
        ends = self.constraint.allowed()[list(self.vocabulary.end_ids)].tolist()
        assert len(set(ends)) == 1
        return bool(ends[0])


def _vocabulary(tokenizer: Tokenizer, extra: int, end_ids: tuple[int, ...]) -> Vocabulary:
    size = tokenizer.vocab_size + extra
    return Vocabulary(tokenizer, Grammars(tokenizer, size, end_ids), end_ids, size)


@pytest.fixture(scope="session")
def vocabularies(tokenizer: Tokenizer) -> Callable[[str, pytest.FixtureRequest], Vocabulary]:
    """By name, each made once; the models of two of them are larger than their tokenizers."""
    made: dict[str, Vocabulary] = {}

    def find(name: str, request: pytest.FixtureRequest) -> Vocabulary:
        if name not in made:
            if name == "small":
                made[name] = _vocabulary(tokenizer, 13, tokenizer.end_ids)
            elif name == "json":
                data = json.dumps(tokenizer.codec.definition()).encode()
                made[name] = _vocabulary(Tokenizer(JsonCodec(data)), 0, tokenizer.end_ids)
            else:
                path: Path = request.getfixturevalue("assets") / "tokenizers" / name
                loaded = puna.tokenizer.load(path)
                ends = (128001, 128008, 128009) if name == "llama3" else loaded.end_ids
                made[name] = _vocabulary(loaded, 64 if name == "llama2" else 0, ends)
        return made[name]

    return find


@pytest.fixture(params=["small", "json", "llama2", "llama3"])
def vocabulary(request: pytest.FixtureRequest, vocabularies: Any) -> Vocabulary:
    return vocabularies(request.param, request)


def wander(answer: Answer, rng: random.Random, valid: Callable[[str], bool]) -> bool:
    """Choose at random until it ends; wherever it may end, the text is valid. Whether it did end.

    Half of the choices prefer what closes, so that texts come to an end; the others take anything allowed.
    """
    tokenizer = answer.vocabulary.tokenizer
    closing = [tokenizer.encode(f"a{sign}", bos=False)[-1] for sign in '"}])']
    ends = set(answer.vocabulary.end_ids)
    while len(answer.tokens) < LIMIT:
        allowed = answer.constraint.allowed()
        assert allowed.shape == (answer.vocabulary.size,)
        if answer.may_end():
            assert valid(answer.text), answer.text
        if answer.constraint.complete:
            assert set(allowed.nonzero()[:, 0].tolist()) == ends
            return True
        choices = [i for i in closing if allowed[i]] if rng.random() < 0.5 else []
        if answer.may_end() and rng.random() < 0.2:
            choices = sorted(ends)
        token = int(rng.choice(choices or allowed.nonzero()[:, 0]))
        answer.accept(token)
        if token in ends:
            assert answer.constraint.complete
            assert valid(answer.text)
            return True
    return False


def _compact(text: str) -> bool:
    return not re.search(r"\s", STRING.sub("", text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_that_ends_is_valid_and_compact(vocabulary: Vocabulary, name: str) -> None:
    schema = SCHEMAS[name]
    rng = random.Random(name)
    for prompt in ("Answer:", None, ""):
        answer = vocabulary.begin(prompt, json_schema=schema)
        wander(answer, rng, lambda text: fits(json.loads(text), schema, schema) and _compact(text))


@pytest.mark.parametrize("name", VALUES)
def test_json_as_the_tokenizer_writes_it_is_taken(vocabulary: Vocabulary, name: str) -> None:
    for value in VALUES[name]:
        assert fits(value, SCHEMAS[name], SCHEMAS[name])
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        for prompt in (None, ""):  # alone, where its first token loses the space it is encoded with
            answer = vocabulary.begin(prompt, json_schema=SCHEMAS[name])
            assert answer.takes(vocabulary.tokenizer.encode(text, bos=False)), text
            assert answer.text == text


PATTERNS = [
    r"\d{3}-\d{4}",
    r"^(?:yes|no|maybe)$",
    r"[A-Z][a-z]+( [A-Z][a-z]+){1,3}",
    r" leading",
    r"(?i:straße|kelvin|[x-z]{2})!",
    r"[^\W\d_]{2,5}",
    r"\w+\s\w+",
    r"[\s\S]{3}",
    r".{1,4}",
    r"\W{2}\S\D",
    r"[a&&b\[\]/\"-]{4}",
    r"(a|ab)(c|bcd)(d*)",
    r"(?s:.)\u00e9\U0001f999",
    r"x?",
    r"(?a:\w\W\s)",
]


@pytest.mark.filterwarnings("ignore:Possible set:FutureWarning")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_that_ends_matches_the_expression_as_a_whole(vocabulary: Vocabulary, pattern: str) -> None:
    rng = random.Random(pattern)
    ended = 0
    for prompt in ("Answer:", None) * 3:
        answer = vocabulary.begin(prompt, regex=pattern)
        ended += wander(answer, rng, lambda text: re.fullmatch(pattern, text) is not None)
    assert ended


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\d{3}-\d{4}", "555-0199"),
        (" leading", " leading"),
        (r"\w+\s\w+", "né Ωmega"),
        (".+", "a € 🦙 b"),
        ("x?", ""),
    ],
)
def test_text_as_the_tokenizer_writes_it_is_taken(vocabulary: Vocabulary, pattern: str, text: str) -> None:
    answer = vocabulary.begin(None, regex=pattern)
    assert answer.takes(vocabulary.tokenizer.encode(text, bos=False) if text else [])
    assert answer.text == text


def test_choices_are_taken_letter_by_letter(vocabulary: Vocabulary) -> None:
    choices = ("yes", "yes, but", 'a/b "c"\n', "  two spaces", "(.*)", "né 🦙", "\\d")
    rng = random.Random(0)
    seen = set()
    for prompt in ("Answer:", None) * 20:
        answer = vocabulary.begin(prompt, choice=choices)
        assert wander(answer, rng, lambda text: text in choices)
        seen.add(answer.text)
    assert len(seen) >= 4


@pytest.mark.parametrize("choice", ["yes", "yes, but", 'a/b "c"\n', "  two spaces", "(.*)", "né 🦙", "\\d"])
def test_every_choice_can_be_taken(vocabulary: Vocabulary, choice: str) -> None:
    ids = vocabulary.tokenizer.encode(choice, bos=False)
    answer = vocabulary.begin(
        None, choice=("yes", "yes, but", 'a/b "c"\n', "  two spaces", "(.*)", "né 🦙", "\\d")
    )
    assert answer.takes(ids)
    assert answer.text == choice
    assert answer.constraint.complete == (choice != "yes")


def test_sentences_of_a_grammar(vocabulary: Vocabulary) -> None:
    def balanced(text: str) -> bool:
        while (shorter := text.replace("()", "").replace("[]", "")) != text:
            text = shorter
        return not text

    rng = random.Random(1)
    for prompt in ("Answer:", None) * 4:
        wander(vocabulary.begin(prompt, grammar=BALANCED), rng, balanced)
    answer = vocabulary.begin(None, grammar=BALANCED)
    assert answer.takes(vocabulary.tokenizer.encode("([()])[]", bos=False))


def test_schemas_within_a_grammar_are_bounded_as_schemas_are(
    vocabularies: Any, request: pytest.FixtureRequest
) -> None:
    """Each with references of its own; their braces are no repeats of the grammar's."""
    small = vocabularies("small", request)
    schemas = {
        letter: {
            **SCHEMAS["tree"],
            "enum": [{"value": n, "x": {}} for n in range(60)],
            "$defs": {"node": inner},
        }
        for letter, inner in (
            ("a", {"const": {"value": 7, "x": {}}}),
            ("b", {"const": {"value": 8, "x": {}}}),
        )
    }
    rules = " | ".join(f'"{letter}" {json_rule(schema)}' for letter, schema in schemas.items())
    assert rules.count("{") > MOST["repeats"]
    for text, taken in [('a{"value":7,"x":{}}', True), ('b{"value":7,"x":{}}', False), ("a7", False)]:
        answer = small.begin(None, grammar=f"start: {rules}")
        assert answer.takes(small.tokenizer.encode(text, bos=False)) == taken
    for bad in (
        "start: " + rules + " | /a{2}/" * 101,
        "start: " + json_rule(True) + " | " + "%json " + json.dumps({"allOf": [{}] * 17}),
        "start: %json " + json.dumps({"enum": ["x" * 100_000]}),
        "start: %json {" + '"a": {' * 200,
        "start: " + " ".join([json_rule({"enum": ["x" * 60_000]})] * 2),
    ):
        with pytest.raises(InputError, match="at most"):
            small.begin(grammar=bad)


def test_the_first_space_counts_as_it_reads(vocabularies: Any, request: pytest.FixtureRequest) -> None:
    llama2 = vocabularies("llama2", request)
    ids = {llama2.tokenizer.piece(i): i for i in range(32_000)}
    brace, spaced, dummy, raw = (ids[piece] for piece in ("{", "▁{", "▁", "<0x20>"))
    inside = llama2.begin("Answer:", json_schema=True).constraint.allowed()
    assert inside[[brace, spaced, dummy, raw]].tolist() == [True, False, False, False]
    for prompt in (None, ""):
        alone = llama2.begin(prompt, json_schema=True)
        assert alone.constraint.allowed()[[brace, spaced, dummy, raw]].tolist() == [True, True, True, False]
        alone.accept(dummy)  # its space is gone, and the next one is real
        assert alone.constraint.allowed()[[brace, spaced, dummy, raw]].tolist() == [True, False, False, False]
    wanted = llama2.begin(None, regex=" {")
    assert wanted.constraint.allowed()[[brace, spaced, dummy, raw]].tolist() == [False, False, True, True]


def test_bytes_form_characters(vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer
    single = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    data = '{"a":"🦙€"}'.encode()
    answer = vocabulary.begin("Answer:", json_schema=True)
    for byte in data:
        assert answer.constraint.allowed()[single[bytes([byte])]]
        answer.accept(single[bytes([byte])])
        if byte == 0xF0:
            assert not answer.constraint.allowed()[single[b'"']], "the character is not whole"
    assert answer.text == data.decode()
    assert answer.constraint.complete


def test_special_tokens_and_padding_are_never_allowed(vocabulary: Vocabulary) -> None:
    tokenizer, size = vocabulary.tokenizer, vocabulary.size
    answer = vocabulary.begin("Answer:", regex=r"[\s\S]*")
    allowed = answer.constraint.allowed()
    others = set(tokenizer.specials.values()) - set(vocabulary.end_ids)
    assert not allowed[sorted(others)].any()
    assert not allowed[tokenizer.vocab_size : size].any()
    assert answer.may_end()
    usual = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)} - set(
        tokenizer.specials.values()
    )
    whole = {i for i in usual if _begins_text(tokenizer.token_bytes(i))}
    assert whole <= set(allowed.nonzero()[:, 0].tolist())


def _begins_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_grammar_cannot_name_a_special_token_by_its_id(vocabulary: Vocabulary) -> None:
    bos = vocabulary.tokenizer.bos_id
    with pytest.raises(InputError, match="nothing that this model's vocabulary can write"):
        vocabulary.begin(grammar=f'start: <[{bos}]> "a"')
    allowed = vocabulary.begin(grammar='start: <[*]> "a"').constraint.allowed()
    assert not allowed[sorted(vocabulary.tokenizer.specials.values())].any()


REFUSED = {
    "type": {"json_schema": {"type": "strin"}},
    "bounds": {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
    "pattern and length": {"json_schema": {"type": "string", "pattern": "^a{10}$", "maxLength": 5}},
    "required false": {"json_schema": {"properties": {"x": False}, "required": ["x"], "type": "object"}},
    "unsupported": {"json_schema": {"not": {"type": "string"}}},
    "endless": {"json_schema": {"$ref": "#"}},
    "far reference": {"json_schema": {"$ref": "http://example.com/x.json"}},
    "counted keys": {"json_schema": {"type": "object", "minProperties": 2}},
    "no JSON": {"json_schema": {"enum": [object()]}},
    "unbalanced": {"regex": "(a"},
    "look-ahead": {"regex": "(?=a)b"},
    "back-reference": {"regex": r"(a)\1"},
    "boundary": {"regex": r"a\b"},
    "surrogate": {"regex": "\ud800"},
    "nothing": {"regex": r"[^\s\S]"},
    "no rule": {"grammar": 'start "a"'},
    "unknown rule": {"grammar": "start: foo"},
    "special": {"grammar": "start: <|eot_id|>"},
    "no end": {"grammar": "start: start"},
    "half a character": {"choice": ("a\ud800",)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_satisfied_is_refused_in_one_line(vocabularies: Any, name: str, request: Any) -> None:
    with pytest.raises(InputError) as caught:
        vocabularies("small", request).begin(**REFUSED[name])
    message = str(caught.value)
    assert len(message) < 400
    assert not re.search(r"[\n⏎]|x-guidance|%json", message), message


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "deep schema": {"json_schema": _nested(400)},
    "long enum": {"json_schema": {"enum": [f"value{i}" for i in range(30_000)]}},
    "large schema": {"json_schema": {"enum": ["x" * 300_000]}},
    "product": {
        "json_schema": {
            "allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(10)]
        }
    },
    "deep expression": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "deep grammar": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "exponential": {"regex": "(a|aa)+(a|b)*a(a|b){200}"},
    "long string": {"json_schema": {"type": "string", "minLength": 1_000_000, "pattern": "^(ab|a)*$"}},
    "many items": {"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 100_000}},
    "ambiguous": {"grammar": 'start: a a a a a a\na: "a" | a a |'},
    "all cases": {"regex": r"(?i)[\x00-\uffff]+"},
    "long chain": {
        "json_schema": {
            "$ref": "#/$defs/0",
            "$defs": {**{str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1900)}, "1900": {}},
        }
    },
    "patterns together": {
        "json_schema": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(99)]}
    },
    "intersections": {"grammar": "start: A\nA: " + " & ".join(f"/.*x{i}.*/" for i in range(99))},
    "many keys": {"json_schema": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_large_ends_soon_and_in_one_line(vocabularies: Any, name: str, request: Any) -> None:
    rng = random.Random(0)
    try:
        answer = vocabularies("small", request).begin(**HOSTILE[name])
        for _ in range(50):
            answer.accept(rng.choice(answer.constraint.allowed().nonzero()[:, 0].tolist()))
            if answer.constraint.complete:
                break
    except InputError as error:
        assert len(str(error)) < 400
        assert "\n" not in str(error)


def _doubled(depth: int) -> dict[str, Any]:
    """Every rule twice or once the next one, or nothing: a text has very many readings."""
    rules = [f"x{i}: x{i + 1} x{i + 1} | x{i + 1} |" for i in range(depth)]
    return {"grammar": "\n".join(["start: x", "x: x0 x | x0", *rules, f"x{depth}: /[a-z ]/ |"])}


AMBIGUOUS: dict[str, dict[str, Any]] = {
    **{f"doubled {depth}": _doubled(depth) for depth in (5, 8, 30, 100, 300)},
    "three or two": {"grammar": 'start: s\ns: s s s | s s | "a" | "b" | " " | /[a-z]/ |'},
    "many": {"grammar": "start: s\ns: /[a-z]/ | " + "| ".join("s " * count for count in range(2, 11)) + "|"},
}


@pytest.mark.parametrize("name", ["small", "llama3"])
@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_is_ambiguous_holds_nobody_up(vocabularies: Any, name: str, case: str, request: Any) -> None:
    """Others wait while a token is found: about 10 ms are meant, seconds it was; a busy machine has time."""
    rng = random.Random(0)
    vocabulary = vocabularies(name, request)
    longest = 0.0
    with suppress(InputError):
        answer = vocabulary.begin("Hello", **AMBIGUOUS[case])
        for _ in range(40):
            began = time.perf_counter()
            try:
                choices = answer.constraint.allowed().nonzero()[:, 0].tolist()
                answer.accept(rng.choice(sorted({*choices} - set(vocabulary.end_ids))))
            finally:
                longest = max(longest, time.perf_counter() - began)
    assert longest < 0.5


MULTIPLES: dict[str, dict[str, Any]] = {
    "many": {
        "properties": {
            f"k{i}": {"multipleOf": 9973 + i, "minimum": -(10**9), "maximum": 10**9} for i in range(100)
        }
    },
    "large": {"type": "integer", "multipleOf": 999_983},
    "fine": {"type": "number", "multipleOf": 99_998.3},
    "together": {"allOf": [{"type": "integer", "multipleOf": number} for number in (97, 89, 83)]},
    "by reference": {"$ref": "#/$defs/a", "multipleOf": 997, "$defs": {"a": {"multipleOf": 991}}},
    "huge": {"multipleOf": 10**4000},
}


@pytest.mark.parametrize("name", MULTIPLES)
def test_multiples_that_take_long_to_tell_apart_are_refused_at_once(name: str) -> None:
    with pytest.raises(InputError, match=r"has \d+ remainders of multipleOf; at most 50000 .* simplify it"):
        json_rule(MULTIPLES[name])


def test_multiples_are_counted_through_all_schemas_of_a_grammar(
    vocabularies: Any, request: pytest.FixtureRequest
) -> None:
    rules = [json_rule({"type": "integer", "multipleOf": 9973 + i}) for i in range(6)]
    with pytest.raises(InputError, match="has 59853 remainders"):
        vocabularies("small", request).begin(grammar="start: " + " | ".join(rules))


@pytest.mark.parametrize("step", [7, 60, 3600, 0.01, 0.25, 1e-8, 1000])
def test_usual_multiples_are_followed(vocabularies: Any, step: float, request: pytest.FixtureRequest) -> None:
    small = vocabularies("small", request)
    answer = small.begin(None, json_schema={"type": "number", "multipleOf": step})
    assert answer.takes(small.tokenizer.encode("126000", bos=False))


@pytest.mark.parametrize("name", ["small", "llama3"])
@pytest.mark.parametrize("count", [100, 300, 1000])
def test_objects_of_many_properties_can_be_written(
    vocabularies: Any, name: str, count: int, request: pytest.FixtureRequest
) -> None:
    vocabulary = vocabularies(name, request)
    schema = {"type": "object", "properties": {f"field{i}": {"type": "string"} for i in range(count)}}
    value = {f"field{i}": "He said (yes). ok" for i in range(0, count, count // 10)}
    ids = vocabulary.tokenizer.encode(json.dumps(value, separators=(",", ":")), bos=False)
    assert vocabulary.begin(None, json_schema=schema).takes(ids)
    if count <= 300:  # within rules, where less is admitted
        rules = f"start: call | /[^{{].*/\ncall: {json_rule(schema)}"
        assert vocabulary.begin(None, grammar=rules).takes(ids)


def test_a_token_that_is_not_allowed_is_refused(vocabularies: Any, request: pytest.FixtureRequest) -> None:
    answer = vocabularies("small", request).begin(regex="[0-9]")
    with pytest.raises(InputError, match="does not fit the regular expression"):
        answer.accept(vocabularies("small", request).tokenizer.encode("ab", bos=False)[-1])


def test_answers_do_not_share_their_state(vocabularies: Any, request: pytest.FixtureRequest) -> None:
    small = vocabularies("small", request)
    first, second = (small.begin(choice=("ab", "ac")) for _ in range(2))
    before = second.constraint.allowed().clone()
    first.accept(next(i for i in range(small.size) if first.constraint.allowed()[i]))
    assert torch.equal(second.constraint.allowed(), before)


def test_an_empty_answer_needs_an_end_token(tokenizer: Tokenizer) -> None:
    endless = _vocabulary(tokenizer, 0, ())
    with pytest.raises(InputError, match="no end token"):
        endless.begin(regex="(?:)")
    assert not endless.begin(regex="a").constraint.complete


def test_a_prompt_that_ends_within_a_character_is_refused(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.end_ids)
    half = tokenizer.encode("🦙")[:-1]
    with pytest.raises(InputError, match="within a character"):
        grammars.constraint(SamplingParams(json_schema=True), half)
    assert grammars.constraint(SamplingParams(json_schema=True), half, continues=False) is not None
    assert grammars.constraint(SamplingParams(), half) is None


def test_a_vocabulary_that_cannot_write_it(tokenizer: Tokenizer) -> None:
    narrow = Grammars(tokenizer, 40, ())  # the model has fewer tokens than its tokenizer: no letters
    with pytest.raises(InputError, match="can write satisfies the regular expression"):
        narrow.constraint(SamplingParams(regex="[a-z]+"), [])


def test_the_extra_is_named_where_it_is_missing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.end_ids)
    assert grammars.constraint(SamplingParams(), []) is None
    with pytest.raises(MissingExtraError, match=r"puna\[serve\]"):
        grammars.constraint(SamplingParams(json_schema=True), [])


def test_compiled_constraints_are_kept_and_bounded(tokenizer: Tokenizer) -> None:
    small = _vocabulary(tokenizer, 0, tokenizer.end_ids)
    for number in range(100):
        assert small.begin(None, choice=(f"x{number}",)).takes(tokenizer.encode(f"x{number}", bos=False))
    assert len(small.grammars._compiled) == KEPT


def test_classes_are_those_of_python() -> None:
    """Letters, numbers and "_"; decimal digits; the white space that is listed."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    categories = [(character, unicodedata.category(character)) for character in every]
    assert re.findall(r"\w", every) == [c for c, kind in categories if kind[0] in "LN" or c == "_"]
    assert re.findall(r"\d", every) == [c for c, kind in categories if kind == "Nd"]
    table = patterns._UNICODE[patterns.codes.CATEGORY_SPACE]
    listed = re.sub(r"\\x\{(\w+)\}", lambda code: chr(int(code[1], 16)), table)
    assert re.findall(r"\s", every) == re.findall(f"[{listed}]", every)


@pytest.mark.parametrize("character", ["7", "\u0663", "\U0001e5f8", "\u00b2", "\u0301", "\x1c"])
@pytest.mark.parametrize("pattern", [r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"[^\w\s]"])
def test_a_character_is_taken_where_python_matches_it(
    tokenizer: Tokenizer, pattern: str, character: str
) -> None:
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    answer = _vocabulary(tokenizer, 0, tokenizer.end_ids).begin(regex=pattern)
    ids = [single[bytes([byte])] for byte in character.encode()]
    assert answer.takes(ids) == (re.fullmatch(pattern, character) is not None)
