"""Chat templates are programs from strangers: they run in jinja2's sandbox, and within bounds."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from puna.errors import TokenizerError

SOURCE_LIMIT = 1 << 20  # characters of a template
SPARE_OUTPUT = 1 << 20  # characters a template may add to what it is given …
GROWTH = 4  # … which it may repeat this often
VALUE_LIMIT = 1 << 24  # characters or items of any value made with an operator
_WIDEST = 64  # of an indentation


def run(source: str, variables: Mapping[str, Any], size: int) -> str:
    """What a template writes; `size` is how many characters its variables hold.

    Raises:
        TokenizerError: the template is malformed, refuses the conversation, or does what it may not.
    """
    template = _compile(source)
    pieces: list[str] = []
    room = SPARE_OUTPUT + GROWTH * size
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise SecurityError("it writes far more than it was given")
    except _RefusedError as error:
        raise TokenizerError(f"the chat template refuses this conversation: {_line(error)}") from None
    except Exception as error:  # a template can raise anything that Python can
        raise TokenizerError(f"the chat template fails: {type(error).__name__}: {_line(error)}") from None
    return "".join(pieces)


class _RefusedError(Exception):
    """A template called `raise_exception`."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with operators that cannot be made to fill the memory."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse before the value is made."""
        if _result_size(operator, left, right) > VALUE_LIMIT:
            raise SecurityError(f"the value of {operator!r} would be too large")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Plain `"{}".format(x)` only: what stands after a colon can be a width."""
        call = super().wrap_str_format(value)
        if call is not None and ":" in value.__self__:
            raise SecurityError("a format with a colon")
        return call

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Text methods that take a width can make any amount of text from little."""
        widening = isinstance(obj, str) and attr in _WIDENING
        return not widening and super().is_safe_attribute(obj, attr, value)


_WIDENING = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})


def _result_size(operator: str, left: Any, right: Any) -> int:
    if operator == "**":
        return VALUE_LIMIT + 1 if isinstance(right, int) and right > 64 else 0
    if operator == "%":
        return VALUE_LIMIT + 1 if isinstance(left, str) and any(c.isdigit() or c == "*" for c in left) else 0
    if operator == "+":
        return _length(left) + _length(right)
    count = next((value for value in (left, right) if isinstance(value, int)), 0)
    return count * max(_length(left), _length(right))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is written as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > SOURCE_LIMIT:
        raise TokenizerError(
            f"the chat template has {len(source)} characters; at most {SOURCE_LIMIT} are taken"
        )
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.filters["indent"] = _indent
    for name in ("center", "format", "wordwrap", "xmlattr"):
        del environment.filters[name]
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    try:
        tree = _BoundedJoins().visit(environment.parse(source))
        code = environment.compile(tree)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TokenizerError(f"the chat template is malformed: {_line(error)}") from None
    environment.globals[_JOIN] = _join
    return jinja2.Template.from_code(environment, code, environment.globals)


_JOIN = "bounded_join"


class _BoundedJoins(jinja2.visitor.NodeTransformer):
    """`a ~ b` becomes a call that looks at the size: jinja2 lets no sandbox intercept that operator."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_JOIN, "load"), node.nodes, [], None, None, lineno=node.lineno)


def _join(*values: Any) -> str:
    texts = [str(value) for value in values]
    if sum(map(len, texts)) > VALUE_LIMIT:
        raise SecurityError("the value of '~' would be too large")
    return "".join(texts)


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    width = indent if indent is None else min(indent, _WIDEST)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=width, **options)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > _WIDEST:
        raise SecurityError(f"indent by more than {_WIDEST}")
    return do_indent(text, width, first, blank)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
