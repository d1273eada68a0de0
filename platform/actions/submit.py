"""`celery -A platform submit TASK`: submit a job by the name of its task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from celery_capacity.platform.actions.wait_codes import CODES, timeout_option
from celery_capacity.platform.console.command import Command, WrongUsage, json_option, stores_of_app
from celery_capacity.platform.console.names import complete_task, complete_worker
from celery_capacity.platform.console.terminal import facts, print_json, talk
from celery_capacity.platform.console.text_type import Text
from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model.amounts import (
    cpus_number,
    parse_count_text,
    parse_cpus_text,
)
from celery_capacity.routing.model.expected import parse_duration
from celery_capacity.routing.policy.labels import PLACEMENTS, parse_where, split_condition
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery import Celery

    from celery_capacity.workers.process.stores import Stores


@click.command(
    "submit",
    cls=Command,
    examples=(
        ("With the request that the task declares", "celery -A platform submit demo.sleep --args '[1]'"),
        ("With another one", "celery -A platform submit demo.sleep --cpus 8 --memory 2GiB"),
        ("And wait for its end", "celery -A platform submit demo.sleep --args '[1]' --wait"),
    ),
    codes={**CODES, Exit.FAILED: "the job was refused; with --wait also: it failed or was lost"},
)
@click.argument("task", metavar="TASK", type=Text(), shell_complete=complete_task)
@click.option("--args", metavar="JSON", type=Text(), help="Its arguments, as a list.")
@click.option("--kwargs", metavar="JSON", type=Text(), help="Its named arguments, as an object.")
@click.option("--cpus", metavar="N", type=Text(), help="CPUs, such as 8 or 0.5.")
@click.option("--memory", metavar="SIZE", type=Text(), help="Memory, such as 2GiB.")
@click.option("--gpus", metavar="N", type=Text(), help="GPUs.")
@click.option("--resource", metavar="NAME=N", type=Text(), multiple=True, help="A named resource; again for more.")
@click.option("--requests", metavar="JSON", type=Text(), help='Alternatives in order: [{"gpus": 1}, {"cpus": 32}].')
@click.option("--expected", metavar="DURATION", type=Text(), help="Its expected run time, such as 90 or 10m.")
@click.option("--where", metavar="CONDITION", type=Text(), multiple=True, help="Labels of its worker; again for more.")
@click.option(
    "--worker", metavar="NAME", type=Text(), shell_complete=complete_worker, help="The only worker that may run it."
)
@click.option("--exclusive", is_flag=True, help="It has its worker alone.")
@click.option(
    "--placement",
    metavar="KIND",
    type=click.Choice(PLACEMENTS),
    help="pack or spread, over the workers with room.",
)
@click.option("--queue", metavar="NAME", type=Text(), help="Its queue.")
@click.option("--tenant", metavar="NAME", type=Text(), help="Its tenant.")
@click.option("--priority", metavar="N", type=click.IntRange(0, 9), help="0 to 9, 9 first.")
@click.option("--countdown", metavar="SECONDS", type=click.FloatRange(min=0), help="Start no earlier than that.")
@click.option("--expires", metavar="SECONDS", type=click.FloatRange(min=0), help="Start no later than that.")
@click.option("--unique", is_flag=True, help="Unless an equal job has not ended yet.")
@click.option("--after", metavar="ID", type=Text(), multiple=True, help="When this job has succeeded; again for more.")
@click.option("--limit", metavar="KEY=N", type=Text(), multiple=True, help="At most N jobs of KEY at once.")
@click.option("--rate", metavar="KEY=RATE", type=Text(), multiple=True, help="A rate of starts of KEY, such as 10/m.")
@click.option("--wait", is_flag=True, help="Wait for its end; the exit code says how it ended.")
@timeout_option("With --wait: no longer than that.")
@json_option
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Submit a job of TASK, and print its id.

    The job asks for what the task declares; --cpus, --memory, --gpus and --resource replace an amount each. --unique
    prints the id of the equal job where there is one.
    """
    from kombu.utils.uuid import uuid

    from celery_capacity.platform.actions.waiting import wait_for
    from celery_capacity.platform.operations.auditing import commanding
    from celery_capacity.platform.operations.submitting import sent_by

    task, as_json = options.pop("task"), options.pop("as_json")
    wait, timeout = options.pop("wait"), options.pop("timeout")
    if timeout is not None and not wait:
        raise WrongUsage("--timeout needs --wait", advice="Add --wait.")
    args, kwargs = _arguments(options.pop("args"), options.pop("kwargs"))
    call = _call(options)
    stores = stores_of_app(context)
    app: Celery = context.obj.app
    proposed = uuid()
    if as_json:
        _check_readable(stores, proposed)
    _warn_of_undeclared(app, stores, task)
    call = {**call, "headers": sent_by(commanding())}
    job = str(app.send_task(task, args, kwargs, task_id=proposed, **call).id)
    # The process ends soon, and the ledger is to know the job before.
    stores.sending.flush()
    if not as_json:
        facts().print(job)
    if not wait:
        if as_json:
            print_json(_facts(stores, job, new=job == proposed))
        return
    awaited = wait_for(stores, [job], timeout)
    if as_json:
        print_json({**_facts(stores, job, new=job == proposed), "state": awaited.events[job].state.value})
    else:
        text = f"not ended after {timeout:g} s" if awaited.timed_out else awaited.events[job].state.value
        talk().print(text)
    raise SystemExit(awaited.code)


def _arguments(args: str | None, kwargs: str | None) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments that a command line has as JSON. Raises `InvalidRequest`."""
    return (
        _parsed("--args", args, list, "a list, such as --args '[1, \"a\"]'"),
        _parsed("--kwargs", kwargs, dict, "an object, such as --kwargs '{\"name\": 1}'"),
    )


def _parsed(option: str, value: str | None, kind: type, right: str) -> Any:
    if value is None:
        return kind()
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{option} {show(value)} is not JSON", value=value, advice=f"It must be {right}."
        ) from error
    if not isinstance(parsed, kind):
        raise InvalidRequest(f"{option} {show(value)} is not valid", value=value, advice=f"It must be {right}.")
    return parsed


def _call(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `send_task` that a command line has. Raises `InvalidRequest`."""
    call: dict[str, Any] = {
        name: options[name]
        for name in ("memory", "worker", "placement", "queue", "tenant", "priority", "countdown", "expires")
        if options[name] is not None
    }
    if options["cpus"] is not None:
        call["cpus"] = cpus_number(parse_cpus_text(options["cpus"], "--cpus"))
    if options["gpus"] is not None:
        call["gpus"] = parse_count_text(options["gpus"], "--gpus")
    if options["requests"] is not None:
        call["requests"] = _parsed("--requests", options["requests"], list, 'a list: [{"gpus": 1}, {"cpus": 32}]')
    if options["expected"] is not None:
        parse_duration(options["expected"], "--expected")
        call["expected"] = options["expected"]
    if options["resource"]:
        call["resources"] = dict(map(_resource, options["resource"]))
    if options["where"]:
        call["where"] = _where(options["where"])
    if options["exclusive"]:
        call["exclusive"] = True
    if options["unique"]:
        call["unique"] = True
    if options["after"]:
        call["after"] = list(options["after"])
    if options["limit"]:
        limits = (_of_key("--limit", value) for value in options["limit"])
        call["limit"] = {key: parse_count_text(bound, f"--limit {key}") for key, bound in limits}
    if options["rate"]:
        call["rate"] = dict(_of_key("--rate", value) for value in options["rate"])
    return call


def _where(conditions: Sequence[str]) -> dict[str, str]:
    """Return the conditions of a command line by their keys. Raises `InvalidRequest`."""
    where: dict[str, str] = {}
    for text in conditions:
        key, value = split_condition(text, "--where")
        if key in where:
            raise InvalidRequest(
                f"--where names {key} twice", value=text, advice="Give one condition for each label, as 'disk in a,b'."
            )
        where[key] = value
    parse_where(where)
    return where


def _resource(value: str) -> tuple[str, int]:
    name, equals, amount = value.partition("=")
    if not (name and equals):
        advice = "It must be a name and a number, such as licence=1."
        raise InvalidRequest(f"--resource {show(value)} is not valid", value=value, advice=advice)
    return name, parse_count_text(amount, f"--resource {name}")


def _of_key(option: str, value: str) -> tuple[str, str]:
    """Return a key and its bound. A key may have an equals sign in it."""
    key, equals, bound = value.rpartition("=")
    if not (key and equals and bound):
        example = f"customer:42={'2' if option == '--limit' else '10/m'}"
        advice = f"It must be a key and its bound, such as {example}."
        raise InvalidRequest(f"{option} {show(value)} is not valid", value=value, advice=advice)
    return key, bound


def _warn_of_undeclared(app: Celery, stores: Stores, task: str) -> None:
    """Print a warning for a task that nobody declared."""
    from celery_capacity.platform.console.render import WITH_ITS_CODE
    from celery_capacity.platform.operations.declared import read_undeclared

    declared = read_undeclared(app, stores, [task])
    if declared.unknown:
        near = get_close_matches(task, declared.names, n=1)
        advice = f"Did you mean {near[0]}?" if near else WITH_ITS_CODE
        talk().print(f"Warning: no worker has declared the task {task}; it waits for one that does. {advice}")


def _check_readable(stores: Stores, job: str) -> None:
    """Read a job that is not there yet. A role that may not read jobs is refused before anything is written."""
    from celery_capacity.routing.store import queries

    with stores.engine.connect() as connection:
        queries.find(connection, job)


def _facts(stores: Stores, job: str, *, new: bool) -> dict[str, Any]:
    from celery_capacity.routing.store import queries

    with stores.engine.connect() as connection:
        file = queries.find(connection, job)
    assert file is not None, "a job that was accepted is in Postgres"
    line = file.job.to_json()
    return {"new": new, **{name: line[name] for name in ("id", "name", "state", "request", "queue", "priority")}}
