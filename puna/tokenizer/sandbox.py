"""Chat templates are programs from strangers: they run in jinja2's sandbox, and within bounds."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
import markupsafe
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_round, do_sum
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from puna.errors import TokenizerError
from puna.tokenizer.meter import STEP, Meter, Metered, method_cost, operator_cost

SOURCE_LIMIT = 1 << 16  # characters of a template; the longest published ones have a third of that
SPARE_OUTPUT = 1 << 20  # characters a template may add to what it is given …
GROWTH = 4  # … which it may repeat this often
_WIDEST = 64  # of an indentation
_METER = "the meter"  # among a template's variables, under a name that it cannot write


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Only these: many others can make any amount of text, or work, from little.
_TEXT_METHODS = _words(
    "capitalize count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_METHODS: dict[type, frozenset[str]] = {
    str: _TEXT_METHODS,
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
}
_FILTERS = _words(
    "abs capitalize count d default dictsort e escape first float groupby indent int items join last length "
    "list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum "
    "title tojson trim unique upper wordcount"
)
# These make a list of what they are given.
_BY_ITEM = _words("groupby list map max min reject rejectattr reverse select selectattr sort sum unique")
# These look at the outside of a value alone.
_QUICK_FILTERS = frozenset({"count", "d", "default", "first", "last", "length"})
_QUICK_TESTS = _words(
    "boolean callable defined false float integer iterable mapping none number sameas sequence string true "
    "undefined"
)


def run(source: str, variables: Mapping[str, Any], size: int) -> str:
    """What a template writes; `size` is how many characters its variables hold.

    Raises:
        TokenizerError: the template is malformed, refuses the conversation, or does what it may not.
    """
    template = _compile(source)
    pieces: list[str] = []
    room = SPARE_OUTPUT + GROWTH * size
    try:
        for piece in template.generate({**variables, _METER: Meter(variables)}):
            if not isinstance(piece, str):  # the value of a filter block can be anything
                raise SecurityError(f"it writes a {type(piece).__name__}, which is no text")
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
    """The sandbox, with everything metered, and operators that cannot be made to fill the memory."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge before the value is made."""
        _meter(context).charge(operator_cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Charge before the call; a macro's body is charged as it runs."""
        if isinstance(obj, MethodType) and obj.__self__ is self:  # what `Metered` put there
            return obj(context, *args)
        meter = _meter(context)
        meter.charge(STEP)
        if not isinstance(obj, Macro):
            args = tuple([*meter.each(arg)] if isinstance(arg, Iterator) else arg for arg in args)
            meter.weigh((args, kwargs))
        if isinstance(obj, BuiltinMethodType):
            _charge_method(meter, obj, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

    def weighed(self, context: Context, value: Any) -> Any:
        """The value, charged with all that is in it."""
        _meter(context).weigh(value)
        return value

    def copied(self, context: Context, value: Any) -> Any:
        """The value, charged without what its items hold."""
        _meter(context).charge(operator_cost("+", value, ""))
        return value

    def joined(self, context: Context, *values: Any) -> str:
        """`a ~ b`."""
        _meter(context).weigh(values)
        return "".join(map(str, values))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Plain `"{}".format(x)` only: what stands after a colon can be a width."""
        plain = super().wrap_str_format(value)
        if plain is None:
            return None
        text = value.__self__
        if ":" in text:
            raise SecurityError("a format with a colon")

        @jinja2.pass_context
        def call(context: Context, *args: Any, **kwargs: Any) -> str:
            _meter(context).charge(method_cost(text, "format", (args, kwargs)))
            return plain(*args, **kwargs)

        return call

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of Python's own types, only the methods that are listed."""
        if isinstance(obj, str | bytes | int | float | dict | list | tuple):
            kind = next((kind for kind in _METHODS if isinstance(obj, kind)), None)
            return kind is not None and attr in _METHODS[kind]
        return super().is_safe_attribute(obj, attr, value)


class _Namespace(Namespace):
    """Shown without what it holds, which may hold it in turn."""

    def __repr__(self) -> str:
        return "<namespace>"


def _meter(context: Context) -> Meter:
    meter: Meter = context.parent[_METER]
    return meter


def _charge_method(meter: Meter, method: BuiltinMethodType, arguments: tuple[Any, ...]) -> None:
    owner = method.__self__
    if method.__name__ not in _METHODS.get(type(owner), ()):
        raise SecurityError(f"a call of {method.__name__!r}")
    if isinstance(owner, str):
        meter.charge(method_cost(owner, method.__name__, arguments))
    elif not isinstance(owner, dict):
        meter.weigh(owner)


def _metered_filter(name: str, plain: jinja2.Environment) -> Callable[..., Any]:
    @jinja2.pass_context
    def call(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        if name in _QUICK_FILTERS:
            meter.charge(STEP)
        else:
            value = [*meter.each(value)] if isinstance(value, Iterator) else value
            meter.weigh((value, args, kwargs))
            _charge_filter(meter, name, value, (*args, *kwargs.values()))
        result = plain.call_filter(name, value, args, kwargs, context=context)
        return meter.each(result) if isinstance(result, Iterator) else result

    return call


def _charge_filter(meter: Meter, name: str, value: Any, arguments: tuple[Any, ...]) -> None:
    """What a filter costs beyond looking at its arguments once."""
    texts = [argument for argument in arguments if isinstance(argument, str)]
    if name == "join":
        meter.charge(len(value) * (STEP + sum(map(len, texts))))
    elif name in ("replace", "trim") and isinstance(value, str):
        meter.charge(method_cost(value, "replace" if name == "replace" else "strip", arguments))
    elif isinstance(value, str):
        meter.charge(STEP * len(value) if name in _BY_ITEM else _WIDEST * value.count("\n"))
    if name in _BY_ITEM and any(text.count(".") > _WIDEST for text in texts):
        raise SecurityError("an attribute of an attribute, too often")


def _metered_test(name: str, plain: jinja2.Environment) -> Callable[..., bool]:
    @jinja2.pass_context
    def call(context: Context, value: Any, *args: Any) -> bool:
        _meter(context).weigh((value, args))
        return bool(plain.call_test(name, value, args, context=context))

    return call


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
    environment = _environment()
    try:
        code = environment.compile(Metered().visit(environment.parse(source)))
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise TokenizerError(f"the chat template is malformed: {_line(error)}") from None
    return jinja2.Template.from_code(environment, code, environment.globals)


def _environment() -> _Environment:
    plain, environment = (
        _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        for _ in range(2)
    )
    plain.filters.update(
        tojson=_to_json, indent=_indent, e=_escape, escape=_escape, safe=str, round=_round, sum=_sum, int=_int
    )
    environment.filters = {name: _metered_filter(name, plain) for name in _FILTERS}
    slow = environment.tests.keys() - _QUICK_TESTS
    environment.tests.update({name: _metered_test(name, plain) for name in slow})
    del environment.globals["lipsum"]
    environment.globals.update(namespace=_Namespace, raise_exception=_refuse, strftime_now=_now)
    return environment


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _now(form: str) -> str:
    if len(form) > 4 * _WIDEST:
        raise SecurityError("a long form of a date")
    return datetime.datetime.now().strftime(form)


@jinja2.pass_context
def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    width = indent if indent is None else min(indent, _WIDEST)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=width, separators=separators, sort_keys=sort_keys
    )
    meter, pieces = _meter(context), []
    for piece in encoder.iterencode(value):
        meter.charge(len(piece) + 1)
        pieces.append(piece)
    return "".join(pieces)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > _WIDEST:
        raise SecurityError(f"indent by more than {_WIDEST}")
    return do_indent(text, width, first, blank)


def _escape(value: Any) -> str:
    return str(markupsafe.escape(value))


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > _WIDEST:
        raise SecurityError(f"a number rounded to more than {_WIDEST} digits")
    return do_round(value, precision, method)


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, value: Any, attribute: Any = None, start: float = 0) -> Any:
    if not isinstance(start, int | float):
        raise SecurityError("a sum of what are no numbers")
    return do_sum(environment, value, attribute, start)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str) and len(value) > _WIDEST:
        raise SecurityError(f"a number of more than {_WIDEST} digits")
    try:
        return int(value, base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
