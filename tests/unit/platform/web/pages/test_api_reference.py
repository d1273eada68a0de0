"""The page about the API: types in words, samples of bodies, and the objects that it explains."""

from __future__ import annotations

from typing import Any

import pytest

from celery_capacity.platform.web.pages.api_reference import PROBLEM, anchor_of, name_of, read, type_of

ADDRESS = "http://127.0.0.1:8000"
SCHEMAS = {
    "Part": {"type": "object", "description": "A part.", "properties": {"kind": {"$ref": "#/components/schemas/Kind"}}},
    "Kind": {"type": "string", "enum": ["queue", "task"], "description": "A kind."},
    "Answer": {
        "type": "object",
        "description": "An answer.",
        "properties": {"parts": {"type": "array", "items": {"$ref": "#/components/schemas/Part"}}},
        "required": ["parts"],
    },
    PROBLEM: {"type": "object", "properties": {"title": {"type": "string"}}},
}


def document(**member: Any) -> dict[str, Any]:
    """Return a document of one operation."""
    answer = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}}}
    operation = {"tags": ["act"], "description": "Do it.", "responses": {"200": answer, "404": {}}, **member}
    return {"paths": {"/parts/{name}": {"post": operation}}, "components": {"schemas": SCHEMAS}}


def body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 0, "maximum": 31_536_000.0}, "integer (at least 0, at most 31,536,000)"),
        ({"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}]}, "string (at most 9 characters) or null"),
        ({"type": "string", "minLength": 1}, "string (at least 1 character)"),
        ({"type": "array", "items": {"$ref": "#/components/schemas/Part"}}, "list of Part"),
        ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}]}, "list of string, then null"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number"),
        ({"enum": ["a", "b"]}, '"a" | "b"'),
        ({"const": "ok"}, '"ok"'),
        ({}, "any value"),
    ],
)
def test_type_is_told_in_words(schema: dict[str, Any], words: str) -> None:
    assert "".join(word.text for word in type_of(schema)) == words


def test_name_of_results_says_of_what() -> None:
    assert name_of("#/components/schemas/Results_Moved_") == "Results of Moved"
    assert anchor_of("get", "/api/v1/jobs/{job_id}") == "get-api-v1-jobs-job-id"


@pytest.mark.parametrize(
    ("members", "required", "sample"),
    [
        ({"task": {"type": "string"}, "args": {"type": "array"}}, ["task"], '{"task": "TASK"}'),
        (
            {"again": {"type": "boolean"}, "task": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
            [],
            '{"task": "TASK"}',
        ),
        ({"again": {"type": "boolean"}}, [], '{"again": true}'),
        ({"ids": {"type": "array", "items": {"type": "integer", "minimum": 0}}}, ["ids"], '{"ids": [1]}'),
        ({"part": {"$ref": "#/components/schemas/Part"}}, ["part"], '{"part": {"kind": "queue"}}'),
        ({"at": {"type": "string", "examples": ["it's 10min"]}}, ["at"], """{"at": "it'"'"'s 10min"}"""),
    ],
)
def test_example_has_required_members_or_the_first_text(
    members: dict[str, Any], required: list[str], sample: str
) -> None:
    sent = body({"type": "object", "properties": members, "required": required})
    (operation,) = read(document(requestBody=sent, security=[{"bearer": ["operator"]}]), ADDRESS).groups["act"]
    assert operation.role == "operator"
    assert operation.example == (
        'curl -s -H "Authorization: Bearer $TOKEN" -H "Content-Type: application/json"'
        f" -d '{sample}' {ADDRESS}/parts/NAME"
    )


def test_objects_are_those_within_answers_and_the_errors() -> None:
    page = read(document(security=[{}]), ADDRESS)
    (operation,) = page.groups["act"]
    assert (operation.role, operation.errors, operation.example) == (
        "",
        ("404",),
        f"curl -s -X POST {ADDRESS}/parts/NAME",
    )
    assert [(part.name, part.text) for part in page.objects] == [
        ("Kind", "A kind."),
        ("Part", "A part."),
        (PROBLEM, ""),
    ]
    assert operation.answer is not None
    assert [field.name for field in operation.answer.fields] == ["parts"]
