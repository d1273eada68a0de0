"""The schemas of the commands' output: as the models have them, complete, closed, and of one voice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from celery_capacity.migrations import HEAD
from celery_capacity.platform.console.render import BLOCKED
from celery_capacity.platform.web.http import problems
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model.reasons import EXPLAINED, Refusal
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.pauses import Kind
from docs.site import schemas
from tests.fixtures.documents.shapes import SCHEMAS, assert_shape, commands, prints_json, schema
from tests.fixtures.processes.platforms import ROOT

NAMES = sorted(path.stem for path in SCHEMAS.glob("*.json"))


def parts(of: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all schemas within a schema, each with its place."""
    yield path, of
    for group in ("properties", "$defs"):
        for name, inner in of.get(group, {}).items():
            yield from parts(inner, f"{path}.{name}")
    for word in ("items", "additionalProperties", "propertyNames"):
        if isinstance(of.get(word), dict):
            yield from parts(of[word], f"{path}.{word}")
    for word in ("prefixItems", "anyOf"):
        for number, inner in enumerate(of.get(word, [])):
            yield from parts(inner, f"{path}.{word}[{number}]")


def test_schemas_are_as_the_models_have_them() -> None:
    # Values are compared, since the order of a schema's words is that of the installed pydantic.
    stored = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in SCHEMAS.glob("*.json")}
    made = {name: json.loads(text) for name, text in schemas.files().items()}
    assert stored == made, "`make reference` makes them anew"


def test_write_makes_changed_schemas_anew_and_deletes_others(tmp_path: Path) -> None:
    assert set(schemas.write(tmp_path)) == schemas.files().keys()
    (tmp_path / "cluster.json").write_text("{}", encoding="utf-8")
    (tmp_path / "former-command.json").write_text("{}", encoding="utf-8")
    assert schemas.write(tmp_path) == ["cluster.json", "former-command.json"]
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == schemas.files()


def test_commands_load_without_the_models() -> None:
    code = (
        "import sys\nfrom celery_capacity.workers.plugin import COMMANDS\n"
        "for stand_in in COMMANDS: stand_in.load()\n"
        "print(*({'pydantic', 'celery_capacity.platform.documents'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_every_command_with_json_has_a_schema_and_no_other_is_there() -> None:
    with_json = {name.replace(" ", "-") for name, command in commands().items() if prints_json(command)}
    assert set(NAMES) == with_json | {"error"}


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_one_and_names_what_prints_it(name: str) -> None:
    document = schema(name)
    Draft202012Validator.check_schema(document)
    assert document["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert document["$id"].endswith(f":{name}")
    assert name == "error" or f"celery -A platform {name.replace('-', ' ')} " in document["title"]


@pytest.mark.parametrize("name", NAMES)
def test_every_object_is_closed_and_every_property_described(name: str) -> None:
    for where, part in parts(schema(name)):
        kinds = part.get("type", [])
        if "object" in ([kinds] if isinstance(kinds, str) else kinds):
            # Either no other names than these, or a map from any name to one kind of value.
            assert part.get("additionalProperties", True) is not True, where
        for property_name, definition in part.get("properties", {}).items():
            assert definition.get("description") or "$ref" in definition, f"{where}.{property_name}"


def test_what_two_schemas_call_by_one_name_is_one_thing() -> None:
    shared: dict[str, Any] = {}
    for name in NAMES:
        for word, definition in schema(name).get("$defs", {}).items():
            assert shared.setdefault(word, definition) == definition, f"{word} of {name}"
    extra = {"attempts", "why"}
    line, file = schema("jobs")["$defs"]["Job"]["properties"], schema("job")["properties"]
    assert {word: file[word] for word in line} == line
    assert extra <= set(file) - set(line)


def every(kind: type[PlatformError]) -> Iterator[type[PlatformError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from every(child)


def test_the_words_of_the_schemas_are_those_of_the_code() -> None:
    # The commands and the web API define errors of their own.
    commands()
    assert issubclass(problems.TooManyRequests, PlatformError)
    ours = {kind.reference for kind in every(PlatformError) if not kind.__module__.startswith("tests.")}
    assert set(schema("error")["properties"]["reference"]["enum"]) == ours
    assert schema("jobs")["$defs"]["State"]["enum"] == [state.value for state in State]
    reasons = schema("jobs")["$defs"]["UnreadableOfQueue"]["properties"]["reason"]
    assert reasons["enum"] == [refusal.word for refusal in Refusal if refusal.startswith("set_aside.")]
    why = schema("job")["$defs"]["Explanation"]["properties"]["why"]
    assert why["enum"] == [why.value for why in EXPLAINED]
    blocked = schema("cluster")["$defs"]["BacklogLine"]["properties"]["blocked"]["anyOf"][0]
    assert set(blocked["enum"]) == {reason.value for reason in BLOCKED}


@pytest.mark.parametrize("name", ["backlog", "cluster", "job", "pause", "resume", "top"])
def test_schema_knows_each_kind_of_pause(name: str) -> None:
    kinds = [part["enum"] for _, part in parts(schema(name)) if Kind.PLATFORM in part.get("enum", [])]
    assert kinds
    assert all(words == [kind.value for kind in Kind] for words in kinds)


def documented() -> Iterator[tuple[str, str]]:
    """Yield (command, example) of every JSON block of the reference."""
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        name = heading if heading in commands() else "error"
        for block in re.findall(r"^```json\n(.*?)^```", body, re.MULTILINE | re.DOTALL):
            yield name, block


def test_the_reference_shows_an_example_of_each_shape_that_fits_it() -> None:
    shown = list(documented())
    for name, block in shown:
        assert_shape(name, json.loads(block))
    assert {name.replace(" ", "-") for name, _ in shown} == set(NAMES)


def test_revisions_in_the_documents_are_the_newest() -> None:
    shown = [json.loads(block) for name, block in documented() if name.startswith("db ")]
    assert {example["head"] for example in shown} == {HEAD}
    assert [
        example["current"] for example in shown if example.get("up_to_date", example.get("before", "") is None)
    ] == [HEAD] * 2
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))]
    mention = re.compile(r"(?:knows |newest revision: `)(\d{4})(?: as the newest|`)")
    assert {number for page in pages for number in mention.findall(page)} == {HEAD}


def test_a_value_that_is_not_its_shape_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"current": "0001", "head": "0001", "up_to_date": True}
    assert_shape("db current", good)
    for wrong in ({**good, "more": 1}, {**good, "up_to_date": "yes"}, {"current": None, "head": "0001"}):
        with pytest.raises(AssertionError, match="not a db current"):
            assert_shape("db current", wrong)
