"""Conversations → ids.

A template decides the words around the messages. What the messages say never becomes a special token,
whoever wrote it: before the template runs, the first character of every special token that a message
spells is replaced by a stand-in, and put back after the template's own special tokens have been found.
So templates may strip, cut and compare as they like, and text still merges across the border between
template and message as it did when the model was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from puna.errors import TokenizerError, nearest
from puna.tokenizer import sandbox, specials
from puna.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, and what else the template knows."""

DEEPEST = 64  # levels of values within values: far more than any conversation has
_PRIVATE_USE = range(0xE000, 0xF900)  # where stand-ins are chosen among characters that occur nowhere

_LLAMA2 = """\
{%- if messages and messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0].content.strip() + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{ raise_exception('after an optional system message, user and assistant must take turns') }}
{%- endif -%}
{%- if message.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + message.content.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

# How functions are told of and called, in every template that knows of tools: Llama 3.1's form of a call, as
# compact as answers are held to, so that a history reads as it was written.
_TOOLS = """\
{%- macro called(function) -%}
{%- set given = function.arguments -%}
{{- '{"name":' + function.name | tojson + ',"parameters":' -}}
{{- (given if given is string else given | tojson(separators=(',', ':'))) + '}' -}}
{%- endmacro -%}
{%- macro said(message) -%}
{%- if message.tool_calls -%}
{{- (message.content or '').strip() + ('\\n' if message.content else '') -}}
{%- for call in message.tool_calls -%}
{{- called(call.function) + ('' if loop.last else '\\n') -}}
{%- endfor -%}
{%- else -%}{{- message.content.strip() -}}{%- endif -%}
{%- endmacro -%}
{%- macro described(tools) -%}
{{- 'These functions can be called; each is described as JSON:\\n\\n' -}}
{%- for tool in tools -%}{{- (tool.function or tool) | tojson + '\\n' -}}{%- endfor -%}
{{- '\\nTo call one of them, answer with a JSON object of this form and nothing else: ' -}}
{{- '{"name":"the function","parameters":{"an argument":"its value"}}. ' -}}
{{- 'The parameters must fit the description. What the function gives back comes next. ' -}}
{{- 'If no function is needed, answer in words.' -}}
{%- endmacro -%}
"""

_LLAMA3 = (
    _TOOLS
    + """\
{{- bos_token -}}
{%- if tools and not (messages and messages[0].role == 'system') -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + described(tools) + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) -}}
{{- '<|end_header_id|>\\n\\n' -}}
{{- described(tools) + '\\n\\n' if tools and loop.first and message.role == 'system' else '' -}}
{{- said(message) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
)

_VICUNA = """\
{{- bos_token -}}
{%- if messages and messages[0].role == 'system' -%}
{{- messages[0].content.strip() + ' ' -}}
{%- set turns = messages[1:] -%}
{%- else -%}
{{- "A chat between a curious user and an artificial intelligence assistant. " -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' + message.content.strip() + ' ' -}}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT: ' + message.content.strip() + eos_token -}}
{%- else -%}
{{- raise_exception('a system message can only come first; then user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_ALPACA = """\
{{- bos_token -}}
{%- if messages and messages[0].role == 'system' -%}
{{- messages[0].content.strip() + '\\n\\n' -}}
{%- set turns = messages[1:] -%}
{%- else -%}
{{- 'Below is an instruction that describes a task. ' -}}
{{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- '### Instruction:\\n' + message.content.strip() + '\\n\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '### Response:\\n' + message.content.strip() + eos_token + ('' if loop.last else '\\n\\n') -}}
{%- else -%}
{{- raise_exception('a system message can only come first; then user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# For models that were trained on no conversations, and so know no template.
_PLAIN = (
    _TOOLS
    + """\
{{- bos_token + (described(tools) + '\\n\\n' if tools else '') -}}
{%- for message in messages -%}
{%- if loop.first and message.role == 'system' -%}
{{- message.content.strip() + '\\n\\n' -}}
{%- else -%}
{{- message.role | capitalize + ': ' + said(message) + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
)

TEMPLATES = {
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "vicuna": _VICUNA,
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "plain": _PLAIN,
}

# Tokens that a template frames messages with; without them the frame would be spelled in ordinary pieces.
MARKS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation, with BOS exactly once at its beginning where the tokenizer has one.

    `template` is a name from TEMPLATES or the text of one; None takes the tokenizer's own. `variables`
    are what else the template may ask for (`tools`, …); `add_generation_prompt` opens the next answer.

    Raises:
        TokenizerError: there is no such template, this tokenizer lacks its tokens, it fails, or it refuses
            the conversation.
    """
    text, originals = _render(tokenizer, messages, template, add_generation_prompt, variables or {})
    parts = list(specials.split(text, tokenizer.specials, tokenizer.pattern))
    while parts[:2] == [tokenizer.bos_id, tokenizer.bos_id]:
        del parts[0]
    ids = tokenizer.encode_parts(
        part if isinstance(part, int) else part.translate(originals) for part in parts
    )
    if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]:
        return ids
    return [tokenizer.bos_id, *ids]


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as text, for people to read; only `render` knows which special tokens in it are real."""
    text, originals = _render(tokenizer, messages, template, add_generation_prompt, variables or {})
    return text.translate(originals)


def tools_in_words(tools: Sequence[Mapping[str, Any]]) -> str:
    """What built-in templates say of functions that may be called, for templates that know of none.

    Raises:
        TokenizerError: the descriptions go too deep.
    """
    return _in_words("described", tools)


def calls_in_words(message: Message) -> str:
    """A message with `tool_calls` as built-in templates write it."""
    return _in_words("said", message)


def _in_words(macro: str, value: Any) -> str:
    _check_depth([value])
    source = f"{_TOOLS}{{{{- {macro}(value) -}}}}"
    return sandbox.run(source, {"value": value}, sum(map(len, _strings([value]))))


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> tuple[str, dict[int, str]]:
    """The template's text with stand-ins in it, and what each of them stands for."""
    source = _source(tokenizer, template)
    _check_depth([list(messages), dict(variables)])
    given = [*_strings([list(messages), dict(variables)])]
    stand_ins = _stand_ins(tokenizer, "".join([source, *given, *tokenizer.specials]))
    names: dict[int | None, str] = {index: name for name, index in tokenizer.specials.items()}
    values = {
        **_guard(dict(variables), tokenizer, stand_ins),
        "messages": [_guard(dict(message), tokenizer, stand_ins) for message in _checked(messages)],
        "add_generation_prompt": add_generation_prompt,
        # A file may name an ordinary token, which no text that is looked through for special ones becomes.
        "bos_token": names.get(tokenizer.bos_id, ""),
        "eos_token": names.get(tokenizer.eos_id, ""),
    }
    text = sandbox.run(source, values, sum(map(len, given)))
    return text, {ord(stand_in): character for character, stand_in in stand_ins.items()}


def _source(tokenizer: Tokenizer, template: str | None) -> str:
    if template is None:
        if tokenizer.chat_template is None:
            raise TokenizerError(f"this tokenizer has no chat template; name one of {_fitting(tokenizer)}")
        return tokenizer.chat_template
    if template not in TEMPLATES and "{" not in template:
        raise TokenizerError(
            f"no chat template {template!r}; expected one of {', '.join(TEMPLATES)}, or the text of one."
            + nearest(template, TEMPLATES)
        )
    missing = next((name for name in MARKS.get(template, ()) if not _is_token(tokenizer, name)), None)
    if missing is not None:
        raise TokenizerError(
            f"the chat template {template!r} needs the token {missing!r}, which this tokenizer lacks; "
            f"those that fit it: {_fitting(tokenizer)}"
        )
    return TEMPLATES.get(template, template)


def _fitting(tokenizer: Tokenizer) -> str:
    """The templates that can be named for this tokenizer, and where: in Python and at the command line."""
    names = [name for name in TEMPLATES if all(_is_token(tokenizer, mark) for mark in MARKS.get(name, ()))]
    return f"{', '.join(names)} (template=, --template)"


def _is_token(tokenizer: Tokenizer, name: str) -> bool:
    """Whether it is one: special, or one that text becomes."""
    if name in tokenizer.specials:
        return True
    return any(tokenizer.token_bytes(index) == name.encode() for index in tokenizer.encode(name, bos=False))


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"message {number} of the conversation must be an object with a 'role'")
    return messages


def _stand_ins(tokenizer: Tokenizer, occurring: str) -> dict[str, str]:
    """For each character that begins a special token, one that occurs nowhere."""
    used = set(occurring)
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    beginnings = sorted({name[0] for name in tokenizer.specials if name})
    try:
        return {character: next(unused) for character in beginnings}
    except StopIteration:
        raise TokenizerError("the conversation uses every private-use character; leave some out") from None


def _guard(value: Any, tokenizer: Tokenizer, stand_ins: Mapping[str, str]) -> Any:
    """The same value with every special token that its texts spell made unrecognisable."""
    if isinstance(value, str):
        return _guard_text(value, tokenizer, stand_ins)
    if isinstance(value, Mapping):
        return {_guard(k, tokenizer, stand_ins): _guard(v, tokenizer, stand_ins) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, tokenizer, stand_ins) for item in value]
    return value


def _guard_text(text: str, tokenizer: Tokenizer, stand_ins: Mapping[str, str]) -> str:
    pieces, at = [], 0
    pattern = tokenizer.pattern
    # Each search begins one character after the last find, so that overlapping spellings are found too.
    while pattern is not None and (match := pattern.search(text, at)) is not None:
        start = match.start(match.lastindex or 0)
        pieces += [text[at:start], stand_ins[text[start]]]
        at = start + 1
    return "".join([*pieces, text[at:]])


def _check_depth(value: Any) -> None:
    """Templates and what walks through values would otherwise run into Python's own limit."""
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > DEEPEST:
            raise TokenizerError(
                f"a conversation may hold values {DEEPEST} levels deep, and this one goes deeper; flatten it"
            )
        inner = [item for item in layer if isinstance(item, Mapping | list | tuple)]
        layer = [x for item in inner for x in (item.values() if isinstance(item, Mapping) else item)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
