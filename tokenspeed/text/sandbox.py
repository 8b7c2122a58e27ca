"""The jinja2 environment that chat templates run in: sandboxed, bounded, and keeping provenance.

Three places make strings in a jinja2 template. Literals: the code generator writes them as look-ups of a
`Text` of the template. Concatenation (`~`, blocks, macros, the output itself): the environment's `concat`.
Methods and filters: `Text` has the methods, and the filters that leave `str` are replaced below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, missing, pass_environment

from tokenspeed.text.provenance import (
    Text,
    blurred,
    check_size,
    concatenated,
    from_request,
    from_template,
    is_templates,
    public,
)
from tokenspeed.text.written import json_text

MAX_EXPONENT = 256
SIZED = (str, list, tuple)
DICT_ATTRIBUTES = frozenset(dir(dict))


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`."""


class Sandbox(ImmutableSandboxedEnvironment):
    """One environment a template: the functions and filters that transformers gives to chat templates."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
            undefined=Missing,
            # Folding would turn literals into strings before the code generator sees them.
            optimized=False,
        )
        self.code_generator_class = ProvenanceGenerator
        self.literals = Literals()
        self.filters.update(
            tojson=tojson,
            string=string,
            format=format_filter,
            join=join,
            replace=replace,
            indent=indent,
            title=title,
            safe=string,
        )
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=raise_exception, strftime_now=strftime_now, dict=DictType(), namespace=TemplateNamespace
        )

    def concat(self, parts: Iterable[str]) -> Text:
        return concatenated(parts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # What is safe whatever it is, and nearly all that templates read: a third of the time of rendering is saved.
        kind = type(obj)
        if kind is dict and attribute not in DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind in OPEN_TYPES and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(_tracked(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is dict and isinstance(argument, str) and argument in obj:
            return obj[argument]
        return super().getitem(_tracked(obj), argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, Text):
            return left + right  # checks the size itself; the usual case
        if operator == "**":
            if isinstance(right, (int, float)) and abs(right) > MAX_EXPONENT:
                raise OverflowError(f"a power above {MAX_EXPONENT}")
        elif operator == "%":
            left = _tracked(left)
        elif operator == "+":
            if isinstance(left, SIZED) and isinstance(right, SIZED):
                check_size(len(left) + len(right))
        else:
            for value, count in ((left, right), (right, left)):
                if isinstance(value, SIZED) and isinstance(count, int):
                    check_size(len(value) * max(0, count))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        pattern = getattr(value, "__self__", None)
        if wrapped is None or not isinstance(pattern, Text):
            return wrapped
        if value.__name__ == "format_map":
            return lambda mapping: format_text(self, pattern, (), mapping)
        return lambda *args, **kwargs: format_text(self, pattern, args, kwargs)


def _tracked(value: Any) -> Any:
    """Plain strings, which filters make, get the bounds and the methods of request text."""
    return from_request(value) if type(value) is str else value


class Literals(dict[str, Text]):
    """The template's literals, each made once."""

    def __missing__(self, value: str) -> Text:
        self[value] = literal = from_template(value)
        return literal


class ProvenanceGenerator(CodeGenerator):
    """Compiles a template's literals to look-ups of `Text`, and `~` to the environment's `concat`."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(_literal(node.value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(_literal(node.data))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        # Expressions of constants are computed when rendering, where their size is bounded.
        if not isinstance(node, nodes.Literal):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return _literal("".join([str(part) for part in group]))


def _literal(value: str) -> str:
    return f"environment.literals[{str.__str__(value)!r}]"


class Missing(jinja2.Undefined):
    """What a template reads where nothing is. Its error never repeats a name that came from the request."""

    __slots__ = ()

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = missing,
        name: str | None = None,
        exc: type[jinja2.TemplateRuntimeError] = jinja2.UndefinedError,
    ) -> None:
        if isinstance(name, Text) and not is_templates(name):
            name = "…"
            hint = None
        super().__init__(hint, obj, name, exc)


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own: what is set inside is not seen outside, as in transformers.
        return nodes.Scope(body).set_lineno(lineno)


class DictType:
    """The `dict` of templates: a function and `fromkeys`, no class to climb from."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class TemplateNamespace(Namespace):
    """jinja2's `namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


OPEN_TYPES = frozenset({LoopContext, TemplateNamespace})
"""Of these a template may read every attribute that does not begin with an underscore."""


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a namespace attribute may not begin with an underscore")


def raise_exception(message: object) -> None:
    """Refuse the messages: what the template says goes to the client, without what the request brought."""
    raise TemplateRefusal(public(message))


def strftime_now(form: str) -> str:
    """Now, in local time."""
    return datetime.now().strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: no HTML escapes. Wholly request text.

    Without options, arguments of calls are written as the model wrote them, where that is known.
    """
    if indent is None and separators is None and not (ensure_ascii or sort_keys):
        return from_request(json_text(value))
    made = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return from_request(made)


@pass_environment
def join(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> Text:
    """The filter `join`, with the separator's and the items' provenance."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return concatenated(_interleaved(str(d), map(str, value)))


def _interleaved(separator: str, parts: Iterable[str]) -> Iterable[str]:
    for index, part in enumerate(parts):
        if index:
            yield separator
        yield part


def replace(s: Any, old: str, new: str, count: int | None = None) -> Text:
    """The filter `replace`."""
    return concatenated([str(s)]).replace(str(old), str(new), -1 if count is None else count)


def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Text:
    """The filter `indent`: new line ends and indentation are the template's."""
    check_size(width if isinstance(width, int) else len(width))
    indention = width if isinstance(width, str) else from_template(" " * width)
    newline = from_template("\n")
    lines = concatenated([s, newline]).splitlines()
    parts: list[str] = [indention] if first else []
    for index, line in enumerate(lines):
        if index:
            parts.append(newline)
            if line or blank:
                parts.append(indention)
        parts.append(line)
    return concatenated(parts)


def title(s: Any) -> Text:
    """The filter `title`: a word begins after a blank, a hyphen or an opening bracket."""
    whole = concatenated([str(s)])
    parts: list[str] = []
    begins = True
    for character in whole:
        opens = character.isspace() or character in "-({[<"
        parts.append(character if opens else character.upper() if begins else character.lower())
        begins = opens
    return concatenated(parts)


def string(value: Any) -> str:
    """The filters `string` and `safe`: nothing is escaped here anyway."""
    return str(_tracked(str(value)))


def format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    """The filter `format`: `value % args`, or `value % kwargs`."""
    if args and kwargs:
        raise jinja2.exceptions.FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return string(value) % (kwargs or args)


def format_text(sandbox: Sandbox, pattern: Text, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Text:
    """`pattern.format(*args, **kwargs)`: arguments keep their origin where the pattern is the template's own."""
    formatter = SandboxedFormatter(sandbox)
    fields = list(formatter.parse(pattern))
    for _, _, spec, _ in fields:
        _check_widths(spec or "")
    if not is_templates(pattern) or any("{" in (spec or "") for _, _, spec, _ in fields):
        return blurred(formatter.vformat(pattern, args, kwargs), [pattern, *args, *kwargs.values()])
    parts: list[str] = []
    number = 0
    for literal, name, spec, conversion in fields:
        parts.append(from_template(literal))
        if name is None:
            continue
        if not name or name[0] in ".[":
            value, _ = formatter.get_field(f"{number}{name}", args, kwargs)
            number += 1
        else:
            value, _ = formatter.get_field(name, args, kwargs)
        value = formatter.convert_field(value, conversion)
        if isinstance(value, Text) and not spec:
            parts.append(value)
        else:
            parts.append(blurred(formatter.format_field(value, spec or ""), [value]))
    return concatenated(parts)


def _check_widths(spec: str) -> None:
    digits = "".join([character if character.isdigit() else " " for character in spec])
    for number in digits.split():
        check_size(int(number[:12]))
