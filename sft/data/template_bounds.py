"""Bounds for what a chat template may do in one rendering, for it comes with a model, and anybody may have written it.

Jinja's sandbox, which transformers renders in, keeps a template from Python's insides and from files, but not from
loops that take days or texts that fill the memory. Here each step of a loop costs as many units of a budget as its body
has parts, and a call, and text that is kept or gone through, cost some too. `+`, `~` and plain output cost nothing, for
speed: what they make is counted where it is kept, given to a call, or put together.
"""

import re
import threading
from collections.abc import Iterable
from functools import wraps
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from sft.errors import ModelError

BUDGET = 2**24  # units of one rendering, a few seconds at most; a dialogue of a thousand messages takes some 300,000
OF_CALL = 100  # units, by the time that it takes
OF_TEXT = 256  # characters or items that cost one unit
LARGEST = 2**26  # characters or items of one value, twice what a row may have
LARGEST_BITS = 1024  # of a whole number
CHEAP = {"trim", "length", "count", "string", "lower", "upper", "first", "last", "default", "d", "list", "items"}
# Methods of text that can make much of little; `translate` takes no table that a template can write.
MULTIPLYING = {"center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "format", "format_map"}
SIZED = {str, list, tuple, dict}
WIDTH = re.compile(r"\d{5,}")  # in a text that is a format


class _Meter(threading.local):
    """Of each thread, since one renders while another locates turns."""

    left = BUDGET


_meter = _Meter()


def refill() -> None:
    """Before a rendering."""
    _meter.left = BUDGET


def _spend(units: int) -> None:
    _meter.left -= units
    if _meter.left < 0:
        raise ModelError(
            "the chat template takes more steps than any conversation needs, or makes a huge text; mend its loops"
        )


def _size(value: Any) -> int:
    """Characters or items; of a whole number its value, and of several values the largest."""
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, str | dict):
        return len(value)
    if isinstance(value, list | tuple):
        return max(len(value), *map(_size, value)) if len(value) < 9 else len(value)
    return 0


def _charge_product(values: Iterable[Any], is_format: bool = False) -> None:
    """For what may be as large as the two largest of the values multiplied."""
    sizes = sorted(map(_size, values), reverse=True)
    if is_format:
        widths = [int(width[:20]) for value in values if isinstance(value, str) for width in WIDTH.findall(value)]
        sizes = sorted([*sizes, *widths], reverse=True)
    product = max(1, sizes[0]) * max(1, *sizes[1:2], 1) if sizes else 0
    _spend(product // OF_TEXT if product <= LARGEST else BUDGET + 1)


@jinja2.pass_context  # so that Jinja does not do it once for all where the value is a constant
def _kept(context: Any, value: Any) -> Any:
    """A value that gets a name."""
    if type(value) in SIZED and len(value) >= OF_TEXT:  # by type: isinstance asks a Namespace for its class, slowly
        _spend(len(value) // OF_TEXT if len(value) <= LARGEST else BUDGET + 1)
    return value


@jinja2.pass_context
def _gone_through(context: Any, items: Any, parts: int) -> Any:
    """What a loop, with a body of so many parts, goes through."""
    if not hasattr(items, "__len__"):
        items = list(items)
    _spend((len(items) + 1) * parts)
    return items


@jinja2.pass_context
def _done(context: Any, value: Any, parts: int) -> Any:
    """Before a body of so many parts is done."""
    _spend(parts)
    return value


def joined(pieces: Iterable[str]) -> str:
    """The text of the pieces: of a rendering, a macro, a block."""
    stream, parts = iter(pieces), []
    while some := list(islice(stream, 4096)):
        size = sum(map(len, some))
        _spend(size // OF_TEXT if size <= LARGEST else BUDGET + 1)
        parts.append("".join(some))
    return "".join(parts)


class _Counting(NodeTransformer):
    """Puts the counting functions into a template: around what loops go through and what is given a name."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        parts = _parts(node)
        self.generic_visit(node)
        node.iter = _through("_gone_through", node.iter, parts)
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        counting = nodes.If(_through("_done", nodes.Const(False, lineno=node.lineno), _parts(node)), [], [], [])
        self.generic_visit(node)
        node.body.insert(0, counting.set_lineno(node.lineno))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _through("_kept", node.node)
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        node.values = [_through("_kept", value) for value in node.values]
        return node


def _parts(node: nodes.Node) -> int:
    return sum(1 for _ in node.find_all(nodes.Node))


def _through(function: str, node: Any, *numbers: int) -> nodes.Filter:
    arguments = [nodes.Const(number, lineno=node.lineno) for number in numbers]
    return nodes.Filter(node, function, arguments, [], None, None, lineno=node.lineno)


def bound(environment: Any) -> None:
    """Makes an environment of Jinja's sandbox count; its templates are then to be made by `compiled`."""
    call, call_binop = environment.call, environment.call_binop

    def counted_call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        receiver = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # format is wrapped
        if type(receiver) is str:
            name = getattr(function, "__name__", "")
            if name in MULTIPLYING:
                _charge_product([receiver, *args, *kwargs.values()], name.startswith("format"))
            else:
                _spend(OF_CALL + len(receiver) // OF_TEXT)
        elif args or kwargs:
            values = [*args, *kwargs.values()]
            _spend(OF_CALL + sum([len(value) for value in values if type(value) in SIZED]) // OF_TEXT)
            if getattr(function, "__name__", "").startswith("strftime"):
                _charge_product(values, True)
        else:
            _spend(OF_CALL)
        return call(context, function, *args, **kwargs)

    def counted_operator(context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str) and operator == "%":
            _charge_product([left, right], True)
        elif not isinstance(left, int) or not isinstance(right, int):
            _charge_product([left, right])
        elif operator != "%":
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _spend(1 if bits <= LARGEST_BITS else BUDGET + 1)
        return call_binop(context, operator, left, right)

    environment.call, environment.call_binop = counted_call, counted_operator
    environment.intercepted_binops = frozenset(["*", "**", "%"])
    environment.concat = joined
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    environment.filters = {
        name: function if name in CHEAP else _counted_filter(function, name)
        for name, function in environment.filters.items()
    } | {"_kept": _kept, "_gone_through": _gone_through, "_done": _done}


def _counted_filter(function: Any, name: str) -> Any:
    @wraps(function)  # which keeps what Jinja has noted on it
    def counted(*args: Any, **kwargs: Any) -> Any:
        _charge_product([*args, *kwargs.values()], name == "format")
        return function(*args, **kwargs)

    return counted


def compiled(environment: Any, source: str) -> jinja2.Template:
    """The template with its counting. Raises: jinja2.TemplateSyntaxError, SyntaxError, RecursionError: it is none."""
    tree = environment.parse(source)
    if (taken := tree.find((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport))) is not None:
        raise jinja2.TemplateSyntaxError("it takes in another file, which none may; write that out", taken.lineno)
    return environment.from_string(_Counting().visit(tree))
