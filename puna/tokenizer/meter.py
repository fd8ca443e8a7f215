"""What a template's work costs: every turn of a loop, call and value is charged, mostly before it is made.

Time and memory are bounded by counting, so that the same template ends at the same place on every machine.
Touching an object costs STEP, a character 1; whatever walks through a value (comparing, writing, hashing)
pays for all that is in it, as often as it is in it.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.visitor import NodeTransformer

STEP = 16
SPARE = 1 << 23  # half a second's work, which any template may do …
GROWTH = 16  # … and this much for every unit that it is given
LONGEST_NUMBER = 4096  # bits


class Meter:
    """What one run of a template may still do."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._left = SPARE + GROWTH * cost(dict(variables))

    def charge(self, amount: int) -> None:
        """Raises SecurityError where that is more than is left."""
        self._left -= amount
        if self._left < 0:
            raise SecurityError("it takes far more work or memory than its conversation calls for")

    def weigh(self, value: Any) -> None:
        """Charge for walking through a value."""
        self.charge(cost(value, self._left))

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, charged as they are taken."""
        for item in items:
            self.charge(STEP)
            yield item


def cost(value: Any, most: int = sys.maxsize) -> int:
    """What walking through a value costs; where that is more than `most`, some number above it."""
    total, waiting = STEP, [value]
    while waiting and total <= most:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() >> 3
        elif isinstance(item, range):
            total += STEP * len(item)
        elif isinstance(item, dict):
            total += 2 * STEP * len(item)
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | KeysView | ValuesView | ItemsView):
            total += STEP * len(item)
            waiting += item
    return total


def operator_cost(operator: str, left: Any, right: Any) -> int:
    """What the value of an operator costs, in the worst case.

    Raises:
        SecurityError: a number would become too long.
    """
    if isinstance(left, int | float) and isinstance(right, int | float):
        _refuse_long_number(operator, left, right)
        return STEP
    if operator == "+":
        return _length(left) + _length(right)
    if operator == "*":
        count = next((value for value in (left, right) if isinstance(value, int)), 0)
        return max(count, 1) * max(_length(left), _length(right))
    if operator == "%" and isinstance(left, str):
        if any(character.isdigit() or character == "*" for character in left):
            raise SecurityError("a width in a format")
        return len(left) + left.count("%") * cost(right)
    return STEP


def method_cost(text: str, name: str, arguments: tuple[Any, ...]) -> int:
    """What a method of a text costs, in the worst case; `arguments` were charged already."""
    first = arguments[0] if arguments else None
    needle = first if isinstance(first, str) else ""
    if name == "join" and isinstance(first, list):
        return len(text) * len(first)
    if name == "replace" and len(arguments) > 1 and isinstance(arguments[1], str):
        return len(text) + text.count(needle) * len(arguments[1])
    if name == "format":
        return len(text) + text.count("{") * cost(arguments)
    many = STEP * (text.count(needle) if needle else len(text)) if "split" in name else 0
    # Stripping, and searching from the right, take time with the product of both lengths.
    return len(text) + many + len(text) * len(needle) // STEP


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return STEP * len(value) if isinstance(value, list | tuple) else 0


def _refuse_long_number(operator: str, left: float, right: float) -> None:
    bits = [value.bit_length() if isinstance(value, int) else 0 for value in (left, right)]
    growing = {"*": sum(bits), "**": bits[0] * max(int(right), 1) if bits[1] < 64 else LONGEST_NUMBER + 1}
    if max(*bits, growing.get(operator, 0)) > LONGEST_NUMBER:
        raise SecurityError(f"the value of {operator!r} would be too large")


class Metered(NodeTransformer):
    """Puts the calls that charge into a template; their names are the environment's, beyond its reach."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        """Every turn, also those that the loop's own condition leaves out."""
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_own("weighed", nodes.Const(None))))
        if node.test is not None:
            node.test = _own("weighed", node.test)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        """What is written, also where it is caught in a variable or a macro."""
        self.generic_visit(node)
        node.nodes = [_own("weighed", _constant(child)) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """jinja2 lets no sandbox intercept `~`."""
        self.generic_visit(node)
        return _own("joined", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """Both sides."""
        self.generic_visit(node)
        node.expr = _own("weighed", node.expr)
        for operand in node.ops:
            operand.expr = _own("weighed", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """Keys are hashed, slices are copied."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _own("copied", nodes.Getitem(node.node, node.arg, node.ctx))
        if not isinstance(node.arg, nodes.Const):
            node.arg = _own("weighed", node.arg)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        """Where one value stands in another twice, the cost doubles."""
        self.generic_visit(node)
        return _own("weighed", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        """Not where it is a target of an assignment."""
        self.generic_visit(node)
        return _own("weighed", node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        """Keys before they are hashed."""
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _own("weighed", pair.key)
        return _own("weighed", node)

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:  # noqa: N802
        """Escaped text is a type of its own, with other methods."""
        raise TemplateSyntaxError("autoescape is not for chat templates", node.lineno)


def _own(name: str, *arguments: Any) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _constant(node: nodes.Expr) -> nodes.Expr:
    return nodes.Const(node.data) if isinstance(node, nodes.TemplateData) else node
