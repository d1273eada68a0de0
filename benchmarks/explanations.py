"""Reasons why a figure may miss its target. The page shows them beside the profile of the run that missed it.

Each reason says what our side does that the other does not. So it stays true while the numbers change; these are in the
profile, and `totals` adds them up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

_COMMIT: Final = (
    "Each submission is a row of Postgres and its commit before `delay()` returns."
    " Plain Celery pushes a message to Redis."
)
_TWO_CORES: Final = (
    "All processes share the cores of this machine, so the rate follows the CPU time of all of them together. Ours"
    " includes the outcome of each job in Postgres, and the scripts that release, claim and note it in Redis."
)
_GAP: Final = (
    "Plain Celery's worker has fetched its next messages before a slot is free. Ours asks the ledger when a job ends,"
    " since only then it is known which waiting job fits and comes first. So the gap has a round trip to Redis with one"
    " script, which releases, admits and hands over the next job. Then comes the way to a process of the pool. With"
    " four slots on two cores, each of these steps also waits for its turn on a core."
)
_ADMISSION: Final = (
    "An admission is one script of 20 commands: it writes the job, the book of the worker, its places in the indexes,"
    " the lease, the transition for Postgres and the message. Beside 3 workers, on a busy machine, the script took"
    " 198 µs by Redis's own count, and the commands themselves 33 of them: HMGET 6, ZRANGEBYSCORE 5, ZADD, XADD and SET"
    " 4 each, HSET 3, LPUSH 2, all others together 4. The rest is Lua and its calls of the commands. An admission takes"
    " 656,000 instructions: 15 % in the commands, 21 % on the way to them and back with some 100 arguments, 8 % for the"
    " making of the script's functions, 8 % for the collection of Lua's garbage. Within these parts, a fifth of all is"
    " in `malloc` and `free`. Around the script the client took 17 µs for the values, 10 for their order and 12 for the"
    " reply, and with these arguments a script that does nothing takes 30 µs longer."
)

_IDLE: Final = (
    "Nothing can be batched while one job is under way. So each of its scripts is a call of its own: the admission, the"
    " claim and the release."
)
_SIZES: Final = "A release looks at both requests."

#: Reasons by figure.
REASONS: Final[Mapping[str, tuple[str, ...]]] = {
    "submit": (_COMMIT,),
    "submit_unattended": (_COMMIT,),
    "submit_behind_20000": (_COMMIT,),
    "submit_4": (_COMMIT, "Four submitters share the syncs of the disk, and each core has two of them."),
    "bulk": (
        "At the target, a job would have a twelfth of what plain Celery takes for one. Ours makes the whole message of"
        " each job, as Celery does, writes its row by COPY, and files it in Redis by a script for 100 jobs.",
    ),
    "end_to_end": (_TWO_CORES,),
    "drain": (_TWO_CORES,),
    "drain_20000": (_TWO_CORES,),
    "chord_1000": (_TWO_CORES, "Each part is a job with a row."),
    "latency_p50": (_COMMIT, _IDLE),
    "latency_p95": (
        _COMMIT,
        _IDLE,
        "The slowest twentieth also meets the outcome of the job before, which is written to Postgres meanwhile, on the"
        " same cores.",
    ),
    "end_to_start_p50": (_GAP,),
    "end_to_start_p95": (_GAP,),
    "end_to_start_two_sizes_p50": (_GAP, _SIZES),
    "end_to_start_two_sizes_p95": (
        _GAP,
        _SIZES,
        "A job of two CPUs may also have to wait until a second one is free.",
    ),
    "packing": (
        "The rules of order decide it: a job that fits starts, and none is held back for a wider one. Without any delay"
        " they give 1.10 to 1.12 for these jobs (`benchmarks.packing.without_delay`).",
        "Of 200 other draws the median is 1.10, the best 1.06 and the worst 1.15, so no draw of such jobs reaches the"
        " target. The end of the list decides it: the last wide jobs run beside idle CPUs. With 800 jobs instead of 200"
        " the same rules give 1.07, and with the widest jobs first 1.05. The lower bound is the plain one, all"
        " CPU-seconds on all CPUs. Every version measured 1.09 to 1.12, so best fit is as it was. On a longer trace,"
        " KTH's SP2, `simulate` gives 1.05.",
    ),
    "cpu_per_job": (_TWO_CORES,),
    "waiting_job_kb": (
        "Redis keeps the whole message of a waiting job, since the script that admits the job delivers it.",
    ),
    "admit_vs_evalsha_3": (_ADMISSION,),
    "admit_vs_evalsha_10000": (
        _ADMISSION,
        "Beside 10,000 workers its commands are the same, in larger sorted sets.",
    ),
    "admit_vs_evalsha_10000_waiting_100000": (
        _ADMISSION,
        "With 100,000 waiting jobs beside 10,000 workers its commands are the same, and took 45 µs of 387, after"
        " 38 of 238 without waiting jobs. Its instructions are the same too, so the growth is in the memory. The"
        " filing of a backlog leaves free pieces all over the heap of a server that uses the C library's `malloc`,"
        " and Lua gets its short-lived values there. Redis's own builds contain jemalloc: with it this figure was"
        " 2.7 where it was 3.7 with glibc's defaults. The embedded server takes jemalloc where the system has it,"
        " and else a larger cache of `malloc`, which gives 3.2. In a simulated cache of 1 MiB and with glibc's"
        " defaults a script misses 1,790 lines behind 20,000 waiting jobs, and 620 without them. The others are in"
        " `malloc` and `free`, and in Lua's collection of garbage. A new Lua (`SCRIPT FLUSH`) is as slow.",
    ),
}

_CPU: Final = re.compile(r"CPU, us: (.*)")
_PART: Final = re.compile(r"(\w+) ([\d,]+)")


def totals(profile: Sequence[str]) -> str:
    """Return a sentence with the CPU time of a job on both sides, over all processes; "" if the profile has no two."""
    sums = [
        sum(int(number.replace(",", "")) for _, number in _PART.findall(match[1]))
        for line in profile
        if (match := _CPU.search(line))
    ]
    if len(sums) != 2 or not sums[1]:
        return ""
    ours, plain = sums
    return f"All processes together take {ours:,} µs a job, and {plain:,} µs with plain Celery: {ours / plain:.2f} ×."


def reason(figures: Sequence[str], profile: Sequence[str]) -> str:
    """Return why these figures, which have one profile, miss their targets."""
    reasons = dict.fromkeys(sentence for figure in figures for sentence in REASONS.get(figure, ()))
    return " ".join(filter(None, (*reasons, totals(profile))))
