"""What a request wants the text of its answer to match: `response_format`, `structured_outputs` and their aliases."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import structs

from tokenspeed.entrypoints.body import BOOLEAN, STRING, STRINGS, Fields
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import Grammar, GrammarKind

JSON_OBJECT = '{"type": "object"}'
FORMATS = "text, json_object or json_schema"

ALIASES: Mapping[str, GrammarKind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "ebnf",
    "guided_choice": "choice",
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf": "ebnf",
}
"""Fields of the request that hold a grammar by themselves: vLLM's old names, then SGLang's."""

STRUCTURED: Mapping[str, GrammarKind] = {"json": "json_schema", "regex": "regex", "grammar": "ebnf", "choice": "choice"}
"""The fields of `structured_outputs`, one of which may be there."""


def asked_grammar(fields: Fields) -> Grammar | None:
    """The grammar that a request names, None if it names none. Raises `InvalidRequest` naming the field."""
    found = [
        *_response_format(fields),
        *_structured_outputs(fields),
        *(grammar for name, kind in ALIASES.items() for grammar in _grammar(fields, name, kind)),
    ]
    if len(found) > 1:
        raise InvalidRequest(f"{found[1].field} cannot be combined with {found[0].field}", param=found[1].field)
    return found[0] if found else None


def response_format(shape: Fields, name: str) -> Grammar | None:
    """OpenAI's object {type: text | json_object | json_schema, json_schema: {schema, strict, …}}; None for text."""
    kind = shape.take("type", STRING)
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_schema", JSON_OBJECT, name)
    if kind != "json_schema":
        raise InvalidRequest(f"{shape.name('type')} must be {FORMATS}", param=shape.name("type"))
    return described_schema(shape.inside("json_schema"), shape.name("json_schema"))


def described_schema(described: Fields, name: str) -> Grammar:
    """The object {name, description, schema, strict}. With strict: false what cannot be enforced is left out."""
    raw = described.raw("schema")
    if raw is None:
        raise InvalidRequest(f"{name}.schema is required: an object (a JSON schema)", param=f"{name}.schema")
    for key in ("name", "description"):
        described.take(key, STRING)
    strict = described.take("strict", BOOLEAN)
    grammar = Grammar("json_schema", _schema(described, "schema"), f"{name}.schema")
    return structs.replace(grammar, strict=False) if strict is False else grammar


def _response_format(fields: Fields) -> list[Grammar]:
    if fields.raw("response_format") is None:
        return []
    grammar = response_format(fields.inside("response_format"), "response_format")
    return [] if grammar is None else [grammar]


def _structured_outputs(fields: Fields) -> list[Grammar]:
    if fields.raw("structured_outputs") is None:
        return []
    inner = fields.inside("structured_outputs")
    found = [grammar for name, kind in STRUCTURED.items() for grammar in _grammar(inner, name, kind)]
    if inner.take_or("json_object", BOOLEAN, False):
        found.append(Grammar("json_schema", JSON_OBJECT, inner.name("json_object")))
    for key in inner.untaken():
        if inner.raw(key) not in (None, b"false"):
            raise InvalidRequest(f"{inner.name(key)} is not supported by this version", param=inner.name(key))
    if len(found) != 1:
        raise InvalidRequest(
            f"structured_outputs must have exactly one of {', '.join(STRUCTURED)} and json_object",
            param="structured_outputs",
        )
    return found


def _grammar(fields: Fields, name: str, kind: GrammarKind) -> list[Grammar]:
    raw = fields.raw(name)
    if raw is None:
        return []
    if kind == "json_schema":
        text = _schema(fields, name)
    elif kind == "choice":
        fields.take(name, STRINGS)
        text = raw.decode()
    else:
        text = fields.take_or(name, STRING, "")
        if not text:
            raise InvalidRequest(f"{fields.name(name)} must not be empty", param=fields.name(name))
    return [Grammar(kind, text, fields.name(name))]


def _schema(fields: Fields, name: str) -> str:
    """A schema as JSON text: an object or boolean, or a string that holds one."""
    raw = fields.raw(name) or b""
    if raw[:1] == b'"':
        return fields.take_or(name, STRING, "")
    if raw[:1] not in (b"{", b"t", b"f"):
        raise InvalidRequest(f"{fields.name(name)} must be an object (a JSON schema)", param=fields.name(name))
    return raw.decode()
