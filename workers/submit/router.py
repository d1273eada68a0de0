"""The router: gives every task its request, in the caller, before anything is written.

It stands first in `task_routes` and returns nothing, so that the routers of the user are asked too. The request goes
into the message's headers and so survives retries and canvas.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from celery_capacity.routing.config.task_rules import NO_RULES, RERUN, RequestRules
from celery_capacity.routing.errors import InvalidRequest, PlatformError, show
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.snapshot import text
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE
from celery_capacity.routing.model.message import HEADER, PLATFORM_PREFIX
from celery_capacity.routing.model.request import REQUEST_OPTIONS, Request
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit import constraints
from celery_capacity.workers.submit.canvas import COORDINATING, UNLOCKING, called_by, mark_of

#: Task name -> what workers publish of it (`declaration`).
Declarations = Mapping[str, Mapping[str, Any]]
#: Seconds for which a sender trusts the declarations that it read.
DECLARATIONS_FOR: Final = 10.0
#: What people write for the names of a request, and what they mean.
MISSPELT: Final = {"cpu": "cpus", "mem": "memory", "ram": "memory", "gpu": "gpus", "resource": "resources"}


class Router:
    """`task_routes` entry. Knows a task's declaration from the task itself, also where it is sent by its name, or else
    from what workers published."""

    def __init__(
        self,
        stores: Stores,
        tasks: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._stores = stores
        self._tasks = tasks
        self._published: dict[str, Request] = {}
        #: Those of them that run only until their first loss.
        self._never_again: set[str] = set()
        self._published_until = 0.0

    def __call__(self, name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any = None, **_: Any) -> None:
        if name.startswith(PLATFORM_PREFIX):
            return
        for option in MISSPELT.keys() & options.keys():
            advice = f"Write {MISSPELT[option]}=."
            raise InvalidRequest(f"apply_async({option}=...) of {name} is not an option", value=option, advice=advice)
        call = {option: options.pop(option) for option in REQUEST_OPTIONS if option in options}
        headers = dict(options.get("headers") or {})
        # (Celery routes a map by the name of the task that it calls.)
        own = task.name if task is not None else name
        if own == UNLOCKING:
            headers = {**mark_of(args), **headers}
        called = called_by(own, kwargs) if HEADER not in headers else None
        if called is not None:
            # What it needs is what the task needs that it calls; its own signature still has the last word.
            name, inner = called
            task, call = None, {**{option: inner[option] for option in REQUEST_OPTIONS if option in inner}, **call}
        headers[HEADER] = self.header(name, headers.get(HEADER), task, call, options.pop("rerun", None))
        known = task if task is not None else self._tasks().get(name)
        if not constraints.OPTIONS.isdisjoint(options) or constraints.declares(known):
            headers[HEADER] |= constraints.header_of(name, args, kwargs, options, known)
        options["headers"] = headers
        priority = options.get("priority")
        if priority is not None and (
            isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9
        ):
            raise InvalidRequest(
                f"priority {show(priority)} is not valid",
                value=priority,
                advice="It must be 0 to 9, 9 first.",
            )

    def header(
        self,
        name: str,
        carried: Any = None,
        task: Any = None,
        call: Mapping[str, Any] | None = None,
        rerun: Any = None,
    ) -> dict[str, Any]:
        """The header `HEADER` of a message. `carried`: what it has already; `call`: what the caller asks for."""
        base, declared = self._base(name, carried, task)
        found = {"shape": base.merged(call or {}).shape, "declared": declared or bool(call)}
        return found if self._reruns(name, rerun, carried, task) else {**found, RERUN: False}

    def _base(self, name: str, carried: Any, task: Any) -> tuple[Request, bool]:
        if isinstance(carried, Mapping):
            # (In which queue, is said anew: a retry may go to another one.)
            return Request.from_shape(str(carried.get("shape"))).within(DEFAULT_QUEUE), bool(carried.get("declared"))
        base, declared = self._declared(name, task)
        if rules := self._stores.requests:
            return rules.over(name, base), declared or rules.of(name) is not None
        return base, declared

    def _declared(self, name: str, task: Any) -> tuple[Request, bool]:
        known = task if task is not None else self._tasks().get(name)
        if known is not None:
            return declared_by(known, self._stores.settings.default_cpus), True
        published = self.published().get(name)
        if published is not None:
            return published, True
        return Request.from_options({}, self._stores.settings.default_cpus), False

    def _reruns(self, name: str, called: Any, carried: Any, task: Any) -> bool:
        """Whether another attempt follows a lost one: as the call says, or else the message of a retry, or the task."""
        if called is not None:
            return check_rerun(called, f"apply_async(rerun=...) of {name}")
        if isinstance(carried, Mapping):
            return carried.get(RERUN) is not False
        rule = self._stores.requests.of(name)
        if rule is not None and rule.rerun is not None:
            return rule.rerun
        known = task if task is not None else self._tasks().get(name)
        if known is not None:
            return reruns(known)
        return name not in self._never_again

    def published(self) -> dict[str, Request]:
        """What workers declared, read from the ledger at most every `DECLARATIONS_FOR` seconds."""
        now = time.monotonic()
        if now >= self._published_until:
            self._published_until = now + DECLARATIONS_FOR
            try:
                found: Any = self._stores.sending.ask(lambda ledger: ledger.client.hgetall(keys.DECLARATIONS))
            except PlatformError:
                # The submit itself will say what is wrong.
                return self._published
            if found is None:
                # No answer: the last that was read serves on.
                return self._published
            declared = {text(key): json.loads(value) for key, value in found.items()}
            self._never_again = {name for name, said in declared.items() if said.pop(RERUN, True) is False}
            self._published = {name: Request.from_people(said) for name, said in declared.items()}
        return self._published


def check_rerun(value: Any, what: str) -> bool:
    """`rerun` as a person gives it. Raises `InvalidRequest`."""
    if isinstance(value, bool):
        return value
    raise InvalidRequest(f"{what}: {show(value)} is not valid", value=value, advice="It must be True or False.")


def reruns(task: Any) -> bool:
    """What a task declares by `@app.task(rerun=False)`."""
    return check_rerun(getattr(task, RERUN, True), f"the declaration of task {task.name}: rerun")


def declaration(task: Any, default_cpus: int, rules: RequestRules = NO_RULES) -> dict[str, Any]:
    """What workers publish of a task: its request as people write it, and that it does not run again. `rules`: what the
    file of `PLATFORM_REQUESTS` says over the task."""
    people: dict[str, Any] = rules.over(task.name, declared_by(task, default_cpus)).to_people()
    rule = rules.of(task.name)
    again = reruns(task) if rule is None or rule.rerun is None else rule.rerun
    return people if again else {**people, RERUN: False}


def declared_by(task: Any, default_cpus: int) -> Request:
    """The request that a task declares by its attributes: `@app.task(cpus=4, memory="2GiB")`. Errors name the task."""
    if task.name in COORDINATING:
        return Request.of({})
    options = {option: getattr(task, option, None) for option in REQUEST_OPTIONS}
    try:
        if options["resources"] is None:
            return _declared(options["cpus"], options["memory"], options["gpus"], default_cpus)
        return Request.from_options(options, default_cpus)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"the declaration of task {task.name} is wrong: {error.message}", value=error.value, advice=error.advice
        ) from error


def _declared(cpus: Any, memory: Any, gpus: Any, default_cpus: int) -> Request:
    try:
        return _cached(cpus, memory, gpus, default_cpus)
    except TypeError:
        # What cannot be hashed is no amount, and the parser says so.
        return Request.from_options({"cpus": cpus, "memory": memory, "gpus": gpus}, default_cpus)


# Typed: True equals 1, and is no number of CPUs.
@lru_cache(maxsize=1024, typed=True)
def _cached(cpus: Any, memory: Any, gpus: Any, default_cpus: int) -> Request:
    return Request.from_options({"cpus": cpus, "memory": memory, "gpus": gpus}, default_cpus)
