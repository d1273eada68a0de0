"""The router: gives every task its request, in the caller, before anything is written.

It stands first in `task_routes` and returns nothing, so that the routers of the user are asked too. The request goes
into the message's headers and so survives retries and canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from celery_capacity.routing.config.task_rules import NO_RULES, RERUN, RequestRules
from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.insert import key_options
from celery_capacity.routing.model.amounts import CPUS, DEFAULT_QUEUE
from celery_capacity.routing.model.expected import EXPECTED, EXPECTED_MS, LIMITS, NO_LIMITS, Limits, parse_duration
from celery_capacity.routing.model.identifiers import check_tenant
from celery_capacity.routing.model.message import HEADER, PLATFORM_PREFIX
from celery_capacity.routing.model.request import (
    CALL_OPTIONS,
    PLACE_OPTIONS,
    REQUEST_OPTIONS,
    REQUESTS,
    TENANT,
    Request,
    alternatives_from,
    alternatives_of,
    alternatives_term,
)
from celery_capacity.routing.policy.labels import ANYWHERE, SPREAD, Place, place_of, place_of_options
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT
from celery_capacity.workers.dispatch.published_declarations import PLACE, TIMES, PublishedDeclarations
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit import constraints
from celery_capacity.workers.submit.canvas import COORDINATING, UNLOCKING, called_by, mark_of
from celery_capacity.workers.submit.validation import limits_of

#: Wrong names of a request's options that people write -> the right ones.
MISSPELT: Final = {
    "cpu": "cpus",
    "mem": "memory",
    "ram": "memory",
    "gpu": "gpus",
    "resource": "resources",
    "expect": EXPECTED,
}
#: Options of a called task that hold for the map which calls it.
_OF_CALLED: Final = (*REQUEST_OPTIONS, REQUESTS, *PLACE_OPTIONS)
_SPREAD: Final = Place(spread=True)


class Router:
    """Entry of `task_routes` that gives each task its request.

    It knows a task's declaration from the task itself, also where it is sent by its name. For a task that is not here
    it reads the declarations that workers published.
    """

    def __init__(
        self,
        stores: Stores,
        tasks: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._stores = stores
        self._tasks = tasks
        self.published = PublishedDeclarations(
            lambda question: stores.sending.ask(question),
            lambda: stores.engine,
            lambda: stores.settings.store_timeout,
        )

    def __call__(self, name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any = None, **_: Any) -> None:
        if name.startswith(PLATFORM_PREFIX):
            return
        for option in MISSPELT.keys() & options.keys():
            advice = f"Write {MISSPELT[option]}=."
            raise InvalidRequest(f"apply_async({option}=...) of {name} is not an option", value=option, advice=advice)
        call = {option: options.pop(option) for option in CALL_OPTIONS if option in options}
        headers = dict(options.get("headers") or {})
        # Celery routes a map by the name of the task that it calls. The map's own name is in `task`.
        task_name = task.name if task is not None else name
        if task_name == UNLOCKING:
            headers = {**mark_of(args), **headers}
        called = called_by(task_name, kwargs) if HEADER not in headers else None
        if called is not None:
            # A map needs what its called task needs. Its own signature still has the last word.
            name, inner = called
            task, call = None, {**{option: inner[option] for option in _OF_CALLED if option in inner}, **call}
        headers[HEADER] = self.header(name, headers.get(HEADER), task, call, options.pop("rerun", None))
        if called is not None:
            # It calls the task many times, so it runs longer than that task.
            for key in (LIMITS,) if EXPECTED in call else (LIMITS, EXPECTED_MS):
                headers[HEADER].pop(key, None)
        registered = task if task is not None else self._tasks().get(name)
        if not constraints.OPTIONS.isdisjoint(options) or constraints.declares(registered):
            headers[HEADER] |= constraints.header_of(name, args, kwargs, options, registered)
        if not key_options.OPTIONS.isdisjoint(options) or key_options.declares(registered):
            headers[HEADER] |= key_options.header_of(name, args, kwargs, options, registered)
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
        """Return the header `HEADER` of a message.

        `carried`: the header that the message has already. `call`: the request that the caller asks for.
        """
        call = call or {}
        base, declared = self._base(name, carried, task)
        asks = not call.keys().isdisjoint((*REQUEST_OPTIONS, REQUESTS))
        place = self._place(name, carried, task, call)
        requests = self._requests(name, carried, task, call, base)
        header = {"shape": place.shape(*requests), "declared": declared or asks}
        header |= self._times(name, carried, task, call.get(EXPECTED))
        header |= self._tenant(name, carried, task, call.get(TENANT))
        return header if self._reruns(name, rerun, carried, task) else {**header, RERUN: False}

    def _base(self, name: str, carried: Any, task: Any) -> tuple[Request, bool]:
        if isinstance(carried, Mapping):
            # The queue is written anew, because a retry may go to another one.
            return Request.from_shape(str(carried.get("shape"))).within(DEFAULT_QUEUE), bool(carried.get("declared"))
        base, declared = self._declared(name, task)
        if rules := self._stores.requests:
            return rules.over(name, base), declared or rules.of(name) is not None
        return base, declared

    def _requests(
        self, name: str, carried: Any, task: Any, call: Mapping[str, Any], base: Request
    ) -> tuple[Request, ...]:
        """Return the alternatives of a job, in order; its one request where it has no others. `base`: as of `_base`."""
        if isinstance(carried, Mapping):
            before = tuple(request.within(DEFAULT_QUEUE) for request in alternatives_of(str(carried.get("shape"))))
            if len(before) > 1:
                shared = set.intersection(*(set(request.amounts) for request in before))
                base = Request.of({CPUS: self._stores.settings.default_cpus, **dict(shared)})
            return alternatives_from(call, before, base)
        registered = task if task is not None else self._tasks().get(name)
        declared, _ = self._declared(name, task)
        if registered is not None:
            before = alternatives_by(registered, declared)
        else:
            published = self.published.of(name)
            before = (published and published.alternatives) or (declared,)
        return alternatives_from(call, self._stores.requests.alternatives(name, before, declared), base)

    def _declared(self, name: str, task: Any) -> tuple[Request, bool]:
        registered = task if task is not None else self._tasks().get(name)
        if registered is not None:
            return declared_by(registered, self._stores.settings.default_cpus), True
        published = self.published.of(name)
        if published is not None:
            return published.request, True
        return Request.from_options({}, self._stores.settings.default_cpus), False

    def _reruns(self, name: str, called: Any, carried: Any, task: Any) -> bool:
        """Return True if another attempt follows a lost one.

        The first of these that has an answer decides: the call, the header of a retry, the file of `PLATFORM_REQUESTS`,
        the task, the published declaration.
        """
        if called is not None:
            return check_rerun(called, f"apply_async(rerun=...) of {name}")
        if isinstance(carried, Mapping):
            return carried.get(RERUN) is not False
        rule = self._stores.requests.of(name)
        if rule is not None and rule.rerun is not None:
            return rule.rerun
        registered = task if task is not None else self._tasks().get(name)
        if registered is not None:
            return reruns(registered)
        published = self.published.of(name)
        return published is None or published.reruns

    def _tenant(self, name: str, carried: Any, task: Any, called: Any) -> dict[str, str]:
        """Return the key of the header that names the tenant, none for the default tenant.

        The first of these that has an answer decides: the call, the header of a retry, the task, the published
        declaration, `PLATFORM_TENANT`.
        """
        registered = task if task is not None else self._tasks().get(name)
        if called is not None:
            tenant = check_tenant(called, f"apply_async(tenant=...) of {name}: tenant")
        elif isinstance(carried, Mapping):
            tenant = check_tenant(carried.get(TENANT, DEFAULT_TENANT))
        elif (declared := getattr(registered, TENANT, None)) is not None:
            tenant = check_tenant(declared, f"the declaration of task {name}: tenant")
        else:
            published = self.published.of(name) if registered is None else None
            named = published.tenant if published is not None else None
            tenant = self._stores.settings.tenant if named is None else check_tenant(named)
        return {} if tenant == DEFAULT_TENANT else {TENANT: tenant}

    def _times(self, name: str, carried: Any, task: Any, called: Any) -> dict[str, Any]:
        """Return the keys of the header about run times: the expected one, and time limits that only the task knows.

        The first of these that has an answer decides: the call, the header of a retry, the file of `PLATFORM_REQUESTS`,
        the task, the published declaration.
        """
        if called is not None:
            expected = parse_duration(called)
        elif isinstance(carried, Mapping):
            return {key: carried[key] for key in (EXPECTED_MS, LIMITS) if key in carried}
        else:
            expected = 0
        registered = task if task is not None else self._tasks().get(name)
        if registered is not None:
            declared, limits = expected_by(registered), limits_of(registered)
        else:
            published = self.published.of(name)
            declared, limits = (0, NO_LIMITS) if published is None else (published.expected_ms, published.limits)
        rule = self._stores.requests.of(name)
        expected = expected or (rule is not None and rule.expected_ms) or declared
        return _times_of(expected, limits)

    def _place(self, name: str, carried: Any, task: Any, call: Mapping[str, Any]) -> Place:
        """Return where a job may run. The sources are those of `_times`, and `PLATFORM_PLACEMENT` behind them."""
        called = ANYWHERE if call.keys().isdisjoint(PLACE_OPTIONS) else place_of_options(call)
        if isinstance(carried, Mapping):
            return called.over(place_of(str(carried.get("shape"))))
        rule = self._stores.requests.of(name)
        registered = task if task is not None else self._tasks().get(name)
        if registered is not None:
            declared = place_by(registered)
        else:
            published = self.published.of(name)
            declared = ANYWHERE if published is None else published.place
        place = called.over(declared if rule is None else rule.location.over(declared))
        return place.over(_SPREAD) if self._stores.settings.placement == SPREAD else place


def check_rerun(value: Any, what: str) -> bool:
    """Return `rerun` as a person gives it. Raises `InvalidRequest` for other values than True and False."""
    if isinstance(value, bool):
        return value
    raise InvalidRequest(f"{what}: {show(value)} is not valid", value=value, advice="It must be True or False.")


def reruns(task: Any) -> bool:
    """Return the value of `rerun` that a task declares, as by `@app.task(rerun=False)`."""
    return check_rerun(getattr(task, RERUN, True), f"the declaration of task {task.name}: rerun")


def declaration(task: Any, default_cpus: int, rules: RequestRules = NO_RULES) -> dict[str, Any]:
    """Return the declaration of a task that workers publish.

    It has the task's request as people write it, `rerun` where the task does not run again, and `TIMES`. `rules`: the
    file of `PLATFORM_REQUESTS`, which overrides the task.
    """
    people: dict[str, Any] = rules.over(task.name, declared_by(task, default_cpus)).to_people()
    rule, limits = rules.of(task.name), limits_of(task)
    again = reruns(task) if rule is None or rule.rerun is None else rule.rerun
    times = _times_of((rule is not None and rule.expected_ms) or expected_by(task), limits)
    place = place_by(task) if rule is None else rule.location.over(place_by(task))
    if (tenant := getattr(task, TENANT, None)) is not None:
        times[TENANT] = check_tenant(tenant, f"the declaration of task {task.name}: tenant")
    if place.terms:
        times[PLACE] = place.terms
    declared = declared_by(task, default_cpus)
    requests = rules.alternatives(task.name, alternatives_by(task, declared), declared)
    if len(requests) > 1:
        times[REQUESTS] = alternatives_term(requests)
    if times:
        people[TIMES] = times
    return people if again else {**people, RERUN: False}


def expected_by(task: Any) -> int:
    """Return the milliseconds that a task declares, as by `@app.task(expected="10m")`; 0 where it does not."""
    declared = getattr(task, EXPECTED, None)
    if declared is None:
        return 0
    try:
        return parse_duration(declared)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"the declaration of task {task.name} is wrong: {error.message}", value=error.value, advice=error.advice
        ) from error


def alternatives_by(task: Any, declared: Request) -> tuple[Request, ...]:
    """Return the alternatives that a task declares, as by `@app.task(requests=[...])`; else its request alone."""
    try:
        return alternatives_from({REQUESTS: getattr(task, REQUESTS, None)}, (declared,), declared)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"the declaration of task {task.name} is wrong: {error.message}", value=error.value, advice=error.advice
        ) from error


def place_by(task: Any) -> Place:
    """Return the place that a task declares, as by `@app.task(where={"arch": "aarch64"})`."""
    options = {option: value for option in PLACE_OPTIONS if (value := getattr(task, option, None)) is not None}
    try:
        return place_of_options(options) if options else ANYWHERE
    except InvalidRequest as error:
        raise InvalidRequest(
            f"the declaration of task {task.name} is wrong: {error.message}", value=error.value, advice=error.advice
        ) from error


def _times_of(expected: int, limits: Limits) -> dict[str, Any]:
    times: dict[str, Any] = {EXPECTED_MS: expected} if expected else {}
    return {**times, LIMITS: list(limits)} if any(limits) else times


def declared_by(task: Any, default_cpus: int) -> Request:
    """Return the request that a task's attributes declare: `@app.task(cpus=4, memory="2GiB")`. Errors name the task."""
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
        # A value that cannot be hashed is no amount, and the parser says so.
        return Request.from_options({"cpus": cpus, "memory": memory, "gpus": gpus}, default_cpus)


# Typed, because True equals 1 and is no number of CPUs.
@lru_cache(maxsize=1024, typed=True)
def _cached(cpus: Any, memory: Any, gpus: Any, default_cpus: int) -> Request:
    return Request.from_options({"cpus": cpus, "memory": memory, "gpus": gpus}, default_cpus)
