"""The page about the API: operations and objects of its document (OpenAPI), in the order in which a person reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any, Final
from urllib.parse import urlencode

from celery_capacity.platform.web.api.security_schemes import BEARER

#: Statuses from which on an answer is an error.
ERRORS: Final = 400
#: Media type of an answer without an end, which curl must not hold back.
STREAM: Final = "text/event-stream"
#: Name of the object of errors.
PROBLEM: Final = "Problem"
#: Where references to objects begin.
_OBJECTS: Final = "#/components/schemas/"
#: Limits of a value, by the words of JSON Schema.
_LIMITS: Final = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Word:
    """A piece of a type. `object`: the name of the object that it stands for, else None."""

    text: str
    object: str | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """A member of an object, or a parameter. `where`: path, query or header, "" for a member."""

    name: str
    type: tuple[Word, ...]
    text: str
    required: bool
    where: str = ""


@dataclass(frozen=True, slots=True)
class Value:
    """A body or an answer: its type, its own text, and the fields of the object that it is."""

    type: tuple[Word, ...]
    text: str
    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a path. `role`: that it needs, "" for none. `errors`: the statuses of its errors."""

    method: str
    path: str
    text: tuple[str, ...]
    role: str
    parameters: tuple[Field, ...]
    body: Value | None
    answer: Value | None
    media: str
    errors: tuple[str, ...]
    example: str

    @property
    def anchor(self) -> str:
        """Return the id of its heading."""
        return anchor_of(self.method, self.path)


@dataclass(frozen=True, slots=True)
class Object:
    """An object that stands within others."""

    name: str
    text: str
    fields: tuple[Field, ...]
    type: tuple[Word, ...]

    @property
    def anchor(self) -> str:
        """Return the id of its heading."""
        return anchor_of("object", self.name)


@dataclass(frozen=True, slots=True)
class Reference:
    """The whole page. `groups`: operations by their tag."""

    groups: Mapping[str, tuple[Operation, ...]]
    objects: tuple[Object, ...]

    @property
    def anchors(self) -> frozenset[str]:
        """Return the ids of the objects that the page has. Bodies and answers stand at their operations."""
        return frozenset(part.anchor for part in self.objects)


def anchor_of(*words: str) -> str:
    """Return an id for a heading."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(words)).strip("-").lower()


def name_of(reference: str) -> str:
    """Return the name of an object without the underscores that FastAPI writes for brackets."""
    return re.sub(r"_(\w+?)_$", r" of \1", reference.rpartition("/")[2])


def type_of(schema: Schema) -> tuple[Word, ...]:
    """Return the type of a value in words."""
    if "$ref" in schema:
        name = name_of(schema["$ref"])
        return (Word(name, anchor_of("object", name)),)
    if "anyOf" in schema:
        return _joined([type_of(choice) for choice in schema["anyOf"]], " or ")
    if "const" in schema:
        return (Word(json.dumps(schema["const"])),)
    if "enum" in schema:
        return (Word(" | ".join(json.dumps(value) for value in schema["enum"])),)
    kind = schema.get("type", "any value")
    if "prefixItems" in schema:
        parts = [type_of(part) for part in schema["prefixItems"]]
        return (Word("list of "), *_joined(parts, ", then "))
    if kind == "array":
        return (Word("list of "), *type_of(schema.get("items", {})))
    values = schema.get("additionalProperties")
    if kind == "object" and isinstance(values, dict) and not schema.get("properties"):
        return (Word("object of "), *type_of(values))
    return (Word(kind), *_limits(schema))


def _limits(schema: Schema) -> Iterator[Word]:
    limits = [
        (words.removesuffix("s") if schema[word] == 1 else words).format(f"{schema[word]:,.0f}")
        for word, words in _LIMITS.items()
        if word in schema
    ]
    if limits:
        yield Word(f" ({', '.join(limits)})")


def _joined(types: list[tuple[Word, ...]], between: str) -> tuple[Word, ...]:
    words: list[Word] = []
    for number, parts in enumerate(types):
        words += [*([Word(between)] if number else []), *parts]
    return tuple(words)


def _sample(name: str, schema: Schema, objects: Mapping[str, Schema]) -> Any:
    """Return a value that shows the form of a member."""
    if "$ref" in schema:
        return _sample(name, objects[schema["$ref"].removeprefix(_OBJECTS)], objects)
    if "examples" in schema:
        return schema["examples"][0]
    if "anyOf" in schema:
        return _sample(name, schema["anyOf"][0], objects)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "array":
            return [_sample(name, schema.get("items", {}), objects)]
        case "integer" | "number":
            return int(schema.get("minimum", 1)) or 1
        case "boolean":
            return True
        case "object":
            return _sample_object(schema, objects) if schema.get("properties") else {}
    return name.upper()


def _sample_object(schema: Schema, objects: Mapping[str, Schema]) -> dict[str, Any]:
    """Return the required members of an object; without any, its first text, or its first member."""
    members = schema.get("properties", {})
    samples = {name: _sample(name, member, objects) for name, member in members.items()}
    wanted = schema.get("required") or [name for name, value in samples.items() if isinstance(value, str)][:1]
    return {name: samples[name] for name in wanted or list(samples)[:1]}


class _Reader:
    """Reads one document, and notes the objects that stand within others."""

    def __init__(self, document: Mapping[str, Any], address: str) -> None:
        self._document = document
        self._address = address
        self._objects: Mapping[str, Schema] = document["components"]["schemas"]

    def fields(self, schema: Schema) -> tuple[Field, ...]:
        """Return the members of an object; for a reference, those of its object."""
        if "$ref" in schema:
            schema = self._objects[schema["$ref"].removeprefix(_OBJECTS)]
        required = schema.get("required", ())
        return tuple(
            Field(name, type_of(member), self._text(member), name in required)
            for name, member in schema.get("properties", {}).items()
        )

    def _text(self, schema: Schema) -> str:
        """Return the description of a value; without one, that of its object."""
        if "description" in schema or "$ref" not in schema:
            return str(schema.get("description", ""))
        return str(self._objects[schema["$ref"].removeprefix(_OBJECTS)].get("description", ""))

    def operation(self, method: str, path: str, member: Mapping[str, Any]) -> Operation:
        parameters = tuple(
            Field(
                parameter["name"],
                type_of(parameter["schema"]),
                parameter.get("description", ""),
                parameter.get("required", False),
                parameter["in"],
            )
            for parameter in member.get("parameters", ())
        )
        sent = member.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        contents: Mapping[str, Schema] = member["responses"]["200"].get("content", {})
        media = next(iter(contents), "")
        answered = contents.get(media, {}).get("schema")
        return Operation(
            method.upper(),
            path,
            tuple(part.replace("\n", " ") for part in member.get("description", "").split("\n\n")),
            _role(member.get("security", ())),
            parameters,
            self._value(sent),
            self._value(answered),
            media,
            tuple(sorted(status for status in member["responses"] if int(status) >= ERRORS)),
            self._example(method, path, member, sent, media),
        )

    def _value(self, schema: Schema | None) -> Value | None:
        if not schema:
            return None
        # An optional body is the object or null.
        choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
        whole = choices[0] if len(choices) == 1 else schema
        return Value(type_of(schema), self._text(whole), self.fields(whole))

    def _example(self, method: str, path: str, member: Mapping[str, Any], sent: Schema | None, media: str) -> str:
        asked = {
            parameter["name"]: _sample(parameter["name"], parameter["schema"], self._objects)
            for parameter in member.get("parameters", ())
            if parameter.get("required") and parameter["in"] == "query"
        }
        named = re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), path)
        words = ["curl -sN" if media == STREAM else "curl -s"]
        if _role(member.get("security", ())):
            words.append('-H "Authorization: Bearer $TOKEN"')
        if sent:
            choices = [choice for choice in sent.get("anyOf", [sent]) if choice.get("type") != "null"]
            words.append('-H "Content-Type: application/json"')
            words.append(f"-d {quote(json.dumps(_sample('body', choices[0], self._objects)))}")
        elif method != "get":
            words.append(f"-X {method.upper()}")
        words.append(quote(f"{self._address}{named}{'?' if asked else ''}{urlencode(asked)}"))
        return " ".join(words)

    def nested(self, operations: list[Operation]) -> tuple[Object, ...]:
        """Return the objects within bodies, answers and each other, by name, and the errors."""
        by_anchor = {anchor_of("object", name_of(name)): name for name in self._objects}
        waiting = [
            word.object
            for operation in operations
            for value in (operation.body, operation.answer)
            if value is not None
            for field in value.fields
            for word in field.type
            if word.object is not None
        ]
        waiting.append(anchor_of("object", PROBLEM))
        objects: dict[str, Object] = {}
        while waiting:
            name = by_anchor[waiting.pop()]
            if name in objects:
                continue
            schema = self._objects[name]
            fields = self.fields(schema)
            own_type = () if fields else type_of(schema)
            objects[name] = Object(name_of(name), str(schema.get("description", "")), fields, own_type)
            waiting += [word.object for field in fields for word in field.type if word.object is not None]
        return tuple(objects[name] for name in sorted(objects))


def _role(security: Any) -> str:
    """Return the role that an operation needs; "" where it needs none."""
    if not security or {} in security:
        return ""
    return next(str(role) for way in security for role in way.get(BEARER, ()))


def read(document: Mapping[str, Any], address: str) -> Reference:
    """Return the page of a document. `address`: of the dashboard, for the examples."""
    reader = _Reader(document, address)
    groups: dict[str, list[Operation]] = {}
    for path, methods in document["paths"].items():
        for method, member in methods.items():
            groups.setdefault(member["tags"][0], []).append(reader.operation(method, path, member))
    operations = [operation for group in groups.values() for operation in group]
    return Reference({tag: tuple(group) for tag, group in groups.items()}, reader.nested(operations))
