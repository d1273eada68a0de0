"""Keys of the ledger in Redis: each is built here and nowhere else, from checked names.

| key | type | holds |
| --- | --- | --- |
| `ledger:epoch` | hash | `epoch`, `run_id` of the server, `opened` (ms), `database`, ... Missing: the ledger is COLD |
| `ledger:book:<worker>` | hash | `epoch`, `incarnation`, `status`, `queue`, `lease` (ms), the resources |
| `ledger:free` | sorted set | worker, free millicores; only workers that may be admitted to |
| `ledger:free:<resource>` | sorted set | worker with the resource, class of its free amount and free millicores |
| `ledger:leases` | sorted set | worker, end of its lease (ms) |
| `ledger:held:<worker>` | hash | job, token of the attempt that holds an allocation there |
| `ledger:missing:<worker>` | hash | held attempt (`<job> <token>`) that its last list lacked, since when (ms) |
| `ledger:job:<id>` | string | head and message of one job; a tombstone where the job ended |
| `ledger:wait:<shape>` | sorted set | waiting job, order |
| `ledger:shapes` | sorted set | shape that waits, order of its first job |
| `ledger:shapes:<resource>` | sorted set | as `ledger:shapes`; each shape stands in one, or in `$<tenant>` |
| `ledger:asks:<resource>` | sorted set | shape that waits, the CPUs or memory it asks for; -1 where it runs alone |
| `ledger:kept` | hash | shape that must run alone or is reserved a worker, the worker that is kept for it |
| `ledger:border` | sorted set | shape of which jobs stay in Postgres, the least order of these, or less |
| `ledger:left` | sorted set | such a shape, the least order of the jobs left since the runner last read |
| `ledger:low` | set | such shapes, of which the runner is to fetch jobs; a channel of the same name says so |
| `ledger:staying` | hash | such a shape, how many of its jobs stay in Postgres, for people |
| `ledger:cordons` | hash | worker to which nothing is admitted, `cordoned` or `draining`; a channel of the same name |
| `ledger:paused` | hash | `platform`, `queue:<name>` or `task:<name>`: a part of the backlog of which nothing starts |
| `ledger:withheld` | set | paused shapes that are kept out of `ledger:shapes` |
| `ledger:tenants` | hash | tenant with a rule, its weight, nominal share and quota: `2;cpus=16000;` |
| `ledger:used` | hash | `<tenant>/<resource>`, the amount that the counted jobs of the tenant hold |
| `ledger:past` | hash | tenant, its decayed past use, as a share |
| `ledger:totals` | hash | resource, the capacity of all workers, while tenants are in use |
| `ledger:tenant_heads` | sorted set | tenant of which jobs wait, order of its first one; not the default tenant |
| `ledger:unclaimed` | sorted set | admitted job, time at which its message is delivered again (ms) |
| `ledger:stream` | stream | transitions that Postgres does not have yet |
| `ledger:carried` | set | jobs with an entry of an older epoch in the stream: nobody brings them in |
| `ledger:allocated` | string | millicores allocated in all |
| `ledger:counters` | hash | counters for people: admissions, refusals, stale writes, ... |
| `ledger:reconciled` | string | end of the last reconcile (ms), for people |
| `ledger:declarations` | hash | task name, request as JSON in people's units |
| `ledger:declared_times` | hash | task name, its run time, limits, tenant, place and alternatives as JSON |
| `ledger:tasks:<catalogue>` | set | names of the tasks that workers with this catalogue have registered |
| `ledger:runner` | hash | `incarnation` of the worker that runs the duties, `fence` and `until` (ms) of its lease |
| `ledger:asked` | set | duties that others ask the runner for |
| `ledger:probe` | string with expiry | a trial write |
| `worker:<name>` | hash with expiry | the view for people; only registration and heartbeat create it |
| `resource:allocated_cpus` | string | CPUs allocated in all, as a decimal number |

In a book `status` is ready, draining or closed. `cordoned` is the entry of `ledger:cordons`. `tasks` is the worker's
catalogue, a set of task names whose key has their digest: workers with the same code share one. A worker without a
catalogue takes any task. `c.<resource>` is the capacity and `a.<resource>` the allocated amount of a resource.
`unfilled` says that jobs which fit there may wait unseen. `kept` is the shape for which the worker takes nothing else
(`routing.policy.placement`), or for whose first job it is reserved (`routing.policy.reservation`); then it has
`kept_at`, `kept_since`, `kept_order` and `beside`. The key `ledger:kept` only leads there. `places` are the resources
in whose indexes of free CPUs the worker stands while jobs may be admitted to it. Such a resource is any but `cpus`,
`slots` and `alone`; queues are among them, by their labels (`routing.model.amounts`). A score in such an index is the
class of the free amount (`routing.policy.amount_classes.amount_class`) times 2^32, and the free millicores. Queues have
no classes.

A job's value is its head, a line for each of `HEAD_LINES`, and its message behind that. The message of a waiting job is
packed (`packed` in lua/lib/job.lua). A line is empty where the job lacks the field. The fields are `state` (waiting,
admitted, running, ended), `entry` (of the stream, not yet applied) and `noted` (the attempt that the entry is about),
the token `epoch` and `attempt`, `worker`, `incarnation`, `shape`, `order`, the times `admitted`, `started` and
`submitted`, the `nonce` of its claim, `losses`, and the `digest` of its message. The last line has marks, as
`name=value,`: `rerun` (0: it may not run again), `redelivered` (times), `successor` (Postgres holds one) and `revoked`.
A held job is `counted` where the use of its tenant has its amounts.
A tombstone has the marks `outcome` of the job's last attempt (none: the job was cancelled in the backlog), the state
that the job `became`, and `final` unless the job goes on. Blanks behind the last line leave room, so that the head can
be written again before its message.

Books are keys without expiry: an expired key would read as a free worker. A tombstone expires only once it names no
`entry` any more: until Postgres has the end of a job, the ledger remembers it. Amounts are integers (millicores,
bytes, counts). Times are milliseconds of the server's own clock.
"""

from __future__ import annotations

from typing import Final

from celery_capacity.routing.model.identifiers import check_job_id, check_worker_name

#: Fixed keys and prefixes, by their names in the Lua scripts (`KEY.epoch`).
KEYS: Final = {
    "epoch": "ledger:epoch",
    "book": "ledger:book:",
    "free": "ledger:free",
    "free_of": "ledger:free:",
    "leases": "ledger:leases",
    "held": "ledger:held:",
    "missing": "ledger:missing:",
    "job": "ledger:job:",
    "wait": "ledger:wait:",
    "shapes": "ledger:shapes",
    "shapes_of": "ledger:shapes:",
    "asks": "ledger:asks:",
    "kept": "ledger:kept",
    "border": "ledger:border",
    "left": "ledger:left",
    "low": "ledger:low",
    "staying": "ledger:staying",
    "cordons": "ledger:cordons",
    "paused": "ledger:paused",
    "withheld": "ledger:withheld",
    "tenants": "ledger:tenants",
    "used": "ledger:used",
    "past": "ledger:past",
    "totals": "ledger:totals",
    "tenant_heads": "ledger:tenant_heads",
    "unclaimed": "ledger:unclaimed",
    "stream": "ledger:stream",
    "carried": "ledger:carried",
    "allocated": "ledger:allocated",
    "counters": "ledger:counters",
    "reconciled": "ledger:reconciled",
    "declarations": "ledger:declarations",
    "declared_times": "ledger:declared_times",
    "tasks": "ledger:tasks:",
    "runner": "ledger:runner",
    "asked": "ledger:asked",
    "probe": "ledger:probe",
    "view": "worker:",
    "allocated_cpus": "resource:allocated_cpus",
}

#: Lines of the head of a job's value (`read_job` in lua/lib/job.lua).
HEAD_LINES: Final = (
    "state", "entry", "noted", "epoch", "attempt", "worker", "incarnation", "shape", "order", "admitted", "started",
    "nonce", "losses", "submitted", "digest", "marks",
)  # fmt: skip

EPOCH: Final = KEYS["epoch"]
FREE: Final = KEYS["free"]
LEASES: Final = KEYS["leases"]
SHAPES: Final = KEYS["shapes"]
BORDER: Final = KEYS["border"]
LEFT: Final = KEYS["left"]
LOW: Final = KEYS["low"]
STAYING: Final = KEYS["staying"]
CORDONS: Final = KEYS["cordons"]
PAUSED: Final = KEYS["paused"]
WITHHELD: Final = KEYS["withheld"]
TENANTS: Final = KEYS["tenants"]
USED: Final = KEYS["used"]
PAST: Final = KEYS["past"]
TOTALS: Final = KEYS["totals"]
TENANT_HEADS: Final = KEYS["tenant_heads"]
UNCLAIMED: Final = KEYS["unclaimed"]
STREAM: Final = KEYS["stream"]
CARRIED: Final = KEYS["carried"]
ALLOCATED: Final = KEYS["allocated"]
COUNTERS: Final = KEYS["counters"]
RECONCILED: Final = KEYS["reconciled"]
DECLARATIONS: Final = KEYS["declarations"]
DECLARED_TIMES: Final = KEYS["declared_times"]
RUNNER: Final = KEYS["runner"]
ASKED: Final = KEYS["asked"]
PROBE: Final = KEYS["probe"]
ALLOCATED_CPUS: Final = KEYS["allocated_cpus"]
#: Patterns for SCAN.
LEDGER: Final = "ledger:*"
VIEWS: Final = KEYS["view"] + "*"
PRIVATE_QUEUES: Final = "worker.*.*"


def book(worker: str) -> str:
    return KEYS["book"] + check_worker_name(worker)


def held(worker: str) -> str:
    return KEYS["held"] + check_worker_name(worker)


def missing(worker: str) -> str:
    return KEYS["missing"] + check_worker_name(worker)


def view(worker: str) -> str:
    return KEYS["view"] + check_worker_name(worker)


def job(job_id: str) -> str:
    return KEYS["job"] + check_job_id(job_id)


def wait(shape: str) -> str:
    return KEYS["wait"] + shape


def tasks(catalogue: str) -> str:
    return KEYS["tasks"] + catalogue


def free_of(resource: str) -> str:
    return KEYS["free_of"] + resource


def asks(resource: str) -> str:
    return KEYS["asks"] + resource


def shapes_of(resource: str) -> str:
    return KEYS["shapes_of"] + resource


def private_queue(worker: str, incarnation: str) -> str:
    """Return the name of the broker queue that one incarnation of a worker consumes."""
    return f"worker.{check_worker_name(worker)}.{incarnation}"
