"""A JSON schema as the compiler takes it: what it would ignore is spelled out another way, or refused.

xgrammar reads a subset of JSON Schema and passes over the rest in silence. Whatever this file lets through is kept by
every text that the grammar allows, with one exception: a oneOf whose branches overlap is an anyOf. Properties
come in the order of the schema, and those that it does not name only where `additionalProperties` says so or where
it names none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenspeed.text.grammars.binding import GrammarError
from tokenspeed.text.grammars.formats import whole
from tokenspeed.text.parsers.schema_types import KINDS, fits

MAX_DEPTH = 64
MAX_SCHEMAS = 50_000
MAX_VALUES = 20_000
"""Levels of nesting, schemas in one, and values of its enums together."""

ANNOTATIONS = frozenset(
    {
        "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "example",
        "examples", "nullable", "readOnly", "strict", "title", "writeOnly",
    }
)  # fmt: skip
"""Words that allow and forbid nothing."""

WORDS: Mapping[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset(
        {
            "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
            "maxProperties", "unevaluatedProperties",
        }
    ),
}  # fmt: skip
"""Words that constrain one type of value."""

CLOSING = ("additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties")
"""Words about the properties that a schema does not name."""

ANY_TYPE = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"})
FORMATS = frozenset(
    {
        "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "json-pointer", "relative-json-pointer",
        "time", "uri", "uri-reference", "uri-template", "uuid",
    }
)  # fmt: skip

KEPT_BY_ENUM = frozenset({"type", "enum", "$defs", "definitions"})

_UNKNOWN_TO_REGEX = re.compile(r"\(\?(?:[=!]|<[=!])|\\[1-9bBkAzZ]|\(\?P=")


def compilable(schema: Any, *, strict: bool = True) -> Any:
    """The schema with the same meaning to xgrammar. Raises `GrammarError` for what it cannot say.

    Without `strict` such words are left out instead: the text then has the shape of the schema, and no more.
    """
    return _Reading(strict).schema(schema, "", 0)


class _Reading:
    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._schemas = 0
        self._values = 0

    def schema(self, schema: Any, path: str, depth: int) -> Any:
        """One schema at `path`; those inside of it first."""
        self._schemas += 1
        if depth > MAX_DEPTH or self._schemas > MAX_SCHEMAS:
            raise GrammarError(f"is nested more than {MAX_DEPTH} levels deep or has more than {MAX_SCHEMAS} schemas")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise GrammarError(f"{_at(path)} must be an object or a boolean")
        made = self._known(schema, path)
        for key in ("$defs", "definitions"):
            if key in schema:
                made[key] = self._named(schema[key], f"{path}/{key}", depth)
        if "$ref" in made:
            return self._reference(made, path)
        made = self._alternatives(made, path, depth)
        self._type(made, path)
        self._enum(made, path)
        for key in ("properties", "patternProperties"):
            if key in made:
                made[key] = self._named(made[key], f"{path}/{key}", depth)
        for key in ("items", "additionalProperties", "propertyNames", "unevaluatedProperties"):
            if key in made:
                made[key] = self.schema(made[key], f"{path}/{key}", depth + 1)
        if "prefixItems" in made:
            made["prefixItems"] = self._listed(made["prefixItems"], f"{path}/prefixItems", depth)
        self._string(made, path)
        self._number(made, path)
        self._array(made)
        self._object(made, path)
        return made

    def _known(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        known = ANY_TYPE.union(*WORDS.values())
        for key in schema:
            if key not in known and key not in ANNOTATIONS and not key.startswith("x-"):
                self._cannot(f"{_at(path)} has {key!r}, which structured output does not support")
        return {key: value for key, value in schema.items() if key in known}

    def _cannot(self, message: str) -> None:
        if self._strict:
            raise GrammarError(message)

    def _named(self, schemas: Any, path: str, depth: int) -> dict[str, Any]:
        if not isinstance(schemas, dict):
            raise GrammarError(f"{_at(path)} must be an object")
        return {name: self.schema(schema, f"{path}/{name}", depth + 1) for name, schema in schemas.items()}

    def _listed(self, schemas: Any, path: str, depth: int) -> list[Any]:
        if not isinstance(schemas, list) or not schemas:
            raise GrammarError(f"{_at(path)} must be a list of schemas")
        return [self.schema(schema, f"{path}/{index}", depth + 1) for index, schema in enumerate(schemas)]

    def _reference(self, made: dict[str, Any], path: str) -> dict[str, Any]:
        target = made["$ref"]
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise GrammarError(f"{_at(path)} has a $ref to outside of the schema; only #/… is followed")
        kept = {"$ref", "$defs", "definitions"}
        if beside := sorted(made.keys() - kept):
            self._cannot(f"{_at(path)} has {beside[0]!r} beside $ref, which structured output does not support")
        return {key: value for key, value in made.items() if key in kept}

    def _alternatives(self, made: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """anyOf, oneOf and allOf. What stands beside them is written into each branch."""
        found = [key for key in ("anyOf", "oneOf", "allOf") if key in made]
        if not found:
            return made
        key = found[0]
        branches = made.pop(key)
        if not isinstance(branches, list) or not branches:
            raise GrammarError(f"{_at(path)}/{key} must be a list of schemas")
        if len(found) > 1 or (key == "allOf" and len(branches) > 1):
            what = " beside ".join(found) if len(found) > 1 else "allOf of several schemas"
            self._cannot(f"{_at(path)} has {what}, which structured output does not support")
        beside = {name: value for name, value in made.items() if name not in {"$defs", "definitions", *found}}
        kept = {name: value for name, value in made.items() if name in {"$defs", "definitions"}}
        if beside:
            branches = [self._joined(beside, branch, path) for branch in branches]
        if key == "allOf":
            only = self.schema(branches[0], f"{path}/allOf/0", depth + 1)
            return kept | only if isinstance(only, dict) else kept
        return kept | {key: self._listed(branches, f"{path}/{key}", depth)}

    def _joined(self, beside: dict[str, Any], branch: Any, path: str) -> Any:
        if not isinstance(branch, dict) or "$ref" in branch:
            self._cannot(f"{_at(path)} has words beside alternatives that structured output cannot join")
            return branch
        joined = dict(beside)
        for closed, wider in ((beside, branch), (branch, beside)):
            if any(closed.get(key, True) is not True for key in CLOSING) and _names(wider) - _names(closed):
                self._cannot(f"{_at(path)} and an alternative have properties that the other one does not allow")
        for key, value in branch.items():
            other = joined.get(key, value)
            if key == "required" and isinstance(other, list) and isinstance(value, list):
                joined[key] = [*other, *(name for name in value if name not in other)]
            elif key == "properties" and isinstance(other, dict) and isinstance(value, dict):
                if any(other[name] != value[name] for name in other.keys() & value.keys()):
                    self._cannot(f"{_at(path)} has properties that an alternative has too")
                joined[key] = other | value
            elif other != value:
                self._cannot(f"{_at(path)} has {key!r}, and an alternative has it too")
                joined[key] = value
            else:
                joined[key] = value
        return joined

    def _type(self, made: dict[str, Any], path: str) -> None:
        """Types are JSON's. A schema that names none has the one that its words are about."""
        named = made.get("type")
        if named is not None:
            kinds = named if isinstance(named, list) else [named]
            if not kinds or any(not isinstance(kind, str) or kind not in KINDS for kind in kinds):
                raise GrammarError(f"{_at(path)}/type must be of {', '.join(KINDS)}")
        elif not any(key in made for key in ANY_TYPE):
            about = [kind for kind, words in WORDS.items() if any(word in made for word in words)]
            if about:
                made["type"] = about[0] if len(about) == 1 else about

    def _enum(self, made: dict[str, Any], path: str) -> None:
        """Only the values of its types, and no more is said of them: xgrammar looks at the values alone."""
        if "const" in made:
            if "enum" in made:
                self._cannot(f"{_at(path)} has const beside enum, of which structured output supports one")
            made["enum"] = [made.pop("const")]
        if "enum" not in made:
            return
        for key in [key for key in made if key not in KEPT_BY_ENUM]:
            self._cannot(f"{_at(path)} has {key!r} beside its values, which structured output does not support")
            del made[key]
        values = made["enum"]
        if not isinstance(values, list) or not values:
            raise GrammarError(f"{_at(path)}/enum must be a list of at least one value")
        self._values += len(values)
        if self._values > MAX_VALUES:
            raise GrammarError(f"has more than {MAX_VALUES} values in its enums")
        named = made.pop("type", None)
        if named is not None:
            kinds = frozenset(named if isinstance(named, list) else [named])
            made["enum"] = [value for value in values if fits(value, kinds)]
            if not made["enum"]:
                raise GrammarError(f"{_at(path)}/enum has no value of its type")

    def _string(self, made: dict[str, Any], path: str) -> None:
        if not isinstance(made.get("format", ""), str):
            raise GrammarError(f"{_at(path)}/format must be a string")
        if "pattern" in made:
            pattern = made["pattern"]
            if not isinstance(pattern, str):
                raise GrammarError(f"{_at(path)}/pattern must be a string")
            if _UNKNOWN_TO_REGEX.search(pattern):
                self._cannot(f"{_at(path)}/pattern looks around or back, which structured output does not support")
                del made["pattern"]
                return
            if "minLength" in made or "maxLength" in made:
                self._cannot(f"{_at(path)} has pattern and a length, of which structured output supports one")
                made.pop("minLength", None), made.pop("maxLength", None)
            made["pattern"] = whole(pattern)
            made.pop("format", None)
        elif made.get("format") not in FORMATS:
            made.pop("format", None)
        elif "minLength" in made or "maxLength" in made:
            self._cannot(f"{_at(path)} has format and a length, of which structured output supports one")
            made.pop("minLength", None), made.pop("maxLength", None)

    def _number(self, made: dict[str, Any], path: str) -> None:
        """Multiples are only of integers, and within no bounds: xgrammar passes over all others."""
        if "multipleOf" not in made:
            return
        bounds = WORDS["number"] - {"multipleOf"}
        if "number" in _kinds(made) or type(made["multipleOf"]) is not int or not bounds.isdisjoint(made):
            self._cannot(f"{_at(path)} has multipleOf, which structured output supports for integers without bounds")
            del made["multipleOf"]

    @staticmethod
    def _array(made: dict[str, Any]) -> None:
        """Items of any kind where none are described: to xgrammar those are no items at all."""
        if "array" in _kinds(made) and "items" not in made and "prefixItems" not in made:
            made["items"] = True

    def _object(self, made: dict[str, Any], path: str) -> None:
        """Required names are properties, and an object that describes none has any."""
        if "object" not in _kinds(made):
            return
        properties, required = made.get("properties", {}), made.get("required", [])
        if not isinstance(required, list) or any(not isinstance(name, str) for name in required):
            raise GrammarError(f"{_at(path)}/required must be a list of names")
        if "propertyNames" in made and properties:
            self._cannot(f"{_at(path)} has properties and propertyNames, of which structured output supports one")
            del made["propertyNames"]
        if "properties" not in made and "patternProperties" not in made:
            made.setdefault("additionalProperties", True)
        missing = [name for name in dict.fromkeys(required) if name not in properties]
        if missing:
            others = made.get("additionalProperties", True)
            if others is False or "patternProperties" in made or "propertyNames" in made:
                raise GrammarError(f"{_at(path)} requires {missing[0]!r}, which is none of its properties")
            made["properties"] = {**properties, **{name: others for name in missing}}
        if "patternProperties" in made:
            made["patternProperties"] = {whole(name): value for name, value in made["patternProperties"].items()}


def _names(schema: dict[str, Any]) -> set[str]:
    properties = schema.get("properties")
    return set(properties) if isinstance(properties, dict) else set()


def _kinds(made: dict[str, Any]) -> list[str]:
    named = made.get("type", [])
    return named if isinstance(named, list) else [named]


def _at(path: str) -> str:
    return path or "the schema"
