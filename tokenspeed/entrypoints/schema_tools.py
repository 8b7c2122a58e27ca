"""The tools of a chat: what may be called, checked before anything is rendered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.body import ARRAY, BOOLEAN, OBJECT, STRING, Fields, Kind, decode, describe
from tokenspeed.entrypoints.limits import MAX_NAME_CHARS, MAX_SCHEMA_DEPTH, MAX_TOOLS, MAX_TOOLS_BYTES
from tokenspeed.entrypoints.schema import Model
from tokenspeed.errors import InvalidRequest
from tokenspeed.text.parsers.schema_types import KINDS

Tool = dict[str, Any]

_SCHEMA = Kind[dict[str, Any]](dict[str, Any], "an object (a JSON schema)", shows=False)
_INNER = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not", "contains")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_TOOL_HINTS = frozenset({"cache_control", "defer_loading"})


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`tools` are shown to the model, None for none. `schemas` of those it may call, None if it may not call any.

    Without `parallel` only the first call of an answer counts. `strict` tools' arguments follow their schemas; a call
    is `demanded`, of the function that is `named` if there is one. Where a choice is `limited` the model may call fewer
    than it is shown. `ignored` names tools and fields without effect.
    """

    tools: list[Tool] | None
    schemas: Mapping[str, Mapping[str, Any]] | None
    parallel: bool
    ignored: tuple[str, ...]
    strict: frozenset[str] = frozenset()
    demanded: bool = False
    named: str | None = None
    limited: bool = False


def tool_use(fields: Fields, model: Model, *, flat: bool = False) -> ToolUse:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`, or raise `InvalidRequest` naming the field.

    Chat has what describes a function in an object `function`; where the route is `flat` it stands beside `type`.
    """
    ignored: dict[str, None] = {}
    strict: set[str] = set()
    tools = _tools(fields, ignored, strict, flat)
    choice = _choice(fields, frozenset(tool["function"]["name"] for tool in tools), ignored, flat)
    parallel = fields.value(declared.PARALLEL_TOOL_CALLS)
    if tools and model.no_tools:
        raise InvalidRequest(f"tools cannot be used: {model.no_tools}", param="tools")
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    return ToolUse(
        tools=tools or None,
        schemas={name: schema for name, schema in schemas.items() if name in choice.callable} or None,
        parallel=parallel,
        ignored=tuple(ignored),
        strict=frozenset(strict),
        demanded=choice.demanded,
        named=choice.named,
        limited=choice.limited,
    )


def _tools(fields: Fields, ignored: dict[str, None], strict: set[str], flat: bool) -> list[Tool]:
    raw = fields.raw("tools")
    if raw is None:
        return []
    if len(raw) > MAX_TOOLS_BYTES:
        raise InvalidRequest(f"tools must have at most {MAX_TOOLS_BYTES} bytes", param="tools")
    items = decode(raw, ARRAY, "tools") or []
    if len(items) > MAX_TOOLS:
        raise InvalidRequest(f"tools must have at most {MAX_TOOLS} entries, got {len(items)}", param="tools")
    made = [_tool(bytes(item), f"tools[{index}]", ignored, strict, flat) for index, item in enumerate(items)]
    return [tool for tool in made if tool is not None]


def _tool(raw: bytes, name: str, ignored: dict[str, None], strict: set[str], flat: bool) -> Tool | None:
    """One tool as templates show it; None for a type that this server does not offer, which clients send anyway."""
    inner = decode(raw, OBJECT, name)
    if inner is None:
        raise InvalidRequest(f"{name} must be an object, got null", param=name)
    outer = Fields(inner, f"{name}.")
    kind = outer.take("type", STRING)
    if kind is None:
        raise InvalidRequest(f'{name}.type is required: "function"', param=f"{name}.type")
    if kind != "function":
        ignored[f"tools[] of type {kind[:64]}"] = None
        return None
    fields = outer if flat else _nested(outer, name)
    function: dict[str, Any] = {"name": function_name(fields)}
    description = fields.take("description", STRING)
    if description is not None:
        function["description"] = description
    # Several templates read properties of the parameters without asking whether there are any.
    parameters = fields.take("parameters", _SCHEMA) or {"type": "object", "properties": {}}
    _check_schema(parameters, fields.name("parameters"))
    function["parameters"] = parameters
    if fields.take_or("strict", BOOLEAN, False) or outer.take_or("strict", BOOLEAN, False):
        strict.add(function["name"])
    for key in (*outer.untaken(), *(() if flat else (f"function.{key}" for key in fields.untaken()))):
        if key not in _TOOL_HINTS:
            ignored[f"tools[].{key}"] = None
    return {"type": "function", "function": function}


def _nested(outer: Fields, name: str) -> Fields:
    """The fields of a tool's `function`."""
    described = outer.take("function", OBJECT)
    if described is None:
        raise InvalidRequest(f"{name}.function is required: an object", param=f"{name}.function")
    return Fields(described, f"{name}.function.")


def function_name(fields: Fields) -> str:
    """The checked name of a function: printable, without spaces."""
    name = fields.take("name", STRING)
    if name is None:
        raise InvalidRequest(f"{fields.name('name')} is required: a string", param=fields.name("name"))
    if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable() or any(map(str.isspace, name)):
        raise InvalidRequest(
            f"{fields.name('name')} must have 1 to {MAX_NAME_CHARS} printable characters and no spaces",
            param=fields.name("name"),
        )
    return name


@dataclass(frozen=True, slots=True)
class _Choice:
    """tool_choice: the functions that may be called, whether one must, and which if it names one.

    `limited`: it lists them, and there may be others among the tools.
    """

    callable: frozenset[str]
    demanded: bool = False
    named: str | None = None
    limited: bool = False


def _choice(fields: Fields, names: frozenset[str], ignored: dict[str, None], flat: bool) -> _Choice:
    raw = fields.raw("tool_choice")
    if raw is None or raw in (b'"auto"', b'"none"'):
        return _Choice(frozenset() if raw == b'"none"' else names)
    if raw != b'"required"' and not raw.startswith(b"{"):
        raise InvalidRequest(
            'tool_choice must be "none", "auto", "required" or name a function, got '
            f"{describe(raw, shows=True)}",
            param="tool_choice",
        )
    if not names:
        raise InvalidRequest("tool_choice demands a call, but there are no tools", param="tool_choice")
    if raw == b'"required"':
        return _Choice(names, demanded=True)
    wanted = fields.inside("tool_choice")
    kind = wanted.take_or("type", STRING, "function")
    if kind == "allowed_tools":
        return _allowed(wanted if flat else wanted.inside("allowed_tools"), names, ignored, flat)
    name = (wanted if flat else wanted.inside("function")).take("name", STRING)
    if kind != "function" or name is None:
        raise InvalidRequest(
            'tool_choice as an object has type "function" and names one, or "allowed_tools" and lists some; other '
            "types are not supported",
            param="tool_choice",
        )
    if name not in names:
        raise InvalidRequest("tool_choice names a function that is not among the tools", param="tool_choice")
    return _Choice(names, demanded=True, named=name)


def _allowed(fields: Fields, names: frozenset[str], ignored: dict[str, None], flat: bool) -> _Choice:
    """{mode: auto | required, tools: [functions]}. All tools are shown all the same: the prompt stays as it was."""
    mode = fields.take("mode", STRING)
    if mode not in ("auto", "required"):
        raise InvalidRequest('tool_choice of allowed_tools has mode "auto" or "required"', param="tool_choice")
    items = fields.take("tools", ARRAY)
    if not items or len(items) > MAX_TOOLS:
        raise InvalidRequest(
            f"tool_choice of allowed_tools lists 1 to {MAX_TOOLS} of the tools", param="tool_choice"
        )
    allowed: set[str] = set()
    for index, item in enumerate(items):
        described = decode(bytes(item), OBJECT, "tool_choice")
        listed = Fields({} if described is None else described, f"{fields.name('tools')}[{index}].")
        kind = listed.take_or("type", STRING, "function")
        if kind != "function":
            ignored[f"tool_choice of type {kind[:64]}"] = None
            continue
        name = (listed if flat else listed.inside("function")).take("name", STRING)
        if name not in names:
            raise InvalidRequest("tool_choice allows a function that is not among the tools", param="tool_choice")
        allowed.add(name)
    if mode == "required" and not allowed:
        raise InvalidRequest("tool_choice demands a call, but allows no function", param="tool_choice")
    return _Choice(frozenset(allowed), demanded=mode == "required", limited=True)


def _check_schema(schema: dict[str, Any], name: str) -> None:
    """Types must be JSON's, nesting bounded. No reference is followed, so cycles are no matter here."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        following: list[Any] = []
        for item in level:
            if isinstance(item, list):
                following += item
            elif isinstance(item, dict):
                _check_type(item.get("type"), name)
                following += [item[key] for key in _INNER if key in item]
                for key in _NAMED:
                    named = item.get(key)
                    following += named.values() if isinstance(named, dict) else ()
        level = [item for item in following if isinstance(item, (dict, list))]
        if not level:
            return
    raise InvalidRequest(f"{name} is nested more than {MAX_SCHEMA_DEPTH} levels deep", param=name)


def _check_type(named: object, name: str) -> None:
    for kind in named if isinstance(named, list) else () if named is None else (named,):
        if not isinstance(kind, str) or kind not in KINDS:
            raise InvalidRequest(f"{name} has a type that is none of JSON's: {', '.join(KINDS)}", param=name)
