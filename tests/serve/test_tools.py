"""Calls: what a model may write once tools bind it, how it is read, and how a history is written."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest

from puna.engine.llm import LLM
from puna.engine.text import answer_text
from puna.errors import InputError, TokenizerError
from puna.serve.calls import ToolCallReader, answer_message
from puna.serve.tools import Binding, bind, conversation, sees_tools, tool_messages
from puna.tokenizer import chat
from puna.tokenizer.tokenizer import Tokenizer

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema

from puna.engine.constraints import Constraint, Grammars
from tests.serve.calls import (
    CLOCK,
    CUT,
    USER,
    WEATHER,
    assert_read,
    begin,
    closed,
    random_object,
    same,
    streamed,
    takes,
    tool,
)
from tests.serve.running import MODEL, Running, chunks_of

LIMIT = 200  # tokens of an answer

# Another program's template in the shape of Llama 3.1's own: tools in the first user's message, results under
# the role ipython, one call a message, arguments an object; whatever has no tool_calls has a text.
PUBLISHED = """\
{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system + "<|eot_id|>" }}
{%- if tools is not none %}
{%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n" }}{%- endfor %}
{{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
{{- '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- else %}
{{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
{{- message.content | tojson if message.content is mapping else message.content }}
{{- "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""


# What a model writes.


def _random_tools(rng: random.Random) -> list[dict[str, Any]]:
    names = rng.sample(["get", "get_more", "g", "set-it", "X", "name", "a" * 64], rng.randint(1, 4))
    tools = []
    for name in names:
        schema = random_object(rng)
        # The same name means something else in each of them.
        schema["$defs"] = {"shared": rng.choice([closed(again={"type": "boolean"}), {"enum": [name]}])}
        tools.append(tool(name, schema))
    return tools


def _wander(tokenizer: Tokenizer, constraint: Constraint, rng: random.Random) -> tuple[str, str]:
    """The text and the finish reason of an answer chosen at random, half of it from what ends texts."""
    closing = [tokenizer.encode(f"a{sign}", bos=False)[-1] for sign in '"}])']
    ends, text = set(tokenizer.end_ids), answer_text(tokenizer, [], (), False)
    pieces: list[str] = []
    for _ in range(LIMIT):
        if constraint.complete:
            return "".join([*pieces, text.close()]), "stop"
        allowed = constraint.allowed()
        likely = [i for i in closing if allowed[i]] if rng.random() < 0.5 else []
        token = int(rng.choice(likely or allowed.nonzero()[:, 0].tolist()))
        constraint.accept(token)
        if token in ends:
            return "".join([*pieces, text.close()]), "stop"
        pieces.append(text.push(token))
    return "".join([*pieces, text.close()]), "length"


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_whatever_is_called_fits_its_schema(choice: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    rng, seen = random.Random(choice), {"call": 0, "text": 0, "cut": 0}
    for _ in range(60):
        tools = _random_tools(rng)
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
        name = rng.choice([*schemas])
        wanted = {"type": "function", "function": {"name": name}} if choice == "named" else choice
        constraint = begin(grammars, bind(tools, wanted))
        if choice == "auto" and rng.random() < 0.5:
            constraint.accept(begun := tokenizer.encode("{", bos=False)[-1])
            assert tokenizer.decode([begun]) == "{"
            text, reason = _wander(tokenizer, constraint, rng)
            text = "{" + text
        else:
            text, reason = _wander(tokenizer, constraint, rng)
        message, told = answer_message(ToolCallReader(), text, reason)
        for size in (1, 2, 3, 7, 1000):
            pieces, pieces_told = streamed(text, reason, size)
            assert same(pieces, message)
            assert pieces_told == told
        if told == "tool_calls":
            (call,) = message["tool_calls"]
            function = call["function"]
            jsonschema.Draft202012Validator(schemas[function["name"]]).validate(
                json.loads(function["arguments"])
            )
            assert choice != "named" or function["name"] == name
            assert json.loads(text) == {
                "name": function["name"],
                "parameters": json.loads(function["arguments"]),
            }
            assert message["content"] is None
            seen["call"] += 1
        elif told == "stop":
            assert choice == "auto"
            assert message == {"content": text}
            assert not text.lstrip().startswith("{")
            seen["text"] += 1
        else:
            assert told == "length"
            seen["cut"] += 1
    assert seen["call"] >= 20
    assert (seen["text"] > 5) == (choice == "auto")


def test_a_models_own_answers_are_of_both_kinds(llm: LLM, tokenizer: Tokenizer) -> None:
    ours = LLM(llm.model, tokenizer)
    binding = bind([WEATHER, CLOCK])
    brace = tokenizer.encode("a{", bos=False)[-1]
    kinds = set()
    for seed in range(6):
        answer = ours.generate(
            "x", seed=seed, max_new_tokens=70, logit_bias={brace: 8.0 * (seed % 2)}, **binding.fields
        )
        message, reason = answer_message(ToolCallReader(), answer.text, answer.finish_reason)
        kinds.add(reason if "tool_calls" in message else "text")
        if reason == "tool_calls":
            function = message["tool_calls"][0]["function"]
            schema = {"weather": WEATHER["function"]["parameters"], "clock": closed()}[function["name"]]
            jsonschema.validate(json.loads(function["arguments"]), schema)
    assert kinds == {"tool_calls", "text"}


NODE = closed(value={"type": "integer"})
NODE["properties"]["next"] = {"$ref": "#/$defs/node"}
TREE = {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/$defs/node", "$defs": {"node": NODE}}
SELF = {"type": "object", "properties": {"again": {"$ref": "#"}}, "additionalProperties": False}
PATH = {**closed(a={"type": "integer"}, b={"$ref": "#/properties/a"}), "$id": "https://example.org/path"}


@pytest.mark.parametrize(
    ("parameters", "arguments", "taken"),
    [
        (TREE, '{"value":1,"next":{"value":2}}', True),
        (TREE, '{"value":1,"next":{"value":"2"}}', False),
        (TREE, '{"value":1,"next":{"again":{}}}', False),
        (TREE, "3", False),
        (SELF, '{"again":{"again":{}}}', True),
        (SELF, '{"again":{"value":1}}', False),
        (PATH, '{"a":1,"b":2}', True),
        (PATH, '{"a":1,"b":"2"}', False),
        (None, "{}", True),
        (None, '{"a":1}', False),
        ({}, '{"a":1}', True),
        ({}, "1", False),
        ({"type": ["object", "null"]}, "{}", True),
        ({"type": ["object", "null"]}, "null", False),
        ({"anyOf": [closed(a=True), closed(b=True)]}, '{"b":null}', True),
        ({"anyOf": [closed(a=True), closed(b=True)]}, '{"c":null}', False),
    ],
)
def test_references_are_relative_to_their_function(
    grammars: Grammars, tokenizer: Tokenizer, parameters: Any, arguments: str, taken: bool
) -> None:
    others = {
        "tree": TREE,
        "self": SELF,
        "node": closed(node={"$ref": "#/$defs/node"}) | {"$defs": {"node": {}}},
    }
    tools = [tool("f", parameters), *(tool(name, schema) for name, schema in others.items())]
    call = f'{{"name":"f","parameters":{arguments}}}'
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
        binding = bind(tools, choice)
        assert takes(grammars, tokenizer, binding, call) == taken


@pytest.mark.parametrize(
    "text", ["", " ", "Hi {", "\n\nYes", '"{"', "😀", "{}", '{"name":"clock"}', " {x", "\n  {"]
)
def test_free_text_is_what_begins_with_no_brace(grammars: Grammars, tokenizer: Tokenizer, text: str) -> None:
    free = not text.strip().startswith("{")
    assert takes(grammars, tokenizer, bind([CLOCK]), text) == free
    assert not takes(grammars, tokenizer, bind([CLOCK], "required"), text)


@pytest.mark.parametrize("blank", ["", " ", "\n", "\n\n"])
def test_a_call_may_follow_a_space(grammars: Grammars, tokenizer: Tokenizer, blank: str) -> None:
    text = blank + '{"name":"clock","parameters":{}}'
    assert takes(grammars, tokenizer, bind([CLOCK]), text)
    message, reason = answer_message(ToolCallReader(), text, "stop")
    assert reason == "tool_calls"
    assert message["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}


END = "\nUser:"


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (f"Hi{END}", True),
        (f"Hi{END} x", False),
        (f"Hi{END}{END}", False),
        (END, True),
        ("Hi\nUser", True),
        ("Hi\nUse\nUser is\n", True),
        ("", True),
        ('{"name":"clock","parameters":{}}', True),
    ],
)
def test_an_answer_in_words_ends_where_the_format_does(
    grammars: Grammars, tokenizer: Tokenizer, text: str, taken: bool
) -> None:
    binding = bind([CLOCK], ends=(END,))
    assert takes(grammars, tokenizer, binding, text) == taken
    constraint = begin(grammars, binding)
    if taken and text.endswith(END):
        for token in tokenizer.encode(text, bos=False):
            assert not constraint.complete
            constraint.accept(token)
        assert constraint.complete
    for size in (1, 2, 3, 5, 100):
        for written, reason in ((text, "stop"), (text[:-1], "length")):
            message, told = answer_message(ToolCallReader(binding.ends), written, reason)
            assert streamed(written, reason, size, binding.ends)[1] == told
            assert same(streamed(written, reason, size, binding.ends)[0], message)
            assert (message["content"] or "") == ("" if told == "tool_calls" else written.removesuffix(END))


def test_what_binds_and_what_is_told() -> None:
    nothing = Binding({})
    assert bind() == bind([], "auto") == bind(None, "none") == bind([CLOCK], "none") == nothing
    assert bind(None, None, {"type": "text"}) == nothing and not nothing.calls
    assert bind([CLOCK]) == bind([CLOCK], "auto") != bind([CLOCK], "required")
    strict = tool("weather", WEATHER["function"]["parameters"], strict=True, description=None)
    binding = bind([strict, CLOCK], {"type": "function", "function": {"name": "clock"}})
    assert (binding.calls, binding.param, [*binding.fields]) == (True, "tools", ["grammar"])
    nobody = {"type": "object", "properties": {}, "additionalProperties": False}
    assert binding.tools == (tool("weather", WEATHER["function"]["parameters"]), tool("clock", nobody))


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, True),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SELF, "strict": True}}, SELF),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, True),
    ],
)
def test_a_response_format_is_a_schema(form: dict[str, Any], schema: Any) -> None:
    assert bind(None, None, form) == Binding({"json_schema": schema}, param="response_format")
    assert bind([CLOCK], "none", form).fields == {"json_schema": schema}
    for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
        with pytest.raises(InputError, match="response_format and tool_choice contradict each other"):
            bind([CLOCK], choice, form)


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(3000):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "tool_choice 'required' needs tools to choose from"),
        (None, "required", "tool_choice 'required' needs tools to choose from"),
        ([CLOCK, WEATHER], {"type": "function", "function": {"name": "wether"}}, "Did you mean 'weather'"),
        (None, {"type": "function", "function": {"name": "x"}}, "tool_choice: no function 'x'"),
        ([CLOCK, CLOCK], "auto", "tools: two functions are named 'clock'"),
        ([CLOCK, CLOCK], "none", "tools: two functions are named 'clock'"),
        ([tool('a" | "b')], "auto", "tools: expected names of"),
        ([tool("x" * 65)], "auto", "tools: expected names of"),
        ([tool("clock\n")], "auto", "tools: expected names of"),
        ([tool(f"f{n}") for n in range(129)], "auto", "tools: expected at most 128 functions, got 129"),
        ([tool("f", {"type": "string"})], "auto", "of 'f' must be of type 'object', got 'string'"),
        ([tool("f", {"type": ["null"]})], "auto", "must be of type 'object'"),
        ([tool("f", {"allOf": [{}] * 17})], "auto", "tools: the parameters of 'f': a constraint has 17"),
        ([tool("f", {"x": "x" * 100_000})], "auto", "tools: the parameters of 'f': json_schema has"),
        ([tool("f", DEEP)], "auto", "tools: the parameters of 'f': the JSON schema cannot be written"),
    ],
)
def test_nonsense_is_refused_in_a_line(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        bind(tools, choice)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            closed(a={"$ref": "#/$defs/x"}),
            "tools: the parameters of 'bad' cannot be used: Pointer '/$defs/x'",
        ),
        (
            closed(a={"$ref": "https://example.org/x"}),
            "of 'bad' cannot be used: Resource 'https://example.org",
        ),
        (closed(a=False), "of 'bad' cannot be used: Unsatisfiable schema: required property 'a'"),
        (closed(a={"not": {}}), "of 'bad' cannot be used: Unimplemented keys"),
        (closed(a={"type": "strin"}), "of 'bad' cannot be used: Invalid type: strin"),
        ({"x": ["x" * 9_000] * 10}, "tools: json_schema has 1[0-9]* characters"),
    ],
)
def test_what_cannot_be_used_is_told_by_its_function(
    grammars: Grammars, parameters: Any, message: str
) -> None:
    large = {"x": "x" * 20_000}
    for tools in (
        [tool("bad", parameters), tool("large", large)],
        [CLOCK, tool("large", large), tool("bad", parameters)],
    ):
        for choice in ("auto", "required"):
            binding = bind(tools, choice)
            with pytest.raises(InputError) as caught:
                begin(grammars, binding)
            blamed = binding.blamed(caught.value)
            assert re.match(message, str(blamed)) or message in str(blamed)
            assert "\n" not in str(blamed) and blamed.param == "tools"


def test_only_what_binds_is_blamed(grammars: Grammars) -> None:
    other = InputError("the prompt has 9 tokens")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    assert (
        bind([CLOCK]).blamed(other) is bind().blamed(other) is bind(None, None, form).blamed(other) is other
    )
    with pytest.raises(InputError) as caught:
        begin(grammars, bind(None, None, form))
    told = bind(None, None, form).blamed(caught.value)
    assert str(told).startswith("response_format: the JSON schema cannot be used: Unimplemented")
    assert bind().blamed(caught.value) is caught.value
    spelled = InputError("the JSON schema cannot be used: at 9999(1): the grammar cannot be used: at 9(9): ")
    assert str(bind(None, None, form).blamed(spelled)) == f"response_format: {spelled}"
    slow = InputError("the grammar is too complex to follow any further; simplify it (fuel)")
    assert str(bind([CLOCK]).blamed(slow)) == f"tools: {slow}"


MANY_WAYS = {"type": "string", "pattern": "^(a|aa)+(a|b)*a(a|b){200}$"}


@pytest.mark.parametrize(
    "parameters",
    [
        closed(a=MANY_WAYS),
        closed(a={"type": "string", "minLength": 100_000, "pattern": "^(ab|a)*$"}),
        closed(a={"type": "array", "items": {"type": "string"}, "minItems": 10_000}),
        closed(
            a={"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(5)]}
        ),
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
)
@pytest.mark.parametrize("count", [1, 100])
def test_what_explodes_is_refused_or_followed_at_a_bounded_cost(
    grammars: Grammars, tokenizer: Tokenizer, parameters: Any, count: int
) -> None:
    start = time.perf_counter()
    try:
        binding = bind([tool(f"f{number}", parameters) for number in range(count)], "required")
        constraint = begin(grammars, binding)
        for token in tokenizer.encode('{"name":"f0","parameters":{"a":', bos=False):
            constraint.accept(token)
        for _ in range(50):
            constraint.accept(int(constraint.allowed().nonzero()[0, 0]))
    except InputError as error:
        assert "\n" not in str(error)
    assert time.perf_counter() - start < 5


# What a history becomes.


def call(index: str, name: str = "weather", arguments: str = '{"city": "Lima"}') -> dict[str, Any]:
    return {"id": index, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [*calls]}


def result(index: str, content: str = "Sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": index, "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
CALLED = '{"name":"weather","parameters":{"city":"Lima"}}'
TALK = [SYSTEM, USER, calling(call("1")), result("1"), {"role": "assistant", "content": "Yes."}, USER]


def test_calls_become_single_with_objects_for_arguments() -> None:
    two = calling(call("1"), call("2", "clock", ""), content="Let me see.")
    history = tool_messages([USER, two, result("2", "12:00"), result("1"), {**SYSTEM, "tool_calls": None}])
    first, second = history[1], history[3]
    assert first["content"] == "" and second["content"] == "Let me see."
    assert first["tool_calls"] == [
        {"id": "2", "type": "function", "function": {"name": "clock", "arguments": {}}}
    ]
    assert second["tool_calls"][0]["function"]["arguments"] == {"city": "Lima"}
    assert history[2] == {**result("2", "12:00"), "name": "clock"}
    assert history[4] == {**result("1"), "name": "weather"}
    assert history[0] == USER and history[5:] == [SYSTEM]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, result("1")], r"messages\[1\]: tool_call_id '1' is no call that waits"),
        ([calling(call("1")), result("2")], r"messages\[1\]: tool_call_id '2' is no call that waits"),
        ([calling(call("1")), result("1"), result("1")], r"messages\[2\]: tool_call_id '1' is no call"),
        ([calling(call("1")), USER], r"messages\[1\]: expected the result of the call '1' in a .* 'user'$"),
        ([calling(call("1"), call("2")), result("1")], "messages: expected the result of the call '2'"),
        ([calling(call("1"), call("1"))], r"messages\[0\].tool_calls\[1\]: the id '1' is another"),
        ([calling(call("1", arguments="{"))], "an object written as JSON, got '{'$"),
        (
            [calling(call("1", arguments="[1]"))],
            r"arguments: expected an object written as JSON, got '\[1\]'$",
        ),
        ([calling(call("1", arguments="[" * 99_999))], "expected an object written as JSON"),
    ],
)
def test_histories_that_do_not_belong_together(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tool_messages(messages)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def words() -> str:
    """What is said of the weather wherever a template knows of no tools, and where it is a built-in one."""
    return chat.tools_in_words([WEATHER])


def _written(tokenizer: Tokenizer, template: str | None, messages: Any, tools: Any = (WEATHER,)) -> str:
    told, variables = conversation(tokenizer, template, messages, tools)
    return chat.render_text(tokenizer, told, template, variables=variables)


def test_the_words(words: str) -> None:
    assert words == (
        "These functions can be called; each is described as JSON:\n\n"
        '{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string", '
        '"maxLength": 8}}, "required": ["city"], "additionalProperties": false}, "description": "What it is '
        'like there"}\n\n'
        "To call one of them, answer with a JSON object of this form and nothing else: "
        '{"name":"the function","parameters":{"an argument":"its value"}}. The parameters must fit the '
        "description. What the function gives back comes next. If no function is needed, answer in words."
    )


def test_plain_tells_of_tools(tokenizer: Tokenizer, words: str) -> None:
    assert _written(tokenizer, "plain", TALK) == (
        f"<s>{words}\n\nBe brief.\n\nUser: Is it sunny in Lima?\nAssistant: {CALLED}\nTool: Sunny\n"
        "Assistant: Yes.\nUser: Is it sunny in Lima?\nAssistant:"
    )
    assert _written(tokenizer, "plain", [USER]).startswith(f"<s>{words}\n\nUser: Is it")


def test_templates_that_know_of_no_tools_get_the_same_words(tokenizer: Tokenizer, words: str) -> None:
    assert [sees_tools(tokenizer, name) for name in ("llama2", "vicuna", "plain")] == [False, False, True]
    assert _written(tokenizer, "llama2", TALK) == (
        f"<s>[INST] <<SYS>>\n{words}\n\nBe brief.\n<</SYS>>\n\nIs it sunny in Lima? [/INST] {CALLED} </s>"
        "<s>[INST] weather gave back: Sunny [/INST] Yes. </s><s>[INST] Is it sunny in Lima? [/INST]"
    )
    assert _written(tokenizer, "vicuna", TALK[1:]).startswith(f"<s>{words} USER: Is it sunny in Lima? ASSI")
    without = _written(tokenizer, "vicuna", TALK, ())
    assert words not in without and CALLED in without and "weather gave back: Sunny" in without


def test_a_published_template_gets_tools_as_it_wants_them(tokenizer: Tokenizer, words: str) -> None:
    assert sees_tools(tokenizer, PUBLISHED)
    text = _written(tokenizer, PUBLISHED, TALK)
    assert text.count('"name": "weather",') == 2 and words not in text
    assert '\n\n{"name": "weather", "parameters": {"city": "Lima"}}<|eot_id|>' in text
    assert "ipython<|end_header_id|>\n\nSunny<|eot_id|>" in text
    two = [USER, calling(call("1"), call("2")), result("1"), result("2", "Rain")]
    assert _written(tokenizer, PUBLISHED, two, ()).count("<|start_header_id|>ipython") == 2
    with pytest.raises(TokenizerError, match="no chat template 'llama9'"):
        _written(tokenizer, "llama9", TALK)


def test_a_template_that_fails_on_tools_does_not_see_them(tokenizer: Tokenizer) -> None:
    source = "{% if tools %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert not sees_tools(tokenizer, source)
    assert _written(tokenizer, source, [USER]).startswith("These functions")


def test_a_conversation_without_tools_is_left_alone(tokenizer: Tokenizer) -> None:
    plain = [SYSTEM, USER]
    assert conversation(tokenizer, "llama2", plain) == (plain, {})


def test_the_history_reads_as_the_model_wrote_it(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """So that the next turn shares the last one's keys and values, and shows the model its own form."""
    rng = random.Random(5)
    parameters = closed(a={"enum": ['x"\n', "é", 1, None, {"b": [True, -0.5]}]}, wärme={"type": "boolean"})
    for _ in range(10):
        text, reason = _wander(tokenizer, begin(grammars, bind([tool("f", parameters)], "required")), rng)
        message, _ = answer_message(ToolCallReader(), text, reason)
        history = tool_messages([{"role": "assistant", **message}, result(message["tool_calls"][0]["id"])])
        assert chat.calls_in_words(history[0]) == text


# What a reader makes of pieces.


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("text", "reason", "message", "told"),
    [
        ("", "stop", "", "stop"),
        (" \n", "stop", " \n", "stop"),
        (" Hello {", "length", " Hello {", "length"),
        ('{"name":"clo', "length", "", "length"),
        ('\n{"name":"clock","parameters"', "length", "", "length"),
        ('{"name":"f","parameters":', "length", ("f", ""), "length"),
        ('{"name":"f","parameters":{"a":"}', "length", ("f", '{"a":"}'), "length"),
        ('{"name":"f","parameters":{"a":"\\\\"}', "length", ("f", '{"a":"\\\\"}'), "tool_calls"),
        ('{"name":"f","parameters":{"a":"\\""}}', "stop", ("f", '{"a":"\\""}'), "tool_calls"),
        ('{"name":"f","parameters":{"a":[{}]}}', "stop", ("f", '{"a":[{}]}'), "tool_calls"),
        ('\n{"name":"f","parameters":{}}', "cancelled", ("f", "{}"), "cancelled"),
    ],
)
def test_reading_in_pieces(text: str, reason: str, message: Any, told: str, size: int) -> None:
    assert_read(text, reason, size, (), message, told)


def test_text_is_told_as_it_comes() -> None:
    reader = ToolCallReader()
    assert reader.push(" ") == []
    assert reader.push("Hi") == [{"content": " Hi"}]
    assert reader.push("") == []
    assert reader.push(" {") == [{"content": " {"}]
    reader = ToolCallReader()
    assert reader.push('{"name":"f","parameters"') == []
    (head, first) = reader.push(':{"a":')
    assert head["tool_calls"][0]["function"] == {"name": "f", "arguments": ""}
    assert first == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}
    assert reader.push("1}}") == [{"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}]
    assert reader.push("}") == []
    assert reader.finish("stop") == ([], "tool_calls")


# Through HTTP.


def test_openais_client_calls_answers_and_goes_on(server: Running) -> None:
    """Whole and streamed alike; and what it got goes back as it came."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked = {"model": MODEL, "seed": 3, "tools": [WEATHER], "max_tokens": 90, "messages": [USER]}
    whole = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    with client.chat.completions.stream(**asked, tool_choice="required") as stream:
        streamed = stream.get_final_completion().choices[0]
    (first,), (second,) = whole.message.tool_calls, streamed.message.tool_calls
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    assert (first.function.name, first.function.arguments) == ("weather", second.function.arguments)
    assert whole.message.content is None and streamed.message.content is None
    jsonschema.validate(json.loads(first.function.arguments), WEATHER["function"]["parameters"])

    for choice, call in ((whole, first), (streamed, second)):
        history = [USER, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
        answer = client.chat.completions.create(
            **{**asked, "messages": history, "max_tokens": 5}, extra_body=CUT
        )
        assert answer.usage.completion_tokens > 0
        body = {"messages": [*history[:1], message_of(choice), history[2]], "tools": [WEATHER]}
        prompt = server.post("/apply-template", body).json()["prompt"]
        arguments = json.dumps(json.loads(call.function.arguments), separators=(",", ":"), ensure_ascii=False)
        assert f'Assistant: {{"name":"weather","parameters":{arguments}}}\nTool: Sunny\nAssistant:' in prompt


def message_of(choice: Any) -> dict[str, Any]:
    """What the client would send."""
    message: dict[str, Any] = choice.message.model_dump(exclude_none=True)
    return message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [tool("f", closed(a={"$ref": "#/x"}))]}, "tools"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"tools": [CLOCK], "ignore_eos": True}, "ignore_eos"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
        ),
        ({"messages": [USER, result("1")]}, "messages"),
    ],
)
def test_faults_are_told_by_their_field(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/chat/completions", {"messages": [USER], "max_tokens": 3, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_before_its_arguments_is_nothing(server: Running, stream: bool) -> None:
    asked = {"messages": [USER], "tools": [CLOCK], "tool_choice": "required", "max_tokens": 3, **CUT}
    answer = server.post("/v1/chat/completions", {**asked, "stream": stream})
    choices = [chunk["choices"][0] for chunk in chunks_of(answer)] if stream else answer.json()["choices"]
    messages = [choice["delta" if stream else "message"] for choice in choices]
    assert not any(message.get("content") or message.get("tool_calls") for message in messages)
    assert choices[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_words_beside_tools(server: Running, stream: bool) -> None:
    asked = {"messages": [USER], "tools": [WEATHER], "temperature": 0, "max_tokens": 24}
    whole = server.post("/v1/chat/completions", asked).json()["choices"][0]["message"]["content"]
    cut = whole[len(whole) // 2 :][:2]
    asked |= {"stop": ["never said", cut], "stream": stream}
    answer = server.post("/v1/chat/completions", asked)
    if stream:
        choices = [choice for chunk in chunks_of(answer) for choice in chunk["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        reason = choices[-1]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert text == whole[: whole.index(cut)]
    assert reason == "stop"
