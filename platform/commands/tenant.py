"""`celery -A platform tenant`: the rules by which tenants share the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from celery_capacity.platform.console.command import Command, Group, json_option, stores_of
from celery_capacity.platform.console.held_back import LATER, by_option
from celery_capacity.platform.console.terminal import bar, facts, print_json, table, talk
from celery_capacity.platform.console.text_type import Text
from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model.amounts import (
    CPUS,
    MEMORY,
    format_amount,
    is_label,
    parse_count_text,
    parse_cpus_text,
    parse_memory,
)
from celery_capacity.routing.model.identifiers import check_resource_name
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from celery_capacity.workers.client.tenants import TenantLine, TenantOrder


@click.group(
    "tenant",
    cls=Group,
    examples=(
        ("Twice the part of others", "celery -A platform tenant set physics --weight 2"),
        ("Who uses what", "celery -A platform tenant list"),
    ),
)
def command() -> None:
    """Make, list or remove the rules by which tenants share the workers."""


@command.command(
    "set",
    cls=Command,
    examples=(
        ("Twice the part of others", "celery -A platform tenant set physics --weight 2"),
        (
            "16 CPUs of its own, and never more than 64",
            "celery -A platform tenant set physics --nominal cpus=16 --quota cpus=64",
        ),
        ("Refuse more than 10,000 waiting jobs", "celery -A platform tenant set physics --max-waiting 10000"),
        ("No quota any more", "celery -A platform tenant set physics --quota none"),
    ),
)
@click.argument("name", metavar="NAME", type=Text())
@click.option("--weight", metavar="N", type=click.IntRange(1, 1_000_000), help="Its part beside others'; 1 by default.")
@click.option(
    "--nominal",
    metavar="RESOURCE=N",
    type=Text(),
    multiple=True,
    help="Its own amount, lent while idle; again; none: no.",
)
@click.option(
    "--quota",
    metavar="RESOURCE=N",
    type=Text(),
    multiple=True,
    help="Most that its jobs hold; again; none: no quota.",
)
@click.option("--max-waiting", metavar="N", type=click.IntRange(min=0), help="Waiting jobs it may have; 0: any number.")
@by_option
@json_option
@click.pass_context
def set_(context: click.Context, /, name: str, by: str | None, as_json: bool, **options: Any) -> None:
    """Make the rule of tenant NAME, or change the given parts of it.

    It holds within a second, for waiting jobs too. Running jobs go on.
    """
    from celery_capacity.platform.operations.auditing import audited, commanding
    from celery_capacity.workers.client.tenants import set_tenant

    changes = {option: options[option] for option in ("weight", "max_waiting") if options[option] is not None}
    changes |= {option: _amounts(option, options[option]) for option in ("nominal", "quota") if options[option]}
    stores, actor = stores_of(context), commanding(by)
    with audited(stores, actor, "tenant", [f"tenant:{name}"]):
        order = set_tenant(stores, name, changes, by=actor.name)
    _tell(order, as_json)


@command.command(
    "remove",
    cls=Command,
    examples=(("As if it had none", "celery -A platform tenant remove physics"),),
    codes={Exit.FAILED: "the tenant had no rule"},
)
@click.argument("name", metavar="NAME", type=Text())
@by_option
@json_option
@click.pass_context
def remove(context: click.Context, name: str, by: str | None, as_json: bool) -> None:
    """Remove the rule of tenant NAME. Its jobs stay, and go on with the defaults."""
    from celery_capacity.platform.operations.auditing import audited, commanding
    from celery_capacity.workers.client.tenants import remove_tenant

    stores, actor = stores_of(context), commanding(by)
    with audited(stores, actor, "remove-tenant", [f"tenant:{name}"]):
        order = remove_tenant(stores, name, by=actor.name)
    _tell(order, as_json)
    if not order.before:
        context.exit(Exit.FAILED)


@command.command(
    "list",
    cls=Command,
    examples=(
        ("Who uses what", "celery -A platform tenant list"),
        ("For a program", "celery -A platform tenant list --json"),
    ),
)
@json_option
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """List the tenants: their rules, their shares of the workers, and their waiting jobs."""
    from celery_capacity.workers.client.tenants import tenants

    lines = tenants(stores_of(context))
    if as_json:
        print_json({"tenants": [line.to_json() for line in lines]})
        return
    columns = ["tenant", "weight", "share", "", "nominal", "quota", "waiting"]
    table(facts(), columns, [_row(line) for line in lines], right=(1, 3, 6))


def _row(line: TenantLine) -> list[str]:
    rule, limit = line.rule, f" of {line.rule.max_waiting:,}" if line.rule.max_waiting else ""
    share = bar(line.share, 1, 12, unicode=facts().encoding.startswith("utf"))
    return [
        line.name,
        f"{rule.weight:,}",
        share,
        f"{line.share:.0%}",
        _words(rule.nominal),
        _words(rule.quota),
        f"{line.waiting:,}{limit}",
    ]


def _words(amounts: Mapping[str, int]) -> str:
    return ", ".join(format_amount(name, amount) for name, amount in sorted(amounts.items())) or "-"


def _amounts(option: str, values: Sequence[str]) -> dict[str, int]:
    """Return the amounts of an option that was given several times. Raises `InvalidRequest`."""
    if list(values) == ["none"]:
        return {}
    amounts = {}
    for value in values:
        name, equals, amount = value.partition("=")
        if not (equals and amount) or is_label(name):
            advice = "It must be a resource and an amount, such as cpus=16 or memory=64GiB."
            raise InvalidRequest(f"--{option} {show(value)} is not valid", value=value, advice=advice)
        parsers: Any = {CPUS: parse_cpus_text, MEMORY: parse_memory}
        what = f"--{option} {name}"
        amounts[check_resource_name(name)] = parsers.get(name, parse_count_text)(amount, what)
    return amounts


def _tell(order: TenantOrder, as_json: bool) -> None:
    if as_json:
        print_json(order.to_json())
        return
    line = order.line
    if line.ruled:
        limit = f", at most {line.rule.max_waiting:,} waiting jobs" if line.rule.max_waiting else ""
        amounts = f"nominal {_words(line.rule.nominal)}, quota {_words(line.rule.quota)}"
        facts().print(f"tenant {line.name}: weight {line.rule.weight:,}, {amounts}{limit}")
    else:
        facts().print(f"tenant {line.name}: {'no rule any more' if order.before else 'it had no rule'}")
    if not order.applied:
        talk().print(LATER)
